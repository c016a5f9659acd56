"""What the answers say of a family whose descent is known, and that names play no part in it."""

import shutil
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import schemas
from command import answer_of, lineage
from conftest import Family
from lineage.engine import LineageEngine
from lineage.simulate import new_network, train

pytestmark = pytest.mark.usefixtures("somewhere")

Json = dict[str, Any]
ONE_WAY = {"parent→child": "child→parent", "child→parent": "parent→child", "unknown": "unknown"}


def weights_of(file: Path) -> dict[str, NDArray[np.float64]]:
    return {name: values.astype(np.float64) for name, values in load_file(file).items()}


def compared(*arguments: str | Path) -> Json:
    found: Json = answer_of("compare", *arguments, "--allow", "cannot-say")
    return found


def near(found: float | None, expected: float | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return found == pytest.approx(expected, rel=1e-9)


def listed(family: Family, way: str, name: str) -> dict[str, Json]:
    answer = answer_of(way, name, "--catalogue", family.catalogue)
    return {found["model"]: found for found in answer[way]}


def catalogued(folder: Path, catalogue: Path) -> Path:
    with LineageEngine(str(catalogue), create=True) as engine:
        engine.add([folder], workers=1)
    return catalogue


class TestParents:
    @pytest.mark.parametrize("name", ["legal-int8.safetensors", "base-a.safetensors"])
    def test_they_are_the_kin_that_compare_does_not_find_to_be_children(
        self, name: str, family: Family
    ) -> None:
        expected = {}
        for other in family.names:
            if other != name:
                found = compared(other, name, "--catalogue", family.catalogue)
                if found["relation"] in schemas.LISTED:
                    expected[other] = found
        for way, excluded in (("parents", "child→parent"), ("children", "parent→child")):
            kept = {o for o, f in expected.items() if f["direction"]["answer"] != excluded}
            found = listed(family, way, name)
            assert set(found) == kept
            assert {o: found[o]["relation"] for o in kept} == {
                o: expected[o]["relation"] for o in kept
            }

    def test_the_order_is_agreement_falling_then_distance_rising_then_name(
        self, family: Family
    ) -> None:
        for way, name in (
            ("parents", "legal-int8.safetensors"),
            ("children", "base-a.safetensors"),
        ):
            found = list(listed(family, way, name).values())
            keys = [(-f["agreement"], f["distance"], f["model"]) for f in found]
            assert len(keys) > 3
            assert keys == sorted(keys)

    def test_the_quantised_model_descends_from_its_parent(self, family: Family) -> None:
        first, *_ = listed(family, "parents", "legal-int8.safetensors").values()
        assert first["model"] == "legal.safetensors"
        assert first["relation"] == "quantised"
        assert first["direction"]["answer"] == "parent→child"
        assert first["direction"]["reasons"]

    def test_copies_are_parents_and_children_at_once(self, family: Family) -> None:
        for copied in ("base-copy.npz", "base-reordered.safetensors"):
            assert copied in listed(family, "parents", "base-a.safetensors")
            assert copied in listed(family, "children", "base-a.safetensors")

    def test_what_is_found_to_be_a_child_is_no_parent(self, family: Family) -> None:
        children = {"base-pruned.safetensors", "base-12-classes.safetensors"}
        assert children <= set(listed(family, "children", "base-a.safetensors"))
        assert not children & set(listed(family, "parents", "base-a.safetensors"))

    def test_strangers_are_never_listed(self, family: Family) -> None:
        assert not listed(family, "parents", "twin-b.safetensors")
        assert not listed(family, "children", "twin-b.safetensors")
        for name in ("base-a.safetensors", "legal-int8.safetensors"):
            assert "twin-b.safetensors" not in listed(family, "parents", name)

    def test_a_model_is_not_its_own_parent(self, family: Family) -> None:
        name = "chat.safetensors"
        assert name not in listed(family, "parents", name)

    def test_siblings_are_not_listed(self, family: Family, tmp_path: Path) -> None:
        base = load_file(family.file("base-a"))
        rng = np.random.default_rng(3)
        for place, shift in enumerate((0.5, -0.5, 0.9)):
            child = train(base, rng, steps=60, rate=1e-3, shift=shift)
            save_file(child, tmp_path / f"{place}.safetensors")
        catalogue = catalogued(tmp_path, tmp_path / "c")
        pair = ("0.safetensors", "1.safetensors")
        found = compared(*pair, "--catalogue", catalogue)
        assert found["relation"] == "sibling"
        assert found["related"] is True
        for way in ("parents", "children"):
            assert answer_of(way, pair[0], "--catalogue", catalogue)[way] == []


class TestSearched:
    def test_it_leaves_out_the_model_itself(self, family: Family) -> None:
        by_name = answer_of("parents", "chat.safetensors", "--catalogue", family.catalogue)
        by_path = answer_of("parents", family.file("chat"), "--catalogue", family.catalogue)
        assert by_name["searched"] == len(family.names) - 1
        assert by_path == by_name

    def test_it_counts_all_for_a_model_that_is_not_catalogued(
        self, family: Family, tmp_path: Path
    ) -> None:
        other = shutil.copy(family.file("chat"), tmp_path / "copied.safetensors")
        answer = answer_of("parents", other, "--catalogue", family.catalogue)
        assert answer["model"] == str(other)
        assert answer["searched"] == len(family.names)
        assert answer["parents"][0]["model"] == "chat.safetensors"
        assert answer["parents"][0]["relation"] == "identical-file"


class TestDuplicates:
    def groups(self, catalogue: Path) -> dict[str, list[list[str]]]:
        found: dict[str, list[list[str]]] = {}
        for group in answer_of("duplicates", "--catalogue", catalogue)["groups"]:
            found.setdefault(group["kind"], []).append(sorted(group["models"]))
        return found

    def test_groups_are_complete(self, family: Family) -> None:
        base = ["base-a.safetensors", "base-copy.npz"]
        assert self.groups(family.catalogue) == {
            "same-tensors": [base],
            "same-weights": [
                [*base, "base-reordered.safetensors"],
                ["chat-fp16.safetensors", "chat.safetensors"],
            ],
        }

    def test_groups_are_nested(self, family: Family, own_catalogue: Path, tmp_path: Path) -> None:
        shutil.copy(family.file("base-copy"), tmp_path / "again.npz")
        lineage("add", tmp_path / "again.npz", "--catalogue", own_catalogue)
        found = self.groups(own_catalogue)
        files, tensors = ["again.npz", "base-copy.npz"], ["again.npz", "base-a.safetensors"]
        assert found["identical-file"] == [files]
        assert found["same-tensors"] == [sorted({*files, *tensors})]
        weights = next(names for names in found["same-weights"] if "again.npz" in names)
        assert weights == sorted({*files, *tensors, "base-reordered.safetensors"})

    def test_a_group_equal_to_a_narrower_one_is_left_out(
        self, family: Family, tmp_path: Path
    ) -> None:
        for name in "xyz":
            shutil.copy(family.file("chat"), tmp_path / f"{name}.safetensors")
        found = self.groups(catalogued(tmp_path, tmp_path / "c"))
        assert found == {"identical-file": [[f"{name}.safetensors" for name in "xyz"]]}

    def test_strangers_of_one_design_are_no_duplicates(self, tmp_path: Path) -> None:
        for seed in range(3):
            values = new_network(np.random.default_rng(seed))
            save_file(values, tmp_path / f"{seed}.safetensors")
        assert self.groups(catalogued(tmp_path, tmp_path / "c")) == {}


class TestCompare:
    PAIRS = (
        ("base-a", "legal"),
        ("legal", "legal-int8"),
        ("base-a", "base-pruned"),
        ("base-a", "base-12-classes"),
        ("base-a", "base-reordered"),
        ("chat", "chat-fp16"),
        ("base-a", "base-copy"),
        ("base-a", "twin-b"),
        ("legal-v2", "base-pruned"),
    )

    def test_every_birth_of_the_family_is_told(self, family: Family) -> None:
        for birth in family.births:
            pair = (family.file(birth.parent), family.file(birth.child))
            found = compared(*pair, "--catalogue", family.catalogue)
            assert found["relation"] == birth.relation, birth
            assert found["direction"]["answer"] != "child→parent", birth

    @pytest.mark.parametrize("pair", PAIRS, ids="-".join)
    def test_it_is_consistent_in_both_orders(self, pair: tuple[str, str], family: Family) -> None:
        first, second = (family.file(stem) for stem in pair)
        there, back = compared(first, second), compared(second, first)
        for key in ("relation", "related", "operations", "chance_by"):
            assert there[key] == back[key], key
        assert near(there["agreement"], back["agreement"])
        assert near(there["chance"], back["chance"])
        assert near(there["share_of_a"], back["share_of_b"])
        assert near(there["share_of_b"], back["share_of_a"])
        assert ONE_WAY[there["direction"]["answer"]] == back["direction"]["answer"]
        assert len(there["tensors"]) == len(back["tensors"])

    @pytest.mark.parametrize("pair", [("base-a", "legal"), ("base-a", "base-pruned")], ids="-".join)
    def test_its_numbers_are_those_of_their_definition(
        self, pair: tuple[str, str], family: Family
    ) -> None:
        x, y = (weights_of(family.file(stem)) for stem in pair)
        counted = [name for name in x if x[name].ndim == 2]
        step = np.sqrt(sum(np.sum((y[name] - x[name]) ** 2) for name in counted))
        length = np.sqrt(sum(np.sum(x[name] ** 2) for name in counted))
        centred = [(x[name] - x[name].mean(), y[name] - y[name].mean()) for name in counted]
        cosines = [np.sum(a * b) / np.sqrt(np.sum(a**2) * np.sum(b**2)) for a, b in centred]
        cosine = np.average(cosines, weights=[x[name].size for name in counted])
        found = compared(*(family.file(stem) for stem in pair))
        assert found["distance"] == pytest.approx(step / length, rel=1e-4)
        # The controls' mean cosine is taken off; it is small.
        assert found["agreement"] == pytest.approx(cosine, abs=1e-3)
        assert {pair["a"] for pair in found["tensors"]} == set(counted)

    def test_a_model_is_identical_to_itself(self, family: Family) -> None:
        file = family.file("base-a")
        found = compared(file, file)
        assert found["relation"] == "identical-file"
        assert (found["agreement"], found["distance"]) == (1.0, 0.0)
        assert found["direction"]["answer"] == "unknown"

    def test_names_and_paths_of_catalogued_models_mean_the_same(self, family: Family) -> None:
        stems = ("base-a", "legal")
        options = ("--catalogue", family.catalogue)
        by_path = compared(*(family.file(stem) for stem in stems), *options)
        by_name = compared(*(family.file(stem).name for stem in stems), *options)
        assert by_path == by_name
        assert by_path["a"] == "base-a.safetensors"


class TestNames:
    """Names of files and models never decide an answer, and those of tensors no kinship.

    Names and order of tensors help to tell an architecture, so without them a pair whose hidden
    units had to be put in order may come out undecided, and nothing else may change.
    """

    @pytest.fixture
    def renamed(self, family: Family, tmp_path: Path) -> tuple[Path, Mapping[str, str]]:
        """Catalogue the family under random names of files and tensors."""
        rng = np.random.default_rng(11)
        names: dict[str, str] = {}
        folder = tmp_path / "renamed"
        folder.mkdir()
        for file in sorted(family.folder.iterdir()):
            names[file.name] = f"{rng.integers(1 << 60):x}{file.suffix}"
            if file.suffix == ".safetensors":
                weights = load_file(file)
                order = rng.permutation(len(weights))
                stored = {
                    f"{rng.integers(1 << 60):x}": list(weights.values())[place] for place in order
                }
                save_file(stored, folder / names[file.name])
            else:
                shutil.copy(file, folder / names[file.name])
        return catalogued(folder, tmp_path / "c"), names

    def test_answers_stay_when_files_and_tensors_are_renamed(
        self, family: Family, renamed: tuple[Path, Mapping[str, str]]
    ) -> None:
        catalogue, names = renamed
        for first, second in combinations(family.names, 2):
            known = compared(first, second, "--catalogue", family.catalogue)
            found = compared(names[first], names[second], "--catalogue", catalogue)
            put_in_order = "reorder" in known["operations"] or "partners" in str(known["chance_by"])
            if found["relation"] == "cannot-say" and put_in_order:
                continue
            for key in ("relation", "related", "operations", "chance_by"):
                assert found[key] == known[key], (first, second, key)
            assert found["direction"]["answer"] == known["direction"]["answer"], (first, second)
            for key in ("agreement", "distance", "share_of_a", "share_of_b", "chance"):
                assert near(found[key], known[key]), (first, second, key)

    def test_parents_and_duplicates_stay_too(
        self, family: Family, renamed: tuple[Path, Mapping[str, str]]
    ) -> None:
        catalogue, names = renamed
        known = answer_of("parents", "legal-int8.safetensors", "--catalogue", family.catalogue)
        found = answer_of("parents", names["legal-int8.safetensors"], "--catalogue", catalogue)
        plain = [f for f in known["parents"] if "reorder" not in f["operations"]]
        assert {(f["model"], f["relation"]) for f in found["parents"]} == {
            (names[f["model"]], f["relation"]) for f in plain
        }
        for group in answer_of("duplicates", "--catalogue", family.catalogue)["groups"]:
            models = sorted(names[model] for model in group["models"])
            assert any(
                sorted(other["models"]) == models and other["kind"] == group["kind"]
                for other in answer_of("duplicates", "--catalogue", catalogue)["groups"]
            )
