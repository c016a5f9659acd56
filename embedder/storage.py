"""Where the stored bytes of a tensor lie, and how to get at a part of them.

A storage gives any byte range on request, so a tensor of any size is read in slices. Ranges are
checked against the real size of the file when a storage is made: a size from a header is never
believed before that.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from embedder.errors import NotFoundError, TruncatedError


class Storage(Protocol):
    """A run of bytes that can be read in parts."""

    @property
    def size_bytes(self) -> int:
        """How many bytes there are."""

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """Return the bytes from `start` up to `stop`; both lie within the size."""


class OpenFile:
    """One open file, read by position, so threads may share it.

    Raises:
        NotFoundError: There is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(path, "no such file") from error
        self.size_bytes = os.fstat(self._descriptor).st_size

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop`.

        Raises:
            TruncatedError: The file ends before `stop`.
        """
        parts = []
        while start < stop:
            # Linux hands out at most 2 GiB a call, and a signal may cut a call short.
            part = os.pread(self._descriptor, stop - start, start)
            if not part:
                raise TruncatedError(
                    self.path,
                    f"TRUNCATED: byte {stop:,} is wanted and the file has {self.size_bytes:,}",
                    "get the file again, then run the same command",
                )
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def part(self, start: int, size_bytes: int, what: str) -> "FileRange":
        """Return the range of `size_bytes` bytes at `start` as a storage.

        Args:
            start: First byte.
            size_bytes: Number of bytes.
            what: Name of the thing stored there, for the error message.

        Raises:
            TruncatedError: The file is shorter than that.
        """
        if start < 0 or size_bytes < 0 or start + size_bytes > self.size_bytes:
            raise TruncatedError(
                self.path,
                f"TRUNCATED: {what} ends at byte {start + size_bytes:,} "
                f"and the file has {self.size_bytes:,}",
                "get the file again, then run the same command",
            )
        return FileRange(self, start, size_bytes)

    def fileno(self) -> int:
        """Return the descriptor, for a child process that reads the same file."""
        return self._descriptor

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class FileRange:
    """A part of an open file; made by `OpenFile.part`, which checks it."""

    __slots__ = ("_file", "_start", "size_bytes")

    def __init__(self, file: OpenFile, start: int, size_bytes: int) -> None:
        self._file, self._start, self.size_bytes = file, start, size_bytes

    @property
    def start(self) -> int:
        """Where in the file it begins."""
        return self._start

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop` of this part."""
        return self._file.read(self._start + start, self._start + stop)


class JoinedStorage:
    """Storages one after the other, such as a tensor that is cut over several files.

    Example:
        >>> joined = JoinedStorage([MemoryStorage(b"ab"), MemoryStorage(b"cde")])
        >>> joined.size_bytes, bytes(joined.read(1, 4))
        (5, b'bcd')
    """

    __slots__ = ("_ends", "_parts", "size_bytes")

    def __init__(self, parts: Sequence[Storage]) -> None:
        self._parts = tuple(parts)
        self._ends = list(accumulate(part.size_bytes for part in self._parts))
        self.size_bytes = self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """Return the bytes from `start` up to `stop`, from as many parts as they lie in."""
        found: list[bytes | memoryview] = []
        place = bisect_right(self._ends, start)
        while start < stop:
            part, end = self._parts[place], self._ends[place]
            begin = end - part.size_bytes
            found.append(part.read(start - begin, min(stop, end) - begin))
            start, place = end, place + 1
        return found[0] if len(found) == 1 else b"".join(found)


class ReadOnce:
    """Bytes that are read when some are first asked for, all of them, and kept.

    Example:
        >>> once = ReadOnce(MemoryStorage(b"abcde"))
        >>> bytes(once.read(1, 3)), bytes(once.read(0, 5))
        (b'bc', b'abcde')
    """

    __slots__ = ("_kept", "_storage", "size_bytes")

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._kept: memoryview | None = None
        self.size_bytes = storage.size_bytes

    def read(self, start: int, stop: int) -> memoryview:
        """Return the bytes from `start` up to `stop`."""
        if self._kept is None:
            self._kept = memoryview(self._storage.read(0, self.size_bytes))
        return self._kept[start:stop]


class MemoryStorage:
    """Bytes that are in memory already, such as those of a live model."""

    __slots__ = ("_bytes", "size_bytes")

    def __init__(self, values: NDArray[np.generic] | bytes) -> None:
        if isinstance(values, bytes):
            self._bytes = memoryview(values)
        else:
            flat = np.ascontiguousarray(values).reshape(-1)
            self._bytes = flat.view(np.uint8).data
        self.size_bytes = self._bytes.nbytes

    def read(self, start: int, stop: int) -> memoryview:
        """Return the bytes from `start` up to `stop`, without copying them."""
        return self._bytes[start:stop]


class ComputedStorage:
    """Rows of float32 that a function gives on demand, such as those of a low-rank product.

    Args:
        rows: Number of rows.
        row_values: Values in each row.
        compute: Returns rows first … last as an array of shape (last − first, row_values).
    """

    __slots__ = ("_compute", "_row_bytes", "size_bytes")

    def __init__(
        self, rows: int, row_values: int, compute: Callable[[int, int], NDArray[np.float32]]
    ) -> None:
        self._compute = compute
        self._row_bytes = row_values * 4
        self.size_bytes = rows * self._row_bytes

    def read(self, start: int, stop: int) -> memoryview:
        """Return the bytes from `start` up to `stop`, of rows made for this call."""
        first, last = start // self._row_bytes, -(-stop // self._row_bytes)
        made = np.ascontiguousarray(self._compute(first, last), dtype=np.float32)
        raw = made.reshape(-1).view(np.uint8).data
        return raw[start - first * self._row_bytes : stop - first * self._row_bytes]
