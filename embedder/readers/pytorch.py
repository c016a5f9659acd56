"""PyTorch checkpoints: zip archives, TorchScript, and the older files of pickles in a row.

A zip archive holds one pickle, `data.pkl`, that describes the objects, and one member for each
storage, uncompressed, so tensors are ranges of the file. TorchScript adds the code, which is not
read, and `constants.pkl`, where a frozen module keeps its weights. The legacy format is five
pickles (magic number, version, machine, objects, storage keys) followed by the storages.
"""

from collections.abc import Callable
from pathlib import Path

from embedder.checkpoint import Checkpoint
from embedder.errors import MalformedError, TruncatedError, UnsupportedError
from embedder.readers.allowed import allowed
from embedder.readers.nested import Named, named_tensors
from embedder.readers.tensor_records import StorageRecord, storage_of_id, text_of
from embedder.readers.unpickling import Unpickler
from embedder.readers.views import Part, Swapped
from embedder.readers.zipped import ZipArchive
from embedder.storage import OpenFile, Storage

_MAGIC = 0x1950A86A20F9469CFC6C


def open_pytorch(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open a PyTorch zip archive or a TorchScript archive.

    Names of nested state dicts are joined with dots. Tied tensors are listed once, their other
    names under `aliases`.

    Raises:
        RefusedError: The pickle imports a name that is not allowed, or the archive is a bomb.
        MalformedError: The archive or a pickle in it is damaged.
        TruncatedError: A storage is shorter than a tensor in it.
        UnsupportedError: No tensor in it can be decoded.
    """
    archive = ZipArchive(path)
    try:
        root = min(
            (name for name in archive.members if name.rpartition("/")[2] == "data.pkl"),
            key=lambda name: (name.count("/"), name),
            default=None,
        )
        if root is None:
            raise MalformedError(path, "the archive has no data.pkl", "get the file again")
        prefix = root.removesuffix("data.pkl")
        swapped = _is_big_endian(archive, prefix)
        found = _read_pickle(archive, root, f"{prefix}data/", swapped=swapped)
        constants = f"{prefix}constants.pkl"
        is_script = constants in archive.members
        if is_script:
            more = _read_pickle(
                archive, constants, f"{prefix}constants/", swapped=swapped, name="constants"
            )
            found.tensors += more.tensors
            found.aliases |= more.aliases
            found.limits += more.limits
    except BaseException:
        archive.close()
        raise
    return checkpoint_of(
        path, "torchscript" if is_script else "pytorch", found, on_close=archive.close
    )


def _read_pickle(
    archive: ZipArchive, member: str, folder: str, *, swapped: bool, name: str = ""
) -> Named:
    """Return the tensors of one pickle whose storages lie in a folder of the archive."""
    path = archive.path
    sources: dict[str, Storage] = {}

    def storage(identity: object) -> StorageRecord:
        found = storage_of_id(identity)
        if found is None:
            raise ValueError("refers to something that is not a storage")
        key, record, _ = found
        source = sources.get(key)
        if source is None:
            source = archive.storage(folder + key)
            if swapped:
                source = _swapped(path, source, record)
            sources[key] = source
        record.source = source
        return record

    pickled = archive.storage(member)
    root = Unpickler(pickled, path, allowed=allowed, persistent=storage).load()
    return named_tensors(path, root, archive.file.size_bytes, prefix=name)


def _is_big_endian(archive: ZipArchive, prefix: str) -> bool:
    if f"{prefix}byteorder" not in archive.members:
        return False
    stated = archive.storage(f"{prefix}byteorder")
    return bytes(stated.read(0, min(stated.size_bytes, 16))).strip() == b"big"


def _swapped(path: Path, source: Storage, record: StorageRecord) -> Storage:
    if "Untyped" in record.class_name or record.plain is None:
        raise UnsupportedError(
            path,
            f"a big-endian {record.class_name} does not say how wide its numbers are",
            "save the file again on a little-endian machine",
        )
    width = record.width // (2 if record.plain[0] == "C" else 1)
    return Swapped(source, width) if width > 1 else source


def open_pytorch_legacy(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open a PyTorch file from before the zip format, or one saved without it.

    Raises:
        RefusedError: A pickle imports a name that is not allowed.
        MalformedError: A pickle is damaged.
        TruncatedError: The file ends before its storages do.
        UnsupportedError: No tensor in it can be decoded.
    """
    file = OpenFile(path)
    try:
        root = read_legacy(file, path)
        found = named_tensors(path, root, file.size_bytes)
    except BaseException:
        file.close()
        raise
    return checkpoint_of(path, "pytorch-legacy", found, on_close=file.close)


def read_legacy(source: Storage, path: Path) -> object:
    """Return what a legacy file describes, as records; its storages know where they lie.

    Args:
        source: The content of the file, or of a file inside a pickle.
        path: The file, for messages.

    Raises:
        CheckpointError: As `open_pytorch_legacy` says.
    """
    storages: dict[str, StorageRecord] = {}
    views: list[tuple[str, StorageRecord, tuple[object, ...]]] = []

    def persistent(identity: object) -> object:
        if isinstance(identity, tuple) and len(identity) == 4 and text_of(identity[0]) == "module":
            return identity[1]  # a class with its source code, which is not looked at
        found = storage_of_id(identity)
        if found is None:
            raise ValueError("refers to something that is not a storage")
        key, record, view = found
        if not view:
            return storages.setdefault(key, record)
        storages.setdefault(key, StorageRecord(record.class_name))
        views.append((key, record, view))
        return record

    place = 0
    loaded = []
    for _ in range(5):  # magic number, protocol, machine, objects, storage keys
        machine = Unpickler(source, path, allowed=allowed, start=place, persistent=persistent)
        loaded.append(machine.load())
        place = machine.place
    magic, _, _, root, keys = loaded
    if magic != _MAGIC or not isinstance(keys, list):
        raise MalformedError(path, "the pickles in it are not those of a PyTorch file")
    for key in keys:
        record = storages.get(text_of(key))
        if record is None:
            raise MalformedError(path, f"storage {text_of(key)!r} belongs to no tensor")
        place = _locate(source, path, record, place)
    for key, record, view in views:
        _locate_view(path, storages[key], record, view)
    return root


def _locate(source: Storage, path: Path, record: StorageRecord, place: int) -> int:
    """Tell a storage where it lies; return where the next one does."""
    start = place + 8
    if start > source.size_bytes:
        raise _truncated(path, start, source.size_bytes)
    size_bytes = int.from_bytes(source.read(place, start), "little") * record.width
    if start + size_bytes > source.size_bytes:
        raise _truncated(path, start + size_bytes, source.size_bytes)
    record.source = Part(source, start, size_bytes)
    return start + size_bytes


def _locate_view(
    path: Path, base: StorageRecord, record: StorageRecord, view: tuple[object, ...]
) -> None:
    """Tell a storage that is a part (key, offset, values) of another one where it lies."""
    _, offset, values = view if len(view) == 3 else (None, None, None)
    if type(offset) is not int or type(values) is not int or base.source is None:
        raise MalformedError(path, "a view of a storage is not what PyTorch writes")
    start, size_bytes = offset * record.width, values * record.width
    if offset < 0 or values < 0 or start + size_bytes > base.source.size_bytes:
        raise MalformedError(path, "a view of a storage goes beyond the storage")
    record.source = Part(base.source, start, size_bytes)


def _truncated(path: Path, wanted: int, available: int) -> TruncatedError:
    return TruncatedError(
        path,
        f"TRUNCATED: a storage ends at byte {wanted:,} and the file has {available:,}",
        "get the file again, then run the same command",
    )


def checkpoint_of(
    path: Path, kind: str, found: Named, *, on_close: Callable[[], None]
) -> Checkpoint:
    """Return the checkpoint over what was found in a file's pickles.

    Args:
        path: The file.
        kind: Name of the format.
        found: Tensors, aliases and limits.
        on_close: Closes what the tensors are read from.
    """
    return Checkpoint(
        location=str(path),
        format=kind,
        tensors=tuple(found.tensors),
        files=(path,),
        limits=found.limits,
        aliases=found.aliases,
        on_close=[on_close],
    )
