"""One model as its readers give it: a list of tensors that are read in slices.

A `Checkpoint` is what every reader makes and what everything above reads. Nothing of a tensor is
in memory until its blocks are asked for, and blocks are small, so a model of any size passes
through a fixed amount of memory.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from embedder.encoding import NAME_OF, Encoding, Plain, Values
from embedder.storage import MemoryStorage, OpenFile, ReadOnce, Storage

BLOCK_VALUES = 1 << 18
"""Values in a block: 1 MiB of float32, which stays in a core's L2 cache (measured: 64 rows of
4,096 are 20 % faster than 512 rows)."""

_MOST_ROWS = 16

KEPT_BYTES = 64 << 20
"""Stored bytes of a model that are kept in memory where it is looked at more than once."""


class Kind(StrEnum):
    """What a tensor is for. Only weights are counted in agreement and distance."""

    WEIGHT = "weight"
    """A matrix, convolution, embedding or recurrent cell."""
    BIAS = "bias"
    NORM = "norm"
    """Gain or offset of a normalisation layer."""
    STATISTIC = "statistic"
    """Running mean or variance of a batch norm."""
    SCALE = "scale"
    """Scale or zero point of a quantised tensor."""
    BUFFER = "buffer"
    """Indices, tables, masks and whatever else is not trained."""
    OPTIMISER = "optimiser"
    """Moments and other state of the optimiser."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A slice of a tensor: all values below one run of places on one axis.

    For `prefix` (i, j) the block holds tensor[i, j, start : start + k].
    """

    prefix: tuple[int, ...]
    start: int
    raw: bytes | memoryview
    values: Values  # (k, *shape after the axis of the run)

    @property
    def axis(self) -> int:
        """The axis that the run lies on."""
        return len(self.prefix)


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a block lies: the places `start` up to `stop` below a prefix."""

    prefix: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """One named tensor of a model.

    Args:
        name: Its name in the file; never evidence.
        shape: Shape of the values, in stored order.
        encoding: How stored bytes become values.
        storage: Where the stored bytes are.
        kind: What it is for.
        axes: The order that brings the stored axes to out × in × space, as
            `numpy.transpose` takes it; empty when the stored order is that already, or unknown.
        stored_values: Number of values that the file holds for it, where `storage` computes more
            from them, as from the factors of a low-rank product.
    """

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    storage: Storage
    kind: Kind = Kind.WEIGHT
    axes: tuple[int, ...] = ()
    stored_values: int | None = None

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def order(self) -> tuple[int, ...]:
        """`axes`, written out."""
        return self.axes or tuple(range(len(self.shape)))

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        """The shape as out × in × space."""
        return tuple(self.shape[axis] for axis in self.order)

    def read(self) -> Values:
        """Return all values in stored order. For small tensors; large ones have `blocks`."""
        values = self.encoding.decode(self.storage.read(0, self.storage.size_bytes), 0)
        return values[: self.size].reshape(self.shape)  # the last unit may hold more

    def canonical(self) -> Values:
        """Return all values as out × in × space."""
        return np.transpose(self.read(), self.order)

    def blocks(self, most: int = BLOCK_VALUES) -> Iterator[Block]:
        """Yield the tensor in stored order, about `most` values at a time.

        Where rows are wide a block may be up to 16 times larger, and where a unit of the encoding
        is larger than `most` it is not split.
        """
        for cut in self.cuts(most):
            yield self.block(cut)

    def cuts(self, most: int = BLOCK_VALUES) -> Iterator[Cut]:
        """Yield where `blocks` cuts the tensor."""
        if self.size == 0:
            return
        shape = self.shape or (1,)
        axis = 0
        while axis < len(shape) - 1 and math.prod(shape[axis + 1 :]) > _MOST_ROWS * most:
            axis += 1
        below = math.prod(shape[axis + 1 :])  # values in one place of the run
        # A few rows at a time even of very wide ones: what is done with them is a product with
        # a matrix as long as a row, which a single row would not pay for.
        step = max(1, most // below, min(_MOST_ROWS, _MOST_ROWS * most // below))
        if below == 1:  # the last axis is cut: between units, not inside one
            step = -(-step // self.encoding.unit_values) * self.encoding.unit_values
        for prefix in np.ndindex(*shape[:axis]):
            for start in range(0, shape[axis], step):
                yield Cut(prefix, start, min(start + step, shape[axis]))

    def block(self, cut: Cut) -> Block:
        """Read one slice."""
        shape, axis = self.shape or (1,), len(cut.prefix)
        below = math.prod(shape[axis + 1 :])
        flat = 0  # number of the prefix in stored order
        for place, length in zip(cut.prefix, shape, strict=False):
            flat = flat * length + place
        base = flat * shape[axis] * below
        raw, values = self._values(base + cut.start * below, base + cut.stop * below)
        return Block(cut.prefix, cut.start, raw, values.reshape(-1, *shape[axis + 1 :]))

    def _values(self, first: int, last: int) -> tuple[bytes | memoryview, Values]:
        """Return raw bytes and values of a flat range, widened to whole units and cut back."""
        unit, width = self.encoding.unit_values, self.encoding.unit_bytes
        low, high = first // unit, -(-last // unit)
        raw = self.storage.read(low * width, min(high * width, self.storage.size_bytes))
        values = self.encoding.decode(raw, low * unit)
        return raw, values[first - low * unit : last - low * unit]


@dataclass(eq=False)
class Checkpoint:
    """A model that is open for reading. Use it in a `with` statement, or `close` it.

    Args:
        location: Path or address that it was opened from.
        format: Name of its format: `safetensors`, `gguf`, `onnx`.
        tensors: Everything in it, optimiser state included.
        files: The files that it is made of, in a fixed order.
        declared: What card, config and header say; never mixed with what the weights say.
        limits: What could not be read, in words.
        adapter: Whether it is an adapter that needs a base model.
        aliases: Further name → name in `tensors`, where one tensor (or branch) has several names.
        renderings: Other files that hold the same model in other formats.
        on_close: What else to do when it is closed.
    """

    location: str
    format: str
    tensors: tuple[Tensor, ...]
    files: tuple[Path, ...] = ()
    declared: Mapping[str, Any] = field(default_factory=dict)
    limits: list[str] = field(default_factory=list)
    adapter: bool = False
    open_files: list[OpenFile] = field(default_factory=list, repr=False)
    aliases: Mapping[str, str] = field(default_factory=dict)
    renderings: tuple[Path, ...] = ()
    on_close: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def parameters(self) -> int:
        """Values in all weight tensors; biases, norms and constants too, optimiser state not."""
        return sum(
            tensor.size if tensor.stored_values is None else tensor.stored_values
            for tensor in self.tensors
            if is_parameter(tensor)
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.stat().st_size for file in self.files)

    def read_once(self) -> "Checkpoint":
        """Return the same model, whose bytes are kept once they are read; close this one.

        It serves who looks at the tensors of a small model more than once. One that stores more
        than `KEPT_BYTES` is returned as it is: what it was read from is the page cache, then.
        """
        if sum(tensor.storage.size_bytes for tensor in self.tensors) > KEPT_BYTES:
            return self
        kept = (replace(tensor, storage=ReadOnce(tensor.storage)) for tensor in self.tensors)
        return replace(self, tensors=tuple(kept), open_files=[], on_close=[])

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        for file in self.open_files:
            file.close()
        for action in self.on_close:
            action()
        self.on_close.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def is_parameter(tensor: Tensor) -> bool:
    """Say whether a tensor's values count as parameters of the model."""
    if tensor.kind in (Kind.OPTIMISER, Kind.SCALE):
        return False
    encoding = tensor.encoding
    return encoding.quantised or not isinstance(encoding, Plain) or encoding.is_float


def kind_of(name: str, shape: tuple[int, ...], encoding: Encoding) -> Kind:
    """Guess what a tensor is for where its format does not say.

    Only the shape decides whether it is counted: a tensor with two axes or more is a weight,
    one with fewer is not. The name only tells apart the kinds that are not counted.

    Example:
        >>> kind_of("bn.running_mean", (64,), Plain("F32"))
        <Kind.STATISTIC: 'statistic'>
        >>> kind_of("position_ids", (1, 512), Plain("I64"))
        <Kind.BUFFER: 'buffer'>
    """
    if isinstance(encoding, Plain) and not encoding.is_float:
        return Kind.BUFFER
    if len(shape) >= 2:
        return Kind.WEIGHT
    if not shape:
        return Kind.BUFFER
    last = name.lower().replace("/", ".").rpartition(".")[2]
    if any(word in last for word in ("running_", "moving_")):
        return Kind.STATISTIC
    if "bias" in last and "norm" not in name.lower():
        return Kind.BIAS
    if any(word in name.lower() for word in ("norm", "bn", "ln_", "gamma", "beta")):
        return Kind.NORM
    return Kind.BIAS


def tensor_of(
    name: str,
    values: NDArray[np.generic],
    *,
    kind: Kind | None = None,
    axes: tuple[int, ...] = (),
) -> Tensor:
    """Return a tensor over values that are in memory.

    Example:
        >>> tensor_of("w", np.eye(2, dtype=np.float32)).encoding.name
        'F32'
    """
    name_of_type = NAME_OF.get(values.dtype.newbyteorder("="))
    if name_of_type is None:
        raise TypeError(f"{name}: no plain encoding for {values.dtype}")
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    encoding = Plain(name_of_type)
    shape = tuple(native.shape)
    return Tensor(
        name=name,
        shape=shape,
        encoding=encoding,
        storage=MemoryStorage(native),
        kind=kind or kind_of(name, shape, encoding),
        axes=axes,
    )
