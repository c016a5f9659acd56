"""The catalogue in a folder: the contract, and what is SQLite's own."""

import sqlite3
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from catalogue_contract import CatalogueContract
from catalogue_writer import code_of, model, units_of
from embedder.identity import IdentityCode
from index.catalogue import open_catalogue
from index.errors import CatalogueError
from index.opening import FILE
from index.sqlite import SqliteCatalogue
from index.transfer import export_catalogue, import_catalogue


class TestSqlite(CatalogueContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return str(tmp_path / "new" / "catalogue")


class TestSqliteByAddress(CatalogueContract):
    """The same, named by an address with a scheme."""

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"file://{tmp_path}/what? a #1 name%20"


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(CatalogueError, match="no catalogue has the scheme 'gone'"):
        open_catalogue("gone://here")


def test_a_catalogue_that_another_process_is_making_is_waited_for(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    done = threading.Timer(0.3, lambda: other.execute("COMMIT"))
    done.start()
    try:
        with open_catalogue(str(tmp_path), create=True) as catalogue:
            assert catalogue.check() == []
    finally:
        done.join()
        other.close()


def test_users_can_open_the_database_themselves(tmp_path: Path) -> None:
    with SqliteCatalogue(str(tmp_path), create=True) as catalogue:
        catalogue.add(*model("m", 1))
    with sqlite3.connect(tmp_path / FILE) as database:
        rows = database.execute("SELECT name, parameters, location FROM models").fetchall()
    database.close()
    assert rows == [("m", 1890, "/models/m")]


def test_nothing_is_left_beside_the_database_when_it_is_closed(tmp_path: Path) -> None:
    with SqliteCatalogue(str(tmp_path), create=True) as catalogue:
        catalogue.add(*model("m", 1))
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_an_error_of_the_database_says_what_became_of_the_rest(tmp_path: Path) -> None:
    with SqliteCatalogue(str(tmp_path), create=True) as catalogue:
        catalogue.add(*model("m", 1))
    (tmp_path / FILE).write_bytes(b"no database at all, but long enough to be looked at" * 100)
    with pytest.raises(CatalogueError, match="nothing was changed; move it away, then import"):
        SqliteCatalogue(str(tmp_path))


def test_a_busy_database_is_told_with_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.opening._BUSY_S", 0.05)
    with SqliteCatalogue(str(tmp_path), create=True) as catalogue:
        other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(CatalogueError, match=r"another process holds it.*run the same command"):
            catalogue.add(*model("m", 1))
        assert len(catalogue) == 0  # asking works all the while
        other.execute("ROLLBACK")
        other.close()
        catalogue.add(*model("m", 1))


def test_an_export_is_one_file_and_comes_back_equal(tmp_path: Path) -> None:
    target = tmp_path / "sent"
    with SqliteCatalogue(str(tmp_path / "one"), create=True) as first:
        for seed in range(3):
            first.add(*model(f"m{seed}", seed))
        first.remember(first.get("m0").identity, first.get("m1").identity, 1, "measured")
        assert export_catalogue(first, target) == 3
        with SqliteCatalogue(str(tmp_path / "two"), create=True) as second:
            second.add(*model("m1", 9))
            kept = second.get("m1")
            assert import_catalogue(second, target) == (["m0", "m2"], ["m1"])
            assert second.get("m1") == kept
            for name in ("m0", "m2"):
                assert second.get(name).content == first.get(name).content
            assert second.check() == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one", "sent", "two"]


@pytest.mark.parametrize("vector", [np.zeros(3, np.float32), np.full(1024, np.nan, np.float32)])
def test_an_export_with_a_wrong_vector_does_not_spoil_a_catalogue(
    vector: NDArray[np.float32], tmp_path: Path
) -> None:
    with SqliteCatalogue(str(tmp_path / "one"), create=True) as first:
        entry, fingerprint = model("m", 1)
        first.add(entry, replace(fingerprint, vector=vector))
        export_catalogue(first, tmp_path / "sent")
    with SqliteCatalogue(str(tmp_path / "two"), create=True) as second:
        second.add(*model("kept", 2))
        with pytest.raises(CatalogueError, match="sent: m: its vector is damaged"):
            import_catalogue(second, tmp_path / "sent")
        assert len(second.vectors()[0]) == 1


def test_a_damaged_code_names_its_model(tmp_path: Path) -> None:
    with SqliteCatalogue(str(tmp_path), create=True) as catalogue:
        code = IdentityCode("e", np.full(256, 1 / 16, np.float32))
        for seed in range(3):
            catalogue.add(*model(f"m{seed}", seed), code)
        ids, codes = catalogue.codes("e")
        assert ids.tolist() == [catalogue.get(f"m{seed}").id for seed in range(3)]
        assert codes.tolist() == [code.vector.tolist()] * 3
        assert len(catalogue.codes("another")[0]) == 0
        with sqlite3.connect(tmp_path / FILE) as database:
            database.execute("UPDATE codes SET code = ? WHERE model = ?", (b"1", int(ids[1])))
        database.close()
        with pytest.raises(CatalogueError, match="m1: its vector is damaged"):
            catalogue.codes("e")


def test_damaged_units_name_their_model(tmp_path: Path) -> None:
    with SqliteCatalogue(str(tmp_path), create=True) as catalogue:
        added = [
            catalogue.add(*model(f"m{seed}", seed), replace(code_of(seed), units=units_of(seed))).id
            for seed in range(2)
        ]
        assert catalogue.check() == []
        with sqlite3.connect(tmp_path / FILE) as database:
            database.execute("UPDATE units SET body = substr(body, 2) WHERE model = ?", added[1:])
        database.close()
        assert catalogue.units(added[:1]).keys() == {added[0]}
        with pytest.raises(CatalogueError, match="m1: its units are damaged"):
            catalogue.units(added)
        (problem,) = catalogue.check()
        assert "m1: its units are damaged; make it anew: lineage remove m1" in problem
