"""What every catalogue must do, wherever it keeps its models. Subclass it once per backend.

A subclass gives the URL of a place where no catalogue is yet, and inherits the tests.
"""

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catalogue_writer import code_of, entry_for, model, printed, units_of, weights_of
from embedder.fingerprint import METHOD, Fingerprint
from embedder.matching import agreement
from embedder.record import to_bytes
from index.catalogue import Catalogue, Entry, open_catalogue
from index.errors import CatalogueError, NotCataloguedError

TESTS = Path(__file__).parent


def snapshot(catalogue: Catalogue) -> dict[str, Any]:
    """Return everything that can be asked of a catalogue, but how often it has changed."""
    entries = list(catalogue.entries())
    prints = {entry.id: catalogue.fingerprint(entry.id) for entry in entries}
    keys = sorted({tensor.key for found in prints.values() for tensor in found.counted})
    ids, vectors = catalogue.vectors()
    return {
        "entries": entries,
        "prints": {number: to_bytes(found) for number, found in prints.items()},
        "ids": ids.tolist(),
        "vectors": vectors.tolist(),
        "sharing": {key: catalogue.sharing([key]) for key in keys},
        "problems": catalogue.check(),
        "length": len(catalogue),
    }


def keys_of(fingerprint: Fingerprint) -> list[bytes]:
    return [tensor.key for tensor in fingerprint.counted]


class CatalogueContract:
    """Tests that every backend passes."""

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        raise NotImplementedError("return the URL of a place where no catalogue is yet")

    @pytest.fixture
    def catalogue(self, url: str) -> Iterator[Catalogue]:
        with open_catalogue(url, create=True) as opened:
            yield opened

    @pytest.fixture
    def full(self, catalogue: Catalogue) -> Catalogue:
        for seed, name in enumerate(("beta", "alpha", "gamma")):
            catalogue.add(*model(name, seed))
        return catalogue

    def writer(self, url: str, prefix: str, first: int, count: int) -> subprocess.Popen[bytes]:
        """Start a process that adds models."""
        command = [sys.executable, str(TESTS / "catalogue_writer.py")]
        environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
        return subprocess.Popen([*command, url, prefix, str(first), str(count)], env=environment)

    # ---------------------------------------------------------------- one model

    def test_a_new_catalogue_is_empty(self, catalogue: Catalogue) -> None:
        ids, vectors = catalogue.vectors()
        assert len(catalogue) == 0
        assert list(catalogue.entries()) == []
        assert (ids.shape, vectors.shape) == ((0,), (0, 1024))
        assert catalogue.sharing([b"x"]) == {}
        assert catalogue.check() == []

    def test_none_is_made_unless_that_is_asked_for(self, url: str) -> None:
        with pytest.raises(CatalogueError, match="lineage add"):
            open_catalogue(url)
        with pytest.raises(CatalogueError):
            open_catalogue(url)

    def test_what_was_added_comes_back_equal(self, catalogue: Catalogue) -> None:
        declared = {"card": {"base_model": ["org/ä"], "tags": [1, None]}}
        entry, fingerprint = model("org/näme", 1, declared=declared, adapter=True)
        added = catalogue.add(entry, fingerprint)
        assert added == replace(entry, id=added.id)
        assert added.id > 0
        assert catalogue.get("org/näme") == added
        assert to_bytes(catalogue.fingerprint(added.id)) == to_bytes(fingerprint)
        np.testing.assert_array_equal(catalogue.vectors()[1], [fingerprint.vector])

    def test_a_code_comes_and_goes_with_its_model(self, catalogue: Catalogue) -> None:
        added = catalogue.add(*model("m", 1), code_of(1))
        other = catalogue.add(*model("n", 2))
        found = catalogue.code(added.id)
        assert found is not None
        assert found.encoder == "one"
        np.testing.assert_array_equal(found.vector, code_of(1).vector)
        assert catalogue.code(other.id) is None
        catalogue.remove("m")
        assert catalogue.codes("one")[0].tolist() == []

    def test_units_come_and_go_with_their_code(self, catalogue: Catalogue) -> None:
        first = catalogue.add(*model("m", 1), replace(code_of(1), units=units_of(1)))
        second = catalogue.add(*model("n", 2), code_of(2))
        found = catalogue.units([first.id, second.id, 99])
        assert found.keys() == {first.id}
        assert agreement(found[first.id], units_of(1))[:7] == pytest.approx(1, abs=1e-3)
        code = catalogue.code(first.id)
        assert code is not None
        assert agreement(code.units, units_of(1))[:7] == pytest.approx(1, abs=1e-3)
        catalogue.remove("m")
        assert catalogue.units([first.id]) == {}

    def test_a_model_that_is_added_again_has_its_new_code_alone(self, catalogue: Catalogue) -> None:
        catalogue.add(*model("m", 1), code_of(1))
        again = catalogue.add(*model("m", 1), code_of(2, "two"))
        assert catalogue.codes("one")[0].tolist() == []
        assert catalogue.codes("two")[0].tolist() == [again.id]
        assert catalogue.code(catalogue.add(*model("m", 1)).id) is None

    def test_codes_of_two_encoders_stay_apart(self, catalogue: Catalogue) -> None:
        numbers = [
            catalogue.add(*model(name, seed), code_of(seed, encoder)).id
            for seed, (name, encoder) in enumerate((("a", "one"), ("b", "two"), ("c", "one")))
        ]
        ids, codes = catalogue.codes("one")
        assert ids.tolist() == [numbers[0], numbers[2]]
        np.testing.assert_array_equal(codes, [code_of(0).vector, code_of(2).vector])
        assert catalogue.codes("another")[1].shape == (0, 256)
        assert catalogue.encoders() == {"one": 2, "two": 1}

    def test_a_place_whose_name_is_no_text_comes_back_equal(self, catalogue: Catalogue) -> None:
        location = os.fsdecode(b"/models/caf\xe9")
        added = catalogue.add(*model("m", 1, location=location))
        assert catalogue.get("m").location == location
        assert catalogue.find(location=location) == [added]

    def test_it_is_still_there_when_opened_again(self, url: str) -> None:
        with open_catalogue(url, create=True) as first:
            first.add(*model("m", 1))
            before = snapshot(first)
        with open_catalogue(url) as second:
            assert snapshot(second) == before

    def test_adding_a_name_again_replaces_the_model(self, full: Catalogue) -> None:
        old = full.fingerprint(full.get("beta").id)
        entry, fingerprint = model("beta", 77)
        added = full.add(entry, fingerprint)
        assert len(full) == 3
        assert full.get("beta") == added
        assert full.sharing(keys_of(old)) == {}
        assert set(full.sharing(keys_of(fingerprint))) == {added.id}
        assert full.check() == []

    def test_adding_and_removing_restores_everything(self, full: Catalogue) -> None:
        before = snapshot(full)
        # One that shares tensors with another, so that more than its own rows are touched.
        shared = {**weights_of(0), "more": np.eye(7, 9, dtype=np.float32)}
        fingerprint = printed(shared)
        full.add(entry_for("delta", fingerprint), fingerprint)
        assert snapshot(full) != before
        full.remove("delta")
        assert snapshot(full) == before

    def test_a_closed_catalogue_can_be_closed_again(self, catalogue: Catalogue) -> None:
        catalogue.close()
        catalogue.close()

    # ---------------------------------------------------------------- asking

    def test_an_unknown_name_is_an_error_with_close_names(self, full: Catalogue) -> None:
        for ask in (full.get, full.remove):
            with pytest.raises(NotCataloguedError, match="close names: gamma") as caught:
                ask("gama")
            assert caught.value.close == ("gamma",)
            assert "lineage add PATH" in str(caught.value)
        assert len(full) == 3

    def test_models_come_in_the_order_of_their_names(self, full: Catalogue) -> None:
        assert [entry.name for entry in full.entries()] == ["alpha", "beta", "gamma"]

    def test_models_are_found_by_their_properties(self, full: Catalogue) -> None:
        beta = full.get("beta")
        twin = full.add(replace(beta, name="twin", location="/elsewhere", id=0), model("", 0)[1])
        assert full.find(location=beta.location) == [beta]
        assert full.find(content=beta.content) == [beta, twin]
        assert full.find(sha256=beta.sha256) == [beta, twin]
        assert full.find(content=beta.content, location="/elsewhere") == [twin]
        assert full.find(content=beta.content, location="/nowhere") == []

    def test_models_are_given_by_number_in_the_order_asked_for(self, full: Catalogue) -> None:
        entries = list(full.entries())
        numbers = [entry.id for entry in entries]
        assert full.by_id(numbers[::-1]) == entries[::-1]
        assert full.by_id([numbers[1], max(numbers) + 1]) == [entries[1]]
        assert full.by_id([]) == []

    def test_vectors_belong_to_their_models(self, full: Catalogue) -> None:
        ids, vectors = full.vectors()
        assert ids.dtype == np.int64
        assert vectors.dtype == np.float32
        for number, vector in zip(ids.tolist(), vectors, strict=True):
            np.testing.assert_array_equal(vector, full.fingerprint(number).vector)

    def test_sharing_counts_the_values_in_shared_tensors(self, catalogue: Catalogue) -> None:
        weights = weights_of(5)
        twice = {"a": weights["w0"], "b": weights["w0"], "c": weights_of(6)["w1"]}
        numbers = {}
        for name, held in (("whole", weights), ("twice", twice), ("other", weights_of(7))):
            fingerprint = printed(held)
            numbers[name] = catalogue.add(entry_for(name, fingerprint), fingerprint).id
        keys = keys_of(printed(weights))
        assert catalogue.sharing(keys) == {
            numbers["whole"]: sum(values.size for values in weights.values()),
            numbers["twice"]: 2 * weights["w0"].size,
        }
        assert catalogue.sharing(keys[1:2]) == {numbers["whole"]: weights["w1"].size}
        assert catalogue.sharing([]) == {}

    def test_sharing_takes_any_number_of_keys(self, full: Catalogue) -> None:
        keys = [place.to_bytes(16, "little") for place in range(2500)]
        beta = full.get("beta")
        own = keys_of(full.fingerprint(beta.id))
        found = full.sharing([*keys[:700], own[0], *keys[700:], *own[1:]])
        assert found == {beta.id: beta.parameters}

    def test_constants_and_zeros_are_shared_with_nobody(self, catalogue: Catalogue) -> None:
        weights = {
            "eye": np.eye(20, dtype=np.float32),
            "zeros": np.zeros((4, 5), np.float32),
            "w": weights_of(1)["w0"],
        }
        fingerprint = printed(weights)
        added = catalogue.add(entry_for("m", fingerprint), fingerprint)
        keys = [tensor.key for tensor in fingerprint.tensors]
        assert catalogue.sharing(keys) == {added.id: weights["w"].size}

    def test_an_unknown_number_is_an_error(self, full: Catalogue) -> None:
        with pytest.raises(CatalogueError, match="999"):
            full.fingerprint(999)

    # ---------------------------------------------------------------- changes and measurements

    def test_the_generation_goes_up_with_every_change(self, catalogue: Catalogue) -> None:
        seen = [catalogue.generation()]
        for change in (
            lambda: catalogue.add(*model("m", 1)),
            lambda: catalogue.add(*model("m", 2)),
            lambda: catalogue.remove("m"),
        ):
            change()
            snapshot(catalogue)  # asking changes nothing
            seen.append(catalogue.generation())
            assert catalogue.generation() == seen[-1]
        assert seen == sorted(set(seen))

    def test_measurements_are_remembered_by_pair_order_and_method(self, full: Catalogue) -> None:
        first, second = full.get("alpha").identity, full.get("beta").identity
        assert full.measurement(first, second, 1) is None
        full.remember(first, second, 1, "one")
        full.remember(first, second, 2, "two")
        assert full.measurement(first, second, 1) == "one"
        assert full.measurement(first, second, 2) == "two"
        assert full.measurement(second, first, 1) is None
        full.remember(first, second, 1, "again")
        assert full.measurement(first, second, 1) == "again"

    @pytest.mark.parametrize("gone", ["alpha", "beta"])
    def test_measurements_are_forgotten_with_either_model(self, gone: str, full: Catalogue) -> None:
        alpha, beta, gamma = (full.get(name).identity for name in ("alpha", "beta", "gamma"))
        for pair in ((alpha, beta), (alpha, gamma), (gamma, beta)):
            full.remember(*pair, 1, "kept")
        full.remove(gone)
        removed = alpha if gone == "alpha" else beta
        for pair in ((alpha, beta), (alpha, gamma), (gamma, beta)):
            expected = None if removed in pair else "kept"
            assert full.measurement(*pair, 1) == expected

    def test_measurements_stay_while_an_equal_model_is_there(self, full: Catalogue) -> None:
        alpha, beta = full.get("alpha"), full.get("beta")
        full.add(replace(alpha, name="twin", id=0), full.fingerprint(alpha.id))
        full.remember(alpha.identity, beta.identity, 1, "kept")
        full.remove("alpha")
        assert full.measurement(alpha.identity, beta.identity, 1) == "kept"
        full.remove("twin")
        assert full.measurement(alpha.identity, beta.identity, 1) is None

    def test_a_fingerprint_of_another_method_is_an_error_and_no_vector(
        self, full: Catalogue
    ) -> None:
        entry, fingerprint = model("old", 9, method=METHOD + 1)
        added = full.add(entry, replace(fingerprint, method=METHOD + 1))
        with pytest.raises(CatalogueError, match=rf"old.*method {METHOD + 1}"):
            full.fingerprint(added.id)
        assert added.id not in full.vectors()[0]
        (problem,) = full.check()
        assert problem.startswith("old: ")
        full.remove("old")
        assert full.check() == []

    # ---------------------------------------------------------------- several processes

    def test_two_processes_may_add_at_once(self, url: str) -> None:
        # Both begin where nothing is, so they also race for making the catalogue.
        writers = [self.writer(url, prefix, first, 25) for prefix, first in (("a", 0), ("b", 100))]
        assert [process.wait(timeout=60) for process in writers] == [0, 0]
        with open_catalogue(url) as catalogue:
            names = [entry.name for entry in catalogue.entries()]
            expected = [f"a{n}" for n in range(25)] + [f"b{n}" for n in range(100, 125)]
            assert names == sorted(expected)
            assert catalogue.check() == []
            assert catalogue.generation() >= 50

    def test_whole_models_are_read_while_another_process_writes(self, url: str) -> None:
        with open_catalogue(url, create=True) as catalogue:
            seen: list[int] = []
            process = self.writer(url, "m", 0, 60)
            try:
                while process.poll() is None:
                    entries = list(catalogue.entries())
                    for entry in entries[-3:]:
                        self.assert_whole(catalogue, entry)
                    seen.append(len(entries))
            finally:
                process.wait(timeout=60)
            assert process.returncode == 0
            assert seen == sorted(seen)
            assert any(0 < count < 60 for count in seen)
            assert len(catalogue) == 60

    def test_a_killed_writer_leaves_whole_models(self, url: str) -> None:
        open_catalogue(url, create=True).close()
        process = self.writer(url, "m", 0, 100_000)
        with open_catalogue(url) as watching:
            deadline = time.monotonic() + 30
            while len(watching) < 5 and time.monotonic() < deadline:
                time.sleep(0.005)
        process.kill()
        process.wait(timeout=60)
        with open_catalogue(url) as catalogue:
            entries = list(catalogue.entries())
            assert len(entries) >= 5
            for entry in entries:
                self.assert_whole(catalogue, entry)
            assert catalogue.check() == []
            assert len(catalogue.vectors()[0]) == len(entries)
            catalogue.add(*model("after", 1))
            assert catalogue.get("after").id > max(entry.id for entry in entries)

    def assert_whole(self, catalogue: Catalogue, entry: Entry) -> None:
        fingerprint = catalogue.fingerprint(entry.id)
        assert fingerprint.content == entry.content
        counted = sum(math.prod(tensor.shape) for tensor in fingerprint.counted)
        assert catalogue.sharing(keys_of(fingerprint))[entry.id] == counted
