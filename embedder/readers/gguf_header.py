"""The header of a GGUF file: facts and a table of tensors, read through a small window.

Facts worth telling are kept; long arrays (a vocabulary of 256,000 words takes most of a header)
are walked over, and only their length is kept. Every count is held against the bytes that are
left before anything is done with it.
"""

import math
import struct
from dataclasses import dataclass, field
from typing import Any

from embedder.errors import MalformedError, TruncatedError, UnsupportedError
from embedder.storage import OpenFile

_WINDOW_BYTES = 1 << 20
_LONGEST_TEXT_BYTES = 1 << 24
_LONGEST_NAME_BYTES = 1 << 16  # the limit that the format sets for keys
_MOST_FACTS = 10_000  # real files have 20 to 60
_MOST_TENSORS = 1_000_000
_KEPT_BYTES = 4 << 20  # of all facts together; a chat template has some kilobytes
_KEPT_ENTRIES = 64
_NEEDED = frozenset({"general.alignment", "split.no", "split.count", "split.tensors.count"})
_MOST_AXES = 8
_DEEPEST_ARRAY = 4

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_TEXT, _ARRAY = 8, 9
_SMALLEST_BYTES = {_TEXT: 8, _ARRAY: 12}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A line of the table of tensors."""

    name: str
    shape: tuple[int, ...]  # the row last, as numpy has it; the file has it first
    type: int
    offset: int


@dataclass(frozen=True, slots=True)
class Split:
    """What a file says of the set it belongs to."""

    number: int  # from 0
    count: int
    tensors: int | None


@dataclass(slots=True)
class Header:
    """What stands before the tensors' bytes."""

    version: int
    big_endian: bool
    facts: dict[str, Any] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    tensors: list[TensorEntry] = field(default_factory=list)
    alignment: int = 32
    data_start: int = 0
    room: int = _KEPT_BYTES
    """Bytes of facts that may still be kept."""

    @property
    def split(self) -> Split | None:
        """The set that the file is a part of, None for a model in one file."""
        count = self.facts.get("split.count")
        number = self.facts.get("split.no")
        if not isinstance(count, int) or not isinstance(number, int) or count < 2:
            return None
        tensors = self.facts.get("split.tensors.count")
        return Split(number, count, tensors if isinstance(tensors, int) else None)

    def declared(self) -> dict[str, Any]:
        """Return the facts, and the tokenizer's name and size; never its words."""
        vocabulary = {
            "model": self.facts.get("tokenizer.ggml.model"),
            "pre": self.facts.get("tokenizer.ggml.pre"),
            "size": self.lengths.get("tokenizer.ggml.tokens"),
        }
        found: dict[str, Any] = {"metadata": self.facts}
        if any(value is not None for value in vocabulary.values()):
            found["vocabulary"] = {
                key: value for key, value in vocabulary.items() if value is not None
            }
        return found


def read_header(file: OpenFile) -> Header:
    """Return the header of a GGUF file.

    Raises:
        MalformedError: It breaks a rule of the format.
        TruncatedError: The file ends inside it.
        UnsupportedError: A version of the format that we do not read.
    """
    cursor = _Cursor(file)
    magic = cursor.take(4)
    raw_version = cursor.take(4)
    # A big-endian file has the same magic; its version, below 65,536, shows the order.
    big_endian = magic == b"FUGG" or int.from_bytes(raw_version, "little") & 0xFFFF == 0
    cursor.order = ">" if big_endian else "<"
    version = int.from_bytes(raw_version, "big" if big_endian else "little")
    if magic not in (b"GGUF", b"FUGG"):
        raise MalformedError(file.path, f"begins with {magic!r}, not with GGUF")
    if version not in (2, 3):
        raise UnsupportedError(
            file.path,
            f"is GGUF version {version:,}; we read versions 2 and 3",
            "convert the model anew with a current llama.cpp",
        )
    header = Header(version, big_endian)
    # A tensor's line takes 24 bytes or more, a fact 13 or more.
    tensors = cursor.count(24, "tensors", _MOST_TENSORS)
    facts = cursor.count(13, "facts", _MOST_FACTS)
    for _ in range(facts):
        _read_fact(cursor, header)
    alignment = header.facts.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment % 8:
        raise MalformedError(
            file.path, f"general.alignment is {alignment!r}; a multiple of 8 was expected"
        )
    header.alignment = alignment
    names = set()
    for _ in range(tensors):
        entry = _read_entry(cursor)
        if entry.name in names:
            raise MalformedError(file.path, f"tensor {entry.name!r} is there twice")
        names.add(entry.name)
        header.tensors.append(entry)
    header.data_start = -(-cursor.place // alignment) * alignment
    return header


class _Cursor:
    """A place in the file and a window of bytes around it."""

    def __init__(self, file: OpenFile) -> None:
        self.file = file
        self.place = 0
        self.order = "<"
        self._window = b""
        self._start = 0

    def take(self, size_bytes: int) -> bytes:
        """Return the next bytes and go on behind them."""
        start = self._reach(size_bytes)
        self.place += size_bytes
        return self._window[start : start + size_bytes]

    def number(self, code: str) -> Any:
        """Return the next number of the given struct code."""
        layout = self.order + code
        size_bytes = struct.calcsize(layout)
        start = self._reach(size_bytes)
        self.place += size_bytes
        return struct.unpack_from(layout, self._window, start)[0]

    def count(self, smallest_bytes: int, what: str, most: int = 1 << 62) -> int:
        """Return the next count of things that take at least so many bytes each."""
        number = int(self.number("Q"))
        if number > most:
            raise MalformedError(
                self.file.path, f"the header counts {number:,} {what}; {most:,} are allowed"
            )
        left = self.file.size_bytes - self.place
        if number * smallest_bytes > left:
            raise TruncatedError(
                self.file.path,
                f"TRUNCATED: the header counts {number:,} {what} and {left:,} bytes are left",
                "get the file again, then run the same command",
            )
        return number

    def text(self, most: int = _LONGEST_TEXT_BYTES) -> str:
        """Return the next text; bytes that are not UTF-8 are kept as surrogates."""
        size_bytes = self.count(1, "bytes of one text", most)
        return self.take(size_bytes).decode("utf-8", "surrogateescape")

    def skip(self, size_bytes: int) -> None:
        """Go on behind bytes that are there."""
        if self.place + size_bytes > self.file.size_bytes:
            self._end(size_bytes)
        self.place += size_bytes

    def skip_texts(self, count: int) -> None:
        """Go on behind so many texts: the loop that a large vocabulary spends its time in."""
        read_length = struct.Struct(self.order + "Q").unpack_from
        window, start, place = self._window, self._start, self.place
        end = self.file.size_bytes
        for _ in range(count):
            if place + 8 > start + len(window) or place < start:
                self.place = place
                self._reach(8)
                window, start = self._window, self._start
            place += 8 + read_length(window, place - start)[0]
            if place > end:
                self._end(place - end)
        self.place = place

    def _reach(self, size_bytes: int) -> int:
        """Bring the next bytes into the window and return where they begin in it."""
        first = self.place - self._start
        if first < 0 or first + size_bytes > len(self._window):
            if self.place + size_bytes > self.file.size_bytes:
                self._end(size_bytes)
            stop = min(self.place + max(size_bytes, _WINDOW_BYTES), self.file.size_bytes)
            self._window = self.file.read(self.place, stop)
            self._start, first = self.place, 0
        return first

    def _end(self, size_bytes: int) -> None:
        raise TruncatedError(
            self.file.path,
            f"TRUNCATED: {size_bytes:,} bytes of the header are wanted at byte {self.place:,} and "
            f"the file has {self.file.size_bytes:,}",
            "get the file again, then run the same command",
        )


def _read_fact(cursor: _Cursor, header: Header) -> None:
    begin = cursor.place
    key = cursor.text(_LONGEST_NAME_BYTES)
    kind = int(cursor.number("I"))
    kept: Any
    if kind == _ARRAY:
        header.lengths[key], kept = _read_array(cursor, 1)
    else:
        kept = _read_value(cursor, kind)
    is_word_list = kind == _ARRAY and key.startswith("tokenizer.")
    size_bytes = cursor.place - begin
    if key in _NEEDED or (kept is not None and not is_word_list and size_bytes <= header.room):
        header.facts[key] = kept
        header.room -= size_bytes


def _read_value(cursor: _Cursor, kind: int) -> Any:
    if kind == _TEXT:
        return cursor.text()
    if kind not in _SCALARS:
        raise MalformedError(
            cursor.file.path, f"a fact of the header has the type {kind:,}, which does not exist"
        )
    return cursor.number(_SCALARS[kind])


def _read_array(cursor: _Cursor, depth: int) -> tuple[int, list[Any] | None]:
    """Return the length of an array, and its entries if they are few."""
    kind = int(cursor.number("I"))
    if kind in _SCALARS:
        smallest = struct.calcsize(_SCALARS[kind])
    elif kind in _SMALLEST_BYTES and depth < _DEEPEST_ARRAY:
        smallest = _SMALLEST_BYTES[kind]
    else:
        raise MalformedError(
            cursor.file.path,
            f"an array of the header has entries of the type {kind:,}"
            + (" inside too many others" if kind == _ARRAY else ", which does not exist"),
        )
    count = cursor.count(smallest, "entries of an array")
    if kind == _ARRAY:
        for _ in range(count):
            _read_array(cursor, depth + 1)
        return count, None
    if count <= _KEPT_ENTRIES:
        return count, [_read_value(cursor, kind) for _ in range(count)]
    if kind == _TEXT:
        cursor.skip_texts(count)
    else:
        cursor.skip(count * smallest)
    return count, None


def _read_entry(cursor: _Cursor) -> TensorEntry:
    name = cursor.text(_LONGEST_NAME_BYTES)
    axes = int(cursor.number("I"))
    if axes > _MOST_AXES:
        raise MalformedError(
            cursor.file.path, f"tensor {name!r} has {axes:,} axes; {_MOST_AXES} are allowed"
        )
    shape = tuple(int(cursor.number("Q")) for _ in range(axes))[::-1]
    kind = int(cursor.number("I"))
    offset = int(cursor.number("Q"))
    if math.prod(shape) >= 1 << 62 or offset >= 1 << 62:
        raise MalformedError(
            cursor.file.path,
            f"tensor {name!r} has the shape {list(shape)} and lies at byte {offset:,}; no file is "
            "that large",
        )
    return TensorEntry(name, shape, kind, offset)
