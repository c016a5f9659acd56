"""What format a file has, told by its content alone.

Each rule looks at the first bytes, the size, and for containers at the directory; no reader is
tried to see whether it fails, and the file's name plays no part. At most one rule says yes.
"""

import json
import mmap
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_HEAD_BYTES = 4096
_LEVELDB_MAGIC = bytes.fromhex("57fb808b247547db")
_TORCH_LEGACY = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_LARGEST_JSON_BYTES = 64 << 20


@dataclass
class Content:
    """What a rule may look at: a file's first and last bytes and, for archives, its directory."""

    path: Path

    @cached_property
    def size_bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    @cached_property
    def head(self) -> bytes:
        """The first 4 KiB."""
        with self.path.open("rb") as file:
            return file.read(_HEAD_BYTES)

    @cached_property
    def tail(self) -> bytes:
        """The last 8 bytes."""
        with self.path.open("rb") as file:
            file.seek(max(0, self.size_bytes - 8))
            return file.read(8)

    @cached_property
    def members(self) -> tuple[str, ...]:
        """Names in a zip archive's directory; empty for anything else."""
        if not self.head.startswith(b"PK\x03\x04"):
            return ()
        try:
            with zipfile.ZipFile(self.path) as archive:
                return tuple(archive.namelist())
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            return ()

    @cached_property
    def is_torch_zip(self) -> bool:
        """Whether the archive holds a pickle with its storages, as torch writes it."""
        return any(name.rpartition("/")[2] == "data.pkl" for name in self.members)

    @cached_property
    def protobuf_fields(self) -> dict[int, int] | None:
        """Field number → wire type at the top level, or None if it is no protobuf message."""
        if not self.head or self.head[0] >> 3 not in range(1, 30):
            return None
        with (
            self.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return _scan_protobuf(content)


def _scan_protobuf(content: mmap.mmap) -> dict[int, int] | None:
    """Walk over the fields of a message without going into them."""
    fields: dict[int, int] = {}
    place, end = 0, len(content)
    for _ in range(10_000):
        if place == end:
            return fields
        key, place = _varint(content, place)
        number, wire = key >> 3, key & 7
        if not 0 < number < 1000 or wire not in (0, 1, 2, 5) or place > end:
            return None
        fields[number] = wire
        if wire == 0:
            _, place = _varint(content, place)
        else:
            length = {1: 8, 5: 4}.get(wire, 0)
            if wire == 2:
                length, place = _varint(content, place)
            place += length
        if place > end:
            # The message is longer than the file: its kind is known all the same.
            return fields
    return fields


def _varint(content: mmap.mmap, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(content) and shift < 64:
        byte = content[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    return 0, len(content) + 1


def _is_safetensors(content: Content) -> bool:
    if len(content.head) < 9:
        return False
    (header_bytes,) = struct.unpack("<Q", content.head[:8])
    return content.head[8:9] == b"{" and 2 <= header_bytes < 1 << 32


def _is_onnx(content: Content) -> bool:
    fields = content.protobuf_fields
    return fields is not None and fields.get(7) == 2 and 1 in fields and fields[1] == 0


def _is_saved_model(content: Content) -> bool:
    fields = content.protobuf_fields
    return fields is not None and set(fields) == {1, 2} and fields[1] == 0 and fields[2] == 2


def _is_paddle(content: Content) -> bool:
    head = content.head
    return len(head) > 21 and head[:16] == bytes(16) and head[18:20] == b"\0\0" and head[20] == 8


def _is_ctranslate2(content: Content) -> bool:
    if len(content.head) < 16:
        return False
    version, length = struct.unpack("<IH", content.head[:6])
    name = content.head[6 : 6 + length]
    return 1 <= version < 100 and 5 < length < 100 and name.endswith(b"Spec\0")


def _is_json_with(*keys: str) -> Callable[[Content], bool]:
    def rule(content: Content) -> bool:
        if content.head.lstrip()[:1] != b"{" or content.size_bytes > _LARGEST_JSON_BYTES:
            return False
        try:
            found = json.loads(content.path.read_bytes())
        except (ValueError, RecursionError):
            return False
        return isinstance(found, dict) and any(key in found for key in keys)

    return rule


def _is_thinc(content: Content) -> bool:
    # A one- or few-entry map whose first key is the byte string or text "weights" (spaCy 2)
    # or "nodes" (thinc 8).
    head = content.head
    return head[:1] in (b"\x81", b"\x82", b"\x83", b"\x84", b"\x85") and any(
        word in head[1:12] for word in (b"weights", b"nodes")
    )


def _is_flax(content: Content) -> bool:
    head = content.head
    if not head or not (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):
        return False
    # The first key is a short text; an array is extension type 1 (flax.serialization).
    start = {0xDE: 3, 0xDF: 5}.get(head[0], 1)
    return len(head) > start and (0xA1 <= head[start] <= 0xBF or head[start] == 0xD9)


def _starts(*magics: bytes) -> Callable[[Content], bool]:
    return lambda content: content.head.startswith(magics)


def _is_torch_legacy(content: Content) -> bool:
    head = content.head
    start = 11 if head[2:3] == b"\x95" else 2  # protocol 4 puts a frame of 9 bytes before it
    return head[:1] == b"\x80" and head[start:].startswith(_TORCH_LEGACY)


def _is_pickle(content: Content) -> bool:
    # Protocols 2 to 5 begin with their number; older ones have no mark to go by.
    return (
        content.head[:1] == b"\x80"
        and content.head[1:2] in (b"\2", b"\3", b"\4", b"\5")
        and not _is_torch_legacy(content)
    )


def _is_keras(content: Content) -> bool:
    return "model.weights.h5" in content.members


def _is_npz(content: Content) -> bool:
    return bool(content.members) and all(name.endswith(".npy") for name in content.members)


def _is_archive(content: Content) -> bool:
    rules = (_is_keras, _is_npz)
    return (
        bool(content.members)
        and not content.is_torch_zip
        and not any(rule(content) for rule in rules)
    )


_RULES: tuple[tuple[str, Callable[[Content], bool]], ...] = (
    ("gguf", _starts(b"GGUF", b"FUGG")),
    ("hdf5", _starts(b"\x89HDF\r\n\x1a\n")),
    ("npy", _starts(b"\x93NUMPY")),
    ("tflite", lambda content: content.head[4:8] == b"TFL3"),
    ("safetensors", _is_safetensors),
    ("pytorch", lambda content: content.is_torch_zip),
    ("pytorch-legacy", _is_torch_legacy),
    ("pickle", _is_pickle),
    ("keras", _is_keras),
    ("npz", _is_npz),
    ("zip", _is_archive),
    ("tensorflow-index", lambda content: content.tail == _LEVELDB_MAGIC),
    ("paddle", _is_paddle),
    ("ctranslate2", _is_ctranslate2),
    ("tfjs", _is_json_with("weightsManifest")),
    ("shard-index", _is_json_with("weight_map")),
    ("thinc", _is_thinc),
    ("flax", lambda content: _is_flax(content) and not _is_thinc(content)),
    ("onnx", _is_onnx),
    ("saved-model", _is_saved_model),
)


def sniff(path: Path) -> str | None:
    """Return the format of a file by its content, or None if no rule knows it.

    Raises:
        OSError: The file cannot be read.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "weights"
        >>> _ = file.write_bytes(b"GGUF" + bytes(20))
        >>> sniff(file)
        'gguf'
    """
    content = Content(path)
    if content.size_bytes == 0:
        return None
    return next((name for name, rule in _RULES if rule(content)), None)
