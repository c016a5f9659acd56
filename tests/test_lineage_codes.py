"""Identity codes in the catalogue: a reordered, rescaled and trained copy is a candidate again."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from embedder.coding import Described, coded, shipped_coder
from embedder.describing import describe
from embedder.identity import IdentityCode
from embedder.matching import MARGIN
from embedder.opening import open_checkpoint
from embedder.plain import ENCODER
from embedder.storage import OpenFile
from embedder.symmetry import permuted, rescaled
from index.search import ALIKE
from lineage.engine import LineageEngine

SHAPES = {
    "0.weight": (48, 64),
    "0.bias": (48,),
    "2.weight": (24, 48),
    "2.bias": (24,),
    "4.weight": (10, 24),
    "4.bias": (10,),
}
PARENT = 5


def network(seed: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def disguised(
    weights: dict[str, NDArray[np.float32]], drift: float
) -> dict[str, NDArray[np.float32]]:
    """Return a child whose weights moved, in another order and scale."""
    rng = np.random.default_rng(99)
    moved = {
        name: values + drift * np.std(values) * rng.normal(size=values.shape).astype(np.float32)
        for name, values in weights.items()
    }
    architecture = describe(SHAPES)
    found = permuted(rescaled(moved, architecture, rng), architecture, rng)
    return {name: np.ascontiguousarray(values, np.float32) for name, values in found.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes")
    for seed in range(40):
        save_file(network(seed), folder / f"m{seed}.safetensors")
    save_file(disguised(network(PARENT), 0.4), folder / "child.safetensors")
    return folder


@pytest.fixture(scope="module")
def engine(models: Path) -> LineageEngine:
    opened = LineageEngine(str(models / "catalogue"), create=True)
    opened.add(sorted(models.glob("m*.safetensors")), workers=1)
    return opened


def test_a_disguised_child_has_its_parent_as_the_first_candidate(
    engine: LineageEngine, models: Path
) -> None:
    child = engine.model(str(models / "child.safetensors"))
    first, *rest = engine.known.candidates(child.fingerprint, child.code)
    assert engine.known.candidate(first).name == f"m{PARENT}.safetensors"
    assert first.alike > ALIKE
    assert all(candidate.alike == 0 for candidate in rest)


def test_without_the_code_it_looks_like_any_stranger(engine: LineageEngine, models: Path) -> None:
    child = engine.model(str(models / "child.safetensors"))
    names = [
        engine.known.candidate(candidate).name
        for candidate in engine.known.candidates(child.fingerprint)
        if candidate.cosine > 0.2 or candidate.shared > 0
    ]
    assert f"m{PARENT}.safetensors" not in names


def test_a_copy_in_another_order_has_the_same_code(models: Path, tmp_path: Path) -> None:
    save_file(disguised(network(PARENT), 0.0), tmp_path / "copy.safetensors")
    codes = []
    for path in (tmp_path / "copy.safetensors", models / f"m{PARENT}.safetensors"):
        with open_checkpoint(path) as checkpoint:
            codes.append(coded(checkpoint)[0])
    assert codes[0] is not None
    assert codes[1] is not None
    assert codes[0].encoder == codes[1].encoder == shipped_coder().version
    assert np.linalg.norm(codes[0].vector - codes[1].vector) < 1e-5


def test_codes_can_be_left_out(models: Path, tmp_path: Path) -> None:
    with LineageEngine(str(tmp_path / "c"), create=True) as engine:
        engine.add([models / "m1.safetensors"], codes=False)
        assert engine.catalogue.code(engine.catalogue.get("m1.safetensors").id) is None


def undescribed(seed: int) -> dict[str, NDArray[np.float32]]:
    """Return matrices that are no chain."""
    rng = np.random.default_rng(seed)
    return {f"x{n}": rng.normal(size=(40 + n, 50 + 11 * n)).astype(np.float32) for n in range(3)}


def test_a_model_that_nothing_describes_is_found_by_its_matrices(tmp_path: Path) -> None:
    for seed in range(20):
        save_file(undescribed(seed), tmp_path / f"m{seed}.safetensors")
    rng = np.random.default_rng(1)
    copy = {
        name: values[rng.permutation(len(values))][:, rng.permutation(values.shape[1])]
        * rng.choice([-3, 0.5, 2], len(values))[:, None]
        for name, values in undescribed(PARENT).items()
    }
    path = tmp_path / "copy.safetensors"
    save_file({name: np.ascontiguousarray(copy[name], np.float32) for name in copy}, path)
    with LineageEngine(str(tmp_path / "c"), create=True) as engine:
        added = engine.add(sorted(tmp_path.glob("m*.safetensors")))
        assert added.failed == []
        found = engine.catalogue.code(engine.catalogue.get("m1.safetensors").id)
        assert found is not None
        assert found.encoder == ENCODER
        model = engine.model(str(path))
        first = engine.known.candidates(model.fingerprint, model.code)[0]
        assert engine.known.candidate(first).name == f"m{PARENT}.safetensors"
        assert first.alike > 1 - 1e-5


def test_a_model_without_a_matrix_is_added_without_a_code(tmp_path: Path) -> None:
    vectors = {f"x{n}": np.arange(n + 2, dtype=np.float32) for n in range(3)}
    save_file(vectors, tmp_path / "odd.safetensors")
    with LineageEngine(str(tmp_path / "c"), create=True) as engine:
        added = engine.add([tmp_path / "odd.safetensors"])
        assert (added.added, added.failed) == (["odd.safetensors"], [])
        assert engine.catalogue.code(engine.catalogue.get("odd.safetensors").id) is None


def test_a_weight_that_is_no_number_gives_no_code(tmp_path: Path) -> None:
    weights = network(1)
    weights["2.weight"][3, 4] = np.nan
    save_file(weights, tmp_path / "nan.safetensors")
    with open_checkpoint(tmp_path / "nan.safetensors") as checkpoint:
        assert coded(checkpoint)[0] is None


def test_codes_of_another_encoder_are_told_and_made_anew(tmp_path: Path) -> None:
    for seed in range(3):
        save_file(network(seed), tmp_path / f"m{seed}.safetensors")
    paths = sorted(tmp_path.glob("m*.safetensors"))
    with LineageEngine(str(tmp_path / "c"), create=True) as engine:
        engine.add(paths)
        old = engine.catalogue.get("m1.safetensors")
        vector = np.eye(1, 256, dtype=np.float32)[0]
        engine.catalogue.add(
            old, engine.catalogue.fingerprint(old.id), IdentityCode("older", vector)
        )
        (limit,) = engine.relatives(str(paths[0])).limits
        assert limit.startswith("1 catalogued model has an identity code of another encoder")
        assert engine.check() == [limit]
        again = engine.add(paths)
        assert again.added == ["m1.safetensors"]
        assert len(again.unchanged) == 2
        assert engine.relatives(str(paths[0])).limits == ()
        assert engine.check() == []


def test_without_codes_an_older_one_is_left_alone(tmp_path: Path) -> None:
    save_file(network(1), tmp_path / "m.safetensors")
    with LineageEngine(str(tmp_path / "c"), create=True) as engine:
        engine.add([tmp_path / "m.safetensors"], codes=False)
        assert engine.add([tmp_path / "m.safetensors"]).unchanged == ["m.safetensors"]


def test_an_export_takes_codes_along(engine: LineageEngine, tmp_path: Path) -> None:
    engine.export(tmp_path / "all.lineage")
    with LineageEngine(str(tmp_path / "other"), create=True) as other:
        other.import_from(tmp_path / "all.lineage")
        version = shipped_coder().version
        here, there = engine.catalogue.codes(version), other.catalogue.codes(version)
        assert len(here[0]) == len(there[0]) == 40
        np.testing.assert_array_equal(np.sort(here[1], axis=0), np.sort(there[1], axis=0))


@pytest.mark.parametrize("large", [False, True])
def test_codes_and_sketches_come_from_the_same_read(
    large: bool, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: Counter[tuple[int, int]] = Counter()
    plain = OpenFile.read

    def counted(self: OpenFile, start: int, stop: int) -> bytes:
        ranges[start, stop] += 1
        return plain(self, start, stop)

    monkeypatch.setattr("embedder.checkpoint.KEPT_BYTES", 0 if large else 1 << 20)
    monkeypatch.setattr(OpenFile, "read", counted)
    with LineageEngine(str(tmp_path / "c"), create=True) as engine:
        engine.add([models / "m1.safetensors"])
        entry = engine.catalogue.get("m1.safetensors")
        assert engine.catalogue.code(entry.id) is not None
    weights = {name: 4 * math.prod(shape) for name, shape in SHAPES.items()}
    read = [count for (start, stop), count in ranges.items() if stop - start in weights.values()]
    assert len(read) == len(weights)
    assert (max(read) > 1) == large


def test_far_kin_are_found_by_the_partners_of_their_units(models: Path, tmp_path: Path) -> None:
    save_file(disguised(network(PARENT), 1.5), tmp_path / "far.safetensors")
    with LineageEngine(str(tmp_path / "c"), create=True) as engine:
        engine.add(sorted(models.glob("m*.safetensors")))
        child = engine.model(str(tmp_path / "far.safetensors"))
        first = engine.known.candidates(child.fingerprint, child.code)[0]
        assert engine.known.candidate(first).name == f"m{PARENT}.safetensors"
        assert first.alike < ALIKE
        assert first.margin > MARGIN
        found = engine.relatives(str(tmp_path / "far.safetensors"))
        (limit,) = found.limits
        assert limit.endswith(f"kinship is not decided: m{PARENT}.safetensors")


def test_what_was_coded_for_the_search_is_not_coded_again(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    plain = Described.__init__

    def counted(self: Described, *given: object, **named: object) -> None:
        read.append("described")
        plain(self, *given, **named)  # type: ignore[arg-type]

    with LineageEngine(str(tmp_path / "c"), create=True) as engine:
        engine.add([models / f"m{PARENT}.safetensors"])
        monkeypatch.setattr(Described, "__init__", counted)
        found = engine.relatives(str(models / "child.safetensors"))
        assert found.found or found.limits
        assert len(read) == 2  # the child once, and its parent to be aligned with
