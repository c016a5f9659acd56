"""Both indices of vectors pass the contract, and give the same answers."""

import importlib.util

import numpy as np
import pytest
from numpy.typing import NDArray

from index import vectors as module
from index.vectors import FaissVectors, NumpyVectors, VectorIndex, vector_index
from vector_contract import VectorContract, drawn

needs_faiss = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None, reason="the extra cpu or gpu is not installed"
)


class TestNumpyVectors(VectorContract):
    def make(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> VectorIndex:
        return NumpyVectors(ids, vectors)


@needs_faiss
class TestFaissVectors(VectorContract):
    def make(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> VectorIndex:
        return FaissVectors(ids, vectors)


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
    assert isinstance(vector_index(*drawn(1, 9)), NumpyVectors)
    assert isinstance(vector_index(*drawn(1, 10)), FaissVectors)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert isinstance(vector_index(*drawn(1, 10)), NumpyVectors)
