"""Axis-equivariant linear sketches: a few hundred numbers that keep inner products.

One infinite sequence of ±1 vectors, given by a seed, serves every axis of every tensor: an axis
of n places is contracted with the first n of them. From that follow the laws that the tests prove:

- *linearity*: the sketch of a·X + b·Y is a·S(X) + b·S(Y), so distances, Gram matrices and fits of
  merges are solved on sketches;
- *equivariance*: the sketch of a transposed tensor is the transposed sketch;
- *continuation*: a tensor with added rows differs in its sketch by the sketch of those rows alone;
- *inner products survive*: ⟨S(X), S(Y)⟩ has the mean ⟨X, Y⟩, and for unrelated tensors a standard
  deviation of about ‖X‖·‖Y‖ / √(numbers kept).

The last law would fail where two axes meet in the same column, because the same signs then meet
on both (the sketch of an identity would come out n/d times too long). Only entries whose columns
all differ are therefore kept. Axes of length 1 carry nothing and are dropped.

Source:
    Random-sign projections: Achlioptas 2003, J. Comput. Syst. Sci. 66; for tensor products of
    them, Ahle et al. 2020, SODA. Leaving out equal columns is our own remedy.
"""

from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from embedder.checkpoint import Block

SEED = 0x6D6F64656C6B696E
"""Part of the method's version: sketches of different seeds cannot be compared."""

_VECTOR_WIDTH = 64
_LONG = 8
"""Axes longer than this get the wide contraction; kernels and heads are shorter."""
_WIDTH_OF_LONG = {0: 0, 1: 16, 2: 16, 3: 7}
_CACHED_SIGNS = 1 << 22

Sketch = NDArray[np.float32]
"""(numbers kept,) float32; see `kept` for which entry each one is."""


def signs(first: int, last: int, width: int) -> NDArray[np.float32]:
    """Return vectors `first` … `last` of the infinite sequence, (last − first, width) of ±1.

    Args:
        first: Place of the first vector.
        last: Place after the last one.
        width: Columns, at most 64; a narrower vector is the beginning of a wider one.

    Example:
        >>> bool((signs(0, 9, 4)[5:] == signs(5, 9, 4)).all())
        True
    """
    # SplitMix64 (Steele et al. 2014, OOPSLA), one 64-bit word a place, one bit a column.
    word = np.arange(first + 1, last + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    word += np.uint64(SEED)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        word ^= word >> np.uint64(shift)
        word *= np.uint64(factor)
    bits = (word[:, None] >> np.arange(width, dtype=np.uint64)) & np.uint64(1)
    return 1.0 - 2.0 * bits.astype(np.float32)


@lru_cache(maxsize=8)
def _first_signs(length: int, width: int) -> NDArray[np.float32]:
    return signs(0, length, width)


def _signs(first: int, last: int, width: int) -> NDArray[np.float32]:
    """As `signs`, from a cache where the axis begins."""
    if last * width > _CACHED_SIGNS:
        return signs(first, last, width)
    # Lengths are rounded up so that the blocks of one axis share an entry.
    return _first_signs(1 << (last - 1).bit_length(), width)[first:last]


@lru_cache(maxsize=64)
def _joint_signs(lengths: tuple[int, ...], columns: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the signs of neighbouring axes as one matrix, (product of lengths, of columns)."""
    joint = np.ones((1, 1), np.float32)
    for length, width in zip(lengths, columns, strict=True):
        own = _signs(0, length, width) if width else np.ones((length, 1), np.float32)
        joint = np.kron(joint, own)
    return joint


def widths(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many columns each axis is contracted to; 0 for an axis of length 1.

    Example:
        >>> widths((64, 64)), widths((64, 1, 3, 3)), widths((10,))
        ((16, 16), (16, 0, 2, 2), (64,))
    """
    axes = [length for length in shape if length > 1]
    if len(axes) == 1:
        return tuple(_VECTOR_WIDTH if length > 1 else 0 for length in shape)
    if len(axes) == 2:
        return tuple(16 if length > 1 else 0 for length in shape)
    long = sum(length > _LONG for length in axes)
    wide = _WIDTH_OF_LONG.get(long, long + 1)
    # As many columns as short axes, at least two, so that there are entries to keep.
    narrow = max(2, len(axes) - long)
    return tuple((wide if length > _LONG else narrow) if length > 1 else 0 for length in shape)


@lru_cache(maxsize=256)
def kept(columns: tuple[int, ...]) -> NDArray[np.intp]:
    """Return which entries of a contraction are kept, as (axes, numbers kept) column indices.

    Args:
        columns: Columns of each axis, without axes of width 0.
    """
    entries = [entry for entry in product(*map(range, columns)) if len(set(entry)) == len(entry)]
    indices = np.array(entries, dtype=np.intp).reshape(-1, len(columns)).T
    indices.flags.writeable = False
    return indices


class Sketcher:
    """Sums up the sketch of one tensor from its blocks.

    Args:
        shape: Shape of the tensor, in the order of its blocks.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape or (1,)
        self._widths = widths(self._shape)
        self._sum = np.zeros([width or 1 for width in self._widths], np.float64)

    def add(self, block: Block) -> None:
        """Add a block, all of whose values are finite."""
        part = block.values.astype(np.float32, copy=False)
        axis, rows = block.axis, len(block.values)
        run = self._run_signs(axis, block.start, block.start + rows)
        if rows >= 2 * run.shape[1] and self._shape[-1] <= _LONG:
            # Kernels: many short products are slow, so first shrink the run to a few rows.
            part = (run.T @ part.reshape(rows, -1)).reshape(-1, *part.shape[1:])
            part = self._contract_trailing(part, axis)
        else:
            part = self._contract_trailing(part, axis)
            part = (run.T @ part.reshape(rows, -1)).reshape(-1, *part.shape[1:])
        for before in range(axis - 1, -1, -1):
            place = block.prefix[before]
            row = self._run_signs(before, place, place + 1)[0]
            part = row.reshape(-1, *[1] * part.ndim) * part
        self._sum += part

    def _run_signs(self, axis: int, first: int, last: int) -> NDArray[np.float32]:
        """Return the signs of a run of places, (last − first, columns); ones for a dropped axis."""
        width = self._widths[axis]
        return _signs(first, last, width) if width else np.ones((last - first, 1), np.float32)

    def _contract_trailing(self, part: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
        """Contract all axes after the run, neighbours that are short in one product."""
        ahead = part.shape[0]
        done: tuple[int, ...] = ()
        now = len(self._shape)
        while now > axis + 1:
            lengths: list[int] = [self._shape[now - 1]]
            while now - len(lengths) > axis + 1 and (
                np.prod(lengths) * self._shape[now - len(lengths) - 1] <= _LONG**2
            ):
                lengths.insert(0, self._shape[now - len(lengths) - 1])
            now -= len(lengths)
            columns = tuple(self._widths[now : now + len(lengths)])
            matrix = _joint_signs(tuple(lengths), columns)
            stacked = part.reshape(-1, matrix.shape[0], int(np.prod(done)))
            part = stacked[:, :, 0] @ matrix if not done else np.matmul(matrix.T, stacked)
            done = (*(width or 1 for width in columns), *done)
        return part.reshape(ahead, *done)

    def result(self, order: tuple[int, ...]) -> Sketch:
        """Return the sketch of the tensor with its axes brought into another order.

        Args:
            order: As `numpy.transpose` takes it.
        """
        columns = tuple(self._widths[axis] for axis in order if self._widths[axis])
        if not columns:
            return self._sum.reshape(1).astype(np.float32)
        whole = np.transpose(self._sum, order).reshape(columns)
        entries = kept(columns)
        return np.asarray(whole[tuple(entries)] / np.sqrt(entries.shape[1]), dtype=np.float32)


def sketch(values: NDArray[np.floating]) -> Sketch:
    """Return the sketch of an array that is in memory.

    Args:
        values: Any shape.

    Returns:
        The numbers kept, scaled so that inner products estimate those of the arrays.

    Example:
        >>> eye = np.eye(300)
        >>> abs(float(np.sum(sketch(eye) ** 2)) / 300 - 1) < 0.5
        True
    """
    sketcher = Sketcher(values.shape)
    if values.size:
        sketcher.add(Block((), 0, b"", np.asarray(values).reshape(values.shape or (1,))))
    return sketcher.result(tuple(range(max(values.ndim, 1))))


@lru_cache(maxsize=4096)
def sketch_of_ones(shape: tuple[int, ...]) -> Sketch:
    """Return the sketch of a tensor of ones, in time proportional to the sum of its lengths.

    With it a tensor is centred after the fact: S(X − mean) = S(X) − mean · S(1).
    """
    columns = [width for width in widths(shape) if width]
    sums = [
        _sum_of_signs(length, width)
        for length, width in zip(shape, widths(shape), strict=True)
        if width
    ]
    if not columns:
        return np.ones(1, np.float32)
    entries = kept(tuple(columns))
    found = np.prod([total[index] for total, index in zip(sums, entries, strict=True)], axis=0)
    ones = np.asarray(found / np.sqrt(entries.shape[1]), dtype=np.float32)
    ones.flags.writeable = False
    return ones


@lru_cache(maxsize=512)
def _sum_of_signs(length: int, width: int) -> NDArray[np.float64]:
    sums: NDArray[np.float64] = np.sum(
        [
            signs(first, min(first + 65536, length), width).sum(axis=0, dtype=np.float64)
            for first in range(0, length, 65536)
        ],
        axis=0,
    )
    return sums


def transposed(numbers: Sketch, shape: tuple[int, ...], order: tuple[int, ...]) -> Sketch:
    """Return the sketch of the transposed tensor from the sketch of the tensor.

    Args:
        numbers: Sketch of a tensor.
        shape: Shape of that tensor.
        order: New order of its axes, as `numpy.transpose` takes it.

    Example:
        >>> x = np.arange(12.0).reshape(3, 4)
        >>> bool(np.allclose(transposed(sketch(x), (3, 4), (1, 0)), sketch(x.T)))
        True
    """
    columns = widths(shape)
    squeezed = [axis for axis in range(len(shape)) if columns[axis]]
    if len(squeezed) < 2:
        return numbers
    moved = tuple(squeezed.index(axis) for axis in order if axis in squeezed)
    return numbers[turning(tuple(columns[axis] for axis in squeezed), moved)]


@lru_cache(maxsize=1024)
def turning(columns: tuple[int, ...], order: tuple[int, ...]) -> NDArray[np.intp]:
    """Return which number of a sketch is each number of the transposed tensor's sketch.

    Args:
        columns: Columns of each axis, without axes of width 0.
        order: New order of these axes, as `numpy.transpose` takes it.
    """
    entries = kept(columns)
    whole = np.zeros(columns, np.intp)
    whole[tuple(entries)] = np.arange(entries.shape[1])
    turned = np.transpose(whole, order)
    places: NDArray[np.intp] = turned[tuple(kept(turned.shape))]
    places.flags.writeable = False
    return places


def common(
    first: Sketch, second: Sketch, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> tuple[Sketch, Sketch]:
    """Return two sketches cut to the columns that both have, so that they can be compared.

    Tensors of equal shape have equal columns. Where one has grown past a limit of `widths`, the
    narrower columns are the beginning of the wider ones.
    """
    left, right = (tuple(width for width in widths(shape) if width) for shape in shapes)
    if left == right:
        return first, second
    both = tuple(min(pair) for pair in zip(left, right, strict=True))
    entries = kept(both)
    cut = []
    for numbers, columns in ((first, left), (second, right)):
        whole = np.zeros(columns, np.float32)
        whole[tuple(kept(columns))] = numbers
        factor = np.sqrt(kept(columns).shape[1] / max(entries.shape[1], 1))
        cut.append(np.asarray(whole[tuple(entries)] * factor, dtype=np.float32))
    return cut[0], cut[1]
