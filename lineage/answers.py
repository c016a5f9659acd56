"""The one JSON form of every answer, for the command line, scripts and later faces."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from embedder.checkpoint import Checkpoint, Kind
from embedder.fingerprint import METHOD as FINGERPRINT_METHOD
from index.catalogue import Entry
from lineage.adding import Added
from lineage.claims import Answer, Verification
from lineage.comparison import Comparison
from lineage.duplicates import Group
from lineage.measure import METHOD as MEASURE_METHOD
from lineage.measure import PairMeasure
from lineage.relatives import Relatives
from lineage.tree import Tree

Json = dict[str, Any]


def tool_version() -> str:
    """Return the version of this program."""
    try:
        return version("model-lineage")
    except PackageNotFoundError:
        return "0+source"


def _head(kind: str, catalogue: str, limits: Iterable[str] = ()) -> Json:
    return {
        "schema": f"lineage/{kind}/1",
        "tool_version": tool_version(),
        "method_version": f"{FINGERPRINT_METHOD}.{MEASURE_METHOD}",
        "catalogue": catalogue,
        "limits": list(dict.fromkeys(limits)),
    }


def _direction(found: Comparison) -> Json:
    direction = found.direction
    return {
        "answer": direction.answer,
        "confidence": direction.confidence,
        "reasons": list(direction.reasons),
    }


def parents_json(found: Relatives, catalogue: str) -> Json:
    """Return the answer of `parents`."""
    limits = [limit for c in found.parents() for limit in c.verdict.limits]
    return {
        **_head("parents", catalogue, limits),
        "model": found.model.name,
        "searched": found.searched,
        "parents": [_relative(c, c.first.name) for c in found.parents()],
    }


def children_json(found: Relatives, catalogue: str) -> Json:
    """Return the answer of `children`."""
    limits = [limit for c in found.children() for limit in c.verdict.limits]
    own = found.model.name
    return {
        **_head("children", catalogue, limits),
        "model": own,
        "searched": found.searched,
        "children": [
            _relative(c, c.second.name if c.first.name == own else c.first.name)
            for c in found.children()
        ],
    }


def _relative(found: Comparison, name: str) -> Json:
    verdict = found.verdict
    return {
        "model": name,
        "relation": str(verdict.relation),
        "operations": list(verdict.operations),
        "agreement": verdict.agreement,
        "distance": verdict.distance,
        "chance": found.chance,
        "direction": _direction(found),
        "share": None,
    }


def compare_json(found: Comparison, catalogue: str) -> Json:
    """Return the answer of `compare`."""
    verdict = found.verdict
    own = [
        limit
        for model in (found.first, found.second)
        for limit in (f"{model.name}: {text}" for text in model.fingerprint.limits)
    ]
    return {
        **_head("compare", catalogue, [*verdict.limits, *own]),
        "a": found.first.name,
        "b": found.second.name,
        "relation": str(verdict.relation),
        "related": verdict.relation.related,
        "operations": list(verdict.operations),
        "agreement": verdict.agreement,
        "distance": verdict.distance,
        "share_of_a": verdict.first_share,
        "share_of_b": verdict.second_share,
        "chance": found.chance,
        "chance_by": _chance_by(found),
        "direction": _direction(found),
        "reasons": list(verdict.reasons),
        "tensors": [_tensor(pair) for pair in found.measured.pairs],
        "not_counted": not_counted(found),
    }


def _chance_by(found: Comparison) -> list[Json]:
    chance = found.verdict.chance
    if chance is None:
        return []
    return [
        {
            "method": chance.method,
            "p": chance.p,
            "controls": chance.controls,
            "extrapolated": chance.extrapolated,
            "source": chance.source,
        }
    ]


def _tensor(pair: PairMeasure) -> Json:
    return {
        "a": pair.first,
        "b": pair.second,
        "shape": list(pair.shape),
        "paired_by": pair.how,
        "cosine": pair.cosine,
        "distance": (pair.difference / pair.first_energy) ** 0.5 if pair.first_energy else None,
        "equal": pair.equal,
        "operation": pair.operation or None,
        "detail": pair.detail or None,
        "exact": pair.exact,
    }


def not_counted(found: Comparison) -> Json:
    """Return the tensors of both models that are left out of the numbers, and why."""
    result: Json = {}
    for side, model in (("a", found.first), ("b", found.second)):
        result[side] = [
            {"name": tensor.name, "size": tensor.size, "why": tensor.constant or str(tensor.kind)}
            for tensor in model.fingerprint.tensors
            if not tensor.counted and tensor.kind is not Kind.BUFFER
        ]
    return result


def verify_json(found: Verification, catalogue: str) -> Json:
    """Return the answer of `verify`."""
    limits = [limit for a in found.answers if a.comparison for limit in a.comparison.verdict.limits]
    return {
        **_head("verify", catalogue, limits),
        "model": found.model.name,
        "claims": [_claim(answer, catalogue) for answer in found.answers],
    }


def _claim(answer: Answer, catalogue: str) -> Json:
    evidence: Json = {"reason": answer.reason, "claimed_by": answer.claim.source}
    if answer.comparison is not None:
        whole = compare_json(answer.comparison, catalogue)
        wanted = ("a", "b", "relation", "agreement", "distance", "chance", "chance_by", "direction")
        evidence |= {key: whole[key] for key in wanted}
    if answer.next_command:
        evidence["next_command"] = answer.next_command
    return {
        "claim": answer.claim.kind,
        "value": answer.claim.value,
        "answer": answer.answer,
        "evidence": evidence,
    }


def duplicates_json(groups: Sequence[Group], catalogue: str) -> Json:
    """Return the answer of `duplicates`."""
    return {
        **_head("duplicates", catalogue),
        "groups": [{"kind": str(group.kind), "models": list(group.models)} for group in groups],
    }


def tree_json(tree: Tree, catalogue: str) -> Json:
    """Return the answer of `tree`."""
    return {
        **_head("tree", catalogue),
        "nodes": [
            {"id": n.id, "name": n.name, "observed": n.observed, "also": list(n.also)}
            for n in tree.nodes
        ],
        "edges": [
            {
                "parent": edge.parent,
                "child": edge.child,
                "relation": str(edge.relation),
                "direction": "known" if edge.known else "unknown",
                "length": edge.length,
                "support": edge.support,
            }
            for edge in tree.edges
        ],
    }


def info_json(checkpoint: Checkpoint, given: str, catalogue: str) -> Json:
    """Return the answer of `info`."""
    dtypes: dict[str, int] = {}
    for tensor in checkpoint.tensors:
        dtypes[tensor.encoding.name] = dtypes.get(tensor.encoding.name, 0) + 1
    return {
        **_head("info", catalogue, checkpoint.limits),
        "model": given,
        "format": checkpoint.format,
        "tensors": len(checkpoint.tensors),
        "parameters": checkpoint.parameters,
        "bytes": checkpoint.size_bytes,
        "dtypes": dict(sorted(dtypes.items(), key=lambda item: -item[1])),
        "declared": dict(checkpoint.declared),
    }


def add_json(result: Added, catalogue: str) -> Json:
    """Return the answer of `add`."""
    limits = [f"{name}: {limit}" for name, found in result.limits.items() for limit in found]
    return {
        **_head("add", catalogue, limits),
        "added": result.added,
        "unchanged": result.unchanged,
        "failed": [{"model": f.model, "reason": f.reason} for f in result.failed],
    }


def list_json(entries: Iterable[Entry], catalogue: str) -> Json:
    """Return the answer of `list`."""
    return {
        **_head("list", catalogue),
        "models": [
            {
                "name": entry.name,
                "format": entry.format,
                "parameters": entry.parameters,
                "bytes": entry.size_bytes,
                "sha256": entry.sha256,
                "location": entry.location,
                "added_at": entry.added_at,
            }
            for entry in entries
        ],
    }


def problem_json(error: Exception, status: int, extra: Mapping[str, Any] | None = None) -> Json:
    """Return an error as an RFC 9457 problem."""
    return {
        "type": f"urn:model-lineage:{type(error).__name__}",
        "title": type(error).__name__,
        "status": status,
        "detail": str(error),
        **(extra or {}),
    }
