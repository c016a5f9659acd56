"""PEFT adapters: small tensors that change a base model, which is not in the folder.

A LoRA pair A (r × in), B (out × r) becomes one tensor, the change scaling · B · A that it makes to
the base weight, computed a few rows at a time. Its name is that of the base weight. Embeddings are
changed by (B · A)ᵀ. Other kinds of adapters are listed as they are stored.

Source:
    Hu et al. 2021, LoRA, arXiv 2106.09685; scaling by 1/√r: Kalajdzievski 2023, arXiv 2312.03732.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.checkpoint import Checkpoint, Kind, Tensor
from embedder.discovery import renderings
from embedder.encoding import Plain
from embedder.errors import MalformedError, MissingPartError
from embedder.readers import reader_of
from embedder.sniff import sniff
from embedder.storage import ComputedStorage

_PREFIX = "base_model.model."
_LARGEST_CONFIG_BYTES = 16 << 20
_DEFAULT_ALPHA = 8  # peft's own default
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB])(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?"
    r"(?:\.weight)?"
)
_SAVED = re.compile(r"\.modules_to_save(?:\.[^.]+)?(?=\.)")
_RISKY = re.compile(r"\)[*+{?]|[*+{].*[*+{].*[*+{]")
"""Patterns whose matching may take a time that grows too fast with the name."""


def open_peft(folder: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open an adapter's folder.

    Args:
        folder: The folder with `adapter_config.json`.
        allow_partial: Passed on to the reader of the weights.

    Raises:
        MissingPartError: There are no weights beside the config.
        MalformedError: The config is not a JSON object, or the factors do not fit together.
        CheckpointError: The weights cannot be read.
    """
    config = _config(folder / "adapter_config.json")
    file = _weights_file(folder)
    checkpoint = reader_of(sniff(file) or "")(file, allow_partial=allow_partial)
    try:
        kind = str(config.get("peft_type", "LORA")).upper()
        if kind == "LORA":
            tensors = _lora_tensors(folder, checkpoint, config)
        else:
            tensors = [replace(one, name=_base_name(one.name)) for one in checkpoint.tensors]
            checkpoint.limits.append(
                f"a {kind[:40]} adapter: its tensors are listed as stored, not as changes of "
                "the base model's weights"
            )
    except BaseException:
        checkpoint.close()
        raise
    checkpoint.tensors = tuple(tensors)
    checkpoint.location = str(folder)
    checkpoint.adapter = True
    return checkpoint


def _config(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _LARGEST_CONFIG_BYTES:
            raise MalformedError(file, "an adapter's config of more than 16 MB")
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        if isinstance(error, MalformedError):
            raise
        raise MalformedError(file, f"it is not JSON ({error})", "get the file again") from error
    if not isinstance(found, dict):
        raise MalformedError(file, "it is not a JSON object", "get the file again")
    return found


def _weights_file(folder: Path) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file() and sniff(folder / name) is not None:
            return folder / name
    found = renderings(folder)
    if not found:
        raise MissingPartError(
            folder,
            "there are no adapter weights beside adapter_config.json",
            "get adapter_model.safetensors too",
        )
    return found[0]


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two factors of one change."""

    module: str
    embedding: bool
    a: Tensor  # (r, in, …); embeddings: (r, vocabulary)
    b: Tensor  # (out, r, 1, …); embeddings: (width, r)


def _lora_tensors(folder: Path, checkpoint: Checkpoint, config: dict[str, Any]) -> list[Tensor]:
    """Return the changes that the pairs make, and all other tensors, in the order of the file."""
    halves: dict[tuple[str, str, bool], dict[str, Tensor]] = {}
    order: list[Tensor | tuple[str, str, bool]] = []
    for tensor in checkpoint.tensors:
        match = _FACTOR.fullmatch(tensor.name)
        if match is None:
            order.append(replace(tensor, name=_base_name(tensor.name)))
            continue
        key = (match["module"], match["adapter"] or "", "embedding" in match["part"])
        if key not in halves:
            order.append(key)
        halves.setdefault(key, {})[match["part"][-1]] = tensor
    tensors = []
    for entry in order:
        if isinstance(entry, Tensor):
            tensors.append(entry)
        elif set(halves[entry]) == {"A", "B"}:
            module, _, embedding = entry
            pair = _Pair(module, embedding, halves[entry]["A"], halves[entry]["B"])
            scaling = _scaling(config, module, pair.a.canonical_shape, checkpoint.limits)
            tensors.append(_product(folder, pair, scaling))
        else:
            (alone,) = halves[entry].values()
            checkpoint.limits.append(f"{alone.name} has no other half; listed as stored")
            tensors.append(alone)
    _note_unapplied(config, checkpoint)
    return tensors


def _note_unapplied(config: dict[str, Any], checkpoint: Checkpoint) -> None:
    magnitudes = sum("lora_magnitude_vector" in tensor.name for tensor in checkpoint.tensors)
    if magnitudes or config.get("use_dora"):
        checkpoint.limits.append(
            f"a DoRA adapter: the {magnitudes} magnitude vectors are listed and not applied, "
            "since that takes the base model's weights"
        )
    biases = sum("lora_B" in tensor.name and "bias" in tensor.name for tensor in checkpoint.tensors)
    if biases:
        checkpoint.limits.append(f"{biases} biases of LoRA factors are listed as stored")


def _scaling(
    config: dict[str, Any], module: str, shape: tuple[int, ...], limits: list[str]
) -> float:
    """Return alpha / r, or alpha / √r; r is that of the factor, whatever the config says."""
    alpha = config.get("lora_alpha", _DEFAULT_ALPHA)
    patterns = config.get("alpha_pattern")
    name = module.removeprefix(_PREFIX)
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        matched = _matches(pattern, name)
        if matched is None:
            limit = f"alpha_pattern {pattern[:60]!r} is too complex and was not applied"
            limits += [limit] if limit not in limits else []
        elif matched:
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        limits.append(f"{name}: lora_alpha is {str(alpha)[:40]!r}, not a number; 8 was taken")
        alpha = _DEFAULT_ALPHA
    rank = max(1, shape[0] if shape else 1)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") is True else rank)


def _matches(pattern: str, name: str) -> bool | None:
    """Say whether a pattern of the config fits the end of a module's name; None if too complex."""
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    if len(pattern) > 200 or len(name) > 500 or _RISKY.search(pattern):
        return None
    try:
        return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None
    except re.error:
        return None


def _product(folder: Path, pair: _Pair, scaling: float) -> Tensor:
    """Return the change scaling · B · A as a tensor that is computed when it is read."""
    a, b = pair.a, pair.b
    a_shape, b_shape = a.canonical_shape, b.canonical_shape
    if (
        len(a_shape) < 2
        or len(b_shape) < 2
        or a_shape[0] != b_shape[1]
        or math.prod(b_shape[2:]) != 1
        or (pair.embedding and len(a_shape) > 2)
        or 0 in a_shape + b_shape
    ):
        raise MalformedError(
            folder,
            f"the LoRA factors of {pair.module!r} do not fit: {list(a_shape)} and {list(b_shape)}",
        )
    rank, factor = a_shape[0], np.float32(scaling)
    if pair.embedding:
        shape: tuple[int, ...] = (a_shape[1], b_shape[0])

        def compute(first: int, last: int) -> NDArray[np.float32]:
            return factor * (_columns(a, first, last).T @ _rows(b, 0, b_shape[0]).T)

    else:
        shape = (b_shape[0], *a_shape[1:])

        def compute(first: int, last: int) -> NDArray[np.float32]:
            # (rows, r) · (r, in · space)
            return factor * (_rows(b, first, last) @ _rows(a, 0, rank))

    return Tensor(
        name=f"{_base_name(pair.module)}.weight",
        shape=shape,
        encoding=Plain("F32"),
        storage=ComputedStorage(shape[0], math.prod(shape[1:]), compute),
        kind=Kind.WEIGHT,
        stored_values=a.size + b.size,
    )


def _rows(tensor: Tensor, first: int, last: int) -> NDArray[np.float32]:
    """Return rows of a factor as a matrix: (last − first, all other axes)."""
    if tensor.axes or tensor.encoding.unit_values > 1:
        rows = tensor.canonical()[first:last]
    else:
        below = math.prod(tensor.shape[1:])
        rows = _run(tensor, first * below, last * below)
    return rows.reshape(last - first, -1).astype(np.float32, copy=False)


def _columns(tensor: Tensor, first: int, last: int) -> NDArray[np.float32]:
    """Return columns of a matrix: (r, last − first)."""
    if tensor.axes or tensor.encoding.unit_values > 1:
        return tensor.canonical()[:, first:last].astype(np.float32, copy=False)
    rows, width = tensor.shape
    runs = [_run(tensor, row * width + first, row * width + last) for row in range(rows)]
    return np.stack(runs).astype(np.float32, copy=False)


def _run(tensor: Tensor, first: int, last: int) -> NDArray[Any]:
    """Return a run of a tensor's values in stored order."""
    width = tensor.encoding.unit_bytes
    return tensor.encoding.decode(tensor.storage.read(first * width, last * width), first)


def _base_name(name: str) -> str:
    """Return the base model's name of what an adapter's tensor belongs to.

    Example:
        >>> _base_name("base_model.model.classifier.modules_to_save.default.weight")
        'classifier.weight'
    """
    return _SAVED.sub("", name.removeprefix(_PREFIX))
