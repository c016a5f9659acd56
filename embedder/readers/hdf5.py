"""HDF5: Keras `.h5` weights and whole models, `.keras` archives, any file with data sets.

libhdf5 crashes and hangs on damaged files, so it runs only in a child process (`hdf5_child`) with
limits on time and memory. The child tells what is where; data sets that lie in the file as they
are (Keras writes no others) are then read by us, without libhdf5. Compressed or chunked ones are
decoded by a second child into a temporary file without a name, when the first of them is read.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedder.checkpoint import Checkpoint, Kind, Tensor
from embedder.encoding import PLAIN, Affine, Encoding, Plain
from embedder.errors import MalformedError, RefusedError, UnsupportedError
from embedder.readers.hdf5_process import (
    Source,
    Temporary,
    decoded_values,
    read_directory,
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
from embedder.readers.zipped import LARGEST_RATIO, LARGEST_UNPACKED_BYTES, ZipArchive
from embedder.storage import FileRange, OpenFile, Storage

_TYPES = {dtype.str: name for name, dtype in PLAIN.items() if dtype.kind in "fiubc"}
_TYPES["bfloat16"] = "BF16"
_LARGEST_CONFIG_BYTES = 64 << 20
_MOST_INFLATION = 1032  # the most that deflate can do
_FILL_BYTES = 1 << 20  # a data set of one fill value has nothing stored
_PIECE_BYTES = 1 << 20
_OPTIMISERS = frozenset({"optimizer_weights", "optimizer", "_optimizer"})
_MOST_LISTED = 20


def open_hdf5(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open an HDF5 file; `allow_partial` changes nothing.

    Raises:
        MalformedError: libhdf5 cannot read it, crashes on it, or finds no end.
        MissingExtraError: h5py is not installed.
        RefusedError: All that it holds lies behind links, or unpacks to far more than is stored.
    """
    file = OpenFile(path)
    with _closing_on_error(file):
        return _open(Source(file, 0, file.size_bytes), {}, name="hdf5")


def open_keras(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open a `.keras` archive; `allow_partial` changes nothing.

    Nothing is unpacked by its name, no layer is built, no code in the config is run.

    Raises:
        MalformedError: The archive or the weights in it are damaged.
        MissingExtraError: h5py is not installed.
        RefusedError: The archive unpacks to far more than it holds.
    """
    archive = ZipArchive(path)
    try:
        config = _member_json(path, archive, "config.json")
        version = _member_json(path, archive, "metadata.json").get("keras_version")
        source = _weights(path, archive)
    finally:
        archive.close()
    with _closing_on_error(source.file):
        declared = {"keras_version": version} if isinstance(version, str) else {}
        return _open(source, config, name="keras", declared=declared)


@contextmanager
def _closing_on_error(file: OpenFile) -> Iterator[None]:
    try:
        yield
    except BaseException:
        file.close()
        raise


def _member_json(path: Path, archive: ZipArchive, name: str) -> dict[str, Any]:
    """Return the object in a member; empty if there is none of that name."""
    if name not in archive.members:
        return {}
    member = archive.storage(name)
    if member.size_bytes > _LARGEST_CONFIG_BYTES:
        raise RefusedError(
            path,
            f"its {name} has {member.size_bytes:,} bytes; {_LARGEST_CONFIG_BYTES:,} are allowed",
            "take the file from a source that you trust",
        )
    return json_object(bytes(member.read(0, member.size_bytes)))


def _weights(path: Path, archive: ZipArchive) -> Source:
    """Return where the weights are: in the archive itself unless they are compressed."""
    member = archive.storage("model.weights.h5")
    if isinstance(member, FileRange):
        return Source(OpenFile(path), member.start, member.size_bytes)

    def inflate(output: int) -> None:
        with open(output, "wb", closefd=False) as target:
            for start in range(0, member.size_bytes, _PIECE_BYTES):
                target.write(member.read(start, min(start + _PIECE_BYTES, member.size_bytes)))

    return Source(Temporary(path, inflate), 0, member.size_bytes)


def _open(
    source: Source,
    config: dict[str, Any],
    *,
    name: str,
    declared: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Open what a source holds."""
    path = source.file.path
    found = read_directory(source)
    left_out, attributes = found["left_out"], found["attributes"]
    if not found["sets"] and any("link to" in text for text in left_out):
        raise RefusedError(
            path, f"holds nothing but links: {left_out[0]}", "open the files that hold the values"
        )
    config = config or json_object(attributes.get("model_config") or "")
    layers = {key: kind for key, kind in reversed(list(layers_of(config)))}
    sets = [_DataSet.of(path, entry) for entry in found["sets"]]
    loose_bytes = sum(entry.size_bytes for entry in sets if entry.offset is None)
    if loose_bytes > LARGEST_UNPACKED_BYTES and loose_bytes > LARGEST_RATIO * source.size_bytes:
        raise RefusedError(
            path,
            f"its compressed data sets unpack to {loose_bytes:,} bytes, "
            f"{loose_bytes // source.size_bytes:,} times the file",
            "take the file from a source that you trust",
        )
    decoded = decoded_values(source, loose_bytes)
    with _closing_on_error(decoded):
        tensors, unscaled = _tensors(source, decoded, _variables(sets, layers))
    places = {name: place for place, name in enumerate(found.get("order", ()))}
    tensors = tuple(sorted(tensors, key=lambda tensor: places.get(tensor.name, len(places))))
    if len(left_out) > _MOST_LISTED:
        left_out = [*left_out[:_MOST_LISTED], f"and {len(left_out) - _MOST_LISTED} more"]
    facts = {key: attributes[key] for key in ("keras_version", "backend") if attributes.get(key)}
    return Checkpoint(
        location=str(path),
        format=name,
        tensors=tensors,
        files=(path,),
        declared={**facts, **(declared or {}), **model_facts(config)},
        limits=[*lambda_limits(layers), *left_out, *unscaled],
        open_files=[source.file, decoded],
    )


@dataclass(frozen=True, slots=True)
class _DataSet:
    """A data set as the child describes it, checked."""

    name: str
    label: str
    shape: tuple[int, ...]
    type: str
    offset: int | None  # None: it must be decoded

    @classmethod
    def of(cls, path: Path, entry: dict[str, Any]) -> "_DataSet":
        name, label, kind = entry.get("name"), entry.get("group"), entry.get("type")
        shape, offset, stored = entry.get("shape"), entry.get("offset"), entry.get("stored_bytes")
        if not (
            isinstance(name, str)
            and isinstance(label, str)
            and isinstance(kind, str)
            and isinstance(shape, list)
            and type(stored) is int
            and (offset is None or (type(offset) is int and offset >= 0))
        ):
            raise MalformedError(path, "libhdf5 gave no directory of it", "get the file again")
        check_shape(path, name, shape)
        stored_type = _TYPES.get(kind)
        if stored_type is None:
            raise UnsupportedError(
                path, f"data set {name!r} holds {kind}, which we cannot decode", "convert it"
            )
        found = cls(name, label, tuple(shape), stored_type, offset)
        if offset is None and found.size_bytes > _FILL_BYTES + _MOST_INFLATION * stored:
            raise RefusedError(
                path,
                f"data set {name!r} promises {found.size_bytes:,} bytes and has {stored:,} stored",
                "take the file from a source that you trust",
            )
        return found

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * PLAIN[self.type].itemsize


@dataclass(frozen=True, slots=True)
class _Variable:
    """A data set and its part in a Keras layer."""

    stored: _DataSet
    word: str
    layer: str
    siblings: "dict[str, _Variable]"  # of its group, itself included

    @property
    def axes(self) -> tuple[int, ...]:
        """The order that brings it to out × in × space."""
        bias = self.siblings.get("bias")
        shape = None if bias is None else bias.stored.shape
        return axes_of(self.word, self.stored.shape, self.layer, bias=shape)

    @property
    def scale(self) -> "_Variable | None":
        """The scales of its channels, if it holds the int8 numbers of a quantised layer."""
        if self.stored.type != "I8" or len(self.stored.shape) != 2:
            return None
        found = self.siblings.get(f"{self.word}_scale")
        channels = self.stored.shape[0 if self.word == "embeddings" else 1]
        fits = found is not None and found.stored.shape == (channels,)
        return found if fits and found is not None and found.stored.type == "F32" else None


def _variables(sets: Sequence[_DataSet], layers: Mapping[str, str]) -> list[_Variable]:
    """Return what each data set is within its layer."""
    groups: dict[str, list[_DataSet]] = {}
    for entry in sets:
        groups.setdefault(entry.name.rpartition("/")[0], []).append(entry)
    found = []
    for members in groups.values():
        siblings: dict[str, _Variable] = {}
        layer = layer_class(members[0].name, layers, label=members[0].label)
        int8 = any(member.type == "I8" for member in members)
        for member in members:
            word = variable_word(member.name, layer, shape=member.shape, siblings=len(members))
            if int8 and member.type != "I8" and "/vars/" in member.name:
                word = _quantised_word(word, member, len(members), layer)
            siblings[word] = _Variable(member, word, layer, siblings)
            found.append(siblings[word])
    place = {entry.name: number for number, entry in enumerate(sets)}
    return sorted(found, key=lambda variable: place[variable.stored.name])


def _quantised_word(word: str, member: _DataSet, count: int, layer: str) -> str:
    """Return what a numbered variable beside int8 numbers is: the scale of int8 comes last."""
    last = member.name.rpartition("/")[2]
    if count <= 3 and last == str(count - 1):
        return "embeddings_scale" if layer == "Embedding" else "kernel_scale"
    return word if last in ("0", "1") else "kernel_zero"  # int4 has several


def _tensors(
    source: Source, decoded: Temporary, variables: Sequence[_Variable]
) -> tuple[tuple[Tensor, ...], list[str]]:
    """Return the tensors, and what to say of int8 numbers whose scale was not found."""
    path = source.file.path
    storages: dict[str, Storage] = {}
    place = 0
    for variable in variables:
        entry = variable.stored
        what = f"data set {entry.name!r}"
        if entry.offset is None:
            storages[entry.name] = decoded.part(place, entry.size_bytes, what)
            place += entry.size_bytes
        elif entry.offset + entry.size_bytes > source.size_bytes:
            raise MalformedError(path, f"{what} ends beyond the file", "get the file again")
        else:
            storages[entry.name] = source.file.part(
                source.base + entry.offset, entry.size_bytes, what
            )
    tensors, unscaled = [], []
    for variable in variables:
        entry = variable.stored
        encoding: Encoding = Plain(entry.type)
        kind = variable_kind(variable.word, entry.shape, encoding)
        if variable.scale is not None:
            encoding, kind = _scaled(variable, storages[variable.scale.stored.name]), Kind.WEIGHT
        elif entry.type == "I8" and variable.word in ("kernel", "embeddings"):
            unscaled.append(f"{entry.name!r} holds int8 numbers whose scale we cannot apply")
        axes = variable.axes
        if entry.name.partition("/")[0] in _OPTIMISERS:
            kind, axes = Kind.OPTIMISER, ()
        tensors.append(
            stored_tensor(
                path,
                entry.name,
                entry.shape,
                encoding=encoding,
                storage=storages[entry.name],
                kind=kind,
                axes=axes,
            )
        )
    return tuple(tensors), unscaled


def _scaled(variable: _Variable, scales: Storage) -> Affine:
    """Return the encoding of int8 numbers q with value q / scale, one scale a channel."""
    scale = np.frombuffer(scales.read(0, scales.size_bytes), np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    return Affine(
        stored="I8",
        shape=variable.stored.shape,
        scale=inverse.astype(np.float32),
        zero=np.zeros(1, np.float32),
        axis=0 if variable.word == "embeddings" else 1,
    )
