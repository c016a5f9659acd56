"""Sparse tensors of TFLite: only the values that are not zero are stored, along a walk.

The walk goes over the tensor level by level, in an order of its own; a blocked axis makes two
levels. A dense level visits all its places; a sparse one lists those that it visits, for each
place of the level before.

Source:
    The comments on SparsityParameters in the format's schema (tensorflow/lite/schema/schema.fbs).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LARGEST_VALUES = 1 << 27
"""Values that the sparse tensors of a model are expanded to at most: 512 MiB of float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """One level of the walk.

    Args:
        size: Number of places, for a dense level.
        segments: Where the list of each place before begins, and where the last ends; None for a
            dense level.
        indices: The lists, one behind the other.
    """

    size: int = 0
    segments: NDArray[np.int64] | None = None
    indices: NDArray[np.int64] | None = None


def places_of(
    shape: tuple[int, ...],
    order: Sequence[int],
    blocks: Sequence[int],
    levels: Sequence[Level],
    *,
    stored: int,
) -> NDArray[np.int64]:
    """Return where in the dense tensor each stored value lies, as flat places.

    Args:
        shape: Shape of the dense tensor.
        order: The axis of each level; the axes of blocks come after those of the tensor.
        blocks: For each axis of blocks, the axis of the tensor that it divides.
        levels: The levels of the walk.
        stored: How many values are stored.

    Raises:
        ValueError: The parts do not fit together.

    Example:
        Rows dense, columns sparse: the first row has a value in column 2, the second in 0 and 1.

        >>> columns = Level(segments=np.array([0, 1, 3]), indices=np.array([2, 0, 1]))
        >>> places_of((2, 3), (0, 1), (), (Level(2), columns), stored=3)
        array([2, 3, 4])
    """
    size = math.prod(shape)
    _check_walk(shape, order, blocks, levels)
    strides = _strides(shape, order, blocks, levels)
    places = np.zeros(1, np.int64)
    for axis, level in zip(order, levels, strict=True):
        places = _below(places, level, strides[axis], size)
    if len(places) != stored:
        raise ValueError(f"the walk visits {len(places):,} places and {stored:,} values are stored")
    if stored and not 0 <= places.min() <= places.max() < size:
        raise ValueError("a place of the walk lies outside the tensor")
    return places


def _check_walk(
    shape: tuple[int, ...], order: Sequence[int], blocks: Sequence[int], levels: Sequence[Level]
) -> None:
    axes = len(shape)
    if sorted(order) != list(range(axes + len(blocks))) or len(levels) != len(order):
        raise ValueError(f"the order of the walk {list(order)} does not fit {axes} axes")
    if any(not 0 <= axis < axes for axis in blocks) or len(set(blocks)) < len(blocks):
        raise ValueError(f"the blocks {list(blocks)} do not fit {axes} axes")


def _below(places: NDArray[np.int64], level: Level, stride: int, size: int) -> NDArray[np.int64]:
    """Return the places that a level leads to; no level may lead to more than there are."""
    if level.segments is None or level.indices is None:
        if len(places) * level.size > size:
            raise ValueError("a dense level leads out of the tensor")
        steps = np.arange(level.size, dtype=np.int64) * stride
        return np.asarray((places[:, None] + steps).reshape(-1))
    counts = np.diff(level.segments)
    if len(counts) != len(places) or (counts < 0).any() or level.segments[0] != 0:
        raise ValueError("the segments of a sparse level do not fit the level before")
    if level.segments[-1] != len(level.indices) or len(level.indices) > size:
        raise ValueError("the segments of a sparse level do not fit its indices")
    if len(level.indices) and not 0 <= level.indices.min() <= level.indices.max() < size:
        raise ValueError("an index of a sparse level leads out of the tensor")
    return np.asarray(np.repeat(places, counts) + level.indices * stride)


def _strides(
    shape: tuple[int, ...], order: Sequence[int], blocks: Sequence[int], levels: Sequence[Level]
) -> list[int]:
    """Return how many values one step on each axis goes on, axes of blocks included."""
    axes = len(shape)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(axes)]
    size_of = dict(zip(order, (level.size for level in levels), strict=True))
    inner = [strides[axis] for axis in blocks]
    for place, axis in enumerate(blocks):
        block = size_of[axes + place]
        if not 0 < block <= shape[axis]:
            raise ValueError(f"a block of {block:,} does not fit an axis of {shape[axis]:,}")
        strides[axis] *= block
    return strides + inner
