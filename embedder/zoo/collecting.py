"""Takes models from outside into a zoo: their weights, and what people say of them.

Nothing that is said becomes a label or a parent: it stands in a column of its own.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from embedder.architecture import Architecture
from embedder.checkpoint import Checkpoint, is_parameter
from embedder.describing import describe
from embedder.discovery import Found, find_models
from embedder.errors import ArchitectureError, MalformedError, ModelLineageError
from embedder.opening import open_checkpoint
from embedder.writing import write_text
from embedder.zoo import shards
from embedder.zoo.nets import Array
from embedder.zoo.plan import fold_of

LARGEST = 50_000_000
"""Values of the largest model that is taken: 200 MB, as a copy in float32 is kept."""


@dataclass(slots=True)
class Collected:
    """What came of a collection.

    Args:
        folder: The zoo.
        added: Rows of models that were taken now.
        kept: Identifiers of models that were there already, the same to the last value.
        left_out: What was not taken, and why.
    """

    folder: Path
    added: list[shards.Row] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def collect(folder: Path, paths: Sequence[Path]) -> Collected:
    """Take models into a zoo.

    Args:
        folder: A zoo, or a new folder.
        paths: Models, or folders that hold some.

    Raises:
        MalformedError: The folder holds something else.
        MissingExtraError: pyarrow is not installed.
        NotFoundError: There is no such path.
    """
    _claim(folder)
    result = Collected(folder)
    try:
        for path in paths:
            for found in find_models(path):
                _take(found, result)
    finally:
        shards.join_tables(folder)
    return result


def _claim(folder: Path) -> None:
    """Make a new folder a zoo's; one that is a zoo's stays what it is."""
    if shards.read_facts(folder):
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MalformedError(folder, "holds something that is no zoo", "name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"format": shards.FORMAT, "size": shards.COLLECTED, "seed": 0}
    write_text(folder / "zoo.json", json.dumps(facts))


def _take(found: Found, result: Collected) -> None:
    """Take one model, or note why not."""
    try:
        with open_checkpoint(found.path) as checkpoint:
            if checkpoint.parameters > LARGEST:
                result.left_out.append(
                    f"{found.name}: {checkpoint.parameters:,} values, at most {LARGEST:,} are taken"
                )
                return
            weights = {
                t.name: t.read().astype(np.float32) for t in checkpoint.tensors if is_parameter(t)
            }
            described = _described(checkpoint, found.name, result)
            name = _identifier(weights)
            if shards.is_done(result.folder, name):
                result.kept.append(name)
                return
            row = _row(name, found.name, checkpoint, described, weights)
    except ModelLineageError as error:
        result.left_out.append(str(error))
        return
    tensors = {f"{name}/{tensor}": values for tensor, values in weights.items()}
    shards.write_shard(result.folder, name, tensors, [row])
    result.added.append(row)


def _described(checkpoint: Checkpoint, name: str, result: Collected) -> Architecture | None:
    try:
        return describe(checkpoint)
    except ArchitectureError as error:
        result.left_out.append(f"{name}: taken without its architecture: {error}")
        return None


def _identifier(weights: Mapping[str, Array]) -> str:
    """Return a name that the values decide."""
    digest = hashlib.sha256()
    for name, values in weights.items():
        digest.update(f"{name} {values.shape}".encode(errors="surrogateescape"))
        digest.update(np.ascontiguousarray(values).tobytes())
    return f"x{digest.hexdigest()[:10]}"


def _row(
    name: str,
    source: str,
    checkpoint: Checkpoint,
    described: Architecture | None,
    weights: Mapping[str, Array],
) -> shards.Row:
    """Return what the table holds of a model from outside; what is not known is left out."""
    design = {"architecture": asdict(described) if described else None, "tensors": list(weights)}
    return {
        "id": name,
        "shard": name,
        "role": shards.COLLECTED,
        "operation": "",
        "relation": "",
        "parents": [],
        "family": name,
        "recipe_group": name,
        "fold": fold_of(name),
        "population": source,
        "kind": described.family if described else "unknown",
        "design": json.dumps(design),
        "parameters": checkpoint.parameters,
        "declared": json.dumps(checkpoint.declared, default=str),
    }
