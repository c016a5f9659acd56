"""Storages over other storages: a part of one, its bytes swapped, or every n-th value of it."""

import numpy as np

from embedder.storage import Storage

_PIECE_VALUES = 1 << 18


class Part:
    """A range of another storage; the caller has checked that it lies within.

    Example:
        >>> from embedder.storage import MemoryStorage
        >>> bytes(Part(MemoryStorage(b"abcdef"), 2, 3).read(1, 3))
        b'de'
    """

    __slots__ = ("_base", "_start", "size_bytes")

    def __init__(self, base: Storage, start: int, size_bytes: int) -> None:
        self._base, self._start, self.size_bytes = base, start, size_bytes

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """Return the bytes from `start` up to `stop` of this part."""
        return self._base.read(self._start + start, self._start + stop)


class Swapped:
    """Another storage with the bytes of each number in the opposite order.

    Args:
        base: Numbers as a big-endian machine writes them.
        width: Bytes of one number: 2, 4 or 8 (a complex number is two).

    Example:
        >>> from embedder.storage import MemoryStorage
        >>> Swapped(MemoryStorage(b"abcd"), 2).read(0, 4)
        b'badc'
    """

    __slots__ = ("_base", "_width", "size_bytes")

    def __init__(self, base: Storage, width: int) -> None:
        self._base, self._width = base, width
        self.size_bytes = base.size_bytes // width * width

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop`, in the order of this machine."""
        width = self._width
        low, high = start // width * width, -(-stop // width) * width
        numbers = np.frombuffer(self._base.read(low, high), f"u{width}")
        return numbers.byteswap().tobytes()[start - low : stop - low]


class Strided:
    """The values of a view that does not lie in one run, row after row.

    Only the span of the base that holds the wanted values is read.

    Args:
        base: Where the values lie.
        width: Bytes of one value.
        shape: Shape of the view.
        strides: Values between neighbours on each axis.
        offset: Place of the view's first value.

    Example:
        >>> from embedder.storage import MemoryStorage
        >>> view = Strided(MemoryStorage(b"abcdef"), width=1, shape=(3, 2), strides=(1, 3))
        >>> view.read(0, 6)
        b'adbecf'
    """

    __slots__ = ("_base", "_offset", "_shape", "_strides", "_width", "size_bytes")

    def __init__(
        self,
        base: Storage,
        *,
        width: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int = 0,
    ) -> None:
        self._base, self._width, self._offset = base, width, offset
        self._shape, self._strides = shape, strides
        self.size_bytes = int(np.prod(shape, dtype=np.int64)) * width

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop` of the view written out."""
        width = self._width
        first, last = start // width, -(-stop // width)
        pieces = [
            self._values(piece, min(piece + _PIECE_VALUES, last))
            for piece in range(first, last, _PIECE_VALUES)
        ]
        return b"".join(pieces)[start - first * width : stop - first * width]

    def _values(self, first: int, last: int) -> bytes:
        along = np.unravel_index(np.arange(first, last), self._shape)
        places = np.full(last - first, self._offset, np.int64)
        for place_on_axis, stride in zip(along, self._strides, strict=True):
            places += place_on_axis * stride
        low, high = int(places.min()), int(places.max()) + 1
        span = np.frombuffer(
            self._base.read(low * self._width, high * self._width), np.uint8
        ).reshape(-1, self._width)
        return span[places - low].tobytes()
