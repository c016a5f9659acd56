"""Weights times codes: of a small tensor as a whole, of a large one block by block.

A large tensor is never in memory. Its blocks are read as they are stored, widened to float32 and
multiplied, a few at a time in each thread. What they give is added up in the order of the file, so
that the number of threads changes nothing.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from embedder.checkpoint import Cut, Tensor
from embedder.errors import ArchitectureError
from embedder.matrices import Layout
from embedder.unit_codes import WIDTH, Array, seeded, through

THREADS = 2
"""Threads that read and multiply the blocks of one tensor."""

_BLOCK = 1 << 19
"""Values in a block: 2 MiB of float32."""
_ROWS = 256
_LARGEST_BLOCK = 1 << 22
"""A block has at least 256 rows, so that packing the codes of all columns and adding up 64 numbers
for each of them pays, unless it would be larger than 16 MiB."""
_LARGEST_KEPT_BYTES = 16 << 20
"""A block of 256 rows of 16,384 fits. Nearly twice as much takes 50 MB more and no less time."""
_MOST_EXPONENT = 1000
"""Of a power of two whose inverse is one too."""
_RUNS = 2
"""Runs of blocks that a tensor is cut into, on any machine: one for each thread. What the blocks of
one give is added up in float32. 8 runs of blocks of 64 rows take 11 % longer for 7 billion
parameters, in turns on one quiet machine."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Matrix(Protocol):
    """Weights from units that are read to units that are written."""

    def times(self, codes: Array) -> Array:
        """Return weights · codes, (places of out, 64)."""

    def back(self, codes: Array) -> Array:
        """Return weightsᵀ · codes, (places of in, 64)."""

    def back_by_head(self, codes: Array, heads: int) -> Array:
        """Return weightsᵀ · codes, (heads, channels, 64)."""

    def times_by_head(self, codes: Array) -> Array:
        """Return weights · codes, (places of out, 64), for codes of (heads, channels, 64)."""


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """A matrix in memory, out × in × places in a kernel."""

    values: Array

    def times(self, codes: Array) -> Array:
        """Return weights · codes, (places of out, 64)."""
        return through(self.values, codes)

    def back(self, codes: Array) -> Array:
        """Return weightsᵀ · codes, (places of in, 64)."""
        return through(np.swapaxes(self.values, 0, 1), codes)

    def back_by_head(self, codes: Array, heads: int) -> Array:
        """Return weightsᵀ · codes, (heads, channels, 64)."""
        return np.stack([part.T @ codes for part in self._by_head(heads)])

    def times_by_head(self, codes: Array) -> Array:
        """Return weights · codes, (places of out, 64), for codes of (heads, channels, 64)."""
        parts = zip(self._by_head(len(codes)), codes, strict=True)
        return np.asarray(sum(part @ code for part, code in parts))

    def _by_head(self, heads: int) -> Array:
        """Return the matrix as heads × out × channels."""
        matrix = self.values[:, :, 0]
        return matrix.reshape(len(matrix), heads, -1).transpose(1, 0, 2)


@dataclass(frozen=True, slots=True, eq=False)
class Streamed:
    """A matrix whose values stay in the file.

    Args:
        tensor: Where they are.
        layout: Which of its axes are those of the matrix.
        threads: Threads that read and multiply.
    """

    tensor: Tensor
    layout: Layout
    threads: int = THREADS

    def times(self, codes: Array) -> Array:
        """Return weights · codes, (places of out, 64).

        Raises:
            ArchitectureError: A value is not finite.
            CheckpointError: A block cannot be read.
        """
        return self._product(codes, transposed=False)

    def back(self, codes: Array) -> Array:
        """Return weightsᵀ · codes, (places of in, 64); it fails as `times` does."""
        return self._product(codes, transposed=True)

    def back_by_head(self, codes: Array, heads: int) -> Array:
        """Return weightsᵀ · codes, (heads, channels, 64); it fails as `times` does."""
        return self.back(codes).reshape(heads, -1, WIDTH)

    def times_by_head(self, codes: Array) -> Array:
        """Return weights · codes, for codes of (heads, channels, 64); it fails as `times` does."""
        return self.times(codes.reshape(-1, WIDTH))

    def _product(self, codes: Array, *, transposed: bool) -> Array:
        """Add up what the blocks give, in their order."""
        # A power of two is taken out, so that codes of any length fit into float32.
        largest = max(float(codes.max(initial=0)), -float(codes.min(initial=0)))
        exponent = math.frexp(largest)[1]
        scale = np.ldexp(1.0, max(-_MOST_EXPONENT, min(exponent, _MOST_EXPONENT)))
        codes = np.ascontiguousarray(codes / scale, dtype=np.float32)
        axis = self.layout.column if transposed else self.layout.row
        found = np.zeros((self.tensor.shape[axis], WIDTH))

        def work(cuts: Sequence[Cut]) -> list[_Part]:
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is looked for
                return self._added(cuts, codes, transposed=transposed)

        _keep_freed_memory()
        below = math.prod(self.tensor.shape[1:])
        cuts = list(self.tensor.cuts(max(_BLOCK, min(_ROWS * below, _LARGEST_BLOCK))))
        length = -(-len(cuts) // _RUNS)
        runs = [cuts[first : first + length] for first in range(0, len(cuts), length)]
        for parts in in_order(work, runs, self.threads):
            for part in parts:
                found[part.places] += part.codes
        found *= scale
        return found

    def _added(self, cuts: Sequence[Cut], codes: Array, *, transposed: bool) -> "list[_Part]":
        """Return what a run of blocks gives; those that give to the same places are one."""
        parts: list[_Part] = []
        for cut in cuts:
            part = self._part(cut, codes, transposed=transposed)
            if parts and parts[-1].places == part.places:
                np.add(parts[-1].codes, part.codes, out=parts[-1].codes)
            else:
                parts.append(part)
        # A product of finite codes with NaN or an infinity is never finite, nor is a sum with one.
        if not all(np.isfinite(part.codes).all() for part in parts):
            self._look_for_not_finite(cuts)
        return parts

    def _look_for_not_finite(self, cuts: Sequence[Cut]) -> None:
        """Make sure that it is not the values of some blocks that are not finite."""
        for cut in cuts:
            if not np.isfinite(self._values(cut)).all():
                raise not_finite(self.tensor.name)

    def _values(self, cut: Cut) -> NDArray[np.float32]:
        """Return the values of one block; those beyond float32 are infinite."""
        return self.tensor.block(cut).values.astype(np.float32, copy=False)

    def _part(self, cut: Cut, codes: Array, *, transposed: bool) -> "_Part":
        """Return what one block gives, and to which places."""
        shape, layout, axis = self.tensor.shape, self.layout, len(cut.prefix)
        starts = (*cut.prefix, cut.start, *(0 for _ in shape[axis + 1 :]))
        lengths = (*(1 for _ in cut.prefix), cut.stop - cut.start, *shape[axis + 1 :])
        ranges = [slice(at, at + n) for at, n in zip(starts, lengths, strict=True)]
        matrix = layout.split(self._values(cut).reshape(lengths))
        out, into = layout.row, layout.column
        if transposed:
            matrix, out, into = np.swapaxes(matrix, 0, 1), into, out
        codes = codes[ranges[into]]
        if not layout.rest or math.prod(shape[place] for place in layout.rest) == 1:
            return _Part(ranges[out], matrix[:, :, 0] @ codes)
        found = np.zeros((matrix.shape[0], WIDTH), np.float32)
        coins = self._coins()[tuple(ranges[place] for place in layout.rest)].reshape(-1, WIDTH)
        for place, coin in enumerate(coins):
            found += (matrix[:, :, place] @ codes) * coin
        return _Part(ranges[out], found)

    def _coins(self) -> Array:
        """Return the signs of each place in the kernel, as the axes of the rest lie."""
        rest = [self.tensor.shape[place] for place in self.layout.rest]
        return seeded("space", math.prod(rest)).astype(np.float32).reshape(*rest, WIDTH)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What a block adds to some places of a product."""

    places: slice
    codes: NDArray[np.floating[Any]]


@cache
def _keep_freed_memory() -> None:
    """Make the allocator keep what a block leaves for the next.

    By default glibc hands such pieces back to the system, which then clears them for the next
    block: a third of all time. Freeing one large array raises its limits (mallopt(3)).
    """
    np.empty(_LARGEST_KEPT_BYTES, np.uint8)


def not_finite(name: str) -> ArchitectureError:
    """Return the error of a tensor that holds values without a size."""
    return ArchitectureError(f"{name}: holds values that are NaN or infinite")


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """Yield what some work gives for each item, in their order, worked on in several threads.

    Only a few items are worked on ahead, so that results do not pile up.
    """
    if threads < 2:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[Result]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
