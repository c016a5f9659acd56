"""Which tensor of one model corresponds to which of another.

Names help to pair tensors that nothing else tells apart, and decide nothing: tensors are paired by
equal values first, then by near sketches over all orders of the axes, then by name, then by place
among the tensors of the same shape.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from embedder.checkpoint import Kind
from embedder.fingerprint import Fingerprint, TensorPrint
from embedder.sketch import transposed
from embedder.vector import centred_sketch

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
    """The tensors of one model that are to be paired, with their centred unit sketches."""

    def __init__(self, tensors: Sequence[TensorPrint], chosen: Chooser) -> None:
        self.tensors = tensors
        self.free = {place for place, tensor in enumerate(tensors) if chosen(tensor)}
        self.count = len(self.free)
        self._sketches: dict[int, NDArray[np.float32]] = {}

    def sorting(self, place: int) -> Order:
        """Return the order that sorts a tensor's axes by length, equal ones left in theirs."""
        shape = self.tensors[place].squeezed
        return tuple(sorted(range(len(shape)), key=lambda axis: shape[axis]))

    def sketch(self, place: int) -> NDArray[np.float32]:
        """Return the centred sketch of a tensor, of unit length, its axes sorted by length."""
        if place not in self._sketches:
            tensor = self.tensors[place]
            numbers = centred_sketch(tensor)
            length = np.linalg.norm(numbers)
            turned = transposed(numbers, tensor.squeezed, self.sorting(place))
            self._sketches[place] = turned / (length or 1)
        return self._sketches[place]

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
    for shape, ours in left.groups().items():
        theirs = right.groups().get(shape, [])
        matches += _within_group(left, right, ours, theirs)
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
        cosines, orders = _cosines(left, right, [place], others)
        for column, other in enumerate(others):
            cosine = float(cosines[0, column])
            how = "turned" if 1 - cosine < _SAME_SKETCH else "shuffled"
            found.append(Match(place, other, orders[0][column], how, cosine))
    # Equal sketches first, so that of several with one norm each finds its own.
    found.sort(key=lambda match: (match.how != "turned", -match.cosine))
    return _take(left, right, found)


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
    cosines, orders = _cosines(left, right, ours, theirs)
    matches = []
    for row, column in _best_pairs(cosines):
        place, other = ours[row], theirs[column]
        noise = 5 / np.sqrt(min(left.tensors[place].size, left.sketch(place).size))
        if cosines[row, column] > max(_LIKE, min(noise, 0.95)):
            how, cosine = "sketch", float(cosines[row, column])
            matches.append(Match(place, other, orders[row][column], how, cosine))
    taken = _take(left, right, matches)
    rows = {place: row for row, place in enumerate(ours)}
    columns = {other: column for column, other in enumerate(theirs)}

    def match(place: int, other: int, how: str) -> Match:
        row, column = rows[place], columns[other]
        return Match(place, other, orders[row][column], how, float(cosines[row, column]))

    names = {right.tensors[other].name: other for other in theirs if other in right.free}
    named = [
        match(place, names[left.tensors[place].name], "name")
        for place in ours
        if place in left.free and left.tensors[place].name in names
    ]
    taken += _take(left, right, named)
    rest = zip(
        [place for place in ours if place in left.free],
        [other for other in theirs if other in right.free],
        strict=False,
    )
    return taken + _take(left, right, [match(place, other, "place") for place, other in rest])


def _cosines(
    left: _Side, right: _Side, ours: list[int], theirs: list[int]
) -> tuple[NDArray[np.float64], list[list[Order]]]:
    """Return the best cosine over orders of axes for each pair, and the order that gave it.

    Another order than the plain one must be clearly better, or noise would choose it.
    """
    shape = tuple(sorted(left.tensors[ours[0]].squeezed))
    rows = np.stack([left.sketch(place) for place in ours]).astype(np.float64)
    columns = [right.sketch(other) for other in theirs]
    ties = _tie_orders(shape)
    cosines = np.zeros((len(ours), len(theirs)))
    chosen = np.zeros((len(ours), len(theirs)), np.intp)
    for turn, tie in enumerate(ties):
        turned = np.stack([transposed(numbers, shape, tie) for numbers in columns])
        found = rows @ turned.T.astype(np.float64)
        better = (found > cosines + 0.2) & (found > _LIKE)
        better |= (1 - found < _SAME_SKETCH) & (found > cosines)
        replaced = np.ones_like(better) if turn == 0 else better
        cosines[replaced], chosen[replaced] = found[replaced], turn
    orders = [
        [
            _joined(left.sorting(place), right.sorting(other), ties[chosen[row, column]])
            for column, other in enumerate(theirs)
        ]
        for row, place in enumerate(ours)
    ]
    return cosines, orders


def _joined(ours: Order, theirs: Order, tie: Order) -> Order:
    """Return the order that brings the second's axes to the first's, both known when sorted."""
    order = [0] * len(ours)
    for place, axis in enumerate(ours):
        order[axis] = theirs[tie[place]]
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
            rank = (len(axes), ours.name != theirs.name, far)
            found.append((rank, Match(place, other, order, "place", 0.0, axes)))
    found.sort(key=lambda entry: entry[0])
    free = left.free.copy(), right.free.copy()
    taken = _take(left, right, [match for _, match in found])
    if all(len(side.free) <= _MOST_ALONE * side.count for side in (left, right)):
        return taken
    left.free, right.free = free
    return []


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
