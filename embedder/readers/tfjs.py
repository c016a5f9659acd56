"""TensorFlow.js: `model.json` with a list of weights, and shards with their bytes.

The weights of a group follow each other in the group's shards as if these were one file, so a
tensor may begin in one shard and end in the next. Layers models are laid out as Keras does it;
in graph models the operations tell which axis of a filter is which.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np

from embedder.checkpoint import Checkpoint, Kind, Tensor
from embedder.encoding import Affine, Encoding, Plain
from embedder.errors import (
    MalformedError,
    MissingPartError,
    RefusedError,
    TruncatedError,
    UnsupportedError,
)
from embedder.readers.keras_layout import (
    axes_of,
    json_object,
    lambda_limits,
    layer_class,
    layers_of,
    model_facts,
    variable_kind,
    variable_word,
)
from embedder.readers.stored import check_shape, stored_tensor
from embedder.readers.views import Part
from embedder.storage import JoinedStorage, OpenFile, Storage

_LARGEST_JSON_BYTES = 256 << 20
_TYPES = {
    "float32": "F32",
    "float16": "F16",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}
_OUT_LAST = frozenset({"Conv2D", "_FusedConv2D", "FusedConv2D", "Conv1D", "Conv3D"})
_OUT_BEFORE_LAST = frozenset(
    {"DepthwiseConv2dNative", "FusedDepthwiseConv2dNative", "DepthwiseConv2d"}
    | {"Conv2DBackpropInput", "Conv2DBackpropInputV2", "Conv3DBackpropInputV2"}
)
_PRODUCTS = frozenset({"MatMul", "_FusedMatMul", "BatchMatMul", "BatchMatMulV2"})


def open_tfjs(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open a TensorFlow.js model.

    Args:
        path: `model.json`, or the folder that it is in.
        allow_partial: Read what is there where shards are missing.

    Raises:
        MalformedError: The list of weights breaks the rules of the format.
        MissingPartError: A shard is not there.
        RefusedError: The path of a shard leads out of the folder.
        TruncatedError: The shards end before their weights do.
        UnsupportedError: A type or quantisation that we do not know.
    """
    listing = path / "model.json" if path.is_dir() else path
    model = _read_json(listing)
    topology = model.get("modelTopology")
    topology = topology if isinstance(topology, dict) else {}
    layout = _Layout.of(topology)
    limits = lambda_limits(layout.layers)
    with ExitStack() as stack:
        shards: dict[str, OpenFile] = {}
        tensors: list[Tensor] = []
        for group in _groups(listing, model):
            storages = [
                _shard(
                    listing, shard, shards, stack=stack, missing=limits if allow_partial else None
                )
                for shard in group.paths
            ]
            if all(storage is not None for storage in storages):
                found = JoinedStorage([storage for storage in storages if storage is not None])
                tensors.extend(_tensors(listing, group, found, layout=layout, limits=limits))
            else:
                names = ", ".join(repr(weight.name) for weight in group.weights[:5])
                more = ", …" if group.weights[5:] else ""
                limits.append(f"not read, as a shard of their group is missing: {names}{more}")
        stack.pop_all()
    return Checkpoint(
        location=str(path),
        format="tfjs",
        tensors=tuple(tensors),
        files=(listing, *(file.path for file in shards.values())),
        declared=_declared(model, topology),
        limits=limits,
        open_files=list(shards.values()),
    )


@dataclass(frozen=True, slots=True)
class _Weight:
    """One entry of the list of weights, checked."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    quantisation: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Group:
    """Weights that follow each other in the same shards."""

    paths: tuple[str, ...]
    weights: tuple[_Weight, ...]


def _read_json(listing: Path) -> dict[str, Any]:
    try:
        size = listing.stat().st_size
        text = listing.read_bytes() if size <= _LARGEST_JSON_BYTES else b""
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingPartError(listing, "there is no such file", "get the whole folder") from error
    if not text and size:
        raise RefusedError(
            listing,
            f"has {size:,} bytes; {_LARGEST_JSON_BYTES:,} are allowed for a list of weights",
            "take the file from a source that you trust",
        )
    return json_object(text)


def _groups(listing: Path, model: dict[str, Any]) -> Iterator[_Group]:
    manifest = model.get("weightsManifest")
    if not isinstance(manifest, list):
        raise MalformedError(listing, "has no list weightsManifest", "get the file again")
    for group in manifest:
        paths = group.get("paths") if isinstance(group, dict) else None
        weights = group.get("weights") if isinstance(group, dict) else None
        if not (
            isinstance(paths, list)
            and all(isinstance(path, str) for path in paths)
            and isinstance(weights, list)
        ):
            raise MalformedError(
                listing, "a group of its weightsManifest has no paths and weights", "get it again"
            )
        yield _Group(tuple(paths), tuple(_weight(listing, weight) for weight in weights))


def _weight(listing: Path, entry: object) -> _Weight:
    if not isinstance(entry, dict):
        raise MalformedError(listing, f"a weight is {entry!r:.80}, not an object", "get it again")
    name, shape, dtype = entry.get("name"), entry.get("shape"), entry.get("dtype")
    quantisation = entry.get("quantization") or {}
    if not (
        isinstance(name, str)
        and isinstance(shape, list)
        and isinstance(dtype, str)
        and isinstance(quantisation, dict)
    ):
        raise MalformedError(listing, f"weight {name!r:.80} has no valid shape and dtype")
    check_shape(listing, name, shape)
    return _Weight(name, tuple(shape), dtype, quantisation)


def _shard(
    listing: Path,
    name: str,
    shards: dict[str, OpenFile],
    *,
    stack: ExitStack,
    missing: list[str] | None,
) -> Storage | None:
    """Return a shard, or None if it is missing and `missing` takes a note of it."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or "\0" in name or ":" in name or not name:
        raise RefusedError(
            listing,
            f"its shard {name!r} would lie outside of the folder",
            "take the model from a source that you trust",
        )
    if name not in shards:
        shard = listing.parent / parts
        if not shard.resolve().is_relative_to(listing.parent.resolve()):
            raise RefusedError(
                listing,
                f"its shard {name!r} is a link that leads out of the folder",
                "replace the link by the file",
            )
        if not shard.is_file():
            if missing is None:
                raise MissingPartError(
                    listing, f"its shard {name} is missing", "get it, or --allow-partial"
                )
            missing.append(f"the shard {name} is missing")
            return None
        shards[name] = OpenFile(shard)
        stack.callback(shards[name].close)
    return shards[name].part(0, shards[name].size_bytes, name)


def _tensors(
    listing: Path, group: _Group, content: Storage, *, layout: "_Layout", limits: list[str]
) -> Iterator[Tensor]:
    """Yield the tensors of a group, which follow each other in its shards."""
    place = 0
    siblings = {weight.name: weight.shape for weight in group.weights}
    for weight in group.weights:
        if weight.dtype == "string":
            place = _after_texts(listing, weight, content, place)
            limits.append(f"{weight.name!r} holds texts")
            continue
        encoding = _encoding(listing, weight)
        size_bytes = math.prod(weight.shape) * encoding.unit_bytes
        _check_end(listing, weight.name, place + size_bytes, content)
        axes, kind = layout.place_of(weight, siblings)
        if weight.dtype not in ("float32", "float16"):
            kind = Kind.BUFFER
        yield stored_tensor(
            listing,
            weight.name,
            weight.shape,
            encoding=encoding,
            storage=Part(content, place, size_bytes),
            kind=kind,
            axes=axes,
        )
        place += size_bytes
    if place != content.size_bytes:
        raise MalformedError(
            listing,
            f"{content.size_bytes - place:,} bytes follow the last weight in {group.paths[-1]}",
            "get the folder again",
        )


def _check_end(listing: Path, name: str, end: int, content: Storage) -> None:
    if end > content.size_bytes:
        raise TruncatedError(
            listing,
            f"TRUNCATED: weight {name!r} ends at byte {end:,} of its shards, which have "
            f"{content.size_bytes:,}",
            "get the shards again, then run the same command",
        )


def _after_texts(listing: Path, weight: _Weight, content: Storage, place: int) -> int:
    """Return where the next weight begins: each text has its length before it."""
    for _ in range(math.prod(weight.shape)):
        _check_end(listing, weight.name, place + 4, content)
        (length,) = struct.unpack("<I", content.read(place, place + 4))
        place += 4 + length
        _check_end(listing, weight.name, place, content)
    return place


def _encoding(listing: Path, weight: _Weight) -> Encoding:
    """Return how the stored numbers become values: value = scale · stored + min."""
    stored = weight.quantisation.get("dtype", weight.dtype)
    plain = _TYPES.get(stored) if isinstance(stored, str) else None
    if plain is None:
        raise UnsupportedError(
            listing, f"weight {weight.name!r} is stored as {stored!r}", "convert the model"
        )
    scale, low = weight.quantisation.get("scale"), weight.quantisation.get("min")
    if scale is None:
        return Plain(plain)
    if not (_is_number(scale) and _is_number(low) and abs(scale) > 1e-30 and stored[:1] == "u"):
        raise MalformedError(
            listing, f"weight {weight.name!r} is quantised with scale {scale!r} and min {low!r}"
        )
    return Affine(
        stored=plain,
        shape=weight.shape,
        scale=np.array([scale], np.float32),
        zero=np.array([-low / scale], np.float32),
    )


def _is_number(found: object) -> TypeGuard[float]:
    """Say whether JSON gave a number that float32 can hold; NaN is none."""
    return type(found) in (int, float) and abs(found) < 1e38  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the topology tells of the axes of weights."""

    layers: dict[str, str]
    orders: dict[str, str]  # weight → the operation that takes it as its filter

    @classmethod
    def of(cls, topology: dict[str, Any]) -> "_Layout":
        """Return the layout of a layers model or a graph model."""
        nodes = topology.get("node")
        if not isinstance(nodes, list):
            config = topology.get("model_config", topology)
            return cls(dict(reversed(list(layers_of(config)))), {})
        inputs: dict[str, str] = {}
        orders: dict[str, str] = {}
        found = [node for node in nodes if isinstance(node, dict)]
        for node in found:
            if node.get("op") in ("Identity", "ReadVariableOp") and _inputs(node):
                inputs[str(node.get("name"))] = _inputs(node)[0]
        for node in found:
            operation, taken = node.get("op"), _inputs(node)
            if isinstance(operation, str) and len(taken) > 1:  # a filter is the second input
                weight = inputs.get(taken[1], taken[1])
                turned = operation in _PRODUCTS and _is_set(node, "transpose_b", "adj_y")
                orders.setdefault(weight, "" if turned else operation)
        return cls({}, orders)

    def place_of(
        self, weight: _Weight, siblings: Mapping[str, tuple[int, ...]]
    ) -> tuple[tuple[int, ...], Kind]:
        """Return the order of axes of a weight and what it is for."""
        layer = layer_class(weight.name, self.layers)
        word = variable_word(weight.name, layer, shape=weight.shape)
        kind = variable_kind(word, weight.shape, Plain("F32"))
        if self.orders:
            return _axes_by_operation(self.orders.get(weight.name, ""), len(weight.shape)), kind
        bias = siblings.get(f"{weight.name.rpartition('/')[0]}/bias")
        return axes_of(word, weight.shape, layer, bias=bias), kind


def _axes_by_operation(operation: str, rank: int) -> tuple[int, ...]:
    if operation in _PRODUCTS:
        return (1, 0) if rank == 2 else ()
    if not 3 <= rank <= 5:
        return ()
    space = tuple(range(rank - 2))
    if operation in _OUT_LAST:
        return (rank - 1, rank - 2, *space)
    return (rank - 2, rank - 1, *space) if operation in _OUT_BEFORE_LAST else ()


def _inputs(node: Mapping[str, Any]) -> list[str]:
    """Return the nodes that a node takes values from, in order."""
    found = node.get("input")
    if not isinstance(found, list):
        return []
    return [name.partition(":")[0] for name in found if isinstance(name, str) and name[:1] != "^"]


def _is_set(node: Mapping[str, Any], *names: str) -> bool:
    attributes = node.get("attr")
    if not isinstance(attributes, dict):
        return False
    values = [attributes.get(name) for name in names]
    return any(isinstance(value, dict) and value.get("b") is True for value in values)


def _declared(model: dict[str, Any], topology: dict[str, Any]) -> dict[str, Any]:
    """Return versions, and class and name of the model."""
    facts = {key: model.get(key) for key in ("format", "generatedBy", "convertedBy")}
    facts |= {key: topology.get(key) for key in ("keras_version", "backend")}
    found: dict[str, Any] = {key: value for key, value in facts.items() if isinstance(value, str)}
    return {**found, **model_facts(topology.get("model_config"))}
