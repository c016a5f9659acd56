"""All indices of vectors pass the contract; the exact ones give the same answers."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from index import vectors as module
from index.vectors import (
    LONGEST,
    SHORTLIST,
    FaissVectors,
    NumpyVectors,
    Shortlist,
    ShortlistedVectors,
    VectorIndex,
    compressed,
    fastest,
    gpus,
    on_gpu,
    vector_index,
)
from vector_contract import VectorContract, drawn

needs_faiss = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None, reason="the extra cpu or gpu is not installed"
)
needs_gpu = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None or gpus() == 0,
    reason="there is no FAISS that sees a GPU here",
)


class TestNumpyVectors(VectorContract):
    def make(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> VectorIndex:
        return NumpyVectors(ids, vectors)


@needs_faiss
class TestFaissVectors(VectorContract):
    def make(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> VectorIndex:
        return FaissVectors(ids, vectors)


class TestPatientVectors(VectorContract):
    def make(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> VectorIndex:
        return ShortlistedVectors(ids, vectors)


@needs_faiss
class TestCompressedVectors(VectorContract):
    def make(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> VectorIndex:
        return ShortlistedVectors(ids, vectors, patience=0, make=compressed)


@pytest.mark.gpu
@needs_gpu
class TestVectorsOnGpu(VectorContract):
    def make(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> VectorIndex:
        return ShortlistedVectors(ids, vectors, patience=0, make=on_gpu)


@needs_faiss
def test_both_give_the_same_answers() -> None:
    ids, vectors = drawn(8, 2000, 128)
    vectors = vectors[:1000]  # no two are equal, so that the order is told by the scores
    ids = ids[:1000]
    one, other = NumpyVectors(ids, vectors), FaissVectors(ids, vectors)
    allowed = ids[::3].tolist()
    for query in vectors[:50]:
        for among in (None, allowed):
            found, expected = other.nearest(query, 20, among), one.nearest(query, 20, among)
            assert [number for number, _ in found] == [number for number, _ in expected]
            assert [score for _, score in found] == pytest.approx(
                [score for _, score in expected], abs=1e-5
            )


@needs_faiss
def test_the_faster_one_is_chosen_by_size_and_by_what_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "FAISS_FROM", 10)
    monkeypatch.setattr(module, "SHORTLIST_FROM", 20)
    assert isinstance(vector_index(*drawn(1, 9)), NumpyVectors)
    assert isinstance(vector_index(*drawn(1, 10)), FaissVectors)
    assert isinstance(vector_index(*drawn(1, 20)), FaissVectors)
    assert isinstance(vector_index(*drawn(1, 19), exact=False), FaissVectors)
    assert isinstance(vector_index(*drawn(1, 20), exact=False), ShortlistedVectors)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for exact in (True, False):
        assert type(vector_index(*drawn(1, 20), exact=exact)) is NumpyVectors


FAMILIES, MEMBERS, WIDE = 400, 20, 64


def families(seed: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return 8,000 vectors in families whose members lie at a cosine of about .8."""
    rng = np.random.default_rng(seed)
    founders = np.repeat(rng.normal(size=(FAMILIES, WIDE)), MEMBERS, axis=0)
    vectors = (founders + 0.5 * rng.normal(size=founders.shape)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return rng.permutation(10 * len(vectors))[: len(vectors)].astype(np.int64), vectors


def found_share(made: VectorIndex, exact: VectorIndex, queries: NDArray[np.float32]) -> float:
    """Return the share of the twenty nearest that are found; scores and order are checked too."""
    shares = []
    for query in queries:
        expected, found = dict(exact.nearest(query, MEMBERS)), made.nearest(query, MEMBERS)
        scores = [score for _, score in found]
        assert scores == sorted(scores, reverse=True)
        assert len(found) == MEMBERS
        for number, score in found:
            if number in expected:
                assert score == pytest.approx(expected[number], abs=1e-6)
        shares.append(len(expected.keys() & {number for number, _ in found}) / MEMBERS)
    return float(np.mean(shares))


@needs_faiss
class TestShortlists:
    def test_nearly_all_relatives_are_found_among_many(self) -> None:
        ids, vectors = families(0)
        made = ShortlistedVectors(ids, vectors, patience=0, make=compressed)
        assert found_share(made, NumpyVectors(ids, vectors), vectors[::80]) >= 0.99

    def test_nearly_all_are_found_where_there_are_no_families(self) -> None:
        ids, vectors = drawn(1, 8000, WIDE)
        made = ShortlistedVectors(ids, vectors, patience=0, make=compressed)
        queries = np.random.default_rng(2).normal(size=(100, WIDE)).astype(np.float32)
        assert found_share(made, NumpyVectors(ids, vectors), queries) >= 0.99

    def test_equal_vectors_give_equal_answers(self) -> None:
        ids, vectors = families(3)
        one, other = (ShortlistedVectors(ids, vectors, patience=0) for _ in range(2))
        for query in vectors[::400]:
            assert one.nearest(query, 10) == other.nearest(query, 10)

    def test_no_filter_limit_or_long_list_is_answered_from_a_shortlist(self) -> None:
        ids, vectors = families(4)

        def unwanted(_: NDArray[np.float32]) -> Shortlist:
            raise AssertionError("no shortlist was needed")

        made = ShortlistedVectors(ids, vectors, patience=0, make=unwanted)
        exact = NumpyVectors(ids, vectors)
        for allowed in (ids[::100].tolist(), ids[::2].tolist()):
            assert made.nearest(vectors[0], 5, allowed) == exact.nearest(vectors[0], 5, allowed)
        assert made.above(vectors[0], 0.5) == exact.above(vectors[0], 0.5)
        assert made.nearest(vectors[0], LONGEST + 1) == exact.nearest(vectors[0], LONGEST + 1)

    def test_a_shortlist_is_made_once_and_not_for_the_first_questions(self) -> None:
        ids, vectors = families(5)
        made_for = []

        def counting(given: NDArray[np.float32]) -> Shortlist:
            made_for.append(len(given))
            return compressed(given)

        made = ShortlistedVectors(ids, vectors, patience=3, make=counting)
        exact = NumpyVectors(ids, vectors)
        for place in range(3):
            assert made.nearest(vectors[place], 9) == exact.nearest(vectors[place], 9)
        assert made_for == []
        for place in range(3):
            assert made.nearest(vectors[place], 1) == exact.nearest(vectors[place], 1)
        assert made_for == [len(ids)]

    def test_vectors_that_may_not_be_written_to_are_enough(self) -> None:
        ids, vectors = families(6)
        vectors.flags.writeable = False
        made = ShortlistedVectors(ids, vectors, patience=0)
        assert made.nearest(vectors[7], 1)[0][0] == ids[7]


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_finds_what_numpy_finds() -> None:
    ids, vectors = families(7)
    made = ShortlistedVectors(ids, vectors, patience=0, make=on_gpu)
    assert found_share(made, NumpyVectors(ids, vectors), vectors[::40]) == 1
    assert len(made.nearest(vectors[0], LONGEST)) == LONGEST


@needs_faiss
class TestWithoutGpu:
    """What FAISS would do on a GPU, done by FAISS on the CPU: no machine here has one."""

    @pytest.fixture
    def moved(self, monkeypatch: pytest.MonkeyPatch) -> list[object]:
        import faiss

        moved: list[object] = []

        def move(resources: object, device: int, flat: object) -> object:
            moved.append(flat)
            return flat

        monkeypatch.setattr(faiss, "StandardGpuResources", SimpleNamespace, raising=False)
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
        monkeypatch.setattr(faiss, "index_cpu_to_gpu", move, raising=False)
        return moved

    def test_a_gpu_is_used_where_there_is_one(self, moved: list[object]) -> None:
        ids, vectors = families(8)
        made = ShortlistedVectors(ids, vectors, patience=0)
        assert found_share(made, NumpyVectors(ids, vectors), vectors[::400]) == 1
        assert len(moved) == 1

    def test_a_gpu_without_room_is_no_reason_to_stop(
        self, moved: list[object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import faiss

        def full(*_: object) -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(faiss, "index_cpu_to_gpu", full, raising=False)
        _, vectors = families(9)
        rows = fastest(vectors)(vectors[3], 1)
        assert 3 in rows
        assert len(rows) == SHORTLIST
