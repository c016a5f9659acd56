"""Which tensor of one model corresponds to which of another.

Names help to pair tensors that nothing else tells apart, and decide nothing: tensors are paired by
equal values first, then by near sketches over all orders of the axes, then by name, then by place
among the tensors of the same shape.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from embedder.checkpoint import Kind
from embedder.fingerprint import Fingerprint, TensorPrint
from embedder.sketch import common, turning, widths

_LIKE = 0.5
"""Sketch cosine from which two tensors are paired whatever their names. The noise between
strangers has a standard deviation of .07 for matrices and .09 for 3 × 3 kernels."""

_SAME_SKETCH = 1e-4
"""Relative difference of two sketches of equal values: rounding of float32 sums in another order
leaves below 1e-6."""


Chooser = Callable[[TensorPrint], bool]
Order = tuple[int, ...]
"""An order of axes, as `numpy.transpose` takes it."""


@dataclass(frozen=True, slots=True)
class Match:
    """Two tensors that correspond.

    Args:
        first: Place among the first model's tensors.
        second: Place among the second model's tensors.
        order: Order that brings the second's axes (those longer than 1) to the first's.
        how: `equal`, `turned` (equal in another order of axes), `shuffled` (equal size and norm,
            other order of values), `sketch`, `name` or `place`.
        cosine: Cosine of the centred sketches: an estimate of that of the values.
        grown: The axes along which one of them is longer; empty for equal shapes.
    """

    first: int
    second: int
    order: Order
    how: str
    cosine: float
    grown: tuple[int, ...] = ()


class _Side:
    """The tensors of one model that are to be paired."""

    def __init__(self, tensors: Sequence[TensorPrint], chosen: Chooser) -> None:
        self.tensors = tensors
        self.free = {place for place, tensor in enumerate(tensors) if chosen(tensor)}
        self.count = len(self.free)

    def groups(self) -> dict[tuple[int, ...], list[int]]:
        """Return the free tensors by their sorted shapes."""
        found = defaultdict(list)
        for place in sorted(self.free):
            found[tuple(sorted(self.tensors[place].squeezed))].append(place)
        return found


def is_counted(tensor: TensorPrint) -> bool:
    """Choose the tensors that count in agreement and distance."""
    return tensor.counted


def is_learned_vector(tensor: TensorPrint) -> bool:
    """Choose biases, gains, offsets and running statistics: shown, not counted."""
    return (
        tensor.kind in (Kind.BIAS, Kind.NORM, Kind.STATISTIC)
        and not tensor.constant
        and tensor.summary.not_finite == 0
        and tensor.size > 1
    )


def pair_tensors(
    first: Fingerprint, second: Fingerprint, chosen: Chooser = is_counted
) -> list[Match]:
    """Return the pairs of tensors of two models, each tensor in one pair at most.

    Args:
        first: One model.
        second: The other.
        chosen: Which tensors to pair.

    Returns:
        Pairs in the order of the first model's tensors.
    """
    left, right = _Side(first.tensors, chosen), _Side(second.tensors, chosen)
    matches = _by_digest(left, right)
    matches += _by_key(left, right)
    theirs = right.groups()
    for shape, ours in left.groups().items():
        matches += _within_group(left, right, ours, theirs.get(shape, []))
    matches += _grown(left, right)
    return sorted(matches, key=lambda match: match.first)


def _take(left: _Side, right: _Side, matches: Iterable[Match]) -> list[Match]:
    taken = []
    for match in matches:
        if match.first in left.free and match.second in right.free:
            left.free.discard(match.first)
            right.free.discard(match.second)
            taken.append(match)
    return taken


def _by_digest(left: _Side, right: _Side) -> list[Match]:
    """Pair tensors whose values have one digest: equal values in one order of axes."""
    theirs = defaultdict(list)
    for place in sorted(right.free):
        theirs[right.tensors[place].values].append(place)
    found = []
    for place in sorted(left.free):
        digest = left.tensors[place].values
        if digest and theirs.get(digest):
            order = tuple(range(len(left.tensors[place].squeezed)))
            found.append(Match(place, theirs[digest].pop(0), order, "equal", 1.0))
    return _take(left, right, found)


def _by_key(left: _Side, right: _Side) -> list[Match]:
    """Pair tensors of equal size and norm: the same values, turned or shuffled."""
    theirs = defaultdict(list)
    for place in sorted(right.free):
        if right.tensors[place].summary.norm > 0:
            theirs[right.tensors[place].key].append(place)
    found = []
    for place in sorted(left.free):
        others = theirs.get(left.tensors[place].key, [])
        shape = sorted(left.tensors[place].squeezed)
        others = [o for o in others if sorted(right.tensors[o].squeezed) == shape]
        if not others:
            continue
        cosines, turns = _cosines(left, right, [place], others)
        for column, other in enumerate(others):
            cosine = float(cosines[0, column])
            how = "turned" if 1 - cosine < _SAME_SKETCH else "shuffled"
            order = _order(left.tensors[place], right.tensors[other], int(turns[0, column]))
            found.append(Match(place, other, order, how, cosine))
    # Equal sketches first, so that of several with one norm each finds its own.
    found.sort(key=lambda match: (match.how != "turned", -match.cosine))
    return _take(left, right, found)


@lru_cache(maxsize=1024)
def _tie_orders(shape: tuple[int, ...]) -> list[Order]:
    """Return the orders that leave a sorted shape as it is, the plain one first.

    Example:
        >>> _tie_orders((3, 3, 8))
        [(0, 1, 2), (1, 0, 2)]
    """
    if len(shape) > 5:
        return [tuple(range(len(shape)))]
    return [
        order
        for order in permutations(range(len(shape)))
        if all(shape[axis] == shape[place] for place, axis in enumerate(order))
    ]


def _within_group(left: _Side, right: _Side, ours: list[int], theirs: list[int]) -> list[Match]:
    """Pair tensors of one shape: near sketches first, then names, then places."""
    if not ours or not theirs:
        return []
    cosines, turns = _cosines(left, right, ours, theirs)

    def match(row: int, column: int, how: str) -> Match:
        place, other, turn = ours[row], theirs[column], int(turns[row, column])
        order = _order(left.tensors[place], right.tensors[other], turn)
        return Match(place, other, order, how, float(cosines[row, column]))

    matches = []
    for row, column in _best_pairs(cosines):
        tensor = left.tensors[ours[row]]
        noise = 5 / math.sqrt(min(tensor.size, tensor.unit_sketch.size))
        if cosines[row, column] > max(_LIKE, min(noise, 0.95)):
            matches.append(match(row, column, "sketch"))
    taken = _take(left, right, matches)
    rows = [row for row, place in enumerate(ours) if place in left.free]
    columns = [column for column, other in enumerate(theirs) if other in right.free]
    names = {right.tensors[theirs[column]].name: column for column in columns}
    own = [left.tensors[place].name for place in ours]
    named = [match(row, names[own[row]], "name") for row in rows if own[row] in names]
    taken += _take(left, right, named)
    rows = [row for row in rows if ours[row] in left.free]
    columns = [column for column in columns if theirs[column] in right.free]
    placed = [match(*pair, "place") for pair in zip(rows, columns, strict=False)]
    return taken + _take(left, right, placed)


def _cosines(
    left: _Side, right: _Side, ours: list[int], theirs: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Return the best cosine over orders of axes for each pair, and which order gave it.

    Another order than the plain one must be clearly better, or noise would choose it.
    """
    shape = tuple(sorted(left.tensors[ours[0]].squeezed))
    rows = np.stack([left.tensors[place].unit_sketch for place in ours]).astype(np.float64)
    columns = np.stack([right.tensors[other].unit_sketch for other in theirs]).astype(np.float64)
    ties = _tie_orders(shape)
    cosines = np.zeros((len(ours), len(theirs)))
    chosen = np.zeros((len(ours), len(theirs)), np.intp)
    for turn, tie in enumerate(ties):
        turned = columns if turn == 0 else columns[:, turning(widths(shape), tie)]
        found = rows @ turned.T
        better = (found > cosines + 0.2) & (found > _LIKE)
        better |= (1 - found < _SAME_SKETCH) & (found > cosines)
        replaced = np.ones_like(better) if turn == 0 else better
        cosines[replaced], chosen[replaced] = found[replaced], turn
    return cosines, chosen


def _order(ours: TensorPrint, theirs: TensorPrint, turn: int) -> Order:
    """Return the order that brings the second's axes to the first's: one of the orders of ties."""
    tie = _tie_orders(tuple(sorted(ours.squeezed)))[turn]
    order = [0] * len(tie)
    for place, axis in enumerate(ours.by_length):
        order[axis] = theirs.by_length[tie[place]]
    return tuple(order)


def _best_pairs(cosines: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Return the pairs of the largest cosines, each row and column taken once."""
    left = cosines.copy()
    pairs = []
    for _ in range(min(cosines.shape)):
        row, column = np.unravel_index(int(np.argmax(left)), left.shape)
        if left[row, column] <= -1:
            break
        pairs.append((int(row), int(column)))
        left[row, :] = -1
        left[:, column] = -1
    return pairs


def _grown(left: _Side, right: _Side) -> list[Match]:
    """Pair tensors that differ in length alone: rows or columns were added or taken out."""
    found = []
    for place in sorted(left.free):
        for other in sorted(right.free):
            ours, theirs = left.tensors[place], right.tensors[other]
            axes = _differences(ours.squeezed, theirs.squeezed)
            if not axes or (len(axes) > 1 and not _may_hold(ours, theirs)):
                continue
            far = abs(np.log(ours.size / theirs.size))
            order = tuple(range(len(ours.squeezed)))
            alike = _continued(ours, theirs) if len(axes) == 1 else 0.0
            rank = (len(axes), -alike, ours.name != theirs.name, far)
            found.append((rank, Match(place, other, order, "place", 0.0, axes)))
    found.sort(key=lambda entry: entry[0])
    free = left.free.copy(), right.free.copy()
    taken = _take(left, right, [match for _, match in found])
    if all(len(side.free) <= _MOST_ALONE * side.count for side in (left, right)):
        return taken
    left.free, right.free = free
    return []


def _continued(ours: TensorPrint, theirs: TensorPrint) -> float:
    """Return the cosine of two sketches of different length; 0 within the noise.

    The sketch of a tensor with added rows is that of the tensor plus that of those rows, so it is
    near where they are few; the sketches of rows put in between tell nothing.
    """
    if not (ours.sketch.size and theirs.sketch.size):
        return 0.0
    first, second = common(ours.sketch, theirs.sketch, (ours.squeezed, theirs.squeezed))
    lengths = float(np.linalg.norm(first) * np.linalg.norm(second))
    cosine = float(first @ second) / lengths if lengths else 0.0
    return cosine if cosine > _LIKE else 0.0


_MOST_ALONE = 0.25
"""Share of a model's tensors that may be left without a partner if others are paired although they
differ in length: grown and thinned copies keep the skeleton, and any two strangers have some
tensors that differ along one axis only."""


def _may_hold(ours: TensorPrint, theirs: TensorPrint) -> bool:
    """Say whether the smaller of two tensors can be the larger with rows and columns taken out."""
    small, large = sorted((ours, theirs), key=lambda tensor: tensor.size)
    return (
        small.summary.maximum <= large.summary.maximum
        and small.summary.minimum >= large.summary.minimum
        and small.summary.norm <= large.summary.norm
    )


def _differences(ours: tuple[int, ...], theirs: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes along which one of two shapes is longer; empty if that pairs nothing.

    Along two axes, the first two, one must be longer in both.
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        return ()
    axes = tuple(axis for axis in range(len(ours)) if ours[axis] != theirs[axis])
    if len(axes) == 1:
        return axes
    longer = {ours[axis] > theirs[axis] for axis in axes}
    return axes if axes == (0, 1) and len(longer) == 1 else ()
