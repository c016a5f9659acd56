"""Candidates: everything that shares a tensor or lies above the noise, the likeliest first."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from catalogue_writer import (
    Weights,
    entry_for,
    near_code,
    printed,
    units_like,
    units_of,
    weights_of,
)
from embedder.identity import Tokens
from embedder.matching import MARGIN
from embedder.vector import DIMENSION
from index.catalogue import Catalogue, open_catalogue
from index.search import AHEAD, ALIKE, ALWAYS, AMONG, CODED, NOISE, Candidate, ModelIndex

RNG = np.random.default_rng(0)


def large(seed: int) -> dict[str, NDArray[np.floating]]:
    rng = np.random.default_rng(seed)
    return {f"w{n}": rng.normal(size=(40 + n, 50)).astype(np.float32) for n in range(4)}


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    """Return a catalogue of forty strangers, s0 to s39."""
    with open_catalogue(str(tmp_path / "c"), create=True) as opened:
        for seed in range(40):
            keep(opened, f"s{seed}", large(seed))
        yield opened


def keep(catalogue: Catalogue, name: str, weights: Weights) -> int:
    fingerprint = printed(weights)
    return catalogue.add(entry_for(name, fingerprint), fingerprint).id


def found_for(catalogue: Catalogue, weights: Weights) -> dict[str, Candidate]:
    """Return the candidates by name, in their order."""
    candidates = ModelIndex(catalogue).candidates(printed(weights))
    entries = catalogue.by_id([candidate.model for candidate in candidates])
    return dict(zip([entry.name for entry in entries], candidates, strict=True))


class TestSharedTensors:
    @pytest.mark.parametrize("how", ["as it is", "transposed", "reordered", "cast up"])
    def test_one_shared_tensor_makes_a_candidate(self, how: str, catalogue: Catalogue) -> None:
        shared = large(7)["w2"]
        if how == "transposed":
            shared = np.ascontiguousarray(shared.T)
        if how == "reordered":
            shared = shared[RNG.permutation(len(shared))][:, RNG.permutation(shared.shape[1])]
        if how == "cast up":
            shared = shared.astype(np.float64)
        query = {"x": shared, "y": RNG.normal(size=(90, 70)).astype(np.float32)}
        first, *_ = found_for(catalogue, query).items()
        name, candidate = first
        assert name == "s7"
        assert candidate.shared == pytest.approx(shared.size / (shared.size + 90 * 70))

    def test_a_constant_makes_none(self, catalogue: Catalogue) -> None:
        eye = np.eye(60, dtype=np.float32)
        keep(catalogue, "with-eye", {**large(50), "eye": eye})
        found = found_for(catalogue, {**large(51), "eye": eye})
        assert all(candidate.shared == 0 for candidate in found.values())

    def test_names_play_no_part(self, catalogue: Catalogue) -> None:
        weights = large(3)
        renamed = dict(zip("abcd", weights.values(), strict=True))
        assert list(found_for(catalogue, renamed).items()) == list(
            found_for(catalogue, weights).items()
        )


class TestNearVectors:
    def test_a_changed_copy_is_the_first_candidate(self, catalogue: Catalogue) -> None:
        changed = {
            name: values + 0.5 * RNG.normal(size=values.shape).astype(np.float32)
            for name, values in large(11).items()
        }
        name, candidate = next(iter(found_for(catalogue, changed).items()))
        assert name == "s11"
        assert candidate.shared == 0
        assert candidate.cosine == pytest.approx(1 / np.sqrt(1.25), abs=0.1)

    def test_strangers_are_looked_at_only_where_nothing_nearer_is(
        self, catalogue: Catalogue
    ) -> None:
        found = found_for(catalogue, large(99))
        assert len(found) == ALWAYS
        # Sketches of 240 numbers leave a noise of .05; a relative at drift 1 has .7.
        assert all(candidate.cosine < 0.35 for candidate in found.values())
        assert all(candidate.shared == 0 for candidate in found.values())

    def test_no_relative_above_the_noise_is_ever_dropped(self, catalogue: Catalogue) -> None:
        base = large(200)
        kin = set()
        for place in range(3 * ALWAYS):
            step = 1.5 * place / (3 * ALWAYS)  # from equal to a cosine of .55
            changed = {
                name: values + step * RNG.normal(size=values.shape).astype(np.float32)
                for name, values in base.items()
            }
            kin.add(f"kin{place}")
            keep(catalogue, f"kin{place}", changed)
        found = found_for(catalogue, base)
        assert kin <= set(found)
        assert all(found[name].cosine > NOISE for name in kin)
        # They come first, the nearest at the head.
        assert set(list(found)[: len(kin)]) == kin
        assert next(iter(found)) == "kin0"

    def test_likeliness_falls(self, catalogue: Catalogue) -> None:
        keep(catalogue, "half", {"a": large(5)["w0"], "b": large(6)["w1"]})
        found = list(found_for(catalogue, large(5)).values())
        likely = [max(candidate.shared, candidate.cosine) for candidate in found]
        assert likely == sorted(likely, reverse=True)

    def test_a_grown_vocabulary_stays_near(self, catalogue: Catalogue) -> None:
        embedding = RNG.normal(size=(600, 32)).astype(np.float32)
        more = RNG.normal(size=(60, 32)).astype(np.float32)
        keep(catalogue, "small", {"e": embedding})
        first = next(iter(found_for(catalogue, {"e": np.concatenate([embedding, more])})))
        assert first == "small"


class TestChanges:
    def test_models_that_came_or_went_are_seen(self, catalogue: Catalogue) -> None:
        known = ModelIndex(catalogue)
        query = printed(weights_of(1))
        before = known.candidates(query)
        number = keep(catalogue, "new", weights_of(1))
        first = known.candidates(query)[0]
        assert (first.model, first.shared) == (number, 1.0)
        assert first.cosine == pytest.approx(1, abs=1e-5)
        catalogue.remove("new")
        assert known.candidates(query) == before

    def test_an_empty_catalogue_has_no_candidates(self, tmp_path: Path) -> None:
        with open_catalogue(str(tmp_path / "empty"), create=True) as empty:
            assert ModelIndex(empty).candidates(printed(large(0))) == []

    def test_a_model_without_counted_tensors_is_no_reason_to_stop(
        self, catalogue: Catalogue
    ) -> None:
        keep(catalogue, "flat", {"x": np.ones((5, 6), np.float32)})
        found = found_for(catalogue, {"x": np.ones((5, 6), np.float32)})
        assert all(candidate.shared == 0 for candidate in found.values())


def test_kin_in_place_takes_no_room_from_one_that_was_reordered(tmp_path: Path) -> None:
    base, units = large(0), units_of(0)
    with open_catalogue(str(tmp_path / "c"), create=True) as opened:
        for place in range(2 * CODED):
            child = {name: w + 0.01 * (place + 1) for name, w in base.items()}
            fingerprint = printed(child)
            code = near_code(1, units_like(units, 0.1, place))
            opened.add(entry_for(f"child{place}", fingerprint), fingerprint, code)
        fingerprint = printed(large(99))
        code = near_code(1, units_like(units, 0.5, 99))
        number = opened.add(entry_for("reordered", fingerprint), fingerprint, code).id
        found = ModelIndex(opened).candidates(printed(base), near_code(1, units))
    assert len(found) == 2 * CODED + 1
    (other,) = [candidate for candidate in found if candidate.model == number]
    assert other.cosine < NOISE < ALIKE < other.alike


class Crowd:
    """A catalogue of one large family, as far as a search asks for it."""

    def __init__(self, count: int) -> None:
        vectors = np.zeros((count, DIMENSION), np.float32)
        vectors[:, 0] = 1
        self.everything = np.arange(1, count + 1), vectors

    def vectors(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        return self.everything

    def sharing(self, keys: Sequence[bytes]) -> dict[int, int]:
        return dict.fromkeys(self.everything[0].tolist(), 1)

    def generation(self) -> int:
        return 1


def test_a_family_of_thousands_costs_no_more_than_its_size() -> None:
    count = 4000  # FAISS, which takes its time to load, comes in later
    fingerprint = printed(large(0))
    fingerprint.vector[:] = 0
    fingerprint.vector[0] = 1
    start = time.perf_counter()
    found = ModelIndex(Crowd(count)).candidates(fingerprint)  # type: ignore[arg-type]
    assert len(found) == count
    # .03 s; looking each one up in a list of those that were kept took 3 s.
    assert time.perf_counter() - start < 1


class TestUnitsThatStandOut:
    """Of models whose codes are all as near, one has units that are far nearer than all others'."""

    FAR = 3.0
    """Noise at which units find partners, and no margin tells them from a stranger's."""

    def ahead_for(
        self,
        folder: Path,
        query: Mapping[str, Tokens],
        count: int,
        more: Mapping[str, dict[str, Tokens]] | None = None,
    ) -> dict[str, float]:
        """Return how far each candidate is ahead among some strangers, a base and its child."""
        with open_catalogue(str(folder / f"of{count}"), create=True) as opened:
            units = {f"s{seed}": units_of(seed) for seed in range(count)}
            units |= {"base": units_of(1000), "child": units_like(units_of(1000), 0.2, 1)}
            units |= more or {}
            for place, (name, known) in enumerate(units.items()):
                fingerprint = printed(large(place))
                opened.add(entry_for(name, fingerprint), fingerprint, near_code(place, known))
            asked = ModelIndex(opened).candidates(printed(large(5000)), near_code(5000, query))
            names = [entry.name for entry in opened.by_id([one.model for one in asked])]
            assert all(one.margin < MARGIN for one in asked if one.ahead)
            return {n: one.ahead for n, one in zip(names, asked, strict=True) if one.ahead}

    def test_the_base_and_its_kin_are_ahead_of_all_strangers(self, tmp_path: Path) -> None:
        query = units_like(units_of(1000), self.FAR, 2)
        found = self.ahead_for(tmp_path, query, 2 * AMONG)
        assert set(found) == {"base", "child"}
        assert min(found.values()) > AHEAD

    def test_the_query_and_its_copies_take_nobodys_place(self, tmp_path: Path) -> None:
        query = units_like(units_of(1000), self.FAR, 2)
        copies = {"itself": query, "copy": units_like(query, 0.1, 3)}
        assert set(self.ahead_for(tmp_path, query, 2 * AMONG, copies)) == {"base", "child"}

    def test_nothing_is_where_kin_is_not_there(self, tmp_path: Path) -> None:
        query = units_like(units_of(2000), self.FAR, 2)
        assert self.ahead_for(tmp_path, query, 2 * AMONG) == {}

    def test_among_few_nothing_is(self, tmp_path: Path) -> None:
        query = units_like(units_of(1000), self.FAR, 2)
        assert self.ahead_for(tmp_path, query, AMONG - 3) == {}

    def test_among_models_of_another_shape_nothing_is(self, tmp_path: Path) -> None:
        query = units_like(units_of(1000), self.FAR, 2)
        query["deep read"] = Tokens(query["deep read"].codes[1:], query["deep read"].even[1:])
        assert self.ahead_for(tmp_path, query, 2 * AMONG) == {}
