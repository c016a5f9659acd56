"""What two models have in common, tensor by tensor.

Exact from their weights where those are at hand, estimated from their fingerprints where not.

A `Measurement` depends on the two models alone, so it is kept in the catalogue. What it means
is decided elsewhere (`lineage.relation`).
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.checkpoint import Checkpoint, Tensor
from embedder.encoding import Values
from embedder.fingerprint import Fingerprint, TensorPrint, fingerprinted
from embedder.sketch import transposed
from lineage.matching import MOST_WORK, best_matches, matching_work
from lineage.operations import KIN, ON_LATTICE, coarser, operation_between, operation_by_type
from lineage.pairing import Match, is_learned_vector, pair_tensors
from lineage.parts import matched_parts

METHOD = 4
"""Version of what is measured; measurements of other versions are made again."""

LARGEST_AT_ONCE = 1 << 25
"""Values of the largest tensor that is held whole: 128 MiB. Larger ones are compared in slices,
without the tests that need all values."""


@dataclass(frozen=True, slots=True)
class PairMeasure:
    """Two corresponding tensors, or the parts of them that correspond.

    Args:
        first: Name of the first's tensor.
        second: Name of the second's tensor.
        first_place: Place among the first fingerprint's tensors.
        second_place: Place among the second fingerprint's tensors.
        shape: Shape of the part, as the first has it.
        size: Values in the part.
        first_size: Values in the first's whole tensor.
        second_size: Values in the second's whole tensor.
        how: How they were paired.
        cosine: Of the values after each part's mean is taken off.
        first_energy: ‖X‖² of the part.
        second_energy: ‖Y‖² of the part.
        difference: ‖Y − X‖² of the part.
        equal: Share of the part's values that are equal.
        first_kurtosis: Excess kurtosis of the first's values.
        second_kurtosis: Excess kurtosis of the second's values.
        units: Mean cosine of sampled rows or columns with their best partners, in whatever order;
            0 where it was not looked for.
        operation: What alone explains the difference: `equal`, `turned`, `shuffled`,
            `reordered`, `cast`, `rescaled`, `quantised`, `pruned`; empty if nothing does.
        detail: More of that, in words.
        child: Which of the two the operation was applied to: `first`, `second` or empty.
        exact: Whether values were compared, or sketches.
    """

    first: str
    second: str
    first_place: int
    second_place: int
    shape: tuple[int, ...]
    size: int
    first_size: int
    second_size: int
    how: str
    cosine: float
    first_energy: float
    second_energy: float
    difference: float
    equal: float
    first_kurtosis: float = 0.0
    second_kurtosis: float = 0.0
    units: float = 0.0
    operation: str = ""
    detail: str = ""
    child: str = ""
    exact: bool = True

    @property
    def same_values(self) -> bool:
        """Whether the two are one tensor in another form, with no other numbers."""
        return self.operation in SAME


SAME = frozenset({"equal", "turned", "shuffled", "reordered", "rounded", "cast", "rescaled"})
"""Operations that leave the weights what they are."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """All pairs of counted tensors, all pairs of vectors, and what has no partner."""

    pairs: tuple[PairMeasure, ...]
    vectors: tuple[PairMeasure, ...]
    first_alone: tuple[int, ...]
    second_alone: tuple[int, ...]
    exact: bool
    limits: tuple[str, ...] = ()

    def reversed(self) -> "Measurement":
        """Return the same with the two models in the other order."""
        return Measurement(
            tuple(_reversed(pair) for pair in self.pairs),
            tuple(_reversed(pair) for pair in self.vectors),
            self.second_alone,
            self.first_alone,
            self.exact,
            self.limits,
        )

    def to_text(self) -> str:
        """Return it as JSON, for the catalogue."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str) -> "Measurement":
        """Return what `to_text` wrote."""
        found: dict[str, Any] = json.loads(text)
        pairs, vectors = (
            tuple(PairMeasure(**{**pair, "shape": tuple(pair["shape"])}) for pair in found[name])
            for name in ("pairs", "vectors")
        )
        return Measurement(
            pairs,
            vectors,
            tuple(found["first_alone"]),
            tuple(found["second_alone"]),
            found["exact"],
            tuple(found["limits"]),
        )


def _reversed(pair: PairMeasure) -> PairMeasure:
    other = {"first": "second", "second": "first", "": ""}
    return replace(
        pair,
        first=pair.second,
        second=pair.first,
        first_place=pair.second_place,
        second_place=pair.first_place,
        first_size=pair.second_size,
        second_size=pair.first_size,
        first_energy=pair.second_energy,
        second_energy=pair.first_energy,
        first_kurtosis=pair.second_kurtosis,
        second_kurtosis=pair.first_kurtosis,
        child=other[pair.child],
    )


def measure(
    first: Fingerprint,
    second: Fingerprint,
    opened: tuple[Checkpoint, Checkpoint] | None = None,
) -> Measurement:
    """Measure what two models have in common.

    Args:
        first: One model's fingerprint.
        second: The other's.
        opened: Both models, open, to compare values; without them sketches are compared.

    Raises:
        CheckpointError: A tensor could not be read.
    """
    if opened is None:
        compare: Comparer = _ComparedBySketch(first, second)
    else:
        compare = _ComparedByValue(first, second, opened)
    compared_pairs = [compare(match) for match in pair_tensors(first, second)]
    pairs = tuple(pair for pair in compared_pairs if pair.size)  # parts in common, if any
    vectors = tuple(compare(match) for match in pair_tensors(first, second, is_learned_vector))
    limits = []
    if not all(pair.exact for pair in (*pairs, *vectors)):
        limits.append("some numbers are estimated from sketches, not from the weights")
    paired = {pair.first_place for pair in pairs}, {pair.second_place for pair in pairs}
    return Measurement(
        pairs,
        vectors,
        _alone(first, paired[0]),
        _alone(second, paired[1]),
        opened is not None,
        tuple(limits),
    )


Comparer = Callable[[Match], PairMeasure]


def _alone(fingerprint: Fingerprint, paired: set[int]) -> tuple[int, ...]:
    return tuple(
        place
        for place, tensor in enumerate(fingerprint.tensors)
        if tensor.counted and place not in paired
    )


def _start(first: TensorPrint, second: TensorPrint, match: Match) -> PairMeasure:
    """Return what is known of a pair from two records alone, as if nothing were in common."""
    return PairMeasure(
        first=first.name,
        second=second.name,
        first_place=match.first,
        second_place=match.second,
        shape=first.squeezed,
        size=first.size,
        first_size=first.size,
        second_size=second.size,
        how=match.how,
        cosine=match.cosine,
        first_energy=first.summary.norm**2,
        second_energy=second.summary.norm**2,
        difference=first.summary.norm**2 + second.summary.norm**2,
        equal=0.0,
        first_kurtosis=first.summary.kurtosis,
        second_kurtosis=second.summary.kurtosis,
        exact=False,
    )


class _ComparedBySketch:
    """Compares two tensors by their sketches."""

    def __init__(self, first: Fingerprint, second: Fingerprint) -> None:
        self._first, self._second = first, second

    def __call__(self, match: Match) -> PairMeasure:
        ours, theirs = self._first.tensors[match.first], self._second.tensors[match.second]
        start = _start(ours, theirs, match)
        if match.how in ("equal", "turned"):
            return replace(start, difference=0.0, equal=1.0, operation=match.how, exact=True)
        if match.how == "shuffled":
            return replace(start, operation="shuffled", cosine=1.0, difference=0.0)
        if match.grown:
            return start
        turned = transposed(theirs.sketch, theirs.squeezed, match.order)
        difference = float(np.sum((turned - ours.sketch).astype(np.float64) ** 2))
        measured = replace(start, difference=difference)
        energy = max(measured.first_energy, measured.second_energy)
        found = (
            operation_by_type((ours, theirs), math.sqrt(difference / energy)) if energy else None
        )
        if found is None:
            return measured
        return replace(measured, operation=found.name, detail=found.detail, child=found.child)


class _ComparedByValue:
    """Compares two tensors by their values."""

    def __init__(
        self, first: Fingerprint, second: Fingerprint, opened: tuple[Checkpoint, Checkpoint]
    ) -> None:
        self._prints = first.tensors, second.tensors
        self._tensors = fingerprinted(opened[0]), fingerprinted(opened[1])
        self._by_sketch = _ComparedBySketch(first, second)
        self._work_left = MOST_WORK

    def __call__(self, match: Match) -> PairMeasure:
        prints = self._prints[0][match.first], self._prints[1][match.second]
        start = _start(*prints, match)
        if match.how == "equal":
            return replace(start, difference=0.0, equal=1.0, operation="equal", exact=True)
        tensors = self._tensors[0][match.first], self._tensors[1][match.second]
        if max(tensor.size for tensor in tensors) > LARGEST_AT_ONCE:
            return self._in_slices(match, tensors, start)
        x = np.squeeze(tensors[0].canonical()).reshape(prints[0].squeezed)
        y = np.squeeze(tensors[1].canonical()).reshape(prints[1].squeezed)
        y = np.transpose(y, match.order)
        if match.grown:
            x, y, detail = matched_parts(x, y, match.grown)
            start = replace(start, shape=x.shape, size=x.size, detail=detail)
        if x.size == 0:
            return start
        measured = _with(start, compared([(x, y)]))
        found = operation_between(x, y, prints, measured.cosine)
        if found is None and measured.cosine < KIN and not match.grown:
            return replace(measured, units=self._units(x, y))
        if found is None:
            child = coarser(x, y, prints) if measured.cosine > KIN else ""
            return replace(measured, detail=ON_LATTICE, child=child) if child else measured
        if match.grown and measured.equal == 1:
            return replace(measured, operation="equal")
        detail = "; ".join(filter(None, (found.detail, start.detail)))
        return replace(measured, operation=found.name, detail=detail, child=found.child)

    def _units(self, x: Values, y: Values) -> float:
        """Look for rows or columns in another order, while the work for one pair allows it."""
        work = matching_work(x.shape)
        if work > self._work_left:
            return 0.0
        self._work_left -= work
        return best_matches(x, y)

    def _in_slices(
        self, match: Match, tensors: tuple[Tensor, Tensor], start: PairMeasure
    ) -> PairMeasure:
        plain = match.order == tuple(range(len(match.order))) and not match.grown
        same = tensors[0].shape == tensors[1].shape and tensors[0].order == tensors[1].order
        if not (plain and same):
            return self._by_sketch(match)
        blocks = zip(tensors[0].blocks(), tensors[1].blocks(), strict=True)
        numbers = compared((ours.values, theirs.values) for ours, theirs in blocks)
        return _with(start, numbers)


@dataclass(frozen=True, slots=True)
class Numbers:
    """How two arrays of equal shape compare; the fields are those of `PairMeasure`."""

    cosine: float
    first_energy: float
    second_energy: float
    difference: float
    equal: float
    first_kurtosis: float
    second_kurtosis: float


def _with(start: PairMeasure, numbers: Numbers) -> PairMeasure:
    return replace(
        start,
        cosine=numbers.cosine,
        first_energy=numbers.first_energy,
        second_energy=numbers.second_energy,
        difference=numbers.difference,
        equal=numbers.equal,
        first_kurtosis=numbers.first_kurtosis,
        second_kurtosis=numbers.second_kurtosis,
        exact=True,
    )


def compared(parts: Iterable[tuple[Values, Values]]) -> Numbers:
    """Compare two arrays that are given part by part.

    Args:
        parts: Pairs of arrays of equal shape, in any order.

    Example:
        >>> x = np.array([1.0, -1.0])
        >>> numbers = compared([(x, 2 * x)])
        >>> numbers.cosine, numbers.difference
        (1.0, 2.0)
    """
    count = equal = 0
    moments = np.zeros((2, 4))  # Σx, Σx², Σx³, Σx⁴ of either
    product = difference = 0.0
    for x, y in parts:
        x64 = np.asarray(x, np.float64).reshape(-1)
        y64 = np.ascontiguousarray(y, np.float64).reshape(-1)
        step = y64 - x64
        count += x64.size
        equal += x64.size - int(np.count_nonzero(step))
        product += float(x64 @ y64)
        difference += float(step @ step)
        moments += [_power_sums(x64), _power_sums(y64)]
    (first, second), (x1, y1) = moments, moments[:, 0]
    spread = max(first[1] - x1 * x1 / count, 0.0) * max(second[1] - y1 * y1 / count, 0.0)
    return Numbers(
        cosine=float((product - x1 * y1 / count) / math.sqrt(spread)) if spread > 0 else 0.0,
        first_energy=float(first[1]),
        second_energy=float(second[1]),
        difference=difference,
        equal=equal / count,
        first_kurtosis=_kurtosis(first / count),
        second_kurtosis=_kurtosis(second / count),
    )


def _power_sums(values: NDArray[np.float64]) -> list[float]:
    squares = values * values
    return [values.sum(), squares.sum(), float(squares @ values), float(squares @ squares)]


def _kurtosis(raw: NDArray[np.float64]) -> float:
    """Return the excess kurtosis from the first four raw moments."""
    mean, second, third, fourth = raw.tolist()
    variance = second - mean**2
    if variance <= 1e-12 * second:
        return 0.0
    central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
    return float(central / variance**2 - 3)


def total(pairs: Sequence[PairMeasure]) -> int:
    """Return the number of values in the given pairs."""
    return sum(pair.size for pair in pairs)
