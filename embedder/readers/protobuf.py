"""The wire form of protocol buffers, walked over field by field.

Just enough to find things in a message without a schema compiler and without loading it: a field
that holds bytes or a message is given as the range that it takes. Nothing is allocated from a
length in the file; each is held against the end of the message that it lies in.
"""

import mmap
import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from embedder.errors import MalformedError

Content = bytes | mmap.mmap
Range = tuple[int, int]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def fields(
    content: Content, span: Range, location: object
) -> Iterator[tuple[int, int, int, int, int]]:
    r"""Yield the fields of a message as (number, wire type, value, start, stop).

    For bytes the field's content is `content[value:stop]`; else `value` is the number itself, a
    float as its bits. `content[start:stop]` is the whole field with its key.

    Args:
        content: What the message lies in.
        span: Where it begins and ends.
        location: What to name in an error.

    Raises:
        MalformedError: It is not a message.

    Example:
        >>> list(fields(b"\x08\x96\x01\x12\x02hi", (0, 7), "x"))
        [(1, 0, 150, 0, 3), (2, 2, 5, 3, 7)]
    """
    place, end = span
    while place < end:
        start = place
        key, place = _varint(content, place, end, location)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, place = _varint(content, place, end, location)
        elif wire == BYTES:
            length, value = _varint(content, place, end, location)
            place = value + length
        elif wire == FIXED64 and place + 8 <= end:
            (value,) = struct.unpack_from("<Q", content, place)
            place += 8
        elif wire == FIXED32 and place + 4 <= end:
            (value,) = struct.unpack_from("<I", content, place)
            place += 4
        else:
            raise _not_a_message(location, start)
        if place > end or number == 0:
            raise _not_a_message(location, start)
        yield number, wire, value, start, place


def varints(content: Content, span: Range, location: object) -> Iterator[int]:
    """Yield the numbers of a packed field, unsigned.

    Raises:
        MalformedError: The last one is cut.
    """
    place, end = span
    while place < end:
        value, place = _varint(content, place, end, location)
        yield value


def packed_varints(
    content: bytes, dtype: str, location: object, *, piece_bytes: int = 1 << 20
) -> NDArray[np.generic]:
    r"""Return the numbers of a packed field at once, cut to a type, for fields of millions.

    Args:
        content: The field.
        dtype: An integer type; higher bits are dropped, as negative numbers need it.
        location: What to name in an error.
        piece_bytes: Bytes that are worked on at a time.

    Raises:
        MalformedError: The last one is cut, or one is too long.

    Example:
        >>> packed_varints(b"\x05\x96\x01", "u2", "x")
        array([  5, 150], dtype=uint16)
    """
    stored = np.frombuffer(content, np.uint8)
    pieces = [np.zeros(0, dtype)]
    start = 0
    while start < stored.size:
        piece = stored[start : start + piece_bytes]
        ends = np.flatnonzero(piece < 0x80)
        lengths = np.diff(ends, prepend=-1)
        if not ends.size or lengths.max() > 10:
            raise _not_a_message(location, start)
        starts = ends - lengths + 1
        values = np.zeros(ends.size, np.uint64)
        for place in range(int(lengths.max())):
            longer = lengths > place
            digits = piece[starts[longer] + place].astype(np.uint64) & np.uint64(0x7F)
            values[longer] |= digits << np.uint64(7 * place)
        pieces.append(values.astype(dtype))
        start += int(ends[-1]) + 1
    return np.concatenate(pieces)


def signed(value: int) -> int:
    """Return a 64-bit number as two's complement has it.

    Example:
        >>> signed(2**64 - 1)
        -1
    """
    return value - (1 << 64) if value >= 1 << 63 else value


def encode_varint(value: int) -> bytes:
    r"""Return a number in the wire form.

    Example:
        >>> encode_varint(150)
        b'\x96\x01'
    """
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _varint(content: Content, place: int, end: int, location: object) -> tuple[int, int]:
    value = shift = 0
    while place < end and shift < 70:
        byte = content[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, place
        shift += 7
    raise _not_a_message(location, place)


def _not_a_message(location: object, place: int) -> MalformedError:
    return MalformedError(
        location,
        f"is not a valid protocol-buffer message at byte {place:,}",
        "get the file again; it is cut short or damaged",
    )
