"""Plain pickles: nested dictionaries of numpy arrays, or of torch tensors, saved by Python itself.

Protocols 2 to 5 are read, by the machine in `unpickling`. Arrays that protocol 4 or 5 writes as
bytes are ranges of the file; protocols 2 and 3 write them as text, which is decoded in memory.
"""

from pathlib import Path

from embedder.checkpoint import Checkpoint
from embedder.readers.allowed import allowed
from embedder.readers.array_records import Encoded
from embedder.readers.nested import named_tensors
from embedder.readers.pytorch import checkpoint_of, read_legacy
from embedder.readers.unpickling import Make, Unpickler
from embedder.readers.views import Part
from embedder.storage import MemoryStorage, OpenFile, Storage

_TORCH_STORAGE = "torch.storage._load_from_bytes"


def open_pickle(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open a pickle of arrays.

    Raises:
        RefusedError: It imports a name that is not allowed; the message says which.
        MalformedError: It breaks the rules of the format.
        TruncatedError: The file ends before the pickle does.
    """
    file = OpenFile(path)
    try:
        storages = _TorchStorages(path)
        machine = Unpickler(file, path, allowed=storages.allowed)
        found = named_tensors(path, machine.load(), file.size_bytes)
    except BaseException:
        file.close()
        raise
    rest = file.size_bytes - machine.place
    if rest:
        found.limits.append(f"{rest:,} bytes follow the first pickle and were not read")
    return checkpoint_of(path, "pickle", found, on_close=file.close)


class _TorchStorages:
    """Reads torch's storages in a plain pickle: each is a legacy file of its own, as bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: dict[int, tuple[object, object]] = {}  # id → (bytes, kept alive; storage)

    def allowed(self, name: str) -> Make | None:
        """Return what stands in for a name in a plain pickle."""
        return self._storage if name == _TORCH_STORAGE else allowed(name)

    def _storage(self, raw: object, *_: object) -> object:
        if id(raw) not in self._read:
            self._read[id(raw)] = raw, read_legacy(_content(raw), self._path)
        return self._read[id(raw)][1]


def _content(raw: object) -> Storage:
    if isinstance(raw, Part):
        return raw
    if isinstance(raw, Encoded):
        return MemoryStorage(raw.raw)
    if isinstance(raw, bytes):
        return MemoryStorage(raw)
    raise TypeError("a storage that is not bytes")
