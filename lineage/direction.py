"""Which of two models came first: a separate answer, with its own reasons.

Only what cannot be undone decides: rounding, a lattice, zeros, added rows, folded norms, and third
models. Growth of the norm is told and decides nothing: its sign depends on the optimiser (positive
in every fine-tune of our controls with AdamW, negative in every one with SGD and weight decay).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from embedder.checkpoint import Kind
from embedder.fingerprint import Fingerprint
from lineage.measure import Measurement
from lineage.operations import ON_LATTICE
from lineage.third import AT, Meeting
from lineage.verdict import Relation, Verdict

FORWARD = "parent→child"
BACKWARD = "child→parent"
UNKNOWN = "unknown"

_OPPOSITE = {FORWARD: BACKWARD, BACKWARD: FORWARD, UNKNOWN: UNKNOWN}


@dataclass(frozen=True, slots=True)
class Direction:
    """Which of two models came first; `parent→child` means the first.

    Args:
        answer: `parent→child`, `child→parent` or `unknown`.
        confidence: Probability of the answer; .5 where it is unknown.
        reasons: Sentences.
    """

    answer: str = UNKNOWN
    confidence: float = 0.5
    reasons: tuple[str, ...] = ()

    def reversed(self) -> "Direction":
        """Return the same with the two models in the other order."""
        return Direction(_OPPOSITE[self.answer], self.confidence, self.reasons)


_IRREVERSIBLE = {"quantised": 0.99, "pruned": 0.99, "cast": 0.95}
"""Operation → how sure it is that the rounded, thinned or coarser one is the child. A wider copy of
a cast model has equal values and no direction; the rest is what a rewritten file may imitate."""

ENOUGH = 0.9
"""Probability below which third models give no direction."""

_NO_DIRECTION = frozenset(
    {
        Relation.IDENTICAL_FILE,
        Relation.SAME_TENSORS,
        Relation.SIBLING,
        Relation.SAME_START,
        Relation.UNRELATED,
        Relation.CANNOT_SAY,
    }
)


def direction_of(
    first: Fingerprint,
    second: Fingerprint,
    verdict: Verdict,
    measured: Measurement,
    meetings: Sequence[Meeting] = (),
) -> Direction:
    """Return which of two models came first.

    Args:
        first: One model.
        second: The other.
        verdict: What they are to each other.
        measured: What was measured between them.
        meetings: Where the branches of third models meet theirs.
    """
    if verdict.relation in _NO_DIRECTION:
        return Direction()
    if verdict.relation is Relation.FINE_TUNE:
        # What was done besides training shows that one is not the parent of the other, but not
        # that the other is: the two may be cousins.
        votes = _by_third_models(meetings)
    else:
        votes = [
            *_by_operation(measured),
            *_by_growth(verdict, measured),
            *_by_folding(first, second, verdict),
        ]
    answers = {vote.answer for vote in votes}
    if len(answers) == 1:
        best = max(votes, key=lambda vote: vote.confidence)
        reasons = tuple(reason for vote in votes for reason in vote.reasons)
        return Direction(best.answer, best.confidence, reasons)
    told = tuple(reason for vote in votes for reason in vote.reasons)
    return Direction(reasons=(*told, *_coarser(measured), *_norm_growth(measured)))


def _towards(child: str, confidence: float, reason: str) -> Direction:
    return Direction(FORWARD if child == "second" else BACKWARD, confidence, (reason,))


def _by_operation(measured: Measurement) -> list[Direction]:
    votes = []
    for operation, confidence in _IRREVERSIBLE.items():
        children = {
            pair.child for pair in measured.pairs if pair.operation == operation and pair.child
        }
        if len(children) == 1:
            (child,) = children
            reason = f"only the {child} is {operation}, which cannot be undone"
            votes.append(_towards(child, confidence, reason))
    return votes


def _by_growth(verdict: Verdict, measured: Measurement) -> list[Direction]:
    """Rows or columns were added to the longer one, or units taken out of the shorter."""
    grown = [pair for pair in measured.pairs if pair.first_size != pair.second_size]
    longer = {"second" if pair.second_size > pair.first_size else "first" for pair in grown}
    if len(longer) != 1:
        return []
    (larger,) = longer
    smaller = "first" if larger == "second" else "second"
    if "extend" in verdict.operations:
        return [_towards(larger, 0.95, f"the {larger} has rows or columns that the other lacks")]
    if verdict.relation is Relation.PRUNED:
        return [_towards(smaller, 0.95, f"hidden units were taken out of the {smaller}")]
    return []


def _by_folding(first: Fingerprint, second: Fingerprint, verdict: Verdict) -> list[Direction]:
    """Running statistics were folded into the weights of the model that has none."""
    if "fold-norm" not in verdict.operations:
        return []
    has = [any(t.kind is Kind.STATISTIC for t in side.tensors) for side in (first, second)]
    child = "second" if has[0] else "first"
    return [_towards(child, 0.95, f"running statistics are folded into the {child}")]


def _by_third_models(meetings: Sequence[Meeting]) -> list[Direction]:
    """The branches of several third models meet at one of the two: most roots lie beyond it."""
    at_first = sum(meeting.first < AT for meeting in meetings)
    at_second = sum(meeting.first > 1 - AT for meeting in meetings)
    if min(at_first, at_second) > 0 or max(at_first, at_second) < 2:
        return []
    hub, number = ("first", at_first) if at_first else ("second", at_second)
    child = "second" if hub == "first" else "first"
    # Of the models on the star any may be the root; only if the other one is, the answer is wrong.
    confidence = (number + 1) / (number + 2)
    if confidence < ENOUGH:
        return []
    return [_towards(child, confidence, f"the branches of {number} other models meet at the {hub}")]


def _coarser(measured: Measurement) -> list[str]:
    """Say that one cannot be the parent; whether the other is, or a cousin, is not told by that."""
    children = {pair.child for pair in measured.pairs if pair.detail == ON_LATTICE}
    if len(children) != 1:
        return []
    return [f"only the {children.pop()} lies on a lattice: it is not the parent"]


def _norm_growth(measured: Measurement) -> list[str]:
    moved = [pair for pair in measured.pairs if not pair.same_values and pair.difference > 0]
    step = sum(pair.difference for pair in moved)
    if step <= 0:
        return []
    growth = sum(pair.second_energy - pair.first_energy for pair in moved) / step
    return [f"norm growth (‖Y‖²−‖X‖²)/‖Y−X‖² is {growth:.2f}; its sign depends on the optimiser"]
