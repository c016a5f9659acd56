"""The evidence for one pair: measured, decided, refined by third models, and given a direction."""

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache

from embedder.checkpoint import Checkpoint
from embedder.coding import Described
from embedder.errors import CheckpointError
from embedder.fingerprint import take_fingerprint
from embedder.matching import margin_of_kin
from embedder.opening import open_checkpoint
from index.search import UNLIKE
from lineage.aligning import Alignment, after_pairing, align, insides_of, margin_between
from lineage.chance import corrected
from lineage.direction import Direction, direction_of
from lineage.known import Known, may_be_read, measure_pair
from lineage.measure import Measurement, measure
from lineage.models import Model
from lineage.relation import decide
from lineage.third import Meeting, may_meet, meeting_point, refined
from lineage.verdict import COPIES, Relation, Verdict

THIRD_MODELS = 6
"""Third models that are asked about one pair; each costs two measurements."""


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """What two models are to each other, with the evidence.

    Args:
        first: One model.
        second: The other.
        verdict: The relation and the numbers.
        direction: Which came first; `parent→child` means `first`.
        measured: Tensor by tensor.
        corrected_for: Number of models searched, or claims checked, for which chance is corrected.
    """

    first: Model
    second: Model
    verdict: Verdict
    direction: Direction
    measured: Measurement
    corrected_for: int = 1

    @property
    def relation(self) -> Relation:
        """The word for it."""
        return self.verdict.relation

    @property
    def chance(self) -> float | None:
        """Corrected probability of the agreement without kinship; None where values prove it."""
        if self.verdict.chance is None:
            return None
        return corrected(self.verdict.chance.p, self.corrected_for)


def compare_models(
    first: Model,
    second: Model,
    known: Known | None = None,
    *,
    exact: bool = True,
    corrected_for: int = 1,
) -> Comparison:
    """Compare two models.

    Args:
        first: One model.
        second: The other.
        known: Catalogued models, asked as third models; None to look at the pair alone.
        exact: Whether to read weights, or to be content with fingerprints.
        corrected_for: Number of models searched, or claims checked.
    """
    measured = (
        measure_pair(first, second, exact=exact)
        if known is None
        else known.measure(first, second, exact=exact)
    )
    verdict = decide(first.fingerprint, second.fingerprint, measured)
    if exact and _may_hide_more(verdict):
        measured, verdict = _by_partners(first, second, measured, verdict, known)
    meetings: list[Meeting] = []
    if known is not None and verdict.relation is Relation.CANNOT_SAY:
        constants = shared_constants(first, second, measured, known)
        if constants:
            verdict = decide(first.fingerprint, second.fingerprint, measured, constants)
    if known is not None and verdict.relation is Relation.FINE_TUNE:
        meetings = list(_meetings(first, second, measured, known, exact=exact))
        verdict = refined(verdict, meetings)
    direction = direction_of(first.fingerprint, second.fingerprint, verdict, measured, meetings)
    return Comparison(first, second, verdict, direction, measured, corrected_for)


UNDECIDED = (Relation.UNRELATED, Relation.CANNOT_SAY)
"""Answers that a reordering of hidden units gives, whatever the two are to each other."""

SHOWN_IN_PLACE = 0.9
"""Share of the values in tensors that agree where they are up to which the rest may be in another
order, or turned: where only heads were, most tensors are as they were. A new head gives that too.
"""

ROUNDED = 0.01
"""Distance up to which two models may be copies that rounding has moved apart."""


def _may_hide_more(verdict: Verdict) -> bool:
    """Say whether hidden units in another order could explain what was not found to agree."""
    shares = verdict.first_share, verdict.second_share
    partly = verdict.relation is Relation.FINE_TUNE and max(shares) < SHOWN_IN_PLACE
    return partly or verdict.relation in UNDECIDED


def _by_partners(
    first: Model, second: Model, measured: Measurement, verdict: Verdict, known: Known | None
) -> tuple[Measurement, Verdict]:
    """Return what is measured and decided of two models by the partners of their hidden units.

    Where these do not stand out nothing is changed.
    """
    try:
        with ExitStack() as stack:
            opened = known.opened if known is not None else _opener(stack)
            insides = cache(lambda m: insides_of(opened(m)))
            taken = known.described if known is not None else insides
            margin = _margin_of(first, second, taken)
            if not margin:
                return measured, verdict
            found = _aligned(first, second, margin, opened, taken)
    except (CheckpointError, OSError):
        return measured, verdict
    if found is None and verdict.relation is not Relation.UNRELATED:
        return measured, verdict  # nothing was out of order
    if found is not None and verdict.relation.related and not _shows_more(found[1], verdict):
        return measured, verdict
    return found or (measured, after_pairing(verdict, margin, None))


def _shows_more(found: Verdict, before: Verdict) -> bool:
    """Say whether more of both models agrees than did before."""
    more = found.first_share > before.first_share and found.second_share > before.second_share
    return more and bool(found.relation.related)


def _margin_of(first: Model, second: Model, taken: Callable[[Model], Described | None]) -> float:
    """Return the margin of two models, from the catalogue if it is there; 0 if it says nothing."""
    one, other = first.code, second.code
    if one is not None and other is not None and one.encoder == other.encoder:
        told = one.units and other.units and float(one.vector @ other.vector) > UNLIKE
        return margin_of_kin(one.units, other.units) if told else 0.0
    # A catalogued model without a code is one whose architecture is not known.
    unknown = any(model.entry and model.code is None for model in (first, second))
    if unknown or not may_be_read(first, second):
        return 0.0
    ours, theirs = taken(first), taken(second)
    return 0.0 if ours is None or theirs is None else margin_between(ours, theirs)


def _aligned(
    first: Model,
    second: Model,
    margin: float,
    opened: Callable[[Model], Checkpoint],
    taken: Callable[[Model], Described | None],
) -> tuple[Measurement, Verdict] | None:
    """Return what is measured and decided once the second's hidden units are put back in order.

    Random scales and bases hide that weights still look like a random start. So where units were
    rescaled or turned the first is put into the second's scales and bases too, and a relation has
    to hold in both; where streams were rotated alone, in those of the one that was not. Copies are
    so in either: small gains make what rounding leaves large in one.
    """
    if not may_be_read(first, second):
        return None
    found = _in_order_of(first, second, margin, opened, taken)
    if found is None:
        return None
    measured, verdict, alignment = found
    if verdict.relation in COPIES or not (alignment.rescaled or alignment.turned):
        return measured, verdict
    plain = "" if alignment.rescaled else alignment.plain
    near = verdict.distance is not None and verdict.distance < ROUNDED
    if not near and (plain == "first" or not (verdict.relation.related or plain == "second")):
        return measured, verdict
    back = _in_order_of(second, first, margin, opened, taken)
    if back is None:
        return measured, verdict
    other = back[1]
    if other.relation in COPIES:
        return back[0].reversed(), _reversed(other, back[0])
    if plain == "second" or not (plain or other.relation.related):
        verdict = _as_told_of(verdict, other)
    return measured, verdict


def _as_told_of(verdict: Verdict, other: Verdict) -> Verdict:
    """Return a verdict with the relation of another of the same two, named in the other order."""
    return replace(
        verdict,
        relation=other.relation,
        operations=other.operations,
        reasons=other.reasons,
        limits=tuple(dict.fromkeys((*verdict.limits, *other.limits))),
    )


def _in_order_of(
    first: Model,
    second: Model,
    margin: float,
    opened: Callable[[Model], Checkpoint],
    taken: Callable[[Model], Described | None],
) -> tuple[Measurement, Verdict, Alignment] | None:
    """Return what is measured and decided once the second's units lie as the first's."""
    ours, theirs = taken(first), taken(second)
    if ours is None or theirs is None:
        return None
    alignment = align(ours, theirs, opened(first), opened(second))
    if alignment is None or not alignment.operations:
        return None
    prints = first.fingerprint, take_fingerprint(alignment.second)
    measured = measure(*prints, (opened(first), alignment.second))
    verdict = after_pairing(decide(*prints, measured), margin, alignment)
    return measured, verdict, alignment


def _opener(stack: ExitStack) -> Callable[[Model], Checkpoint]:
    """Return what opens each model once, and keeps it open as long as the stack."""
    return cache(lambda model: stack.enter_context(open_checkpoint(model.location)))


def reversed_comparison(found: Comparison) -> Comparison:
    """Return a comparison with the two models in the other order."""
    return Comparison(
        found.second,
        found.first,
        _reversed(found.verdict, found.measured),
        found.direction.reversed(),
        found.measured.reversed(),
        found.corrected_for,
    )


def distance_from_second(found: Comparison) -> float | None:
    """Return ‖Y − X‖ / ‖X‖ with the second model as X."""
    return _reversed(found.verdict, found.measured).distance


def _reversed(verdict: Verdict, measured: Measurement) -> Verdict:
    """Return what a verdict is with the two models in the other order."""
    first = sum(pair.first_energy for pair in measured.pairs)
    second = sum(pair.second_energy for pair in measured.pairs)
    distance = verdict.distance
    if distance is not None and min(first, second) > 0:
        distance *= math.sqrt(first / second)
    return replace(
        verdict,
        distance=distance,
        first_share=verdict.second_share,
        second_share=verdict.first_share,
    )


def _meetings(
    first: Model, second: Model, between: Measurement, known: Known, *, exact: bool
) -> Iterable[Meeting]:
    """Yield where the branches of catalogued relatives meet those of two models."""
    own = {first.content, second.content}
    asked = 0
    for candidate in known.candidates(first.fingerprint):
        third = known.candidate(candidate)
        if third.content in own or asked == THIRD_MODELS or candidate.cosine < LIKE_ENOUGH:
            continue
        own.add(third.content)
        asked += 1
        to_first = known.measure(first, third, exact=exact)
        if not may_meet(to_first):
            continue
        to_second = known.measure(second, third, exact=exact)
        found = meeting_point(third.name, between, to_first, to_second)
        if found is not None:
            yield found


LIKE_ENOUGH = 0.5
"""Inner product of the vectors from which a catalogued model may be a near relative of a pair."""


def shared_constants(
    first: Model, second: Model, measured: Measurement, known: Known
) -> frozenset[bytes]:
    """Return digests of equal tensors that a third model has and nothing else of these two.

    Three models that share one tensor bit by bit and nothing else have it from a formula or a
    table, not from each other.
    """
    found = set()
    ids = {model.entry.id for model in (first, second) if model.entry}
    for pair in measured.pairs:
        tensor = first.fingerprint.tensors[pair.first_place]
        if not pair.same_values or not tensor.values:
            continue
        holders = known.catalogue.sharing([tensor.key]).keys() - ids
        others = [
            [other.key for other in side.fingerprint.counted if other.key != tensor.key]
            for side in (first, second)
        ]
        more = set().union(*(known.catalogue.sharing(keys).keys() for keys in others))
        if holders - more:
            found.add(tensor.values)
    return frozenset(found)
