"""The compact record of a model: what the catalogue keeps when the weights are gone.

`take_fingerprint` reads every tensor once, in slices, and keeps for each its exact digests, its
norm, robust statistics and a linear sketch (see `embedder.sketch`); for the model, one vector for
the search. At most 1 MB for a model of 7 billion parameters.
"""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.checkpoint import Block, Checkpoint, Kind, Tensor, is_parameter
from embedder.constants import LARGEST, formula_of, worth_a_look
from embedder.digest import TensorHasher, combined, sha256_of
from embedder.sketch import Sketch, Sketcher, transposed
from embedder.statistics import Summary, TensorStatistics
from embedder.vector import centred_sketch, model_vector

METHOD = 1
"""Version of everything stored: fingerprints of different versions are not compared."""

_PARALLEL_BYTES = 16 << 20
"""Models below this are read by one thread: starting a second costs more than it saves."""


@dataclass(frozen=True, eq=False)
class TensorPrint:
    """What is kept of one tensor.

    Args:
        name: Its name in the file; never evidence.
        shape: out × in × space.
        dtype: Stored type.
        kind: What it is for.
        quantised: Whether it is stored as scaled integers.
        constant: The formula that gives it, or empty.
        bits: Digest of stored type, shape and bytes.
        values: Digest of the values; empty for a large tensor in another layout.
        narrow: The narrowest type that holds the values.
        summary: Norm, mean, extremes and the rest.
        sketch: Linear sketch of the values; empty where some are not finite.
        sample_sketch: Sketch of a seeded sample of stored rows; empty for few rows.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    quantised: bool
    constant: str
    bits: bytes
    values: bytes
    narrow: str
    summary: Summary
    sketch: Sketch
    sample_sketch: Sketch

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @cached_property
    def squeezed(self) -> tuple[int, ...]:
        """The shape without axes of length 1."""
        return tuple(length for length in self.shape if length > 1)

    @cached_property
    def counted(self) -> bool:
        """Whether it counts in agreement and distance."""
        return (
            self.kind is Kind.WEIGHT
            and not self.constant
            and self.summary.not_finite == 0
            and self.size > 1
        )

    @cached_property
    def key(self) -> bytes:
        """A digest of size and norm: equal for equal values in whatever order they lie."""
        return combined([f"{self.size} {self.summary.norm:.10e}".encode()])

    @cached_property
    def by_length(self) -> tuple[int, ...]:
        """The order that sorts the axes of `squeezed` by length, equal ones left in theirs."""
        return tuple(sorted(range(len(self.squeezed)), key=lambda axis: self.squeezed[axis]))

    @cached_property
    def unit_sketch(self) -> Sketch:
        """The centred sketch, of unit length, its axes sorted by length."""
        numbers = centred_sketch(self)
        length = np.linalg.norm(numbers)
        return transposed(numbers, self.squeezed, self.by_length) / (length or 1)


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What is kept of one model.

    Args:
        format: Format that it was read from.
        sha256: Of its file or files.
        size_bytes: Of its file or files.
        parameters: Values in all weight tensors.
        tensors: One record a tensor, optimiser state left out.
        vector: (1024,) float32 of unit length, for the search.
        adapter: Whether it is an adapter.
        declared: What card, config and header say.
        limits: What could not be read or counted.
    """

    format: str
    sha256: str
    size_bytes: int
    parameters: int
    tensors: tuple[TensorPrint, ...]
    vector: NDArray[np.float32]
    adapter: bool = False
    declared: Mapping[str, Any] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    method: int = METHOD

    @cached_property
    def content(self) -> bytes:
        """Digest of all stored tensors, whatever their names, order and sharding."""
        return combined(tensor.bits for tensor in self.parameter_tensors)

    @cached_property
    def identity(self) -> bytes:
        """Digest of all tensors with their names and order: what places in `tensors` refer to."""
        parts = (
            f"{tensor.name} {tensor.kind}".encode("utf-8", "replace") + tensor.bits
            for tensor in self.tensors
        )
        return combined([b"\n".join(parts)])

    @property
    def parameter_tensors(self) -> list[TensorPrint]:
        """Tensors that hold parameters: no indices, scales or optimiser state."""
        return [t for t in self.tensors if t.kind not in (Kind.BUFFER, Kind.SCALE) and t.size]

    @property
    def counted(self) -> list[TensorPrint]:
        """Tensors that count in agreement and distance."""
        return [tensor for tensor in self.tensors if tensor.counted]


def take_fingerprint(
    checkpoint: Checkpoint,
    *,
    threads: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Fingerprint:
    """Read a model once and return its fingerprint.

    Args:
        checkpoint: An open model.
        threads: Threads that read; memory grows by about 60 MB for each.
        progress: Called with the number of bytes just read, from any thread.

    Raises:
        CheckpointError: A tensor could not be read.

    Example:
        >>> from embedder.checkpoint import tensor_of
        >>> tensor = tensor_of("w", np.ones((4, 3), np.float32))
        >>> print_ = take_fingerprint(Checkpoint("x", "live", (tensor,)))
        >>> print_.parameters, print_.tensors[0].constant
        (12, 'all equal')
    """
    tensors = fingerprinted(checkpoint)
    size_bytes = checkpoint.size_bytes
    if threads < 2 or size_bytes < _PARALLEL_BYTES:
        sha256 = sha256_of(checkpoint.files) if checkpoint.files else ""
        prints = [take_print(tensor, progress) for tensor in tensors]
    else:
        sha256, prints = _in_parallel(tensors, checkpoint.files, threads, progress)
    parameters = checkpoint.parameters
    return Fingerprint(
        format=checkpoint.format,
        sha256=sha256,
        size_bytes=size_bytes,
        parameters=parameters,
        tensors=tuple(prints),
        vector=model_vector(prints),
        adapter=checkpoint.adapter,
        declared=dict(checkpoint.declared),
        limits=(*checkpoint.limits, *_limits_of(prints)),
    )


def fingerprinted(checkpoint: Checkpoint) -> list[Tensor]:
    """Return the tensors of a model that its fingerprint has a record of, in its order."""
    return [tensor for tensor in checkpoint.tensors if tensor.kind is not Kind.OPTIMISER]


def _in_parallel(
    tensors: list[Tensor],
    files: tuple[Path, ...],
    threads: int,
    progress: Callable[[int], None] | None,
) -> tuple[str, list[TensorPrint]]:
    """Hash the files in one thread while the others read tensors, the largest first."""
    with ThreadPoolExecutor(threads) as pool:
        whole: Future[str] | None = pool.submit(sha256_of, files) if files else None
        pending: dict[int, Future[TensorPrint]] = {}
        for place in sorted(range(len(tensors)), key=lambda place: -tensors[place].size):
            pending[place] = pool.submit(take_print, tensors[place], progress)
        try:
            prints = [pending[place].result() for place in range(len(tensors))]
            return whole.result() if whole else "", prints
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def take_print(tensor: Tensor, progress: Callable[[int], None] | None = None) -> TensorPrint:
    """Read one tensor once and return what is kept of it.

    Raises:
        CheckpointError: It could not be read.
    """
    hasher = TensorHasher(tensor)
    statistics = TensorStatistics(tensor)
    sketcher, sampler = Sketcher(tensor.shape), _RowSampler(tensor)
    wanted = is_parameter(tensor)
    look = False
    with np.errstate(invalid="ignore"):  # a signalling NaN complains when it is cast
        for block in tensor.blocks():
            hasher.add(block)
            if wanted:
                statistics.add(block)
                if statistics.not_finite == 0:
                    sketcher.add(block)
                    sampler.add(block)
                if block.start == 0 and not any(block.prefix):
                    look = tensor.size <= LARGEST and worth_a_look(block.values)
            if progress is not None:
                progress(len(block.raw))
    finite = wanted and statistics.not_finite == 0 and tensor.size > 0
    values, narrow = hasher.values()
    nothing = np.zeros(0, np.float32)
    return TensorPrint(
        name=tensor.name,
        shape=tensor.canonical_shape,
        dtype=tensor.encoding.name,
        kind=tensor.kind,
        quantised=tensor.encoding.quantised,
        constant=formula_of(tensor.canonical()) if look and finite else "",
        bits=hasher.bits(),
        values=values,
        narrow=narrow,
        summary=statistics.result(),
        sketch=sketcher.result(tensor.order) if finite else nothing,
        sample_sketch=sampler.result() if finite else nothing,
    )


class _RowSampler:
    """Sketches a seeded sample of the stored rows: what a ranged read of a remote file can give."""

    def __init__(self, tensor: Tensor) -> None:
        self._rows = sampled_rows(tensor.shape[0]) if len(tensor.shape) > 1 else _NO_ROWS
        self._order = tensor.order
        self._sketcher = Sketcher(tensor.shape) if self._rows.size else None

    def add(self, block: Block) -> None:
        if self._sketcher is None or block.prefix:
            return
        for row in self._rows:
            place = int(row) - block.start
            if 0 <= place < len(block.values):
                values = block.values[place : place + 1]
                self._sketcher.add(Block((), int(row), b"", values))

    def result(self) -> Sketch:
        if self._sketcher is None:
            return np.zeros(0, np.float32)
        return self._sketcher.result(self._order)


_NO_ROWS = np.zeros(0, np.int64)
_SAMPLED = 32


def sampled_rows(count: int) -> NDArray[np.int64]:
    """Return the places of the sampled rows among the first `count`.

    They are the 32 of lowest rank in one seeded order of all places, so that an added row changes
    the sample little. Up to 32 rows there is no sample, because it would be all of them.

    Example:
        >>> sampled_rows(20).size, sampled_rows(100).size
        (0, 32)
    """
    if count <= _SAMPLED:
        return _NO_ROWS
    # Multiplication by an odd constant permutes 64-bit integers (Fibonacci hashing, Knuth 6.4).
    ranks = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0xD6E8FEB86659FD93)
    ranks ^= ranks >> np.uint64(32)
    return np.sort(np.argpartition(ranks, _SAMPLED)[:_SAMPLED])


def _limits_of(prints: list[TensorPrint]) -> list[str]:
    """Return the sentences about tensors that are kept and not counted."""
    return [
        f"{tensor.name}: {tensor.summary.not_finite:,} of {tensor.size:,} values are NaN or "
        "infinite; not counted"
        for tensor in prints
        if tensor.summary.not_finite and tensor.kind is not Kind.BUFFER
    ]
