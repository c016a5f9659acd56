"""Whether what is claimed of a model holds: claims against weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from embedder.errors import CheckpointError
from index.errors import NotCataloguedError
from lineage.comparison import Comparison, compare_models
from lineage.direction import BACKWARD, FORWARD
from lineage.known import Known
from lineage.models import Model, find_model
from lineage.relatives import find_relatives
from lineage.verdict import COPIES, Relation

SUPPORTED, REFUTED, CANNOT_SAY = "supported", "refuted", "cannot-say"


@dataclass(frozen=True, slots=True)
class Claim:
    """One thing said of a model.

    Args:
        kind: `base_model`, `adapter_base`, `relation`, `quantisation` or `derived_from_nothing`.
        value: What is claimed.
        source: Who says so: `command line`, `card`, `header` or `adapter`.
    """

    kind: str
    value: str
    source: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What the weights say to a claim.

    Args:
        claim: The claim.
        answer: `supported`, `refuted` or `cannot-say`.
        reason: One sentence.
        comparison: The evidence, where two models were compared.
        next_command: What would decide it, where nothing has.
    """

    claim: Claim
    answer: str
    reason: str
    comparison: Comparison | None = None
    next_command: str = ""


@dataclass(slots=True)
class Verification:
    """All claims of one model and the answers to them."""

    model: Model
    answers: list[Answer] = field(default_factory=list)


_RELATION_WORDS = {
    "finetune": frozenset({Relation.FINE_TUNE, Relation.LORA}),
    "quantized": frozenset({Relation.QUANTISED, Relation.PART_OF, Relation.SAME_WEIGHTS}),
    "adapter": frozenset({Relation.ADAPTER}),
    "merge": frozenset({Relation.MERGE}),
}
"""The hub's words for a relation and the findings that agree with them."""


def declared_claims(declared: dict[str, Any]) -> list[Claim]:
    """Return the claims in a model's card, config and adapter config.

    Example:
        >>> [claim.value for claim in declared_claims({"card": {"base_model": "org/base"}})]
        ['org/base']
    """
    claims = []
    card, adapter = declared.get("card", {}), declared.get("adapter", {})
    bases = card.get("base_model", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if isinstance(base, str):
            claims.append(Claim("base_model", base, "card"))
    relation = card.get("base_model_relation")
    if isinstance(relation, str):
        claims.append(Claim("relation", relation, "card"))
    base = adapter.get("base_model_name_or_path")
    if isinstance(base, str):
        claims.append(Claim("adapter_base", base, "adapter"))
    return [*claims, *_gguf_claims(declared.get("metadata", {}))]


def _gguf_claims(facts: Any) -> list[Claim]:
    """Return the bases that a GGUF header names, as the hub writes them: owner/name."""
    claims = []
    for number in range(_MOST_BASES):
        url = (
            facts.get(f"general.base_model.{number}.repo_url") if isinstance(facts, dict) else None
        )
        name = facts.get(f"general.base_model.{number}.name") if isinstance(facts, dict) else None
        value = "/".join(url.rstrip("/").split("/")[-2:]) if isinstance(url, str) else name
        if isinstance(value, str):
            claims.append(Claim("base_model", value, "header"))
    return claims


_MOST_BASES = 16


def verify_model(model: Model, known: Known | None, parents: Sequence[str] = ()) -> Verification:
    """Check the claims made of a model.

    Args:
        model: The model.
        known: Catalogued models, to find claimed bases and other ancestors; may be None.
        parents: Bases claimed on the command line; the card's claims are checked if there are none.
    """
    claims = [Claim("base_model", parent, "command line") for parent in parents]
    claims = claims or declared_claims(dict(model.fingerprint.declared))
    result = Verification(model)
    base: Comparison | None = None
    for claim in claims:
        if claim.kind in ("base_model", "adapter_base"):
            found = _base_claim(claim, model, known, len(claims))
            base = base or found.comparison
        else:
            found = _relation_claim(claim, base)
        result.answers.append(found)
    return result


def _base_claim(claim: Claim, model: Model, known: Known | None, number: int) -> Answer:
    try:
        base = find_model(claim.value, known.catalogue if known else None)
    except (NotCataloguedError, CheckpointError) as error:
        return Answer(
            claim,
            CANNOT_SAY,
            f"the claimed base cannot be read: {error}",
            next_command="lineage add PATH-OF-THE-BASE",
        )
    found = compare_models(base, model, known, corrected_for=number)
    relation, direction = found.relation, found.direction.answer
    if relation is Relation.UNRELATED:
        return Answer(claim, REFUTED, found.verdict.reasons[0], found)
    if relation is Relation.SIBLING:
        return Answer(
            claim, REFUTED, "found to be a sibling: neither descends from the other", found
        )
    if relation.related and direction == BACKWARD:
        return Answer(claim, REFUTED, "found to be a descendant of the model", found)
    if relation.related and direction == FORWARD:
        return Answer(claim, SUPPORTED, f"found as an ancestor ({relation})", found)
    other = _other_ancestor(base, model, known)
    if other is not None:
        reason = f"another ancestor is found, to which it is unrelated: {other.first.name}"
        return Answer(claim, REFUTED, reason, other)
    if relation in COPIES:
        reason = f"the two are copies ({relation}); which came first is not in the weights"
        return Answer(claim, CANNOT_SAY, reason, found)
    if relation.related:
        return Answer(
            claim, CANNOT_SAY, f"the same family ({relation}), but not which came first", found
        )
    return Answer(claim, CANNOT_SAY, found.verdict.reasons[0], found)


def _other_ancestor(base: Model, model: Model, known: Known | None) -> Comparison | None:
    """Return a found ancestor of the model that the claimed base is a stranger to."""
    if known is None:
        return None
    for found in find_relatives(model, known).parents():
        if found.direction.answer != FORWARD or found.first.content == base.content:
            continue
        if compare_models(base, found.first, known).relation is Relation.UNRELATED:
            return found
    return None


def _relation_claim(claim: Claim, base: Comparison | None) -> Answer:
    agreeing = _RELATION_WORDS.get(claim.value)
    if base is None or agreeing is None or not base.relation.related:
        return Answer(claim, CANNOT_SAY, "no claimed base was found to compare with", base)
    if base.relation in agreeing:
        return Answer(claim, SUPPORTED, f"found: {base.relation}", base)
    return Answer(claim, REFUTED, f"found: {base.relation}", base)
