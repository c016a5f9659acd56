"""Undo a reordering of hidden units where two ways of finding it agree.

Units are matched twice: by what they read, which the weights below them decide, and by what they
do, which the weights above them decide. Between relatives both matchings are the same; strangers
agree about few units, and only as far as their data made units alike. So a reordered child is told
from a stranger before anything is aligned, and alignment then shows how far the two are apart.

The channels of a residual stream and the heads of an attention are put in order too, and decide
nothing: channels may have been rotated instead, and heads are few.

Source: matching units by weights, Ainsworth et al. 2023 (Git Re-Basin), ICLR; the second matching
from the other side, as a test, is our own.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.anchors import Units
from embedder.architecture import Architecture, Op
from embedder.checkpoint import Checkpoint, Tensor, tensor_of
from embedder.coding import shipped_coder, units_of
from embedder.describing import describe
from embedder.errors import ArchitectureError
from embedder.identity import is_hidden, unit_rows
from embedder.symmetry import multiplied, reordered
from embedder.units import Gauge
from lineage.chance import Chance
from lineage.verdict import Relation, Verdict

Values = NDArray[np.floating[Any]]

AGREED = 0.6
"""Share of units about which both matchings agree, from which two models are no strangers. In a zoo
(`benchmarks/results/alignment.json`) 239 of 256 children pass that were trained further to a drift
of .3, and none of 1,693 pairs of other seeds and other recipes of one design and task."""

CONTROLS, STRANGERS = 1_693, 0.5
"""How many pairs of strangers these were, and the largest share among them."""

NEAREST = 0.2
"""Share of units whose nearest is the same from both sides, below which they are not matched one by
one: of the pairs of the zoo that agree about .6 none has less than .208."""

LEAST_UNITS = 24
"""Units below which agreement may be luck: of 24 that match at random, one agrees on average."""

RESCALED = 0.2
"""Standard deviation of the logarithm of scales from which units were rescaled: training to a drift
of .3 leaves .12 in nineteen of twenty networks of the zoo, a random rescaling about .5."""

LARGEST = 30_000_000
"""Values of a model that is aligned; more would take minutes and gigabytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """The second of two models, with its units in the order and scale of the first's.

    Args:
        units: Hidden units that were matched twice.
        agreed: Those about which both matchings agree.
        second: The aligned model, in memory.
        moved: Whether any unit changed its place.
        rescaled: Whether scales or signs were undone.
    """

    units: int
    agreed: int
    second: Checkpoint
    moved: bool
    rescaled: bool


def after_alignment(verdict: Verdict, alignment: Alignment) -> Verdict:
    """Return what a verdict on two models means whose hidden units had to be put in order.

    That the matchings from both sides agree shows that the two are no strangers, and it is the only
    chance that is told: the law of the controls is one of tensors that were not aligned.

    Args:
        verdict: Of the first model and the aligned second.
        alignment: How the units were matched.
    """
    reason = (
        f"hidden units that are matched by what they read and by what they do agree about "
        f"{alignment.agreed} of {alignment.units}; of {CONTROLS:,} pairs of strangers none does "
        f"about more than {STRANGERS:.0%}"
    )
    chance = Chance(1 / (CONTROLS + 1), "dual match of hidden units", CONTROLS, False, "zoo")
    operations = list(verdict.operations)
    if alignment.moved:
        operations.append("reorder")
    if alignment.rescaled:
        operations.append("rescale")
    related = verdict.relation not in (Relation.UNRELATED, Relation.CANNOT_SAY)
    return replace(
        verdict,
        relation=verdict.relation if related else Relation.CANNOT_SAY,
        operations=tuple(operations) if related else (),
        chance=verdict.chance and chance,
        reasons=(reason, *(verdict.reasons if related else (_SAME_START_TOO,))),
    )


_SAME_START_TOO = "a common random start explains that as well as a common trained ancestor"


@dataclass(frozen=True, slots=True, eq=False)
class Described:
    """What is matched of a model: worth keeping, as it is small and takes all weights to make.

    Args:
        architecture: How its tensors hang together.
        units: The codes of its hidden units.
    """

    architecture: Architecture
    units: Sequence[Units]

    @property
    def unknown(self) -> frozenset[str]:
        """Groups of which it is not known what is applied to them: it may be odd, as tanh is."""
        groups = self.architecture.groups.values()
        return frozenset(group.name for group in groups if group.activation == "unknown")


def described(checkpoint: Checkpoint) -> Described | None:
    """Return what is matched of a model; None for one that is too large or not understood.

    Raises:
        CheckpointError: A tensor cannot be read.
    """
    if checkpoint.parameters > LARGEST:
        return None
    try:
        architecture = describe(checkpoint)
        return Described(architecture, units_of(checkpoint, architecture))
    except ArchitectureError:
        return None


def align(
    ours: Described, theirs: Described, first: Checkpoint, second: Checkpoint
) -> Alignment | None:
    """Return the second model aligned to the first; None where they are not of one design.

    None too where the two ways of matching do not agree, as between strangers.

    Args:
        ours: What is known of the first.
        theirs: What is known of the second.
        first: The weights of the first.
        second: Those of the second.

    Raises:
        CheckpointError: A tensor cannot be read.
    """
    matched = match_units(ours.units, theirs.units)
    if not _agree(matched) and ours.unknown:
        matched = match_units(ours.units, theirs.units, ours.unknown)
    if not _agree(matched):
        return None
    return _undone(first, second, theirs.architecture, matched, dict(_beside(ours, theirs)))


def _agree(matched: Sequence["Match"]) -> bool:
    """Say whether two models are no strangers, as the two ways of matching agree."""
    units = sum(match.units for match in matched)
    if units < LEAST_UNITS or sum(match.nearest for match in matched) < NEAREST * units:
        return False
    return sum(match.agreed for match in matched) >= AGREED * units


def match_units(
    ours: Sequence[Units], theirs: Sequence[Units], signless: Collection[str] = ()
) -> list["Match"]:
    """Return the groups of two models' units, matched from both sides; none if designs differ.

    Args:
        ours: What `embedder.anchors.anchored` returns for one model.
        theirs: The same for the other.
        signless: Groups whose units may have another sign, though their gauge does not say it.
    """
    if _design(ours) != _design(theirs):
        return []
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if _is_matched(a)]
    first = min((a.depth for a, _ in pairs), default=0)
    last = max((a.depth for a, _ in pairs), default=0)
    return [
        Match(a, b, first=a.depth == first, last=a.depth == last, signless=a.group in signless)
        for a, b in pairs
    ]


def _design(units: Sequence[Units]) -> list[tuple[int, Gauge, bool, bool]]:
    return [(len(group.read), group.gauge, group.heads, group.gates) for group in units]


def _is_matched(group: Units) -> bool:
    """Say whether a group has units that may be reordered, and that do something."""
    return is_hidden(group) and not group.gates and bool(group.reach.any()) and len(group.read) > 1


def _beside(ours: Described, theirs: Described) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """Yield the order of streams' channels, if both sides agree about it, and that of heads.

    Args:
        ours: One model.
        theirs: The other, of the same design.
    """
    for a, b in zip(ours.units, theirs.units, strict=True):
        if a.channels and Gauge.NAMED not in (a.gauge, b.gauge):
            # What they hold came from the inputs, and what they do goes to the outputs.
            match = Match(a, b, first=True, last=True)
            if match.agreed >= AGREED * match.units:
                yield b.group, match.order
        elif a.heads:
            turn = shipped_coder().arrays["heads/turn"]
            # Query heads that share a key are one unit.
            size = theirs.architecture.groups[b.group].size
            one, other = (unit_rows(side.forward @ turn).reshape(size, -1) for side in (a, b))
            yield b.group, _partners(one @ other.T)


class Match:
    """The units of one group of both models, matched from both sides.

    Args:
        ours: The group of one model.
        theirs: The same group of the other.
        first: Whether its units read the inputs.
        last: Whether they feed the outputs.
        signless: Whether units may have another sign, whatever their gauge says.
    """

    def __init__(
        self, ours: Units, theirs: Units, *, first: bool, last: bool, signless: bool = False
    ) -> None:
        self.ours, self.theirs = ours, theirs
        arrays = shipped_coder().arrays
        read = arrays["first read/turn" if first else "deep read/turn"]
        reach = arrays["last reach/turn" if last else "deep reach/turn"]
        self._below = unit_rows(ours.forward @ read) @ unit_rows(theirs.forward @ read).T
        self._above = unit_rows(ours.backward @ reach) @ unit_rows(theirs.backward @ reach).T
        self.even = signless or ours.gauge is Gauge.SIGN
        self.units = len(ours.read)

    def _sized(self) -> list[Values]:
        return [np.abs(c) if self.even else c for c in (self._below, self._above)]

    @property
    def nearest(self) -> int:
        """Units whose nearest one is the same from both sides, whoever else is nearest to it."""
        one, other = (cosines.argmax(axis=1) for cosines in self._sized())
        return int((one == other).sum())

    @cached_property
    def agreed(self) -> int:
        """Units whose partner is the same from both sides."""
        one, other = (_partners(cosines) for cosines in self._sized())
        return int((one == other).sum())

    @cached_property
    def order(self) -> NDArray[np.intp]:
        """The partner of each unit, by both sides together."""
        below, above = self._sized()
        return _partners(below + above)

    @property
    def signs(self) -> Values:
        """The sign that each partner has to be given."""
        both = (self._below + self._above)[np.arange(self.units), self.order]
        return np.where(both < 0, -1.0, 1.0)

    def factors(self) -> Values:
        """Return what each unit, in its new place, is multiplied by.

        A scale makes what a unit reads longer and what it does shorter; their ratio tells it, and
        training changes that little.
        """
        if self.even:
            return self.signs
        balance = self.ours.read / np.maximum(self.ours.reach, 1e-300)
        theirs = self.theirs.read / np.maximum(self.theirs.reach, 1e-300)
        ratio = balance / np.maximum(theirs[self.order], 1e-300)
        usable = np.isfinite(ratio) & (ratio > 0)
        return np.sqrt(np.where(usable, ratio, 1.0))


def _partners(cosines: Values) -> NDArray[np.intp]:
    """Return a partner of its own for each row, for the largest sum of cosines."""
    from scipy.optimize import linear_sum_assignment  # half a second, for few pairs

    return np.asarray(linear_sum_assignment(-cosines)[1])


def _undone(
    first: Checkpoint,
    second: Checkpoint,
    architecture: Architecture,
    matched: Sequence[Match],
    beside: Mapping[str, NDArray[np.intp]],
) -> Alignment:
    """Return the aligned model."""
    orders = dict(beside)
    factors: dict[str, Values] = {}
    for match in matched:
        name = match.theirs.group
        orders.setdefault(architecture.root(name), match.order)
        scales = match.factors()
        # Where the activation is not known, scales are undone only if they are there to be seen.
        known = match.even or architecture.groups[name].gauge is Gauge.SCALE
        if known or _is_scaled(scales):
            factors[name] = scales
    ours, weights = (
        {t.name: t.read() for t in side.tensors if t.name in architecture.axes}
        for side in (first, second)
    )
    weights = multiplied(reordered(weights, architecture, orders), architecture, factors)
    weights, more = _scales_undone(ours, weights, architecture, _untold(architecture, factors))
    factors |= {name: factors.get(name, 1.0) * scales for name, scales in more.items()}
    tensors = tuple(_with(tensor, weights.get(tensor.name)) for tensor in second.tensors)
    aligned = Checkpoint(second.location, second.format, tensors, adapter=second.adapter)
    moved = any((order != np.arange(len(order))).any() for order in orders.values())
    scaled = any(_is_scaled(f) or (f < 0).any() for f in factors.values())
    units, agreed = sum(m.units for m in matched), sum(m.agreed for m in matched)
    return Alignment(units, agreed, aligned, moved, scaled)


def _is_scaled(factors: Values) -> bool:
    return bool(np.std(np.log(np.abs(factors))) > RESCALED)


def _untold(architecture: Architecture, told: Mapping[str, Values]) -> list[str]:
    """Return the groups whose units may have scales that their codes do not tell.

    These are the channels after a norm, which its gain and what reads them share, and the units of
    a gated map, whose codes stand for their negatives too and tell the sign alone.
    """
    gated = {step.inside for step in architecture.steps if step.op is Op.GATED}
    return [
        name
        for name, group in architecture.groups.items()
        if name in gated or (group.gauge is Gauge.SCALE and name not in told)
    ]


_ROUNDS = 4
"""How often scales are told: those of the rows of a matrix and of its columns depend on each other.
In a disguised transformer of the zoo's design twelve rounds more move no tensor by over .001."""


def _scales_undone(
    ours: Mapping[str, Values],
    theirs: dict[str, Values],
    architecture: Architecture,
    groups: Sequence[str],
) -> tuple[dict[str, Values], dict[str, Values]]:
    """Return the second model's weights without the scales of those groups that were rescaled.

    Args:
        ours: The weights of the first model.
        theirs: Those of the second, in the order of the first's.
        architecture: What their axes mean.
        groups: Which groups may have been rescaled.
    """
    found: dict[str, Values] = {}
    for _ in range(_ROUNDS):
        for name in groups:
            ratio = _ratio(ours, theirs, architecture, name)
            if name in found or _is_scaled(ratio):
                theirs = multiplied(theirs, architecture, {name: ratio})
                found[name] = found.get(name, 1.0) * ratio
        if not found:
            break
    return theirs, found


def _ratio(
    ours: Mapping[str, Values], theirs: Mapping[str, Values], architecture: Architecture, name: str
) -> Values:
    """Return what the units of a group have to be multiplied by, as weights on both sides tell."""
    size = architecture.groups[name].size
    # By power: the inner product of each unit's weights with the other's, and with themselves.
    products = {power: np.zeros((2, size)) for power in (1, -1)}
    # Names of tensors may differ, and so may the inputs.
    alike = [t for t in architecture.axes if t in ours and ours[t].shape == theirs[t].shape]
    for tensor in alike:
        for place, axis in enumerate(architecture.axes[tensor]):
            if axis is not None and axis.group == name and axis.power in products:
                one, other = (
                    np.moveaxis(side[tensor], place, 0)
                    .reshape(axis.before, size, axis.inner, -1)
                    .astype(np.float64)
                    for side in (ours, theirs)
                )
                products[axis.power] += [
                    np.einsum("busv,busv->u", known, other) for known in (one, other)
                ]
    (read, own), (reach, heard) = products[1], products[-1]
    told = (read > 0) & (reach > 0)
    squared = np.where(told, read * heard, 1.0) / np.where(told, own * reach, 1.0)
    return np.asarray(np.sqrt(squared))


def _with(tensor: Tensor, values: Values | None) -> Tensor:
    """Return a tensor with other values, in the axes that it has."""
    if values is None:
        return tensor
    fresh = tensor_of(tensor.name, np.ascontiguousarray(values, np.float32))
    return Tensor(
        tensor.name, tensor.shape, fresh.encoding, fresh.storage, tensor.kind, tensor.axes
    )
