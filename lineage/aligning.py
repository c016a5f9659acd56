"""Undo a reordering of hidden units where they find partners that stand out.

Every unit of one model is given a partner in the other, by what the two read of which inputs.
Between relatives a partner is far nearer than any other unit; units of strangers find partners
too, but others are as near (`embedder.matching.margin`). So a reordered child is told from a
stranger before anything is aligned, and alignment then shows how far the two are apart.

The channels of a residual stream and the heads of an attention are put in order too. Heads decide
nothing, for they are few, and channels do so where they were not rotated.

Source: matching units by weights, Ainsworth et al. 2023 (Git Re-Basin), ICLR; the margin, as a
test before, is our own.
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
from embedder.coding import Described, described, shipped_coder
from embedder.errors import ArchitectureError
from embedder.identity import is_hidden, tokens_of, unit_rows
from embedder.matching import margin_of_kin, standing_apart, turned
from embedder.symmetry import multiplied, reordered
from embedder.units import Gauge
from lineage.chance import Chance
from lineage.verdict import Relation, Verdict

Values = NDArray[np.floating[Any]]

CONTROLS, STRANGERS = 36_679, 0.28
"""How many pairs of strangers were looked at, and the largest margin among them."""

AGREED = 0.6
"""Share of a stream's channels about which what they hold and what they do must agree; else it may
have been rotated, and they stay."""

RESCALED = 0.2
"""Standard deviation of the logarithm of scales from which units were rescaled: training to a drift
of .3 leaves .12 in nineteen of twenty networks of the zoo, a random rescaling about .5."""

_DEAD = 1e-6
"""Length of a code, by the longest of its group, up to which a unit is cut off: what float32 rounds
away of a sum."""

LARGEST = 30_000_000
"""Values of a model that is aligned; more would take minutes and gigabytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """The second of two models, with its units in the order and scale of the first's.

    Args:
        second: The aligned model, in memory.
        moved: Whether any unit changed its place.
        rescaled: Whether scales or signs were undone.
    """

    second: Checkpoint
    moved: bool
    rescaled: bool


def after_pairing(verdict: Verdict, margin: float, alignment: Alignment | None) -> Verdict:
    """Return what a verdict on two models means whose hidden units are found to be partners.

    That they are shows that the two are no strangers, and it is the only chance that is told: the
    law of the controls is one of tensors that were not aligned.

    Args:
        verdict: Of the first model and the aligned second, or of the two as they are.
        margin: How much nearer their units are to their partners than to any others.
        alignment: How the second was aligned; None if it was not.
    """
    reason = (
        f"hidden units are nearer to their partners than to any other unit, with a margin of "
        f"{margin:.2f}, where a copy has 1; of {CONTROLS:,} pairs of strangers none has more than "
        f"{STRANGERS}"
    )
    chance = Chance(1 / (CONTROLS + 1), "partners of hidden units", CONTROLS, False, "zoo")
    operations = list(verdict.operations)
    if alignment is not None and alignment.moved:
        operations.append("reorder")
    if alignment is not None and alignment.rescaled:
        operations.append("rescale")
    related = verdict.relation not in (Relation.UNRELATED, Relation.CANNOT_SAY)
    return replace(
        verdict,
        relation=verdict.relation if related else Relation.CANNOT_SAY,
        operations=tuple(operations) if related else (),
        chance=verdict.chance and chance,
        limits=tuple(limit for limit in verdict.limits if limit not in _limits(verdict.chance)),
        reasons=(reason, *(verdict.reasons if related else (_SAME_START_TOO,))),
    )


def _limits(chance: Chance | None) -> tuple[str, ...]:
    return () if chance is None else chance.limits


_SAME_START_TOO = "a common random start explains that as well as a common trained ancestor"


def insides_of(checkpoint: Checkpoint) -> Described | None:
    """Return what is matched of a model; None for one that is too large or not understood.

    Raises:
        CheckpointError: A tensor cannot be read.
    """
    if checkpoint.parameters > LARGEST:
        return None
    try:
        return described(checkpoint)
    except ArchitectureError:
        return None


def margin_between(ours: Described, theirs: Described) -> float:
    """Return how much nearer units of two models are to their partners than to any others.

    It is 0 where that does not tell them from strangers.
    """
    coder = shipped_coder()
    return margin_of_kin(*(turned(tokens_of(side.units), coder) for side in (ours, theirs)))


def align(
    ours: Described, theirs: Described, first: Checkpoint, second: Checkpoint
) -> Alignment | None:
    """Return the second model aligned to the first; None where they are not of one design.

    Any two of one design can be aligned, and look more alike then: ask for their margin first.

    Args:
        ours: What is known of the first.
        theirs: What is known of the second.
        first: The weights of the first.
        second: Those of the second.

    Raises:
        CheckpointError: A tensor cannot be read.
    """
    matched = match_units(ours.units, theirs.units)
    if ours.unknown:
        signless = match_units(ours.units, theirs.units, ours.unknown)
        # Others come nearer with signs left open, so partners do so only if they were flipped.
        matched = max(matched, signless, key=_apart)
    if not matched:
        return None
    return _undone(first, second, theirs.architecture, matched, dict(_beside(ours, theirs)))


def _apart(matched: Sequence["Match"]) -> float:
    """Return how far all partners stand apart from others."""
    return sum(match.units * match.apart for match in matched)


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
    """Return what models of one design have in common; another head may have other outputs."""
    named = Gauge.NAMED
    return [
        (0 if group.gauge is named else len(group.read), group.gauge, group.heads, group.gates)
        for group in units
    ]


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

    @cached_property
    def agreed(self) -> int:
        """Units whose partner is the same from both sides."""
        one, other = (_partners(self._sized(side)) for side in (self._below, self._above))
        return int((one == other).sum())

    @cached_property
    def order(self) -> NDArray[np.intp]:
        """The partner of each unit, by what units read or by both sides."""
        return _partners(self._sized(self._told))

    @property
    def apart(self) -> float:
        """How much nearer partners are than all others, in cosine."""
        return float(standing_apart(self._sized(self._told)).min())

    @property
    def signs(self) -> Values:
        """The sign that each partner has to be given."""
        return np.where(self._told[np.arange(self.units), self.order] < 0, -1.0, 1.0)

    @cached_property
    def _told(self) -> Values:
        """The cosines that partners are told by: those among which they stand out most.

        Training moves what units do further than what they read, and a new head changes all of
        it: of children of a zoo that had drifted by .3 to .6, both sides together told 80 % of the
        partners right, the better of this and what units read 97 %.
        """
        return max((self._below, self._below + self._above), key=self._deviations)

    def _deviations(self, cosines: Values) -> float:
        """Return how far partners stand apart from all others, in standard deviations."""
        sized = self._sized(cosines)
        return float(standing_apart(sized).min() / max(float(sized.std()), 1e-12))

    def _sized(self, cosines: Values) -> Values:
        return np.abs(cosines) if self.even else cosines

    def factors(self) -> Values:
        """Return what each unit, in its new place, is multiplied by.

        A scale makes what a unit reads longer and what it does shorter; their ratio tells it, and
        training changes that little. Of a unit that was cut off on one side the other tells it.
        """
        if self.even:
            return self.signs
        theirs = self.theirs.read[self.order], self.theirs.reach[self.order]
        sides = (self.ours.read, theirs[0]), (theirs[1], self.ours.reach)
        told = np.array([_alive(one) & _alive(other) for one, other in sides])
        longer, shorter = (np.where(told, side, 1.0) for side in zip(*sides, strict=True))
        logs = np.log(longer) - np.log(shorter)
        return np.asarray(np.exp(logs.sum(axis=0) / np.maximum(told.sum(axis=0), 1)))


def _alive(lengths: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which units read, or do, anything that is more than noise of rounding."""
    return np.asarray(lengths > _DEAD * lengths.max(initial=0))


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
    return Alignment(aligned, moved, scaled)


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
