"""Where units lie after the axes of a value were merged, split or moved."""

import math
from collections.abc import Mapping, Sequence

from embedder.followed import Label, Value

Shape = tuple[int | None, ...]


def moved(value: Value, order: Sequence[int]) -> Value:
    """Return a value with its axes in another order, as `numpy.transpose` takes it.

    Example:
        >>> moved(Value({-2: Label(0)}), (1, 0)).labels
        {-1: Label(units=0, before=1, inner=1)}
    """
    axes = len(order)
    labels = {
        new - axes: value.labels[old - axes]
        for new, old in enumerate(order)
        if old - axes in value.labels
    }
    shape = None if value.shape is None else tuple(value.shape[old] for old in order)
    return Value(labels, shape)


def reshaped(value: Value, sizes: Mapping[int, int], shape: Shape) -> tuple[Value, list[int]]:
    """Return a value in another shape, and the axes whose units could not be followed.

    Args:
        value: The value; its shape has to be known.
        sizes: Axis of the value → number of its units.
        shape: The new shape.

    Example:
        >>> flat, lost = reshaped(Value({-3: Label(0)}, (None, 8, 2, 2)), {-3: 8}, (None, 32))
        >>> flat.labels, lost
        ({-1: Label(units=0, before=1, inner=4)}, [])
    """
    old = value.shape
    if old is None:
        return Value({}, shape), list(value.labels)
    blocks = _aligned(old, shape)
    labels: dict[int, Label] = {}
    lost: list[int] = []
    for place, label in value.labels.items():
        axis = len(old) + place
        block = next((pair for pair in blocks if axis in pair[0]), None)
        found, new = None, 0
        if block is not None:
            before, after = [old[i] for i in block[0]], [shape[i] for i in block[1]]
            found = _in_block(before, axis - block[0].start, label, sizes[place], after)
            new = block[1].start - len(shape) + (found[0] if found else 0)
        if found is None or new in labels:
            lost.append(place)
        else:
            labels[new] = found[1]
    return Value(labels, shape), lost


def cut_last(old: Shape, new: Shape) -> Shape:
    """Return what the last axis is cut into; nothing if it is not cut, or not alone.

    Example:
        >>> cut_last((None, None, 12), (None, None, 3, 4)), cut_last((2, 12), (8, 3))
        ((3, 4), ())
    """
    last = range(len(old) - 1, len(old))
    after = next((after for before, after in _aligned(old, new) if before == last), range(0))
    return new[after.start :] if len(after) > 1 else ()


def _aligned(old: Shape, new: Shape) -> list[tuple[range, range]]:
    """Return pairs of neighbouring axes, of the old and the new shape, that hold the same places.

    Axes are matched from both ends; what is left in the middle was merged or split. Where sizes are
    unknown, only what follows the last of them is certain.
    """
    front = _matched(old, new)
    back = _matched(old[front:][::-1], new[front:][::-1])
    middle = (range(front, len(old) - back), range(front, len(new) - back))
    certain = _is_equal([old[i] for i in middle[0]], [new[i] for i in middle[1]])
    if not certain:
        front, back = 0, _matched(_known_end(old)[::-1], _known_end(new)[::-1])
        starts = (
            (i, j)
            for i in range(len(old) - len(_known_end(old)), len(old) - back)
            for j in range(len(new) - len(_known_end(new)), len(new) - back)
        )
        ends = (len(old) - back, len(new) - back)
        middle = next(
            (
                (range(i, ends[0]), range(j, ends[1]))
                for i, j in starts
                if _is_equal(old[i : ends[0]], new[j : ends[1]])
            ),
            (range(0), range(0)),
        )
    single = [(range(i, i + 1), range(i, i + 1)) for i in range(front)]
    single += [
        (range(len(old) - i - 1, len(old) - i), range(len(new) - i - 1, len(new) - i))
        for i in range(back)
    ]
    return [*single, middle]


def _known_end(shape: Shape) -> Shape:
    """Return the axes after the last one of unknown size."""
    unknown = [place for place, size in enumerate(shape) if size is None]
    return shape[max(unknown, default=-1) + 1 :]


def _matched(old: Shape, new: Shape) -> int:
    """Return how many axes at the front are the same."""
    count = 0
    while count < min(len(old), len(new)) and old[count] == new[count]:
        count += 1
    return count


def _is_equal(old: Sequence[int | None], new: Sequence[int | None]) -> bool:
    """Say whether two blocks certainly hold as many places."""
    sizes = [size for size in (*old, *new) if size is not None]
    known = len(sizes) == len(old) + len(new)
    return known and math.prod(s or 0 for s in old) == math.prod(s or 0 for s in new)


def _in_block(
    old: Sequence[int | None], axis: int, label: Label, size: int, new: Sequence[int | None]
) -> tuple[int, Label] | None:
    """Return the new axis of units in a block whose sizes are known, and how they lie there."""
    if len(old) == len(new) == 1:
        return 0, label
    if label.inner is None:
        return None
    before = math.prod(s or 0 for s in old[:axis]) * label.before
    inner = math.prod(s or 0 for s in old[axis + 1 :]) * label.inner
    # Seen over the whole block, the units are `before` × size × `inner`: the new axis has to
    # hold all of them, with whole factors of the other two.
    done = 1
    for place, length in enumerate(new):
        length = length or 0
        if before % done:
            return None
        left = before // done
        after = math.prod(s or 0 for s in new[place + 1 :])
        fits = inner % after == 0 and left * size * (inner // after) == length
        if fits and length > 1:
            return place, Label(label.units, left, inner // after)
        done *= length
    return None
