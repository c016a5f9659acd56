"""The one JSON form of every answer, for the command line, scripts and later faces."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from embedder.checkpoint import Checkpoint, Kind
from embedder.fingerprint import METHOD as FINGERPRINT_METHOD
from index.catalogue import Entry
from lineage.adding import Added, Job, estimate
from lineage.claims import CANNOT_SAY, REFUTED, SUPPORTED, Answer, Verification
from lineage.comparison import Comparison
from lineage.duplicates import Group
from lineage.measure import METHOD as MEASURE_METHOD
from lineage.measure import PairMeasure
from lineage.relatives import Relatives
from lineage.tree import Tree
from lineage.verdict import Relation

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
    limits = [*found.limits, *(limit for c in found.parents() for limit in c.verdict.limits)]
    return {
        **_head("parents", catalogue, limits),
        "model": found.model.name,
        "searched": found.searched,
        "parents": [_relative(c, c.first.name) for c in found.parents()],
    }


def children_json(found: Relatives, catalogue: str) -> Json:
    """Return the answer of `children`."""
    limits = [*found.limits, *(limit for c in found.children() for limit in c.verdict.limits)]
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


GATE_WORDS = frozenset({SUPPORTED, REFUTED, CANNOT_SAY, "licence-conflict", *map(str, Relation)})
"""What a gate may fail on: answers, relations, and a conflict of licences."""


def gate(answer: Json, fail_on: Sequence[str], allow: Sequence[str]) -> str:
    """Return what a gate makes of the answer of `verify`: `failed`, `undecided` or `done`.

    Args:
        answer: From `verify_json`.
        fail_on: Answers or relations that fail it.
        allow: `cannot-say`, if that is no reason to stop.
    """
    answers = {claim["answer"] for claim in answer["claims"]}
    relations = {claim["evidence"].get("relation") for claim in answer["claims"]}
    if (answers | relations) & set(fail_on):
        return "failed"
    undecided = not answers or "cannot-say" in answers
    return "undecided" if undecided and "cannot-say" not in allow else "done"


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


def descent_json(tree: Tree, node: str, way: str, catalogue: str) -> Json:
    """Return the answer of `ancestors` or `descendants`: every model on the way, nearest first.

    Args:
        tree: The family trees.
        node: The node to start from.
        way: `ancestors` or `descendants`.
        catalogue: Where they were searched.
    """
    nodes = {found.id: found for found in tree.nodes}
    found: list[Json] = []
    queue = [(node, 0)]
    while queue:
        here, steps = queue.pop(0)
        edges = tree.parents_of(here) if way == "ancestors" else tree.children_of(here)
        for edge in edges:
            there = edge.parent if way == "ancestors" else edge.child
            queue.append((there, steps + 1))
            found.append(
                {
                    "model": nodes[there].name,
                    "also": list(nodes[there].also),
                    "observed": nodes[there].observed,
                    "steps": steps + 1,
                    "relation": str(edge.relation),
                    "direction": "known" if edge.known else "unknown",
                    "through": nodes[here].name,
                }
            )
    return {**_head(way, catalogue), "model": nodes[node].name, way: found}


def path_json(tree: Tree, start: str, end: str, catalogue: str) -> Json:
    """Return the answer of `path`: the edges that join two nodes, none if nothing does."""
    edges = {(edge.parent, edge.child): edge for edge in tree.edges}
    came_from: dict[str, str] = {start: start}
    queue = [start]
    while queue and end not in came_from:
        here = queue.pop(0)
        for parent, child in edges:
            for near, far in ((parent, child), (child, parent)):
                if near == here and far not in came_from:
                    came_from[far] = here
                    queue.append(far)
    steps: list[Json] = []
    there = end
    while there in came_from and there != start:
        here = came_from[there]
        edge = edges.get((here, there)) or edges[(there, here)]
        steps.append(
            {
                "from": here,
                "to": there,
                "parent": edge.parent,
                "relation": str(edge.relation),
                "direction": "known" if edge.known else "unknown",
                "length": edge.length,
            }
        )
        there = here
    return {**_head("path", catalogue), "joined": end in came_from, "steps": steps[::-1]}


def done_json(command: str, facts: Json, catalogue: str) -> Json:
    """Return the answer of a command that does something and has little to say of it."""
    return {**_head(command, catalogue), **facts}


def doctor_json(findings: Sequence[Mapping[str, str]], catalogue: str) -> Json:
    """Return the answer of `doctor`."""
    return {**_head("doctor", catalogue), "findings": [dict(found) for found in findings]}


def plan_json(jobs: Sequence[Job], unchanged: Sequence[str], catalogue: str) -> Json:
    """Return the answer of `add --dry-run`."""
    seconds, total = estimate(jobs)
    return {
        **_head("plan", catalogue),
        "models": [{"name": job.name, "format": job.kind, "bytes": job.size_bytes} for job in jobs],
        "unchanged": list(unchanged),
        "bytes": total,
        "seconds": round(seconds, 1),
    }


def problem_json(error: Exception, code: int, detail: str) -> Json:
    """Return an error as an RFC 9457 problem.

    Args:
        error: What was raised.
        code: The exit code that goes with it: 2 is a usage error.
        detail: What to tell the user.
    """
    return {
        "type": f"urn:model-lineage:{type(error).__name__}",
        "title": type(error).__name__,
        "status": 400 if code == 2 else 422,
        "detail": detail,
        "exit_code": code,
    }


_LISTS = frozenset(
    {"parents", "children", "ancestors", "descendants", "steps", "models", "groups", "claims"}
    | {"tensors", "nodes", "edges", "findings", "added", "unchanged", "failed"}
)


def limited(answer: Json, limit: int | None) -> Json:
    """Return an answer with its lists cut to so many; whole if None."""
    return {
        key: value[:limit] if key in _LISTS and isinstance(value, list) else value
        for key, value in answer.items()
    }
