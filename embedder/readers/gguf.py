"""GGUF: a table of facts, a table of tensors, then their blocks.

The header is parsed here, in one pass over a small window: the reader of the `gguf` package keeps
an object for every word of the vocabulary and takes ten seconds for 250,000 of them. Only the
table of block sizes and the arithmetic of each block type come from the package.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.checkpoint import Checkpoint, Tensor, kind_of
from embedder.encoding import Encoding, Plain, Values
from embedder.errors import (
    MalformedError,
    MissingExtraError,
    MissingPartError,
    TruncatedError,
    UnsupportedError,
)
from embedder.readers.gguf_header import Header, TensorEntry, read_header
from embedder.storage import OpenFile, Storage

_PLAIN = {
    0: "F32",
    1: "F16",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    30: "BF16",
}
"""Number of a type in the file → name of the plain encoding."""

_SWAPPED_PAIRS = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,), "MXFP4": ()}
"""Where the 16-bit numbers of a block lie, for the block types that big-endian machines use."""

_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})(?P<suffix>\..*)?", re.S)
_CHUNK_NAME = re.compile(r".*\.(part|chunk|split)?[-_.]?([0-9]{2,4}|[a-z]{2})", re.S)


def open_gguf(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open one GGUF file, or all files of a split one, whichever of them is named.

    Args:
        path: The file.
        allow_partial: Read what is there of a file cut short, or of a set with missing files.

    Raises:
        MalformedError: The header breaks a rule of the format.
        TruncatedError: A file ends before its tensors do.
        MissingPartError: A file of a split model is not there.
        UnsupportedError: A block type that we cannot decode.
        MissingExtraError: The package gguf is not installed.
    """
    limits: list[str] = []
    parts: list[_Part] = []
    try:
        for file_path in _files_of(path, limits, allow_partial=allow_partial):
            parts.append(_Part(OpenFile(file_path)))
            parts[-1].read(limits, allow_partial=allow_partial)
        _check_set(path, parts, complete=not limits)
    except BaseException:
        for part in parts:
            part.file.close()
        raise
    return Checkpoint(
        location=str(path),
        format="gguf",
        tensors=tuple(tensor for part in parts for tensor in part.tensors),
        files=tuple(part.file.path for part in parts),
        declared=parts[0].header.declared(),
        limits=limits,
        adapter=parts[0].header.facts.get("general.type") == "adapter",
        open_files=[part.file for part in parts],
    )


@dataclass
class _Part:
    """One file of the model; most models have one."""

    file: OpenFile
    tensors: list[Tensor] = field(default_factory=list)
    header: Header = field(init=False)

    def read(self, limits: list[str], *, allow_partial: bool) -> None:
        """Read the header, and make the tensors whose bytes are there."""
        self.header = read_header(self.file)
        types = _block_types()
        placed = [
            (entry, *_encoding(self.file.path, entry, types)) for entry in self.header.tensors
        ]
        self._check_places([(entry, size_bytes) for entry, _, size_bytes in placed])
        available = self.file.size_bytes - self.header.data_start
        present = [item for item in placed if item[0].offset + item[2] <= available]
        if len(present) < len(placed):
            promised = max(entry.offset + size_bytes for entry, _, size_bytes in placed)
            missing = self._truncation(promised, max(available, 0))
            if not allow_partial:
                raise TruncatedError(self.file.path, f"TRUNCATED: {missing}", self._cure())
            limits.append(
                f"{self.file.path.name}: {missing}; {len(placed) - len(present)} of "
                f"{len(placed)} tensors are left out"
            )
        for entry, encoding, size_bytes in present:
            self.tensors.append(self._tensor(entry, encoding, size_bytes))

    def _check_places(self, placed: list[tuple[TensorEntry, int]]) -> None:
        """Refuse tensors that lie over each other or between the alignment's places."""
        end = 0
        for entry, size_bytes in sorted(placed, key=lambda item: item[0].offset):
            if entry.offset % self.header.alignment:
                raise MalformedError(
                    self.file.path,
                    f"tensor {entry.name!r} begins at byte {entry.offset:,} of the data, which is "
                    f"not a multiple of the alignment, {self.header.alignment}",
                )
            if entry.offset < end and size_bytes:
                raise MalformedError(
                    self.file.path,
                    f"tensor {entry.name!r} begins at byte {entry.offset:,} of the data, inside "
                    f"the one before it, which ends at {end:,}",
                )
            end = max(end, entry.offset + size_bytes)

    def _truncation(self, promised: int, available: int) -> str:
        values = sum(math.prod(entry.shape) for entry in self.header.tensors)
        return (
            f"the header is complete ({len(self.header.tensors):,} tensors, {values:,} values) and "
            f"promises {promised:,} bytes of tensors, and {available:,} are there"
        )

    def _cure(self) -> str:
        # The name proves nothing; it only decides how helpful the advice is.
        if _CHUNK_NAME.fullmatch(self.file.path.name):
            return (
                "this looks like the first of several chunks: join them in order "
                "(cat NAME.part* > NAME.gguf), then open the joined file"
            )
        return "get the file again, or allow a partial read"

    def _tensor(self, entry: TensorEntry, encoding: Encoding, size_bytes: int) -> Tensor:
        storage: Storage = self.file.part(
            self.header.data_start + entry.offset, size_bytes, f"tensor {entry.name!r}"
        )
        if self.header.big_endian and encoding.unit_bytes > 1:
            storage = Reordered(storage, _little_endian(self.file.path, entry, encoding))
        return Tensor(
            name=entry.name,
            shape=entry.shape,
            encoding=encoding,
            storage=storage,
            kind=kind_of(entry.name, entry.shape, encoding),
        )


def _files_of(path: Path, limits: list[str], *, allow_partial: bool) -> Iterator[Path]:
    """Yield the files that the model is made of, in order."""
    file = OpenFile(path)
    try:
        split = read_header(file).split
    finally:
        file.close()
    if split is None:
        yield path
        return
    name = _PART_NAME.fullmatch(path.name)
    if name is None:
        if not allow_partial:
            raise MissingPartError(
                path,
                f"is part {split.number + 1} of {split.count}, and its name does not say how the "
                "others are called",
                f"give it a name that ends in -{split.number + 1:05d}-of-{split.count:05d}.gguf, "
                "as the others have",
            )
        limits.append(f"{path.name}: {split.count - 1} of {split.count} parts were not found")
        yield path
        return
    for number in range(1, split.count + 1):
        suffix = name["suffix"] or ""
        part = path.with_name(f"{name['stem']}-{number:05d}-of-{split.count:05d}{suffix}")
        if part.is_file():
            yield part
        elif allow_partial:
            limits.append(f"part {number} of {split.count} is missing: {part.name}")
        else:
            raise MissingPartError(
                path, f"part {number} of {split.count} is not there: {part.name}", "get it too"
            )


def _check_set(path: Path, parts: list[_Part], *, complete: bool) -> None:
    """Refuse parts that do not belong together."""
    for place, part in enumerate(parts):
        split = part.header.split
        if len(parts) > 1 and (split is None or (complete and split.number != place)):
            raise MalformedError(
                part.file.path,
                f"was expected to be part {place + 1} of {len(parts)} by its name and says "
                + (f"part {split.number + 1} of {split.count}" if split else "nothing of parts"),
            )
    names = [tensor.name for part in parts for tensor in part.tensors]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise MalformedError(path, f"tensor {twice!r} is there twice")
    first = parts[0].header.split
    if complete and first is not None and first.tensors not in (None, len(names)):
        raise MalformedError(
            path, f"{first.tensors:,} tensors are promised and the parts hold {len(names):,}"
        )


@dataclass(frozen=True, slots=True)
class Blocks:
    """A GGUF block type, decoded by the arithmetic of the gguf package."""

    name: str
    unit_values: int
    unit_bytes: int
    dequantise: Callable[[NDArray[np.uint8]], NDArray[np.float32]]

    @property
    def quantised(self) -> bool:
        """Always: the values lie on a lattice."""
        return True

    def decode(self, raw: bytes | memoryview, first: int) -> Values:
        """Return the values of whole blocks."""
        blocks = np.frombuffer(raw, np.uint8).reshape(-1, self.unit_bytes)
        if not len(blocks):
            return np.empty(0, np.float32)
        # A damaged scale may be NaN or infinite; that is a value, not a warning.
        with np.errstate(all="ignore"):
            return self.dequantise(blocks).reshape(-1).astype(np.float32, copy=False)


def _block_types() -> dict[int, Blocks]:
    """Return the block types that the installed package knows, by their number."""
    try:
        from gguf import quants
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise MissingExtraError("gguf", "formats", "reading GGUF") from error

    def arithmetic(kind: Any) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
        return lambda blocks: np.asarray(quants.dequantize(blocks, kind))

    return {
        int(kind): Blocks(kind.name, values, size, arithmetic(kind))
        for kind, (values, size) in GGML_QUANT_SIZES.items()
        if int(kind) not in _PLAIN
    }


def _encoding(path: Path, entry: TensorEntry, types: dict[int, Blocks]) -> tuple[Encoding, int]:
    """Return the encoding of a tensor and the number of its bytes."""
    encoding: Encoding
    if entry.type in _PLAIN:
        encoding = Plain(_PLAIN[entry.type])
    elif entry.type in types:
        encoding = types[entry.type]
        _check_decodable(path, entry, encoding)
    else:
        raise UnsupportedError(
            path,
            f"tensor {entry.name!r} has the block type number {entry.type}, which the installed "
            "gguf package does not know",
            "a newer gguf package may: pip install -U gguf",
        )
    row = entry.shape[-1] if entry.shape else 1
    if row % encoding.unit_values:
        raise MalformedError(
            path,
            f"tensor {entry.name!r} has rows of {row:,} values, which is not a multiple of the "
            f"{encoding.unit_values} values of a {encoding.name} block",
        )
    return encoding, math.prod(entry.shape) // encoding.unit_values * encoding.unit_bytes


def _check_decodable(path: Path, entry: TensorEntry, encoding: Encoding) -> None:
    try:
        encoding.decode(bytes(encoding.unit_bytes), 0)
    except NotImplementedError as error:
        raise UnsupportedError(
            path,
            f"tensor {entry.name!r} is stored as {encoding.name}, which the installed gguf package "
            "cannot decode",
            "use a rendering of the model in another type",
        ) from error


class Reordered:
    """Bytes of another storage, with the bytes of each unit in another order."""

    __slots__ = ("_order", "_storage", "size_bytes")

    def __init__(self, storage: Storage, order: NDArray[np.intp]) -> None:
        self._storage, self._order = storage, order
        self.size_bytes = storage.size_bytes

    def read(self, start: int, stop: int) -> memoryview:
        """Return the bytes from `start` up to `stop` in the new order."""
        unit = self._order.size
        first, last = start // unit * unit, min(-(-stop // unit) * unit, self.size_bytes)
        stored = np.frombuffer(self._storage.read(first, last), np.uint8).reshape(-1, unit)
        return np.ascontiguousarray(stored[:, self._order]).data.cast("B")[
            start - first : stop - first
        ]


def _little_endian(path: Path, entry: TensorEntry, encoding: Encoding) -> NDArray[np.intp]:
    """Return the order of a unit's bytes that turns big-endian numbers into little-endian ones."""
    order = np.arange(encoding.unit_bytes)
    if isinstance(encoding, Plain):
        return order[::-1]
    if encoding.name not in _SWAPPED_PAIRS:
        raise UnsupportedError(
            path,
            f"tensor {entry.name!r} is stored as {encoding.name} in a big-endian file; of those we "
            f"read {', '.join(_SWAPPED_PAIRS)}",
            "use the little-endian rendering of the model",
        )
    for place in _SWAPPED_PAIRS[encoding.name]:
        order[place : place + 2] = order[place : place + 2][::-1]
    return order
