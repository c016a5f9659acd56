"""The nearest vectors, exactly: by FAISS where it is installed, else by numpy.

Both give the same answers. The vectors themselves are in the catalogue; what is held here can be
made again at any time.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class VectorIndex(Protocol):
    """Finds the vectors with the largest inner product."""

    def __len__(self) -> int:
        """Return the number of vectors."""

    def nearest(
        self, vector: NDArray[np.float32], count: int, allowed: Sequence[int] | None = None
    ) -> list[tuple[int, float]]:
        """Return the `count` nearest models and their inner products, the largest first.

        Args:
            vector: (D,) float32.
            count: How many at most.
            allowed: Numbers of the models to look among; all if None.
        """

    def above(self, vector: NDArray[np.float32], limit: float) -> list[tuple[int, float]]:
        """Return all models whose inner product is larger than a limit, the largest first.

        Args:
            vector: (D,) float32.
            limit: What the inner product must be larger than.
        """


class NumpyVectors:
    """Exact search by one matrix product.

    Args:
        ids: (n,) numbers of the models.
        vectors: (n, D) float32.

    Example:
        >>> vectors = NumpyVectors(np.array([7, 8]), np.eye(2, dtype=np.float32))
        >>> vectors.nearest(np.array([0.6, 0.8], np.float32), 1)
        [(8, 0.800000011920929)]
    """

    def __init__(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        self._ids, self._vectors = ids, vectors

    def __len__(self) -> int:
        """Return the number of vectors."""
        return len(self._ids)

    def nearest(
        self, vector: NDArray[np.float32], count: int, allowed: Sequence[int] | None = None
    ) -> list[tuple[int, float]]:
        """Return the `count` nearest models and their inner products, the largest first."""
        rows = np.arange(len(self._ids))
        if allowed is not None:
            rows = np.flatnonzero(np.isin(self._ids, np.asarray(allowed, np.int64)))
        if rows.size == 0 or count < 1:
            return []
        vectors = self._vectors if allowed is None else self._vectors[rows]
        scores = vectors @ vector
        best = np.argsort(-scores, kind="stable")[:count]
        return [(int(self._ids[rows[place]]), float(scores[place])) for place in best]

    def above(self, vector: NDArray[np.float32], limit: float) -> list[tuple[int, float]]:
        """Return all models whose inner product is larger than a limit, the largest first."""
        scores = self._vectors @ vector
        places = np.flatnonzero(scores > limit)
        places = places[np.argsort(-scores[places], kind="stable")]
        return [(int(self._ids[place]), float(scores[place])) for place in places]


class FaissVectors:
    """Exact search by FAISS, with the same answers as `NumpyVectors`."""

    def __init__(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        import faiss  # 0.2 to 0.8 s, so only where it is used

        # One query at a time is faster in one thread: of 10,000 vectors in 1.4 ms, against 24 ms in
        # two threads that wait for each other (two cores, faiss-cpu 1.14).
        faiss.omp_set_num_threads(1)
        self._faiss: Any = faiss
        self._index = faiss.IndexIDMap(faiss.IndexFlatIP(vectors.shape[1]))
        if len(ids):
            self._index.add_with_ids(np.ascontiguousarray(vectors), ids)

    def __len__(self) -> int:
        """Return the number of vectors."""
        return int(self._index.ntotal)

    def nearest(
        self, vector: NDArray[np.float32], count: int, allowed: Sequence[int] | None = None
    ) -> list[tuple[int, float]]:
        """Return the `count` nearest models and their inner products, the largest first."""
        if count < 1 or len(self) == 0:
            return []
        parameters = None
        if allowed is not None:
            chosen = self._faiss.IDSelectorBatch(np.asarray(allowed, np.int64))
            parameters = self._faiss.SearchParameters(sel=chosen)
        scores, found = self._index.search(vector[None], min(count, len(self)), params=parameters)
        return [
            (int(model), float(score))
            for model, score in zip(found[0], scores[0], strict=True)
            if model >= 0
        ]

    def above(self, vector: NDArray[np.float32], limit: float) -> list[tuple[int, float]]:
        """Return all models whose inner product is larger than a limit, the largest first."""
        if len(self) == 0:
            return []
        _, scores, found = self._index.range_search(vector[None], limit)
        order = np.argsort(-scores, kind="stable")
        return [(int(found[place]), float(scores[place])) for place in order]


FAISS_FROM = 5_000
"""Models from which FAISS pays for its import; below it numpy answers in a few milliseconds."""


def vector_index(ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> VectorIndex:
    """Return the faster exact index for this many vectors."""
    if len(ids) >= FAISS_FROM and importlib.util.find_spec("faiss") is not None:
        return FaissVectors(ids, vectors)
    return NumpyVectors(ids, vectors)
