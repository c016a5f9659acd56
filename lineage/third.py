"""What third models tell about two.

Independent training steps are nearly orthogonal, so squared distances nearly add along a tree.
For two models A, B and a third C the three squared distances give how far each lies from the point
where their branches meet:

    e_A = (d²_AB + d²_AC − d²_BC) / 2 = ⟨B − A, C − A⟩, and likewise e_B and e_C.

If all three are large, none of them descends from another along these branches: A and B are
siblings. If e_A is nearly zero, A lies where the branches meet.

Source:
    The three-point formula of distance-based phylogeny (Fitch & Margoliash 1967, Science 155);
    orthogonality of independent fine-tunes: docs/concepts.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lineage.measure import Measurement, PairMeasure
from lineage.relation import CLOSE
from lineage.verdict import Relation, Verdict

APART = 0.2
"""Share of d²_AB from which a model lies off the meeting point; .5 for three equal siblings, 0 for
a parent. Steps are orthogonal to within .1 of their length for fine-tunes on other data."""

AT = 0.1
"""Share of d²_AB below which it lies at the meeting point."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the branches of two models and a third meet.

    Args:
        third: Name of the third model.
        first: e_A / d²_AB, from 0 (the first lies there) to 1 (the second does).
        branch: e_C / d²_AB: how far the third lies from there.
        values: Values in the tensors that all three share.
    """

    third: str
    first: float
    branch: float
    values: int


def meeting_point(
    third: str, between: Measurement, to_first: Measurement, to_second: Measurement
) -> Meeting | None:
    """Return where three models' branches meet, or None if they share too little.

    Args:
        third: Name of the third model.
        between: What was measured between the first and the second.
        to_first: Between the first and the third.
        to_second: Between the second and the third.
    """
    by_first = {pair.first_place: pair for pair in to_first.pairs if _close(pair)}
    by_second = {pair.first_place: pair for pair in to_second.pairs if _close(pair)}
    sums = [0.0, 0.0, 0.0]
    values = 0
    for pair in between.pairs:
        ours, theirs = by_first.get(pair.first_place), by_second.get(pair.second_place)
        if not _close(pair) or ours is None or theirs is None:
            continue
        if ours.second_place != theirs.second_place:
            continue
        values += pair.size
        for place, found in enumerate((pair, ours, theirs)):
            sums[place] += found.difference
    ab, ac, bc = sums
    matched = sum(pair.size for pair in between.pairs)
    if ab <= 0 or values < 0.3 * matched:
        return None
    return Meeting(third, (ab + ac - bc) / 2 / ab, (ac + bc - ab) / 2 / ab, values)


def may_meet(measured: Measurement) -> bool:
    """Say whether two models are near enough for a place where their branches meet."""
    return any(_close(pair) for pair in measured.pairs)


def _close(pair: PairMeasure) -> bool:
    """Choose pairs that changed little and plainly: neither equal nor strangers."""
    limit = (2 * CLOSE) ** 2 * max(pair.first_energy, pair.second_energy)
    return 0 < pair.difference <= limit and pair.cosine > 0.9


def refined(verdict: Verdict, meetings: Sequence[Meeting]) -> Verdict:
    """Return the verdict that third models leave of a fine-tune.

    Args:
        verdict: From two models alone.
        meetings: Where the branches of third models meet theirs.
    """
    if verdict.relation is not Relation.FINE_TUNE or not meetings:
        return verdict
    at_one = [m for m in meetings if m.first < AT or m.first > 1 - AT]
    between = [m for m in meetings if m.branch < AT and APART < m.first < 1 - APART]
    apart = [m for m in meetings if APART < m.first < 1 - APART and m.branch > APART]
    if at_one or between or not apart:
        return verdict
    best = max(apart, key=lambda found: found.values)
    reason = (
        f"with {best.third} the branches meet off both: {best.first:.2f} and "
        f"{1 - best.first:.2f} of their squared distance from it"
    )
    return replace(verdict, relation=Relation.SIBLING, reasons=(*verdict.reasons, reason))
