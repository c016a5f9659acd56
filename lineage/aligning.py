"""Undo a reordering of hidden units where they find partners that stand out.

Every unit of one model is given a partner in the other, by what the two read of which inputs.
Between relatives a partner is far nearer than any other unit; units of strangers find partners
too, but others are as near (`embedder.matching.margin`). So a reordered child is told from a
stranger before anything is aligned, and alignment then shows how far the two are apart.

The channels of a residual stream and the heads of an attention are put in order too. Heads decide
nothing, for they are few, and channels do so where they were not rotated; rotations are undone once
the rest is in order (`lineage.turning`).

Source: matching units by weights, Ainsworth et al. 2023 (Git Re-Basin), ICLR; the margin, as a
test before, is our own.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from embedder.architecture import Architecture
from embedder.checkpoint import Checkpoint, Tensor, tensor_of
from embedder.coding import Described, described, shipped_coder
from embedder.encoding import Plain
from embedder.errors import ArchitectureError
from embedder.identity import tokens_of
from embedder.matching import margin_of_kin, turned
from embedder.symmetry import Values, multiplied, reordered
from embedder.units import Gauge
from lineage.chance import Chance
from lineage.partners import Match, orders_beside, partners_of
from lineage.rescaling import is_scaled, scales_undone
from lineage.rounding import but_for_rounding, on_lattices
from lineage.turning import turned_back
from lineage.verdict import Relation, Verdict

CONTROLS, STRANGERS = 36_679, 0.28
"""How many pairs of strangers were looked at, and the largest margin among them."""

LARGEST = 150_000_000
"""Values of a model that is aligned. A language model of 131 million takes a minute and 4 GB, where
8 seconds tell that two are strangers; more would take minutes and gigabytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """The second of two models, with its units in the order and scale of the first's.

    Args:
        second: The aligned model, in memory.
        moved: Whether any unit changed its place.
        rescaled: Whether scales or signs were undone.
        turned: Whether a stream or the channels of heads were turned back.
        plain: Which of the two, `first` or `second`, has the streams that were not rotated; empty
            where none was, or that cannot be told.
    """

    second: Checkpoint
    moved: bool
    rescaled: bool
    turned: bool = False
    plain: str = ""

    @property
    def operations(self) -> tuple[str, ...]:
        """What was undone."""
        done = {"reorder": self.moved, "rescale": self.rescaled, "rotate": self.turned}
        return tuple(name for name, was in done.items() if was)


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
    undone = alignment.operations if alignment is not None else ()
    if undone and verdict.relation is Relation.SAME_TENSORS:
        equal = "all tensors are equal once that is undone"
        verdict = replace(verdict, relation=Relation.SAME_WEIGHTS, operations=(), reasons=(equal,))
    related = verdict.relation not in (Relation.UNRELATED, Relation.CANNOT_SAY)
    # What was undone says more than that the wrapping is another.
    before = [name for name in verdict.operations if not undone or name != "repackage"]
    return replace(
        verdict,
        relation=verdict.relation if related else Relation.CANNOT_SAY,
        operations=tuple(dict.fromkeys((*before, *undone))) if related else (),
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
    matched = partners_of(ours, theirs)
    return _undone(ours, theirs, first, second, matched) if matched else None


def _undone(
    ours: Described,
    theirs: Described,
    first: Checkpoint,
    second: Checkpoint,
    matched: Sequence[Match],
) -> Alignment:
    """Return the aligned model."""
    architecture = theirs.architecture
    orders = dict(orders_beside(ours, theirs))
    factors: dict[str, Values] = {}
    for match in matched:
        name = match.theirs.group
        orders.setdefault(architecture.root(name), match.order)
        scales = match.factors()
        # Where the activation is not known, scales are undone only if they are there to be seen.
        known = match.even or architecture.groups[name].gauge is Gauge.SCALE
        if known or is_scaled(scales):
            factors[name] = scales
    weights = {t.name: t.read() for t in second.tensors if t.name in architecture.axes}
    stored, given = _given(ours.architecture, architecture, first, weights)
    weights = multiplied(reordered(weights, architecture, orders), architecture, factors)
    like = _like(ours.architecture, architecture)
    turning = turned_back(given, weights, like)
    weights, more = scales_undone(given, turning.weights, architecture, factors)
    factors |= {name: factors.get(name, 1.0) * scales for name, scales in more.items()}
    scaled = any(is_scaled(f) or (f < 0).any() for f in factors.values())
    coarse: Set[str] = frozenset()
    if turning.turned or scaled:
        weights |= but_for_rounding(given, weights, stored, second.tensors)
        coarse = on_lattices(given, second.tensors)
    tensors = tuple(_with(t, weights.get(t.name), coarse) for t in second.tensors)
    aligned = Checkpoint(second.location, second.format, tensors, adapter=second.adapter)
    moved = any((order != np.arange(len(order))).any() for order in orders.values())
    return Alignment(aligned, moved, scaled, turning.turned, turning.plain)


def _given(
    ours: Architecture, theirs: Architecture, first: Checkpoint, weights: Mapping[str, Values]
) -> tuple[dict[str, Tensor], dict[str, Values]]:
    """Return the tensors of the first model, and their values, as the second names and lays them.

    Tensors are the same if the same step uses them in the same role, whatever they are called.
    Words may have been added, and a head may have other classes: those are left out.
    """
    stored: dict[str, Tensor] = {}
    given: dict[str, Values] = {}
    tensors = {tensor.name: tensor for tensor in first.tensors}
    for own, step in zip(ours.steps, theirs.steps, strict=False):
        for role, name in step.tensors.items():
            tensor = tensors.get(own.tensors.get(role, ""))
            if tensor is None or name in given or len(tensor.shape) != weights[name].ndim:
                continue
            turned = own.turned != step.turned and len(tensor.shape) == 2
            if (tensor.shape[::-1] if turned else tensor.shape) == weights[name].shape:
                values = tensor.read()
                stored[name], given[name] = tensor, values.T if turned else values
    return stored, given


def _like(ours: Architecture, theirs: Architecture) -> Architecture:
    """Return the second's description, with what only the first's says about its attention.

    A graph does not say by what queries and keys are turned.
    """
    steps = list(theirs.steps)
    for place, (own, step) in enumerate(zip(ours.steps, theirs.steps, strict=False)):
        if step.fixed and own.rotary and own.op is step.op:
            step = replace(step, rotary=True, interleaved=own.interleaved)
            steps[place] = replace(step, fixed=own.fixed)
    return replace(theirs, steps=tuple(steps))


def _with(tensor: Tensor, values: Values | None, coarse: Set[str]) -> Tensor:
    """Return a tensor with other values, in the axes that it has.

    Args:
        tensor: As it is stored.
        values: Its new values; None if it stays.
        coarse: Names of those that lay on a lattice, which other values hide.
    """
    if values is None:
        return tensor
    fresh = tensor_of(tensor.name, np.ascontiguousarray(values, np.float32))
    quantised = tensor.encoding.quantised or tensor.name in coarse
    encoding = Plain("F32", quantised=quantised)
    return Tensor(tensor.name, tensor.shape, encoding, fresh.storage, tensor.kind, tensor.axes)
