"""Where units lie after the axes of a value were merged, split or moved."""

import math
from collections.abc import Mapping, Sequence

from embedder.tracing import Label, Value

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

    Axes are matched from both ends; what is left in the middle is one block, whose axes were
    merged or split.

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
    front = _matched(old, shape)
    back = _matched(old[front:][::-1], shape[front:][::-1])
    block = (old[front : len(old) - back], shape[front : len(shape) - back])
    if any(block) and not _is_equal(*block):
        return Value({}, shape), list(value.labels)
    labels: dict[int, Label] = {}
    lost: list[int] = []
    for place, label in value.labels.items():
        axis = len(old) + place
        if axis < front:
            labels[axis - len(shape)] = label
        elif axis >= len(old) - back:
            labels[place] = label
        else:
            found = _in_block(block[0], axis - front, label, sizes[place], block[1])
            new = None if found is None else found[0] + front - len(shape)
            if found is None or new is None or new in labels:
                lost.append(place)
            else:
                labels[new] = found[1]
    return Value(labels, shape), lost


def _matched(old: Shape, new: Shape) -> int:
    """Return how many axes at the front are the same."""
    count = 0
    while count < min(len(old), len(new)) and old[count] == new[count]:
        count += 1
    return count


def _is_equal(old: Shape, new: Shape) -> bool:
    """Say whether two blocks certainly hold as many places."""
    sizes = [size for size in (*old, *new) if size is not None]
    known = len(sizes) == len(old) + len(new)
    return known and math.prod(s or 0 for s in old) == math.prod(s or 0 for s in new)


def _in_block(
    old: Shape, axis: int, label: Label, size: int, new: Shape
) -> tuple[int, Label] | None:
    """Return the new axis of units in a block whose sizes are known, and how they lie there."""
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
