"""A zip archive with a model in it: unpacked to a temporary folder, then opened like any other.

`archive.zip!member` names one of several models. Nothing is written before the whole directory
was looked at: names that climb out of the folder, links, and archives that would unpack to far
more than they hold are refused.
"""

import shutil
import tempfile
import zipfile
from pathlib import Path

from embedder.checkpoint import Checkpoint
from embedder.discovery import ARCHIVE_MARK, find_models
from embedder.errors import CheckpointError, NotFoundError, RefusedError
from embedder.opening import open_checkpoint
from embedder.readers.zipped import ZIP_ERRORS, ZipArchive, refuse_unsafe_member
from embedder.sniff import sniff

_PIECE_BYTES = 1 << 20
_SHOWN = 5


def open_archive(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open the model in a zip archive.

    Args:
        path: The archive, or `archive.zip!member` for one file or folder in it.
        allow_partial: Passed on to the reader of the model inside.

    Returns:
        The model; its temporary folder is removed when it is closed.

    Raises:
        RefusedError: Unpacking would be unsafe.
        NotFoundError: There is no such member, or no model in the archive.
        CheckpointError: There are several models, or the one there cannot be read.
    """
    archive_path, member = _parts_of(path)
    archive = ZipArchive(archive_path)
    folder = Path(tempfile.mkdtemp(prefix="lineage-"))
    try:
        try:
            wanted = _wanted(archive, member, path)
            for info in wanted:
                refuse_unsafe_member(archive_path, info)
            _unpack(archive, wanted, folder)
        finally:
            archive.close()
        inside = folder / member
        if inside.is_dir():
            inside = _only_model(inside, folder, path)
        if inside.is_file() and sniff(inside) == "zip":
            # An archive that holds itself would be unpacked for ever.
            raise RefusedError(
                path, "an archive inside the archive is not opened", "unpack the outer one first"
            )
        checkpoint = _open_inside(inside, folder, archive_path, allow_partial)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    checkpoint.location = str(path)
    checkpoint.files = (archive_path,)
    checkpoint.on_close.append(lambda: shutil.rmtree(folder, ignore_errors=True))
    return checkpoint


def _parts_of(path: Path) -> tuple[Path, str]:
    """Return the archive and the member; the member is empty if none is named."""
    if path.is_file():
        return path, ""
    archive, _, member = str(path).rpartition(ARCHIVE_MARK)
    return Path(archive), member.strip("/")


def _wanted(archive: ZipArchive, member: str, path: Path) -> list[zipfile.ZipInfo]:
    """Return what is to be unpacked: all, or a member with the files beside or below it."""
    everything = list(archive.members.values())
    if not member:
        return everything
    below = [info for info in everything if info.filename.startswith(f"{member}/")]
    if below:
        return below
    if member not in archive.members:
        names = [name for name in archive.members if not name.endswith("/")]
        raise NotFoundError(path, f"the archive has no member {member!r}", _some("it has", names))
    # A config, or further shards, may lie beside a file.
    parent = member.rpartition("/")[0]
    return [info for info in everything if info.filename.rpartition("/")[0] == parent]


def _unpack(archive: ZipArchive, members: list[zipfile.ZipInfo], folder: Path) -> None:
    needed = sum(info.file_size for info in members)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            archive.path,
            f"unpacking takes {needed:,} bytes and {folder.parent} has {free:,} free",
            "set TMPDIR to a larger disk",
        )
    for info in members:
        target = folder / info.filename
        try:
            if info.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            content = archive.storage(info.filename)
            with target.open("wb") as output:
                for start in range(0, content.size_bytes, _PIECE_BYTES):
                    output.write(content.read(start, min(start + _PIECE_BYTES, content.size_bytes)))
        except ZIP_ERRORS as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                archive.path, f"member {info.filename!r} cannot be unpacked ({error})"
            ) from error


def _only_model(searched: Path, folder: Path, path: Path) -> Path:
    """Return the one model in an unpacked folder."""
    found = list(find_models(searched))
    found = [one for one in found if one.sure] or found
    if len(found) != 1:
        names = [str(one.path.relative_to(folder)) for one in found]
        if not names:
            raise NotFoundError(path, "there is no model in this archive", "check the path")
        archive = _parts_of(path)[0]
        raise CheckpointError(
            path,
            _some(f"there are {len(names)} models in this archive:", names),
            f"name one as '{archive}{ARCHIVE_MARK}{names[0]}'",
        )
    return found[0].path


def _open_inside(inside: Path, folder: Path, archive: Path, allow_partial: bool) -> Checkpoint:
    """Open an unpacked model; errors name the archive and the member, not the temporary folder."""
    try:
        return open_checkpoint(inside, allow_partial=allow_partial)
    except CheckpointError as error:
        inner = error.location.removeprefix(str(folder)).strip("/")
        where = f"{archive}{ARCHIVE_MARK}{inner}" if inner else str(archive)
        problem = error.problem.replace(f"{folder}/", "")
        raise type(error)(where, problem, error.cure.replace(f"{folder}/", "")) from error


def _some(words: str, names: list[str]) -> str:
    return f"{words} {', '.join(names[:_SHOWN])}" + (", …" if len(names) > _SHOWN else "")
