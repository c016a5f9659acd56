"""TensorFlow variables: SavedModel folders and checkpoints, read without TensorFlow.

A checkpoint is an index, a sorted table of tensor → place, and data files with the bytes. Nothing
of a SavedModel's graph or functions is looked at but what it says of its layers. The object graph
that TensorFlow 2 stores beside the variables tells their own names and which are the optimiser's.
"""

import mmap
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedder.checkpoint import Checkpoint, Kind, Tensor
from embedder.encoding import Plain
from embedder.errors import (
    CheckpointError,
    MalformedError,
    MissingPartError,
    UnsupportedError,
)
from embedder.readers.keras_layout import (
    axes_of,
    json_object,
    lambda_limits,
    layer_class,
    layers_of,
    variable_kind,
    variable_word,
)
from embedder.readers.protobuf import BYTES, VARINT, Content, fields, signed
from embedder.readers.sstable import table_entries, varint
from embedder.readers.stored import stored_tensor
from embedder.storage import OpenFile

_TYPES = {
    1: "F32",
    2: "F64",
    3: "I32",
    4: "U8",
    5: "I16",
    6: "I8",
    8: "C64",
    9: "I64",
    10: "BOOL",
    11: "I8",
    12: "U8",
    13: "I32",
    14: "BF16",
    15: "I16",
    16: "U16",
    17: "U16",
    18: "C128",
    19: "F16",
    22: "U32",
    23: "U64",
    24: "F8_E5M2",
    25: "F8_E4M3",
}
"""tensorflow.DataType → stored type; strings, resources and variants are no numbers."""

_STRING = 7
_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_SLOT = "/.OPTIMIZER_SLOT/"
_TRAINING_ROOTS = frozenset({"optimizer", "_optimizer", "keras_api", "save_counter"})
_TRAINING_NAMES = frozenset({"global_step", "beta1_power", "beta2_power"})
_LARGEST_METADATA_BYTES = 64 << 20
_MOST_LISTED = 20


def open_saved_model(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open the variables of a SavedModel folder.

    Args:
        path: The folder with `saved_model.pb`.
        allow_partial: Read what is there where data files are missing.

    Raises:
        MissingPartError: The index or a data file of the variables is not there.
        MalformedError: The index breaks the rules of its format.
        UnsupportedError: The variables were written by a big-endian machine.
    """
    listing = path / "variables" / "variables.index"
    if not listing.is_file():
        raise MissingPartError(
            path,
            "this SavedModel has no variables/variables.index: its weights, if any, are constants "
            "in the graph, which we do not read",
            "get the whole folder, or convert the model to ONNX",
        )
    described = _describe(path)
    checkpoint = _open(listing, allow_partial=allow_partial, layers=described.layers)
    checkpoint.location, checkpoint.format = str(path), "saved-model"
    checkpoint.files = (path / "saved_model.pb", *checkpoint.files)
    checkpoint.declared = described.declared
    checkpoint.limits.extend(lambda_limits(described.layers))
    return checkpoint


def open_variables(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open a TensorFlow checkpoint by its index, whose data files lie beside it.

    Args:
        path: `model.ckpt.index` or `variables.index`.
        allow_partial: Read what is there where data files are missing.

    Raises:
        MissingPartError: A data file is not there.
        MalformedError: The index breaks the rules of its format.
        UnsupportedError: The checkpoint was written by a big-endian machine.
    """
    return _open(path, allow_partial=allow_partial, layers={})


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where one tensor lies."""

    key: str
    type: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size_bytes: int
    sliced: bool

    @property
    def name(self) -> str:
        """The key without what TensorFlow 2 adds to all of them."""
        return self.key.removesuffix(_VALUE)


def _open(listing: Path, *, allow_partial: bool, layers: dict[str, str]) -> Checkpoint:
    shard_count, entries = _read_listing(listing)
    limits: list[str] = []
    with ExitStack() as stack:
        shards: dict[int, OpenFile] = {}
        for number in sorted({entry.shard for entry in entries}):
            shard = _shard_path(listing, number, shard_count)
            if shard.is_file():
                shards[number] = OpenFile(shard)
                stack.callback(shards[number].close)
            elif allow_partial:
                limits.append(f"the data file {shard.name} is missing, and the tensors in it")
            else:
                raise MissingPartError(
                    listing, f"its data file {shard.name} is missing", "get it, or --allow-partial"
                )
        graph = _object_graph(listing, entries, shards)
        tensors = _tensors(listing, entries, shards, graph=graph, layers=layers, limits=limits)
        stack.pop_all()
    return Checkpoint(
        location=str(listing),
        format="tensorflow",
        tensors=tensors,
        files=(listing, *(file.path for file in shards.values())),
        limits=limits,
        open_files=list(shards.values()),
    )


def _read_listing(listing: Path) -> tuple[int, list[_Entry]]:
    """Return the number of data files and where each tensor lies."""
    file = OpenFile(listing)
    shard_count, entries = 0, []
    try:
        for key, value in table_entries(file):
            if key == b"":
                shard_count = _read_header(listing, value)
            elif not key.startswith(b"\0"):  # these are parts of sliced variables
                entries.append(_read_entry(listing, key.decode("utf-8", "surrogateescape"), value))
    finally:
        file.close()
    beyond = next((entry for entry in entries if entry.shard >= shard_count), None)
    if beyond is not None:
        raise MalformedError(
            listing,
            f"tensor {beyond.name!r} lies in data file {beyond.shard} of {shard_count}",
            "get the file again",
        )
    return shard_count, entries


def _read_header(listing: Path, raw: bytes) -> int:
    """Return the number of data files."""
    numbers = {
        number: value
        for number, wire, value, _, _ in fields(raw, (0, len(raw)), listing)
        if wire == VARINT
    }
    if numbers.get(2, 0) != 0:
        raise UnsupportedError(
            listing, "was written by a big-endian machine", "save it again on another one"
        )
    return numbers.get(1, 0)


def _read_entry(listing: Path, key: str, raw: bytes) -> _Entry:
    numbers: dict[int, int] = {}
    shape: tuple[int, ...] = ()
    sliced = False
    for number, wire, value, _, stop in fields(raw, (0, len(raw)), listing):
        if wire == VARINT:
            numbers[number] = signed(value)
        elif wire == BYTES and number == 2:
            shape = tuple(_read_shape(listing, raw, (value, stop)))
        sliced |= number == 7
    found = _Entry(
        key=key,
        type=numbers.get(1, 0),
        shape=shape,
        shard=numbers.get(3, 0),
        offset=numbers.get(4, 0),
        size_bytes=numbers.get(5, 0),
        sliced=sliced,
    )
    if found.shard < 0:
        raise MalformedError(listing, f"tensor {found.name!r} lies in data file {found.shard}")
    return found


def _read_shape(listing: Path, raw: bytes, span: tuple[int, int]) -> Iterator[int]:
    for number, wire, value, _, stop in fields(raw, span, listing):
        if number == 2 and wire == BYTES:
            lengths = [
                signed(length)
                for inner, kind, length, _, _ in fields(raw, (value, stop), listing)
                if inner == 1 and kind == VARINT
            ]
            yield lengths[-1] if lengths else 0


def _shard_path(listing: Path, number: int, count: int) -> Path:
    """Return the path of a data file, by the name of the index or else by what lies beside it."""
    ending = f".data-{number:05d}-of-{count:05d}"
    expected = listing.with_name(listing.name.removesuffix(".index") + ending)
    if not expected.is_file() and not listing.name.endswith(".index"):
        beside = [file for file in listing.parent.iterdir() if file.name.endswith(ending)]
        if len(beside) == 1:  # the index was renamed, and there is no doubt
            return beside[0]
    return expected


@dataclass(slots=True)
class _Graph:
    """What the object graph says of variables, by their keys."""

    names: dict[str, str] = field(default_factory=dict)
    slots: set[str] = field(default_factory=set)


def _object_graph(listing: Path, entries: list[_Entry], shards: dict[int, OpenFile]) -> _Graph:
    """Return the variables' own names and which are slots of the optimiser; empty for old files."""
    entry = next((entry for entry in entries if entry.key == _GRAPH_KEY), None)
    if entry is None or entry.type != _STRING or entry.shard not in shards:
        return _Graph()
    storage = shards[entry.shard].part(entry.offset, entry.size_bytes, "the object graph")
    raw = bytes(storage.read(0, storage.size_bytes))
    length, start = varint(raw, 0, listing)
    start += 4  # a checksum of the length
    if start + length > len(raw):
        raise MalformedError(listing, "the object graph ends beyond its place", "get it again")
    keys: list[str] = []
    graph = _Graph()
    slots: list[int] = []
    for number, wire, value, _, stop in fields(raw, (start, start + length), listing):
        if number != 1 or wire != BYTES:
            continue
        keys.append("")
        for inner, kind, first, _, last in fields(raw, (value, stop), listing):
            if kind != BYTES:
                continue
            if inner == 2:
                texts = _texts(listing, raw, (first, last))
                keys[-1] = texts.get(3, keys[-1])
                graph.names[texts.get(3, "")] = texts.get(2, "")
            elif inner == 3:
                slots.extend(
                    found
                    for name, form, found, _, _ in fields(raw, (first, last), listing)
                    if name == 3 and form == VARINT
                )
    graph.slots = {keys[slot] for slot in slots if slot < len(keys)} - {""}
    return graph


def _texts(location: Path, raw: Content, span: tuple[int, int]) -> dict[int, str]:
    """Return the texts among the fields of a message."""
    return {
        number: raw[value:stop].decode("utf-8", "surrogateescape")
        for number, wire, value, _, stop in fields(raw, span, location)
        if wire == BYTES
    }


def _tensors(
    listing: Path,
    entries: list[_Entry],
    shards: dict[int, OpenFile],
    *,
    graph: _Graph,
    layers: dict[str, str],
    limits: list[str],
) -> tuple[Tensor, ...]:
    """Return the tensors over the variables; what is none of our kinds goes to `limits`."""
    readable = [entry for entry in entries if _is_readable(entry, limits)]
    places = {entry.key: graph.names.get(entry.key) or entry.name for entry in readable}
    classes = {key: layer_class(place, layers) for key, place in places.items()}
    shapes = {entry.name: entry.shape for entry in readable}
    tensors = []
    for entry in readable:
        if entry.shard not in shards:
            continue
        layer, parent = classes[entry.key], entry.name.rpartition("/")[0]
        word = variable_word(places[entry.key], layer, shape=entry.shape)
        encoding = Plain(_TYPES[entry.type])
        kind = variable_kind(word, entry.shape, encoding)
        bias = shapes.get(f"{parent}/bias", shapes.get(f"{parent}/biases"))
        axes = axes_of(word, entry.shape, layer, bias=bias)
        # TensorFlow 1 names a slot `variable/Adam`, so a variable below a variable is a slot.
        if _is_training_state(entry, graph) or shapes.get(parent) == entry.shape != ():
            kind, axes = Kind.OPTIMISER, ()
        what = f"tensor {entry.name!r}"
        tensors.append(
            stored_tensor(
                listing,
                entry.name,
                entry.shape,
                encoding=encoding,
                storage=shards[entry.shard].part(entry.offset, entry.size_bytes, what),
                kind=kind,
                axes=axes,
            )
        )
    return tuple(tensors)


def _is_readable(entry: _Entry, limits: list[str]) -> bool:
    """Say whether a variable holds numbers in one piece; else add to `limits` what it is."""
    if entry.key == _GRAPH_KEY:
        return False
    if not entry.sliced and entry.type in _TYPES:
        return True
    problem = f"holds values of TensorFlow type {entry.type}"
    if entry.sliced:
        problem = "is stored in slices, which we do not join"
    elif entry.type == _STRING:
        problem = "holds texts"
    if len(limits) < _MOST_LISTED:
        limits.append(f"{entry.name!r} {problem}")
    return False


def _is_training_state(entry: _Entry, graph: _Graph) -> bool:
    """Say whether a variable is the optimiser's, a counter's or a metric's."""
    return (
        _SLOT in entry.key
        or entry.key in graph.slots
        or entry.name.partition("/")[0] in _TRAINING_ROOTS
        or entry.name.rpartition("/")[2] in _TRAINING_NAMES
    )


@dataclass(slots=True)
class _Description:
    """What a SavedModel says of itself."""

    declared: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)


def _describe(folder: Path) -> _Description:
    """Return version, tags and layers from `saved_model.pb` and `keras_metadata.pb`.

    A declaration is never needed, so files that cannot be read add nothing.
    """
    found = _Description()
    for name, read in (
        ("saved_model.pb", _describe_graph),
        ("keras_metadata.pb", _describe_keras),
    ):
        file = folder / name
        try:
            with (
                file.open("rb") as opened,
                mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content,
            ):
                read(file, content, found)
        except (OSError, ValueError, CheckpointError):
            continue
    return found


def _below(
    location: Path, content: Content, span: tuple[int, int], path: tuple[int, ...]
) -> Iterator[tuple[int, int]]:
    """Yield the places of all messages that a path of field numbers leads to."""
    if not path:
        yield span
        return
    for number, wire, value, _, stop in fields(content, span, location):
        if number == path[0] and wire == BYTES:
            yield from _below(location, content, (value, stop), path[1:])


def _describe_graph(file: Path, content: Content, found: _Description) -> None:
    whole = (0, len(content))
    for start, stop in _below(file, content, whole, (2, 1)):  # graph, its meta information
        tags = [
            content[a:b].decode("utf-8", "replace")
            for a, b in _below(file, content, (start, stop), (4,))
        ]
        version = _texts(file, content, (start, stop)).get(5)
        facts = {"tensorflow_version": version, "tags": tags}
        found.declared |= {key: value for key, value in facts.items() if value}
    # graph, its objects, each one, what its class is, and its metadata
    _add_layers(file, content, _below(file, content, whole, (2, 7, 1, 4, 3)), found)


def _describe_keras(file: Path, content: Content, found: _Description) -> None:
    _add_layers(file, content, _below(file, content, (0, len(content)), (1, 5)), found)


def _add_layers(
    file: Path, content: Content, spans: Iterator[tuple[int, int]], found: _Description
) -> None:
    budget = _LARGEST_METADATA_BYTES
    for start, stop in spans:
        budget -= stop - start
        if budget < 0:
            return
        layer = json_object(content[start:stop].decode("utf-8", "replace"))
        name, kind = layer.get("name"), layer.get("class_name")
        if isinstance(name, str) and isinstance(kind, str):
            found.layers.setdefault(name, kind)
        for inner_name, inner_kind in layers_of(layer):
            found.layers.setdefault(inner_name, inner_kind)
