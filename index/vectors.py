"""The nearest vectors: exactly, by FAISS where it is installed, else by numpy; or from a shortlist.

The two exact ones give the same answers. The vectors themselves are in the catalogue; what is held
here can be made again at any time.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class VectorIndex(Protocol):
    """Finds the vectors with the largest inner product.

    Inner products are those of the vectors themselves. All indices but `ShortlistedVectors` find
    every vector that they should; that one may miss some in `nearest`, and says when.
    """

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


_GATHERED = 8
"""Rows are gathered before they are multiplied if fewer than one in so many is asked for; above
that the product of all is faster (10⁶ codes: .1 s; gathering 10⁵ of them takes .05 s)."""


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
        if allowed is None:
            return self._best(np.arange(len(self._ids)), self._vectors @ vector, count)
        rows = self._rows_of(allowed)
        if _GATHERED * len(rows) < len(self._ids):
            # A thousand at a time stay in the processor's cache: of 10,000 in 5 ms instead of 6.
            parts = np.array_split(rows, len(rows) // 1000 + 1)
            scores = np.concatenate([self._vectors[part] @ vector for part in parts])
        else:
            scores = (self._vectors @ vector)[rows]
        return self._best(rows, scores, count)

    @cached_property
    def _by_number(self) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        """The rows by the numbers of their models, and these numbers."""
        order = np.argsort(self._ids)
        return order, self._ids[order]

    def _rows_of(self, allowed: Sequence[int]) -> NDArray[np.intp]:
        """Return the rows of some models, in their order; numbers that are no model's have none."""
        order, numbers = self._by_number
        wanted = np.sort(np.asarray(allowed, np.int64))
        places = np.searchsorted(numbers, wanted)
        inside = places < len(numbers)
        places, wanted = places[inside], wanted[inside]
        there = numbers[places] == wanted
        there[1:] &= wanted[1:] != wanted[:-1]  # faster than np.unique: of 10,000 by 1.1 ms
        return np.sort(order[places[there]])

    def _best(
        self, rows: NDArray[np.intp], scores: NDArray[np.float32], count: int
    ) -> list[tuple[int, float]]:
        """Return the best of some rows by their inner products; of equal ones the first rows."""
        if count < 1:
            return []
        falling = -scores
        if count < len(rows):
            # Sorting a million takes ten times as long as finding where to cut.
            kept = np.flatnonzero(falling <= np.partition(falling, count - 1)[count - 1])
            rows, falling = rows[kept], falling[kept]
        best = np.argsort(falling, kind="stable")[:count]
        return [(int(self._ids[rows[place]]), -float(falling[place])) for place in best]

    def above(self, vector: NDArray[np.float32], limit: float) -> list[tuple[int, float]]:
        """Return all models whose inner product is larger than a limit, the largest first."""
        scores = self._vectors @ vector
        places = np.flatnonzero(scores > limit)
        places = places[np.argsort(-scores[places], kind="stable")]
        return [(int(self._ids[place]), float(scores[place])) for place in places]


def _single_threaded_faiss() -> Any:
    """Return the module `faiss`, which takes 0.2 to 0.8 s, so only where it is used."""
    import faiss

    # One query at a time is faster in one thread: of 10,000 vectors in 1.4 ms, against 24 ms in
    # two threads that wait for each other (two cores, faiss-cpu 1.14).
    faiss.omp_set_num_threads(1)
    return faiss


class FaissVectors:
    """Exact search by FAISS, with the same answers as `NumpyVectors`."""

    def __init__(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        self._faiss = faiss = _single_threaded_faiss()
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


Shortlist = Callable[[NDArray[np.float32], int], NDArray[np.int64]]
"""Vector and count → rows among which the `count` nearest are; −1 where there are no more."""

SHORTLIST = 512
"""Rows of a shortlist at least. Of 10⁶ identity codes the six nearest are all among them, of 256
99.8 % are (`benchmarks/million.py`)."""

SPARE = 4
"""Rows of a shortlist for each that is wanted: of the 1,000 nearest 99.5 % are among 4,000."""

LONGEST = 1_000
"""Neighbours up to which a shortlist is asked; FAISS gives no more than 2,048 rows on a GPU."""

PATIENCE = 64
"""Questions that are answered without a shortlist: to make one takes as long as so many."""

_TRAINED_ON = 20_000
"""Vectors from which the 16 values of each pair of coordinates are learned; more find no more."""


def compressed(vectors: NDArray[np.float32]) -> Shortlist:
    """Return what finds near rows by vectors of half a byte for two coordinates each.

    All of them are looked at for each question, so none is missed because it lies in the wrong
    part of space; only rounding can hide one. They are learned from every n-th vector, so equal
    vectors give equal shortlists.

    Args:
        vectors: (n, D) float32, n ≥ 1,024 and D even.

    Source:
        Jégou et al. 2011, TPAMI (product quantisation); André et al. 2015, VLDB (scans of
        4-bit codes in registers).
    """
    faiss = _single_threaded_faiss()
    width = vectors.shape[1]
    vectors = np.ascontiguousarray(vectors)
    index = faiss.IndexPQFastScan(width, width // 2, 4, faiss.METRIC_INNER_PRODUCT)
    index.train(np.ascontiguousarray(vectors[:: max(1, len(vectors) // _TRAINED_ON)]))
    index.add(vectors)

    def shortlist(vector: NDArray[np.float32], count: int) -> NDArray[np.int64]:
        _, rows = index.search(vector[None], max(SHORTLIST, SPARE * count))
        return np.asarray(rows[0], np.int64)

    return shortlist


def on_gpu(vectors: NDArray[np.float32]) -> Shortlist:
    """Return what finds the nearest rows on the first GPU, which holds the whole vectors.

    Args:
        vectors: (n, D) float32; they take 4 · n · D bytes there.
    """
    faiss = _single_threaded_faiss()
    resources = faiss.StandardGpuResources()
    index = faiss.index_cpu_to_gpu(resources, 0, faiss.IndexFlatIP(vectors.shape[1]))
    index.add(np.ascontiguousarray(vectors))

    def shortlist(vector: NDArray[np.float32], count: int) -> NDArray[np.int64]:
        # Some to spare, for a GPU rounds otherwise.
        _, rows = index.search(vector[None], 2 * count)
        return np.asarray(rows[0], np.int64)

    return shortlist


def gpus() -> int:
    """Return how many GPUs the installed FAISS can use."""
    faiss = _single_threaded_faiss()
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def fastest(vectors: NDArray[np.float32]) -> Shortlist:
    """Return the shortlist of a GPU if there is one with room, else of compressed vectors."""
    if gpus():
        try:
            return on_gpu(vectors)
        except RuntimeError:  # its memory is too small, or others have it
            pass
    return compressed(vectors)


class ShortlistedVectors(NumpyVectors):
    """The nearest of very many, from a shortlist that FAISS gives; approximate.

    `nearest` may miss what the shortlist lacks; what it returns is scored by the vectors
    themselves. Its first answers, those among `allowed`, those of more than a thousand, and all of
    `above` are found without a shortlist and miss nothing: that takes .1 s of 10⁶ codes.

    Args:
        ids: (n,) numbers of the models.
        vectors: (n, D) float32, D even.
        patience: Questions that are answered before the shortlist is made.
        make: What makes it.
    """

    def __init__(
        self,
        ids: NDArray[np.int64],
        vectors: NDArray[np.float32],
        *,
        patience: int = PATIENCE,
        make: Callable[[NDArray[np.float32]], Shortlist] = fastest,
    ) -> None:
        super().__init__(ids, vectors)
        self._patience, self._make = patience, make
        self._shortlist: Shortlist | None = None

    def nearest(
        self, vector: NDArray[np.float32], count: int, allowed: Sequence[int] | None = None
    ) -> list[tuple[int, float]]:
        """Return the `count` nearest models and their inner products, the largest first."""
        few = len(self) < 2 * max(SHORTLIST, SPARE * count)
        if allowed is not None or few or not 0 < count <= LONGEST:
            return super().nearest(vector, count, allowed)
        if self._patience > 0:
            self._patience -= 1
            return super().nearest(vector, count)
        if self._shortlist is None:
            self._shortlist = self._make(self._vectors)
        found = self._shortlist(vector, count)
        rows = np.sort(found[found >= 0])
        return self._best(rows, self._vectors[rows] @ vector, count)


FAISS_FROM = 5_000
"""Models from which FAISS pays for its import; below it numpy answers in a few milliseconds."""

SHORTLIST_FROM = 200_000
"""Vectors from which a shortlist is used where not all have to be found: below it FAISS looks at
all 256 numbers of each in 7 ms."""


def vector_index(
    ids: NDArray[np.int64], vectors: NDArray[np.float32], *, exact: bool = True
) -> VectorIndex:
    """Return the fastest index for this many vectors.

    Args:
        ids: (n,) numbers of the models.
        vectors: (n, D) float32.
        exact: Whether `nearest` has to find all; otherwise it may miss some of very many.
    """
    if len(ids) < FAISS_FROM or importlib.util.find_spec("faiss") is None:
        return NumpyVectors(ids, vectors)
    if exact or len(ids) < SHORTLIST_FROM:
        return FaissVectors(ids, vectors)
    return ShortlistedVectors(ids, vectors)
