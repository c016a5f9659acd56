"""The answers of `lineage zoo` as JSON and as tables; `docs/columns.md` describes each field."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedder.errors import ModelLineageError
from embedder.zoo.building import Built
from embedder.zoo.collecting import Collected
from embedder.zoo.labels import NAMES
from embedder.zoo.shards import COLLECTED, Row, Zoo
from lineage.answers import done_json
from lineage.rendering import Table
from lineage.tables import plural

Json = dict[str, Any]

_LISTED = ("id", "role", "operation", "relation", "kind", "task", "parameters", "test_accuracy")


def build_json(built: Built) -> Json:
    """Return the answer of `zoo build`."""
    counts = Counter(row["role"] for row in built.rows)
    facts = {
        "folder": str(built.folder),
        "models": len(built.rows),
        "made": built.made,
        "kept": built.kept,
        "roles": [{"role": role, "models": number} for role, number in counts.most_common()],
        "limits": built.left_out,
    }
    return done_json("zoo-build", facts, str(built.folder))


def build_table(answer: Json) -> Table:
    """Return the table of `zoo build`: one row a role."""
    rows = [(found["role"], found["models"]) for found in answer["roles"]]
    shards = f"{plural(len(answer['made']), 'shard')} made, {len(answer['kept']):,} kept"
    closing = [f"limit   {limit}" for limit in answer["limits"]]
    closing.append(f"{plural(answer['models'], 'model')} in {answer['folder']}; {shards}.")
    return Table(("role", "models"), rows, "\n".join(closing))


def collect_json(collected: Collected) -> Json:
    """Return the answer of `zoo collect`."""
    added = [
        {"id": row["id"], "model": row["population"], "kind": row["kind"]}
        for row in collected.added
    ]
    facts = {
        "folder": str(collected.folder),
        "added": added,
        "kept": collected.kept,
        "limits": collected.left_out,
    }
    return done_json("zoo-collect", facts, str(collected.folder))


def collect_table(answer: Json) -> Table:
    """Return the table of `zoo collect`: one row a model that was taken."""
    rows = [(model["id"], model["model"], model["kind"]) for model in answer["added"]]
    closing = [f"limit   {limit}" for limit in answer["limits"]]
    kept = f"{len(answer['kept']):,} there already"
    closing.append(f"{plural(len(rows), 'model')} taken, {kept}.")
    return Table(("id", "model", "kind"), rows, "\n".join(closing))


def list_json(zoo: Zoo, wanted: Mapping[str, str]) -> Json:
    """Return the answer of `zoo list`.

    Args:
        zoo: To look in.
        wanted: Column → the value that it must have.
    """
    models = [
        {name: row[name] for name in _LISTED}
        for row in zoo
        if all(row[name] == value for name, value in wanted.items())
    ]
    return done_json("zoo-list", {"models": models}, str(zoo.folder))


def list_table(answer: Json) -> Table:
    """Return the table of `zoo list`: one row a model."""
    rows = [tuple(model[name] for name in _LISTED) for model in answer["models"]]
    columns = (
        "id",
        "role",
        "operation",
        "relation",
        "kind",
        "task",
        "parameters",
        "test_accuracy",
    )
    return Table(columns, rows, plural(len(rows), "model") + ".")


def describe_json(zoo: Zoo, model: str) -> Json:
    """Return the answer of `zoo describe`: all that the table holds, and the children.

    Raises:
        NotFoundError: There is no such model.
    """
    row = zoo.row(model)
    labels = {name: row[name] for name in NAMES}
    recipe = {name: value for name, value in row.items() if name not in NAMES}
    facts = {
        "model": model,
        "made": {**recipe, "design": _design(row)},
        "measured": labels,
        "children": [other["id"] for other in zoo if model in other["parents"]],
    }
    return done_json("zoo-describe", facts, str(zoo.folder))


def _design(row: Row) -> Json:
    """Return what a model is made of; of one from outside, how much is known of that."""
    design: Json = json.loads(row["design"])
    if row["role"] != COLLECTED:
        return design
    described = design["architecture"] or {"confidence": None}
    return {"tensors": len(design["tensors"]), "confidence": described["confidence"]}


def describe_table(answer: Json) -> Table:
    """Return the table of `zoo describe`: one row a fact."""
    facts = {**answer["made"], **answer["measured"], "children": answer["children"]}
    rows = [(name, _flat(value)) for name, value in facts.items() if value not in (None, "", [])]
    return Table(("fact", "value"), rows, names=[answer["model"]], whole=True)


def _flat(value: Any) -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items() if inner)
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def export_json(zoo: Zoo, model: str, target: Path) -> Json:
    """Write a model to a file; return the answer of `zoo export`.

    Raises:
        NotFoundError: There is no such model.
        ModelLineageError: The file is there already, or cannot be written.
    """
    from safetensors.numpy import save_file

    row, weights = zoo.row(model), zoo.weights(model)
    if target.exists():
        raise ModelLineageError(f"{target}: is there already; name a new file")
    if not target.parent.is_dir():
        raise ModelLineageError(f"{target}: there is no folder {target.parent}; make it first")
    save_file(weights, target, metadata=_header(row))
    facts = {"file": str(target), "model": model, "parameters": row["parameters"]}
    return done_json("zoo-export", facts, str(zoo.folder))


def _header(row: Row) -> dict[str, str]:
    """Return what the header of a file declares; safetensors takes texts alone."""
    known = {name: value for name, value in row.items() if value not in (None, "", [])}
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in known.items()
    }


def export_table(answer: Json) -> Table:
    """Return the table of `zoo export`: one row."""
    return Table(("file", "model"), [(answer["file"], answer["model"])])
