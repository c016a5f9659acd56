"""Models from outside stand in a zoo beside those that were made there, and are told apart."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import Family
from embedder.errors import ArchitectureError, MalformedError, NotFoundError
from embedder.zoo import collecting
from embedder.zoo.building import build_zoo
from embedder.zoo.collecting import collect
from embedder.zoo.labels import NAMES
from embedder.zoo.shards import open_zoo
from zoo_made import files_of


def test_weights_and_architecture_come_back(family: Family, tmp_path: Path) -> None:
    collected = collect(tmp_path / "zoo", [family.file("base-a")])
    (row,) = collected.added
    zoo = open_zoo(tmp_path / "zoo")
    expected = load_file(family.file("base-a"))
    found = zoo.weights(row["id"])
    assert set(found) == set(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    zoo.architecture(row["id"]).check({name: x.shape for name, x in found.items()})


def test_nothing_that_is_said_becomes_a_label_or_a_parent(family: Family, tmp_path: Path) -> None:
    place = tmp_path / "model"
    place.mkdir()
    shutil.copy(family.file("chat"), place / "model.safetensors")
    (place / "config.json").write_text("{}")
    (place / "README.md").write_text("---\nbase_model: somebody/base\nlicense: mit\n---\n")
    (row,) = collect(tmp_path / "zoo", [place]).added
    (found,) = open_zoo(tmp_path / "zoo")
    assert json.loads(found["declared"])["card"] == {
        "base_model": "somebody/base",
        "license": "mit",
    }
    assert found["id"] == row["id"]
    assert found["parents"] == []
    assert {found[name] for name in (*NAMES, "task", "relation")} <= {None, ""}


def test_the_same_values_are_taken_once(family: Family, tmp_path: Path) -> None:
    shutil.copy(family.file("legal"), tmp_path / "again.safetensors")
    first = collect(tmp_path / "zoo", [family.file("legal")])
    second = collect(tmp_path / "zoo", [tmp_path / "again.safetensors"])
    assert second.added == []
    assert second.kept == [first.added[0]["id"]]
    assert len(open_zoo(tmp_path / "zoo")) == 1


def test_a_zoo_keeps_what_was_made_and_what_was_taken(
    zoo_folder: Path, family: Family, tmp_path: Path
) -> None:
    own: Path = shutil.copytree(zoo_folder, tmp_path / "zoo")
    made = len(open_zoo(own))
    collect(own, [family.file("base-a"), family.file("twin-b")])
    build_zoo(own, "sample", only=["c00"])
    zoo = open_zoo(own)
    assert len(zoo) == made + 2
    assert files_of(zoo_folder).items() <= files_of(own).items()
    assert "on what others chose" in (own / "card.md").read_text(encoding="utf-8")
    outside = next(row["id"] for row in zoo if row["role"] == "collected")
    with pytest.raises(NotFoundError, match="comes from outside"):
        zoo.config(outside)


def test_a_model_without_a_known_architecture_is_taken_and_said_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    odd = {name: rng.normal(size=shape).astype(np.float32) for name, shape in ODD.items()}
    save_file(odd, tmp_path / "odd.safetensors")
    collected = collect(tmp_path / "zoo", [tmp_path / "odd.safetensors"])
    (row,) = collected.added
    assert "without its architecture" in collected.left_out[0]
    zoo = open_zoo(tmp_path / "zoo")
    assert set(zoo.weights(row["id"])) == set(odd)
    with pytest.raises(ArchitectureError, match=row["id"]):
        zoo.architecture(row["id"])


ODD = {"a": (7, 5), "b": (11, 3), "c": (13, 2)}
"""Matrices of which none can follow another."""


def test_what_cannot_be_read_or_is_too_large_is_named_and_the_rest_is_taken(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(family.file("base-a").read_bytes()[:500])
    paths = [broken, family.file("base-a"), family.file("legal")]
    size = sum(values.size for values in load_file(family.file("legal")).values())
    monkeypatch.setattr(collecting, "LARGEST", size)
    collected = collect(tmp_path / "zoo", [*paths, family.file("base-12-classes")])
    assert len(collected.added) == 2
    assert "broken.safetensors" in collected.left_out[0]
    assert f"at most {size:,} are taken" in collected.left_out[1]


def test_a_folder_of_something_else_is_left_alone(family: Family, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(MalformedError, match="no zoo"):
        collect(tmp_path, [family.file("base-a")])
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_a_path_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        collect(tmp_path / "zoo", [tmp_path / "nothing"])
