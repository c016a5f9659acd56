"""The bytes of an ONNX file: the graph without its tensors, and where the tensors lie.

A protobuf message is parsed whole, so a model with its weights inside would be in memory before
the first tensor is read. Here the message is walked over first, and each large tensor's bytes are
left out; in their place stands where in the file they are. What is left, the graph, is small and
goes to the `onnx` package. Tensors in other files are never opened from there either.
"""

import math
import mmap
import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embedder.encoding import FP4, INT4, UINT4, Encoding, Nibbles, Plain
from embedder.errors import (
    MalformedError,
    MissingPartError,
    RefusedError,
    UnsupportedError,
)
from embedder.readers.protobuf import BYTES, Range, encode_varint, fields, packed_varints
from embedder.readers.stored import check_shape
from embedder.storage import MemoryStorage, OpenFile, Storage

if TYPE_CHECKING:
    import onnx

_LIFTED_BYTES = 256
"""Tensors of this size and more stay in the file."""

_ENTERED_BYTES = 2048
"""Nodes and attributes of this size and more are looked into for tensors."""

# The protobuf package makes an object of a hundred bytes out of a message of two, so what is left
# for it is limited. The graph of a large language model has 10 MiB and 100,000 nodes.
_LARGEST_GRAPH_BYTES = 1 << 26
_MOST_FIELDS = 2_000_000
_MOST_EMPTY = 1 << 23  # zero bytes, and so messages of length zero

_DEEPEST = 100  # the limit of the protobuf package itself

_NESTED: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Message → number of a field that holds a message in which tensors lie."""

_SEGMENT = 3
_BYTE_FIELDS = frozenset({4, 9, 10})
"""Fields of a tensor whose bytes are its values: float_data, raw_data, double_data."""

_LISTS = frozenset({5, 7, 11})
"""Fields that list numbers of varying length: int32_data, int64_data, uint64_data."""

_ENCODINGS: dict[int, Encoding] = {
    **{
        number: Plain(name)
        for number, name in {
            1: "F32",
            2: "U8",
            3: "I8",
            4: "U16",
            5: "I16",
            6: "I32",
            7: "I64",
            9: "BOOL",
            10: "F16",
            11: "F64",
            12: "U32",
            13: "U64",
            14: "C64",
            15: "C128",
            16: "BF16",
            17: "F8_E4M3",
            18: "F8_E4M3FNUZ",
            19: "F8_E5M2",
            20: "F8_E5M2FNUZ",
            24: "F8_E8M0",
        }.items()
    },
    21: Nibbles("UINT4", UINT4),
    22: Nibbles("INT4", INT4),
    23: Nibbles("F4", FP4),
}
STRING = 8


class OnnxFile:
    """An ONNX file and the data files beside it, all open for reading in parts.

    Args:
        path: The file.
        allow_partial: Do without data files that are missing.
    """

    def __init__(self, path: Path, *, allow_partial: bool = False) -> None:
        self.path = path
        self.limits: list[str] = []
        self._allow_partial = allow_partial
        self._main = OpenFile(path)
        self._others: dict[str, OpenFile | None] = {}
        self._lifted: dict[Range, int] = {}
        self._fields = 0

    @property
    def open_files(self) -> list[OpenFile]:
        """The file itself, then the data files in the order of their names."""
        others = sorted(self._others.items())
        return [self._main, *(file for _, file in others if file is not None)]

    def close(self) -> None:
        """Close all files."""
        for file in self.open_files:
            file.close()

    def graph_bytes(self) -> bytes:
        """Return the message without the bytes of its large tensors.

        Raises:
            MalformedError: It is no message.
            UnsupportedError: Too much is left to be a graph.
        """
        if not self._main.size_bytes:
            raise MalformedError(self.path, "the file is empty", "get it again")
        with (
            self.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            left = self._without_tensors(content, "model", (0, len(content)), 0)
        if len(left) > _LARGEST_GRAPH_BYTES or left.count(0) > _MOST_EMPTY:
            raise self._too_large(f"{len(left):,} bytes are left without the tensors")
        return left

    def _too_large(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            self.path,
            f"its graph is too large: {what}; at most {_LARGEST_GRAPH_BYTES:,} bytes and "
            f"{_MOST_FIELDS:,} nodes are read",
            "save the model with its tensors as raw data or as external data",
        )

    def _without_tensors(self, content: mmap.mmap, message: str, span: Range, depth: int) -> bytes:
        if depth > _DEEPEST:
            raise MalformedError(self.path, f"graphs lie in each other more than {_DEEPEST} deep")
        if message == "tensor":
            return self._without_bytes(content, span)
        parts = []
        copied = span[0]
        for number, wire, value, start, stop in fields(content, span, self.path):
            self._fields += 1
            if self._fields > _MOST_FIELDS:
                raise self._too_large(f"more than {_MOST_FIELDS:,} fields")
            inner = _NESTED[message].get(number)
            least = _LIFTED_BYTES if inner == "tensor" else _ENTERED_BYTES
            if wire != BYTES or inner is None or stop - value < least:
                continue
            left = self._without_tensors(content, inner, (value, stop), depth + 1)
            parts += [content[copied:start], encode_varint(number << 3 | BYTES)]
            parts += [encode_varint(len(left)), left]
            copied = stop
        parts.append(content[copied : span[1]])
        return b"".join(parts)

    def _without_bytes(self, content: mmap.mmap, span: Range) -> bytes:
        """Return a tensor with the place of its bytes in place of them."""
        found = []
        for each in fields(content, span, self.path):
            self._fields += 1
            if each[0] in _BYTE_FIELDS | _LISTS:
                found.append(each)
            if self._fields > _MOST_FIELDS:
                raise self._too_large(f"more than {_MOST_FIELDS:,} fields")
        if len(found) != 1 or found[0][1] != BYTES or found[0][4] - found[0][2] < _LIFTED_BYTES:
            return content[span[0] : span[1]]
        number, _, value, start, stop = found[0]
        self._lifted[value, stop] = number
        # `segment` is a field for tensors in several pieces, which no known program writes.
        segment = b"\x08" + encode_varint(value) + b"\x10" + encode_varint(stop)
        place = encode_varint(_SEGMENT << 3 | BYTES) + encode_varint(len(segment)) + segment
        return content[span[0] : start] + place + content[stop : span[1]]

    def tensor(
        self, name: str, proto: "onnx.TensorProto"
    ) -> tuple[tuple[int, ...], Encoding, Storage] | None:
        """Return shape, encoding and bytes of a tensor; None if a missing file holds them.

        Raises:
            MalformedError: Shape, type and bytes do not fit together.
            MissingPartError: The file that holds it is not there.
            RefusedError: It lies in a file outside the model's folder.
            UnsupportedError: A stored type that we do not know.
        """
        shape = tuple(int(length) for length in proto.dims)
        encoding = _ENCODINGS.get(proto.data_type)
        if encoding is None:
            raise UnsupportedError(
                self.path, f"tensor {name!r} has the type number {proto.data_type}, unknown to us"
            )
        check_shape(self.path, name, shape)
        size_bytes = -(-math.prod(shape) // encoding.unit_values) * encoding.unit_bytes
        if proto.data_location == 1:
            storage = self._external(name, proto, size_bytes)
            return None if storage is None else (shape, encoding, storage)
        stored = self._inside(name, proto, encoding)
        if stored.size_bytes != size_bytes:
            raise MalformedError(
                self.path,
                f"tensor {name!r} of shape {list(shape)} and type {encoding.name} takes "
                f"{size_bytes:,} bytes and has {stored.size_bytes:,}",
            )
        return shape, encoding, stored

    def _inside(self, name: str, proto: "onnx.TensorProto", encoding: Encoding) -> Storage:
        """Return the bytes of a tensor that lies in the message."""
        if proto.HasField("segment"):
            span = (proto.segment.begin, proto.segment.end)
            if span not in self._lifted:
                raise UnsupportedError(
                    self.path, f"tensor {name!r} is stored in segments, which we do not read"
                )
            part = self._main.part(span[0], span[1] - span[0], f"tensor {name!r}")
            if self._lifted[span] in _BYTE_FIELDS:
                return part
            dtype = f"<u{encoding.unit_bytes}"
            return MemoryStorage(packed_varints(part.read(0, part.size_bytes), dtype, self.path))
        if proto.HasField("raw_data"):
            return MemoryStorage(proto.raw_data)
        return MemoryStorage(_typed(proto, encoding))

    def _external(self, name: str, proto: "onnx.TensorProto", size_bytes: int) -> Storage | None:
        """Return the bytes of a tensor that lies in another file."""
        entries = {text(entry.key): text(entry.value) for entry in proto.external_data}
        location = entries.get("location", "")
        offset = self._number(name, "offset", entries.get("offset", "0"))
        length = self._number(name, "length", entries.get("length", str(size_bytes)))
        if length != size_bytes:
            raise MalformedError(
                self.path,
                f"tensor {name!r} takes {size_bytes:,} bytes and has {length:,} in {location!r}",
            )
        if location not in self._others:
            self._others[location] = self._open_beside(name, location)
        file = self._others[location]
        return None if file is None else file.part(offset, length, f"tensor {name!r}")

    def _number(self, name: str, what: str, found: str) -> int:
        if not found.isascii() or not found.isdigit() or len(found) > 18:
            raise MalformedError(
                self.path, f"tensor {name!r} has the {what} {found[:40]!r}; a number was expected"
            )
        return int(found)

    def _open_beside(self, name: str, location: str) -> OpenFile | None:
        """Open a data file in the model's folder, and none anywhere else."""
        pure = (PurePosixPath(location), PureWindowsPath(location))
        if (
            not location
            or "\0" in location
            or any(path.is_absolute() or path.drive or ".." in path.parts for path in pure)
        ):
            raise self._outside(name, location)
        path = self.path.parent / location
        try:
            real = Path(os.path.realpath(path, strict=False))
            is_file = real.is_file()
        except OSError as error:
            raise self._outside(name, location) from error
        # A hub's cache links both the model and its data to files in one other folder.
        folders = (self.path.parent.resolve(), self.path.resolve().parent)
        if not any(real.is_relative_to(folder) for folder in folders):
            raise self._outside(name, location)
        if is_file:
            return OpenFile(real)
        if not self._allow_partial:
            raise MissingPartError(
                self.path,
                f"tensor {name!r} lies in {location!r}, which is not there",
                f"get {location} and put it beside {self.path.name}",
            )
        self.limits.append(f"the data file {location!r} is missing: its tensors are left out")
        return None

    def _outside(self, name: str, location: str) -> RefusedError:
        return RefusedError(
            self.path,
            f"tensor {name!r} points to {location[:200]!r}, which is outside the model's folder; "
            "nothing was read from there",
            "take the model from its source again, and do not trust this copy",
        )


def text(found: str | bytes) -> str:
    r"""Return a text of a message; the protobuf package gives bytes where it is not UTF-8.

    Example:
        >>> text(b"w\xff")
        'w\udcff'
    """
    return found.decode("utf-8", "surrogateescape") if isinstance(found, bytes) else found


def _typed(proto: "onnx.TensorProto", encoding: Encoding) -> NDArray[Any]:
    """Return the values of a tensor that is stored as a list of numbers."""
    if isinstance(encoding, Plain) and encoding.name in ("F32", "C64"):
        return np.asarray(proto.float_data, "<f4")
    if isinstance(encoding, Plain) and encoding.name in ("F64", "C128"):
        return np.asarray(proto.double_data, "<f8")
    if isinstance(encoding, Plain) and encoding.name == "I64":
        return np.asarray(proto.int64_data, "<i8")
    if isinstance(encoding, Plain) and encoding.name in ("U32", "U64"):
        return np.asarray(proto.uint64_data, "<u8").astype(f"<u{encoding.unit_bytes}")
    # The rest are kept as int32: small integers as they are, small floats and pairs of 4-bit
    # numbers as their bits.
    return np.asarray(proto.int32_data, "<i4").astype(f"<u{encoding.unit_bytes}")
