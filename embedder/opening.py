"""Open a model of any known format: find what stands for it, then call exactly one reader."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embedder.checkpoint import Checkpoint, is_parameter
from embedder.declared import folder_facts
from embedder.discovery import ARCHIVE_MARK, find_models, folder_kind, unknown, whole_model
from embedder.errors import CheckpointError, EmptyModelError, NotFoundError
from embedder.readers import reader_of
from embedder.sniff import sniff


def open_checkpoint(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open one model, whatever its format.

    Args:
        path: A file, a folder that is one model, or `archive.zip!member`.
        allow_partial: Read what is there of a model with missing shards.

    Returns:
        The model, with open files: close it, or use it in a `with` statement.

    Raises:
        NotFoundError: There is no such path, or the folder is not one model.
        UnknownFormatError: No reader recognises the content.
        EmptyModelError: There is no weight in it.
        CheckpointError: Something else is wrong with the files.
        MissingExtraError: The format needs a package that is not installed.
    """
    try:
        place, kind = _place_of(path)
        checkpoint = reader_of(kind)(place, allow_partial=allow_partial)
    except PermissionError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            path, "may not be read: permission denied", "change its permissions"
        ) from error
    except IsADirectoryError as error:
        raise CheckpointError(path, "is a folder where a file is expected") from error
    if not any(is_parameter(tensor) and tensor.size for tensor in checkpoint.tensors):
        checkpoint.close()
        why = "".join(f": {limit}" for limit in checkpoint.limits[:1])
        problem = f"there is no weight in this {checkpoint.format} file{why}"
        raise EmptyModelError(path, problem, "name one with weights")
    folder = place if place.is_dir() else place.parent
    if place.is_dir() or folder_kind(folder) == "huggingface":
        checkpoint.declared = {**folder_facts(folder), **checkpoint.declared}
    _make_plain(checkpoint)
    return checkpoint


_MOST_FACTS = 100_000
"""Values that a declaration may hold: by references, ten lines of YAML can claim billions."""


def _make_plain(checkpoint: Checkpoint) -> None:
    """Bring what is declared into the types of JSON, since everything above writes it as that."""
    plain = {}
    for name, found in checkpoint.declared.items():
        try:
            plain[name] = _as_json(found, iter(range(_MOST_FACTS)))
        except RecursionError:
            checkpoint.limits.append(f"declared {name}: endless or too long; left out")
    checkpoint.declared = plain


def _as_json(value: Any, budget: Iterator[int]) -> Any:
    """Return a value as JSON can hold it; dates, NaN and the like become text.

    Raises:
        RecursionError: It refers to itself, or the budget is spent.
    """
    if next(budget, None) is None:
        raise RecursionError("too many values")
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _as_json(item, budget) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_as_json(item, budget) for item in value]
    if value is None or isinstance(value, str | int):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)


def _place_of(path: Path) -> tuple[Path, str]:
    """Return what stands for the model at a path, and the reader that it needs."""
    if not path.exists():
        archive, mark, _ = str(path).rpartition(ARCHIVE_MARK)
        if mark and Path(archive).is_file():
            return path, "zip"
        raise NotFoundError(path, "no such file or folder", "check the path")
    place = whole_model(path) if path.is_file() else path
    kind = folder_kind(place) if place.is_dir() else sniff(place)
    if kind is None and place.is_dir():
        inside = [found.name for found in find_models(place)]
        some = ", ".join(inside[:3]) + (", …" if len(inside) > 3 else "")
        raise NotFoundError(
            path,
            f"this folder is not one model; it holds {len(inside)}" + (f": {some}" if some else ""),
            "name one of them" if inside else "check the path",
        )
    if kind is None or kind == "shard-index":
        raise unknown(path)
    return place, kind
