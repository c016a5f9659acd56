"""Sorted string tables: the file format of LevelDB, in which TensorFlow keeps its lists of tensors.

A footer points to a block of (last key, place) for each data block; a block holds entries whose
keys leave out what they share with the key before, then a list of restarts that only seeking needs.
"""

import struct
from collections.abc import Iterator

from embedder.errors import MalformedError, TruncatedError, UnsupportedError
from embedder.storage import OpenFile

MAGIC = bytes.fromhex("57fb808b247547db")
_FOOTER_BYTES = 48
_TRAILER_BYTES = 5  # kind of compression, checksum
_LONGEST_KEY = 8192
_MOST_ENTRIES = 5_000_000
_MOST_EXPANSION = 64  # a copy of 64 bytes takes two or three


def table_entries(file: OpenFile) -> Iterator[tuple[bytes, bytes]]:
    """Yield (key, value) of a table in the order of the keys.

    Raises:
        MalformedError: It is not such a table, or breaks the rules.
        TruncatedError: It ends before its blocks do.
        UnsupportedError: A block is compressed in a way that we do not know.
    """
    if file.size_bytes < _FOOTER_BYTES:
        raise TruncatedError(
            file.path,
            f"TRUNCATED: {file.size_bytes:,} bytes are less than the {_FOOTER_BYTES} of a footer",
            "get the file again, then run the same command",
        )
    footer = file.read(file.size_bytes - _FOOTER_BYTES, file.size_bytes)
    if footer[-8:] != MAGIC:
        raise _malformed(file, "does not end with the mark of a table")
    place = 0
    for _ in range(2):  # the block of statistics, which nobody writes
        _, place = varint(footer, place, file.path)
    listing, _ = _handle(footer, place, file)
    count = 0
    for _, value in _block_entries(_block(file, *listing), file):
        data, _ = _handle(value, 0, file)
        for entry in _block_entries(_block(file, *data), file):
            count += 1
            if count > _MOST_ENTRIES:
                raise _malformed(file, f"has more than {_MOST_ENTRIES:,} entries")
            yield entry


def varint(raw: bytes, place: int, location: object) -> tuple[int, int]:
    """Return the number of variable length at a place, and the place after it.

    Raises:
        MalformedError: It has no end.

    Example:
        >>> varint(bytes([0x96, 0x01, 0xFF]), 0, "x")
        (150, 2)
    """
    value = shift = 0
    while place < len(raw) and shift < 64:
        byte = raw[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise MalformedError(location, "a number in it has no end", "get the file again")


def _handle(raw: bytes, place: int, file: OpenFile) -> tuple[tuple[int, int], int]:
    offset, place = varint(raw, place, file.path)
    size, place = varint(raw, place, file.path)
    return (offset, size), place


def _block(file: OpenFile, offset: int, size: int) -> bytes:
    """Return a block, unpacked."""
    raw = file.part(offset, size + _TRAILER_BYTES, "a block").read(0, size + _TRAILER_BYTES)
    compression = raw[size]
    if compression == 0:
        return raw[:size]
    if compression == 1:
        return unpack_snappy(raw[:size], file.path)
    raise UnsupportedError(
        file.path, f"a block is compressed in the unknown way {compression}", "get the file again"
    )


def _block_entries(block: bytes, file: OpenFile) -> Iterator[tuple[bytes, bytes]]:
    if len(block) < 4:
        raise _malformed(file, "a block is too short")
    (restarts,) = struct.unpack("<I", block[-4:])
    end = len(block) - 4 - 4 * restarts
    if end < 0:
        raise _malformed(file, f"a block of {len(block):,} bytes has {restarts:,} restarts")
    place, key = 0, b""
    while place < end:
        shared, place = varint(block, place, file.path)
        own, place = varint(block, place, file.path)
        length, place = varint(block, place, file.path)
        if shared > len(key) or place + own + length > end or shared + own > _LONGEST_KEY:
            raise _malformed(file, f"an entry of {own:,} + {length:,} bytes leaves its block")
        key = key[:shared] + block[place : place + own]
        yield key, block[place + own : place + own + length]
        place += own + length


def unpack_snappy(raw: bytes, location: object) -> bytes:
    """Return what a snappy block holds.

    Raises:
        MalformedError: It is damaged, or promises more than its bytes can hold.

    Example:
        >>> unpack_snappy(bytes([6, 0b100]) + b"ab" + bytes([0b1, 2]), "x")
        b'ababab'
    """
    size, place = varint(raw, 0, location)
    if size > _MOST_EXPANSION * len(raw):
        raise MalformedError(location, f"{len(raw):,} bytes of snappy promise {size:,}")
    out = bytearray()
    while place < len(raw):
        tag = raw[place]
        place += 1
        if tag & 3 == 0:
            length, place = _literal_length(raw, tag, place)
            out += raw[place : place + length]
            place += length
            continue
        width = (1, 2, 4)[(tag & 3) - 1]
        back = int.from_bytes(raw[place : place + width], "little")
        length = (tag >> 2) + 1
        if width == 1:
            back |= tag >> 5 << 8
            length = (tag >> 2 & 7) + 4
        place += width
        if not 0 < back <= len(out) or len(out) > size:
            raise MalformedError(location, "a block of snappy is damaged", "get the file again")
        run = bytes(out[-back:][:length])
        out += (run * (length // back + 1))[:length]
    if len(out) != size:
        raise MalformedError(
            location, f"a block of snappy holds {len(out):,} bytes and promises {size:,}"
        )
    return bytes(out)


def _literal_length(raw: bytes, tag: int, place: int) -> tuple[int, int]:
    """Return the length of a run of literal bytes and where they begin."""
    length = tag >> 2
    if length < 60:
        return length + 1, place
    width = length - 59
    return int.from_bytes(raw[place : place + width], "little") + 1, place + width


def _malformed(file: OpenFile, problem: str) -> MalformedError:
    return MalformedError(file.path, problem, "get the file again")
