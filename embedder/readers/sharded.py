"""A model in several files, with an index that says which file holds which tensor."""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedder.checkpoint import Checkpoint, Tensor
from embedder.discovery import RENDERINGS, shard_indices, shards_of, unknown
from embedder.errors import MalformedError, MissingPartError, UnknownFormatError
from embedder.readers import reader_of
from embedder.sniff import sniff

_KEEP_NAMES = frozenset({"safetensors", "pytorch", "pytorch-legacy"})
"""Formats whose readers give tensors the names that the index uses."""

_SHOWN = 5


def open_sharded(folder: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open a folder of shards as one model.

    Where a folder has several indices (of safetensors and of PyTorch files), the first complete
    set in the order of `embedder.discovery.RENDERINGS` is opened; the others are `renderings`.

    Args:
        folder: The folder with the index.
        allow_partial: Read what is there when shards are missing, and say so in `limits`.

    Raises:
        MissingPartError: Shards are missing; all of them are named.
        MalformedError: The index names tensors that no shard holds.
        UnknownFormatError: No reader recognises a shard.
        CheckpointError: A shard cannot be read.
    """
    sets = [_shard_set(index) for index in shard_indices(folder)]
    if not sets:
        raise UnknownFormatError(folder, "there is no index of shards in this folder")
    chosen = min(sets, key=lambda one: (bool(one.missing), one.preference))
    limits = _missing_limits(chosen, allow_partial)
    with ExitStack() as opened:
        shards = {}
        for name in chosen.present:
            file = folder / name
            kind = sniff(file)
            if kind is None:
                raise unknown(file)
            shards[name] = reader_of(kind)(file, allow_partial=allow_partial)
            opened.callback(shards[name].close)
        tensors = _join(chosen, shards, limits)
        if chosen.preference < len(_KEEP_NAMES):
            _compare_with_index(chosen, shards, limits, allow_partial=allow_partial)
        closing = opened.pop_all()
    first = next(iter(shards.values()))
    metadata = _metadata(chosen.index_file)
    return Checkpoint(
        location=str(folder),
        format=first.format,
        tensors=tensors,
        files=(chosen.index_file, *(folder / name for name in chosen.present)),
        declared={**first.declared, **({"index": metadata} if metadata else {})},
        limits=limits,
        aliases={name: of for shard in shards.values() for name, of in shard.aliases.items()},
        renderings=tuple(one.index_file for one in sets if one is not chosen),
        on_close=[closing.close],
    )


@dataclass(frozen=True, slots=True)
class _ShardSet:
    """An index and what it names.

    Args:
        index_file: The index.
        tensors: Shard → names of its tensors.
        present: Shards that are there.
        missing: Shards that are not.
        preference: Place of their format among the renderings.
    """

    index_file: Path
    tensors: dict[str, list[str]]
    present: tuple[str, ...]
    missing: tuple[str, ...]
    preference: int


def _shard_set(index_file: Path) -> _ShardSet:
    tensors = shards_of(index_file)
    if not tensors:
        raise MalformedError(index_file, "the index names no shard", "get the index again")
    there = [name for name in tensors if _is_file(index_file.with_name(name))]
    kind = sniff(index_file.with_name(there[0])) if there else None
    return _ShardSet(
        index_file=index_file,
        tensors=tensors,
        present=tuple(there),
        missing=tuple(name for name in tensors if name not in set(there)),
        preference=RENDERINGS.index(kind) if kind in RENDERINGS else len(RENDERINGS),
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for the file system
        return False


def _missing_limits(chosen: _ShardSet, allow_partial: bool) -> list[str]:
    """Return what to say of missing shards; raise if they may not be missing."""
    if not chosen.missing:
        return []
    total = len(chosen.tensors)
    problem = f"{len(chosen.missing)} of {total} shards are missing: {', '.join(chosen.missing)}"
    if not allow_partial or not chosen.present:
        raise MissingPartError(
            chosen.index_file.parent,
            problem,
            "get them, or read the rest with --allow-partial" if chosen.present else "get them",
        )
    lost = sum(len(chosen.tensors[name]) for name in chosen.missing)
    return [f"{problem}; their {lost} tensors were not read"]


def _join(
    chosen: _ShardSet, shards: dict[str, Checkpoint], limits: list[str]
) -> tuple[Tensor, ...]:
    """Return the tensors of all shards; of one that lies in two, the one that the index names."""
    shard_of = {tensor: shard for shard, names in chosen.tensors.items() for tensor in names}
    joined: dict[str, Tensor] = {}
    twice = []
    for shard, checkpoint in shards.items():
        limits += checkpoint.limits
        for tensor in checkpoint.tensors:
            if tensor.name in joined:
                twice.append(tensor.name)
                if shard_of.get(tensor.name) != shard:
                    continue
            joined[tensor.name] = tensor
    if twice:
        limits.append(f"{len(twice)} tensors lie in two shards: {_some(twice)}")
    return tuple(joined.values())


def _compare_with_index(
    chosen: _ShardSet, shards: dict[str, Checkpoint], limits: list[str], *, allow_partial: bool
) -> None:
    """Say which tensors the index and the shards do not both have."""
    found = {tensor.name for checkpoint in shards.values() for tensor in checkpoint.tensors}
    found |= {name for checkpoint in shards.values() for name in checkpoint.aliases}
    listed = {name for shard in chosen.present for name in chosen.tensors[shard]}
    if absent := sorted(listed - found):
        problem = f"{len(absent)} tensors of the index are in no shard: {_some(absent)}"
        if not allow_partial:
            raise MalformedError(
                chosen.index_file, problem, "get the shards again, or use --allow-partial"
            )
        limits.append(problem)
    if extra := sorted(found - listed):
        limits.append(f"{len(extra)} tensors are in the shards, not in the index: {_some(extra)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _metadata(index_file: Path) -> dict[str, Any]:
    found = json.loads(index_file.read_bytes()).get("metadata")
    return found if isinstance(found, dict) else {}
