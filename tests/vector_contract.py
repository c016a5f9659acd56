"""What every index of vectors must do: give the exact nearest, and only from what is allowed."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from index.vectors import VectorIndex

WIDTH = 24


def drawn(
    seed: int, count: int, width: int = WIDTH
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return numbers in no order and vectors of unit length, some of them equal."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(10 * count + 1)[:count].astype(np.int64)
    vectors = rng.normal(size=(count, width)).astype(np.float32)
    vectors[count // 2 : count // 2 + count // 4] = vectors[: count // 4]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return ids, vectors


def brute_force(
    ids: NDArray[np.int64],
    vectors: NDArray[np.float32],
    query: NDArray[np.float32],
    count: int,
    allowed: Sequence[int] | None = None,
) -> list[tuple[int, float]]:
    """Return what a search has to give, one dot product after the other."""
    chosen = [
        (number, sum(float(a) * float(b) for a, b in zip(vector, query, strict=True)))
        for number, vector in zip(ids.tolist(), vectors, strict=True)
        if allowed is None or number in allowed
    ]
    return sorted(chosen, key=lambda found: -found[1])[:count]


class VectorContract:
    """Tests that every index of vectors passes."""

    def make(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> VectorIndex:
        raise NotImplementedError("return the index under test")

    def test_a_model_is_its_own_nearest(self) -> None:
        ids, vectors = drawn(0, 40)
        vectors[20:30] = -vectors[20:30]  # no two are equal
        made = self.make(ids, vectors)
        for number, vector in zip(ids.tolist(), vectors, strict=True):
            ((nearest, score),) = made.nearest(vector, 1)
            assert nearest == number
            assert score == pytest.approx(1, abs=1e-5)

    def test_it_finds_what_brute_force_finds(self) -> None:
        # The property is made here, because it is one test for each index.
        @given(st.integers(0, 10_000), st.integers(0, 60), st.integers(0, 70), st.integers(0, 2))
        @settings(deadline=None, max_examples=60)
        def holds(seed: int, size: int, count: int, filtering: int) -> None:
            ids, vectors = drawn(seed, size)
            rng = np.random.default_rng(seed + 1)
            query = rng.normal(size=WIDTH).astype(np.float32)
            allowed = None
            if filtering:
                # Numbers that are no model's are among them, and a number may come twice.
                more = rng.choice(10 * size + 5, size * filtering)
                allowed = [*more.tolist(), *ids[::2].tolist()]
            found = self.make(ids, vectors).nearest(query, count, allowed)
            expected = brute_force(ids, vectors, query, count, allowed)
            scores = [score for _, score in found]
            assert scores == pytest.approx([score for _, score in expected], abs=1e-4)
            assert scores == sorted(scores, reverse=True)
            assert len({number for number, _ in found}) == len(found)
            row = {number: place for place, number in enumerate(ids.tolist())}
            for number, score in found:
                assert score == pytest.approx(float(vectors[row[number]] @ query), abs=1e-4)

        holds()

    def test_no_filtered_search_returns_what_the_filter_excludes(self) -> None:
        @given(st.integers(0, 10_000), st.integers(1, 60), st.data())
        @settings(deadline=None, max_examples=60)
        def holds(seed: int, size: int, data: st.DataObject) -> None:
            ids, vectors = drawn(seed, size)
            allowed = data.draw(st.lists(st.sampled_from(ids.tolist())))
            # The query is a vector that the filter may well exclude.
            query = vectors[data.draw(st.integers(0, size - 1))]
            count = data.draw(st.integers(1, 2 * size))
            found = self.make(ids, vectors).nearest(query, count, allowed)
            assert {number for number, _ in found} <= set(allowed)
            assert len(found) == min(count, len(set(allowed)))

        holds()

    def test_every_true_neighbour_is_found(self) -> None:
        ids, vectors = drawn(3, 3000, 64)
        made = self.make(ids, vectors)
        rng = np.random.default_rng(4)
        for query in rng.normal(size=(20, 64)).astype(np.float32):
            scores = np.sort(vectors @ query)[::-1]
            found = made.nearest(query, 50)
            assert [score for _, score in found] == pytest.approx(scores[:50].tolist(), abs=1e-4)

    def test_all_above_a_limit_are_found_and_no_other(self) -> None:
        ids, vectors = drawn(6, 500)
        made = self.make(ids, vectors)
        rng = np.random.default_rng(7)
        for limit, query in zip(
            (-2.0, -0.1, 0.2, 0.9, 2.0), rng.normal(size=(5, WIDTH)), strict=True
        ):
            query = (query / np.linalg.norm(query)).astype(np.float32)
            found = made.above(query, limit)
            expected = [one for one in brute_force(ids, vectors, query, len(ids)) if one[1] > limit]
            assert {number for number, _ in found} == {number for number, _ in expected}
            assert [score for _, score in found] == pytest.approx(
                [score for _, score in expected], abs=1e-5
            )

    def test_an_empty_index_finds_nothing(self) -> None:
        made = self.make(np.zeros(0, np.int64), np.zeros((0, WIDTH), np.float32))
        query = np.ones(WIDTH, np.float32)
        assert len(made) == 0
        assert made.nearest(query, 5) == []
        assert made.above(query, -1) == []
        assert made.nearest(query, 5, [1, 2]) == []

    def test_more_than_there_are_is_all(self) -> None:
        ids, vectors = drawn(5, 7)
        found = self.make(ids, vectors).nearest(vectors[0], 100)
        assert sorted(number for number, _ in found) == sorted(ids.tolist())

    def test_none_is_asked_for_and_none_is_given(self) -> None:
        ids, vectors = drawn(5, 7)
        made = self.make(ids, vectors)
        assert made.nearest(vectors[0], 0) == []
        assert made.nearest(vectors[0], 3, []) == []
        assert len(made) == 7

    def test_large_numbers_stay_what_they_are(self) -> None:
        ids = np.array([2**53 + 1, 2**62, 3], np.int64)
        vectors = np.eye(3, WIDTH, dtype=np.float32)
        made = self.make(ids, vectors)
        assert [made.nearest(vector, 1)[0][0] for vector in vectors] == ids.tolist()
        assert made.nearest(vectors[0], 1, [2**62])[0][0] == 2**62
