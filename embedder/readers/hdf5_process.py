"""Running libhdf5 where it can do no harm, and files without a name for what comes of it."""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from embedder.errors import CheckpointError, MalformedError, MissingExtraError
from embedder.readers.keras_layout import json_object
from embedder.storage import OpenFile

CHILD = Path(__file__).with_name("hdf5_child.py")
TIME_LIMIT_S = 60.0
MEMORY_LIMIT_BYTES = 2 << 30
_LARGEST_DIRECTORY_BYTES = 128 << 20
_BYTES_PER_S = 5 << 20  # decoding: gzip gives 50 MB/s on a slow core, so this is generous


class Temporary(OpenFile):
    """A file without a name, which is made when it is first read and gone when it is closed.

    Args:
        path: What messages name.
        fill: Writes the content to a descriptor.
        size_bytes: Size of the content. None: make it at once and see.
    """

    def __init__(
        self, path: Path, fill: Callable[[int], None], *, size_bytes: int | None = None
    ) -> None:
        self.path = path
        self._descriptor = -1
        self._fill = fill
        self._lock = threading.Lock()
        self.size_bytes = size_bytes or 0
        if size_bytes is None:
            self._make()
            self.size_bytes = os.fstat(self._descriptor).st_size

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop`.

        Raises:
            CheckpointError: The content cannot be made.
        """
        if self._descriptor < 0:
            self._make()
        return super().read(start, stop)

    def _make(self) -> None:
        with self._lock:
            if self._descriptor >= 0:
                return
            try:
                with tempfile.TemporaryFile(prefix="lineage-") as file:
                    self._fill(file.fileno())
                    self._descriptor = os.dup(file.fileno())
            except CheckpointError:
                raise
            except OSError as error:
                raise CheckpointError(
                    self.path,
                    f"its content cannot be unpacked to {tempfile.gettempdir()} ({error})",
                    "set TMPDIR to a folder with more room",
                ) from error


@dataclass(frozen=True, slots=True)
class Source:
    """An HDF5 file, or the part of a file that is one."""

    file: OpenFile
    base: int
    size_bytes: int


def read_directory(source: Source) -> dict[str, Any]:
    """Return what the child says is in an HDF5 file: `attributes`, `sets` and `left_out`.

    Raises:
        MalformedError: The file is bad, or the child's answer is not of this form.
        MissingExtraError: h5py is not installed.
    """
    path = source.file.path
    if find_spec("h5py") is None:
        raise MissingExtraError("h5py", "formats", "reading HDF5")
    answer = Temporary(
        path,
        lambda output: run_child(
            source,
            "directory",
            output=output,
            most_bytes=_LARGEST_DIRECTORY_BYTES,
            seconds=TIME_LIMIT_S,
        ),
    )
    try:
        found = json_object(answer.read(0, answer.size_bytes))
    finally:
        answer.close()
    sets, left_out, order = found.get("sets"), found.get("left_out"), found.get("order", [])
    if not (
        isinstance(sets, list)
        and all(isinstance(entry, dict) for entry in sets)
        and isinstance(left_out, list)
        and isinstance(order, list)
        and all(isinstance(text, str) for text in (*left_out, *order))
        and isinstance(found.get("attributes"), dict)
    ):
        raise MalformedError(path, "libhdf5 gave no directory of it", "get the file again")
    return found


def decoded_values(source: Source, size_bytes: int) -> Temporary:
    """Return the contents of all data sets that have no place of their own, when first read."""
    return Temporary(
        source.file.path,
        lambda output: run_child(
            source,
            "values",
            output=output,
            most_bytes=max(size_bytes, 4096),  # room for the reason of a failure
            seconds=TIME_LIMIT_S + size_bytes / _BYTES_PER_S,
        ),
        size_bytes=size_bytes,
    )


def run_child(source: Source, mode: str, *, output: int, most_bytes: int, seconds: float) -> None:
    """Run the child, which writes its answer to the descriptor `output`.

    Raises:
        MalformedError: It died, found no end, or says that the file is bad.
    """
    path, descriptor = source.file.path, source.file.fileno()
    numbers = (descriptor, source.base, source.size_bytes, output)
    limits = (MEMORY_LIMIT_BYTES, most_bytes, int(seconds) + 2)
    process = subprocess.Popen(
        # -P: else the folder of readers, with its safetensors.py, would shadow packages
        [sys.executable, "-P", str(CHILD), mode, *map(str, (*numbers, *limits))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(descriptor, output),
        # A thread of OpenBLAS for each core would take address space beyond the limit.
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise MalformedError(
            path,
            f"libhdf5 found no end within {seconds:.0f} s and was stopped",
            "get the file again; other files are not affected",
        ) from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if status < 0:
        raise MalformedError(
            path,
            f"libhdf5 crashed on it (signal {-status})",
            "get the file again; other files are not affected",
        )
    if status:
        reason = json_object(os.pread(output, 4096, 0)).get("error", f"exit status {status}")
        raise MalformedError(path, f"libhdf5 cannot read it ({reason})", "get the file again")
