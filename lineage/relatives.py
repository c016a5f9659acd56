"""All catalogued kin of a model: parents, children and the rest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from embedder.matching import MARGIN
from index.search import AHEAD, Candidate
from lineage.comparison import Comparison, compare_models, reversed_comparison
from lineage.direction import BACKWARD, FORWARD
from lineage.known import Known
from lineage.models import Model
from lineage.verdict import COPIES, Relation

EXACT_FIRST = 24
"""Candidates, the likeliest first, that are compared by their weights; the rest by fingerprints."""

LISTED = frozenset(
    {
        Relation.IDENTICAL_FILE,
        Relation.SAME_TENSORS,
        Relation.SAME_WEIGHTS,
        Relation.MERGE,
        Relation.LAYER_EDIT,
        Relation.ADAPTER,
        Relation.LORA,
        Relation.FINE_TUNE,
        Relation.PART_OF,
        Relation.EXTENDED,
        Relation.PRUNED,
        Relation.QUANTISED,
        Relation.PERTURBED,
    }
)
"""Relations that `parents` and `children` list (CONTRACTS 6)."""


@dataclass(frozen=True, slots=True)
class Relatives:
    """The kin of a model among the catalogued ones.

    Args:
        model: The model that was asked about.
        searched: Catalogued models that the answer stands for, without the model itself.
        found: Comparisons whose `first` is the other model and whose `second` is this one, nearest
            first.
        limits: What the search cannot see, in sentences.
    """

    model: Model
    searched: int
    found: tuple[Comparison, ...]
    limits: tuple[str, ...] = ()

    def parents(self) -> list[Comparison]:
        """Return the listed kin that are not found to be children."""
        return [c for c in self._listed() if c.direction.answer != BACKWARD]

    def children(self) -> list[Comparison]:
        """Return the listed kin that are not found to be parents; X is the parent in each."""
        listed = [c for c in self._listed() if c.direction.answer != FORWARD]
        return [reversed_comparison(c) if c.direction.answer == BACKWARD else c for c in listed]

    def _listed(self) -> list[Comparison]:
        return [found for found in self.found if found.relation in LISTED]


def find_relatives(model: Model, known: Known, *, exact: bool = True) -> Relatives:
    """Return every catalogued model that is kin to one.

    Args:
        model: The model to ask about; it need not be catalogued.
        known: The catalogue's index.
        exact: Whether to read the weights of the likeliest candidates.
    """
    own = model.entry.id if model.entry else 0
    candidates = [c for c in known.candidates(model.fingerprint, model.code) if c.model != own]
    searched = known.size - (1 if own else 0)
    found: list[Comparison] = []
    partners: list[str] = []
    ahead: list[str] = []
    alike: list[str] = []
    for place, candidate in enumerate(candidates):
        comparison = _compared(
            model, candidate, known, exact=exact and place < EXACT_FIRST, searched=searched
        )
        if comparison.relation.related:
            found.append(comparison)
        elif candidate.margin > MARGIN:
            partners.append(comparison.first.name)
        elif candidate.ahead > AHEAD:
            ahead.append(comparison.first.name)
        elif (
            comparison.relation is Relation.CANNOT_SAY and candidate.alike and not candidate.margin
        ):
            alike.append(comparison.first.name)  # where units are known, they say more than codes
    found.sort(key=nearest_first)
    if partners or any(comparison.relation not in COPIES for comparison in found):
        ahead.clear()  # a lead is for who has nothing better
    return Relatives(
        model, searched, tuple(found), (*known.limits(), *_not_decided(partners, ahead, alike))
    )


def _not_decided(
    partners: Sequence[str], ahead: Sequence[str], alike: Sequence[str]
) -> Iterator[str]:
    """Yield what is to be said of models that may be kin, though it was not decided.

    Args:
        partners: Names of those whose units are partners of the model's.
        ahead: Names of those whose units pair off far better than those of all others.
        alike: Names of those whose codes are alike, and no more.
    """
    if partners:
        yield (
            "hidden units find partners as those of relatives do, or of models of one random "
            f"start, and kinship is not decided: {', '.join(partners)}"
        )
    if ahead:
        yield (
            "hidden units pair off far better than those of any other near model, which is a lead "
            f"and no evidence; kinship is not decided: {', '.join(ahead)}"
        )
    if alike:
        yield f"identity codes are alike, and kinship is not decided: {', '.join(alike)}"


def _compared(
    model: Model, candidate: Candidate, known: Known, *, exact: bool, searched: int
) -> Comparison:
    other = known.candidate(candidate)
    quick = compare_models(other, model, None, exact=False, corrected_for=searched)
    hinted = candidate.alike > 0 or candidate.shared > 0
    if not exact or (quick.relation is Relation.UNRELATED and not hinted):
        # Fingerprints can show that two models are strangers, and that costs no reading. Where
        # identity codes are alike, or tensors have equal norms, values may stand in another order,
        # which sketches do not see, and weights are looked at.
        return quick
    return compare_models(other, model, known, corrected_for=searched)


def nearest_first(found: Comparison) -> tuple[float, float, str]:
    """Return the key of the order in CONTRACTS 6: agreement falling, distance rising, name."""
    verdict = found.verdict
    return (-(verdict.agreement or 0.0), verdict.distance or 0.0, found.first.name)
