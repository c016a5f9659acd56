"""Zip archives as the readers need them: members as storages, and nothing trusted unchecked."""

import lzma
import stat
import struct
import threading
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from embedder.errors import MalformedError, RefusedError, TruncatedError
from embedder.storage import OpenFile, Storage

LARGEST_UNPACKED_BYTES = 1_000_000_000
LARGEST_RATIO = 100
"""An archive is a bomb if it unpacks to more than both limits together allow."""

ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,  # also NotImplementedError: an unknown compression; and a missing password
)
"""What `zipfile` raises on archives that are damaged or of kinds that it does not know."""

_LOCAL_HEADER_BYTES = 30
_ENCRYPTED, _UTF8 = 0x1, 0x800


class ZipArchive:
    """An open archive whose members can be read in parts.

    Raises:
        NotFoundError: There is no such file.
        MalformedError: Its directory cannot be read.
        RefusedError: It is a bomb: the directory alone shows it, so nothing was unpacked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = OpenFile(path)
        try:
            self._archive = zipfile.ZipFile(path)
        except ZIP_ERRORS as error:
            self.file.close()
            raise MalformedError(
                path, f"the archive's directory cannot be read ({error})", "get the file again"
            ) from error
        self.members = {info.filename: info for info in self._archive.infolist()}
        try:
            refuse_bomb(path, self._archive.infolist(), self.file.size_bytes)
        except RefusedError:
            self.close()
            raise

    def storage(self, name: str) -> Storage:
        """Return a member's content: a range of the file where it is not compressed.

        Raises:
            MalformedError: Directory and content disagree, or there is no such member.
            TruncatedError: The file ends inside the member.
            RefusedError: The member is encrypted.
        """
        info = self.members.get(name)
        if info is None:
            raise MalformedError(self.path, f"the archive has no member {name!r}")
        if info.flag_bits & _ENCRYPTED:
            raise RefusedError(
                self.path, f"member {name!r} is encrypted", "decrypt the archive first"
            )
        if info.compress_type != zipfile.ZIP_STORED:
            return _Inflated(self.path, self._archive, info)
        if info.file_size != info.compress_size:
            raise MalformedError(
                self.path,
                f"member {name!r} is stored uncompressed in {info.compress_size:,} bytes, yet "
                f"has {info.file_size:,}",
            )
        return self.file.part(self._content_start(info), info.file_size, f"member {name!r}")

    def _content_start(self, info: zipfile.ZipInfo) -> int:
        """Return where a member's bytes begin: after its local header, which is checked."""
        start = info.header_offset
        if start < 0 or start + _LOCAL_HEADER_BYTES > self.file.size_bytes:
            raise TruncatedError(self.path, f"member {info.filename!r} lies outside the file")
        header = self.file.read(start, start + _LOCAL_HEADER_BYTES)
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        name_start = start + _LOCAL_HEADER_BYTES
        name = self.file.read(name_start, min(name_start + name_bytes, self.file.size_bytes))
        stated = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
        if header[:4] != b"PK\x03\x04" or name != stated:
            raise MalformedError(
                self.path, f"member {info.filename!r} is not where the directory says"
            )
        return name_start + int(name_bytes) + int(extra_bytes)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._archive.close()
        self.file.close()


class _Inflated:
    """A compressed member, unpacked as it is read; forward reading costs one pass."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        self.size_bytes = info.file_size
        self._path, self._name, self._lock = path, info.filename, threading.Lock()
        try:
            self._content = archive.open(info)
        except ZIP_ERRORS as error:
            raise self._damaged(error) from error

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop`."""
        with self._lock:
            try:
                self._content.seek(start)
                raw = self._content.read(stop - start)
            except ZIP_ERRORS as error:
                raise self._damaged(error) from error
        if len(raw) < stop - start:
            raise TruncatedError(
                self._path,
                f"TRUNCATED: member {self._name!r} unpacks to {start + len(raw):,} bytes and the "
                f"directory promises {self.size_bytes:,}",
                "get the file again, then run the same command",
            )
        return raw

    def _damaged(self, error: BaseException) -> MalformedError:
        return MalformedError(
            self._path, f"member {self._name!r} cannot be unpacked ({error})", "get the file again"
        )


def refuse_bomb(path: Path, members: list[zipfile.ZipInfo], size_bytes: int) -> None:
    """Refuse an archive whose directory promises far more than the file can hold.

    Args:
        path: The archive, for the message.
        members: Its directory.
        size_bytes: Size of the archive.

    Raises:
        RefusedError: The members unpack to over 1 GB and over 100 times the file.
    """
    unpacked = sum(info.file_size for info in members)
    if unpacked > max(LARGEST_UNPACKED_BYTES, LARGEST_RATIO * size_bytes):
        raise RefusedError(
            path,
            f"{size_bytes:,} bytes would unpack to {unpacked:,}: an archive bomb; nothing was "
            "unpacked",
            "unpack it yourself if you trust it",
        )


def refuse_unsafe_member(path: Path, info: zipfile.ZipInfo) -> None:
    """Refuse a member that would be written outside the folder it is unpacked to.

    Args:
        path: The archive, for the message.
        info: The member.

    Raises:
        RefusedError: Its name is absolute or climbs, or it is a link or a device.
    """
    name = info.filename
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or "\0" in name or name[1:2] == ":":
        raise RefusedError(
            path,
            f"member {name!r} would be written outside its folder; nothing was unpacked",
            "do not trust this archive",
        )
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise RefusedError(
            path,
            f"member {name!r} is a link or a device, not a file; nothing was unpacked",
            "unpack the archive yourself if you trust it",
        )
