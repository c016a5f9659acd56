"""MessagePack, walked without loading it.

The package `msgpack` gives every array as bytes in memory and bounds only single objects. Here a
run of bytes is given as the place where it lies, so a model of any size is walked in a few
kilobytes, and what is bounded is what grows: depth and number of values.
"""

import struct
from dataclasses import dataclass
from typing import Any

from embedder.errors import MalformedError, TruncatedError
from embedder.storage import OpenFile, Storage

MOST_DEPTH = 100
MOST_VALUES = 2_000_000
_LONGEST_TEXT = 4096
_BUFFER_BYTES = 1 << 16

_FIXED = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_RUNS = {
    **dict.fromkeys((0xC4, 0xC7, 0xD9), 1),
    **dict.fromkeys((0xC5, 0xC8, 0xDA), 2),
    **dict.fromkeys((0xC6, 0xC9, 0xDB), 4),
}
"""First byte of bytes, extensions and texts → width of the length that follows."""

_EXTENSIONS = frozenset({0xC7, 0xC8, 0xC9})
_MEMBERS = {0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes, a text, or the content of an extension type, by the place where it lies.

    Args:
        file: The file that it lies in.
        start: Its first byte.
        size_bytes: Number of bytes.
        code: The extension type; None for bytes and texts.
    """

    file: OpenFile
    start: int
    size_bytes: int
    code: int | None = None

    def storage(self, what: str) -> Storage:
        """Return the bytes as a storage."""
        return self.file.part(self.start, self.size_bytes, what)

    def text(self) -> str:
        """Return a short text; empty for anything too long to be one."""
        if self.size_bytes > _LONGEST_TEXT:
            return ""
        raw = self.file.read(self.start, self.start + self.size_bytes)
        return raw.decode("utf-8", "surrogateescape")

    def inside(self) -> "Tree":
        """Return the MessagePack value that the content is.

        Raises:
            MalformedError: It is none.
        """
        return read_tree(self.file, self.start, self.start + self.size_bytes)


Tree = None | bool | int | float | Run | list[Any] | dict[str, Any]
"""A value: a number, a run of bytes, or trees. The keys of a map are given as texts."""


def read_tree(file: OpenFile, start: int = 0, stop: int | None = None) -> Tree:
    """Return the one value that a part of a file is.

    Raises:
        MalformedError: It is not MessagePack, is nested too deep, or has too many values.
        TruncatedError: It ends before the value does.
    """
    walk = _Walk(file, start, file.size_bytes if stop is None else stop)
    found = walk.value(0)
    if walk.place != walk.stop:
        raise MalformedError(
            file.path, f"{walk.stop - walk.place:,} bytes follow its content", "get the file again"
        )
    return found


class _Walk:
    """A place that moves over a part of a file."""

    def __init__(self, file: OpenFile, start: int, stop: int) -> None:
        self.place, self.stop = start, stop
        self._file, self._values = file, 0
        self._buffer, self._from = b"", start

    def value(self, depth: int) -> Tree:
        """Return the value at the place, and move behind it."""
        self._values += 1
        if depth > MOST_DEPTH or self._values > MOST_VALUES:
            raise MalformedError(
                self._file.path,
                f"is nested deeper than {MOST_DEPTH}, or has more than {MOST_VALUES:,} values",
                "get the file again",
            )
        first = self._take(1)[0]
        if first < 0x80:
            return first
        if first >= 0xE0:
            return first - 0x100
        if first in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[first]
        if first in _FIXED:
            number: int | float = struct.unpack(
                _FIXED[first], self._take(struct.calcsize(_FIXED[first]))
            )[0]
            return number
        if 0xA0 <= first < 0xC0:
            return self._run(first & 31, None)
        if first in _RUNS:
            length = int.from_bytes(self._take(_RUNS[first]), "big")
            return self._run(length, self._code() if first in _EXTENSIONS else None)
        if 0xD4 <= first <= 0xD8:
            return self._run(1 << first - 0xD4, self._code())
        if 0x80 <= first < 0xA0 or first in _MEMBERS:
            return self._members(first, depth + 1)
        raise MalformedError(
            self._file.path, f"byte {self.place - 1:,} begins no value", "get the file again"
        )

    def _members(self, first: int, depth: int) -> Tree:
        """Return a list or a map."""
        is_map = first < 0x90 or first in (0xDE, 0xDF)
        width = _MEMBERS.get(first)
        count = first & 15 if width is None else int.from_bytes(self._take(width), "big")
        if count * (2 if is_map else 1) > self.stop - self.place:  # each takes a byte or more
            raise self._cut(count)
        if not is_map:
            return [self.value(depth) for _ in range(count)]
        found: dict[str, Tree] = {}
        for _ in range(count):
            key = self.value(depth)
            found[key.text() if isinstance(key, Run) else str(key)[:_LONGEST_TEXT]] = self.value(
                depth
            )
        return found

    def _run(self, size_bytes: int, code: int | None) -> Run:
        start = self.place
        if size_bytes > self.stop - start:
            raise self._cut(size_bytes)
        self.place += size_bytes
        return Run(self._file, start, size_bytes, code)

    def _code(self) -> int:
        return int.from_bytes(self._take(1), "big", signed=True)

    def _take(self, count: int) -> bytes:
        if count > self.stop - self.place:
            raise self._cut(count)
        begin = self.place - self._from
        if not 0 <= begin <= len(self._buffer) - count:
            self._from, begin = self.place, 0
            self._buffer = self._file.read(self.place, min(self.place + _BUFFER_BYTES, self.stop))
        self.place += count
        return self._buffer[begin : begin + count]

    def _cut(self, wanted: int) -> TruncatedError:
        return TruncatedError(
            self._file.path,
            f"TRUNCATED: {wanted:,} bytes or values are promised at byte {self.place:,}, and "
            f"{self.stop - self.place:,} bytes follow",
            "get the file again, then run the same command",
        )
