"""Which models a path holds, and which file or folder stands for each.

A folder is one model if it holds an index of shards, an adapter's config, a SavedModel, a
TensorFlow.js model, or one `config.json` with weights. A diffusers folder is one model per
component. Every other folder is searched, one model a file. A file inside a multi-part model
stands for the whole.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedder.errors import CheckpointError, NotFoundError, UnknownFormatError
from embedder.sniff import sniff

ARCHIVE_MARK = "!"
"""Parts the path of an archive from the path of a member in it: `model.zip!model.safetensors`."""

RENDERINGS = ("safetensors", "pytorch", "pytorch-legacy", "hdf5", "flax", "onnx", "gguf")
"""Formats that may lie side by side as renderings of one folder's model, the preferred first."""

_CLAIMS = frozenset(
    {".safetensors", ".pt", ".pth", ".ckpt", ".jit", ".gguf", ".onnx", ".tflite", ".h5"}
    | {".hdf5", ".keras", ".npz", ".npy", ".pdiparams", ".msgpack"}
)
"""Suffixes that say "I am a model". They never choose a reader; they only turn a file that no
reader knows from something to pass over into something to report."""

_NOT_ALONE = frozenset({"shard-index", "saved-model", "pickle", "ctranslate2"})
_SKIPPED_FOLDERS = frozenset({"__pycache__", ".git", ".cache", "node_modules"})


@dataclass(frozen=True, slots=True)
class Found:
    """A model that a search came upon.

    Args:
        name: Its path below the searched folder, or the file's name.
        path: The file or folder that stands for the whole model.
        sure: Whether the file must be a model; otherwise one without weights is passed over.
    """

    name: str
    path: Path
    sure: bool = True


def find_models(path: Path) -> Iterator[Found]:
    """Yield the models that a path holds, in the order of their names.

    Raises:
        NotFoundError: There is no such path.

    Example:
        >>> import tempfile
        >>> [found.name for found in find_models(Path(tempfile.mkdtemp()))]
        []
    """
    if not is_there(path):
        raise NotFoundError(path, "no such file or folder", "check the path")
    if not path.is_dir():
        whole = whole_model(path)
        yield Found(located(whole).name if whole.is_dir() else path.name, whole)
        return
    root = path
    closed: list[OSError] = []
    for folder, subfolders, files in os.walk(path, onerror=closed.append):
        here = Path(folder)
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
        if _is_model_or_closed(here):
            yield Found(_name_below(root, here), here)
            subfolders[:] = []
            continue
        for name in sorted(files):
            file = here / name
            found = _find_file(file, str(file.relative_to(root)))
            if found is not None:
                yield found
    for error in closed:
        here = Path(error.filename)
        yield Found(_name_below(root, here), here)


def is_there(path: Path) -> bool:
    """Say whether a path exists, or the archive of the member that it names."""
    return path.exists() or _archive_of(path)[0].is_file()


def located(path: Path) -> Path:
    """Return where a path lies, the same for every spelling of it; links are not followed."""
    # `Path.absolute` keeps "..", and `Path.resolve` would give the blobs of a hub's cache.
    return Path(os.path.abspath(path))  # noqa: PTH100


def _name_below(root: Path, folder: Path) -> str:
    return located(folder).name if folder == root else str(folder.relative_to(root))


def _is_model_or_closed(folder: Path) -> bool:
    """Say whether a folder is one model, or one whose files may not be read: opening it tells."""
    try:
        return folder_kind(folder) is not None
    except OSError:
        return True


def _find_file(file: Path, name: str) -> Found | None:
    """Return the model in a file, None if it looks like none."""
    if not file.is_file():
        return None
    claimed = file.suffix.lower() in _CLAIMS
    part = _SPLIT_PART.search(file.name)
    if part and int(part[1]) > 1 and file.with_name(_first_part(file.name, part)).is_file():
        return None  # the first file of a split GGUF stands for all
    try:
        kind = sniff(file)
    except OSError:
        return Found(name, file)
    if kind in _NOT_ALONE and not claimed:
        # CTranslate2 and SavedModel files belong to a folder; shard indices are folders' too.
        return Found(name, file, sure=False) if kind in ("pickle", "ctranslate2") else None
    if kind is None:
        return Found(name, file) if claimed else None
    return Found(name, file, sure=claimed or kind in ("gguf", "safetensors", "onnx", "tflite"))


_SPLIT_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def _first_part(name: str, part: re.Match[str]) -> str:
    return f"{name[: part.start(1)]}{1:05d}{name[part.end(1) :]}"


def folder_kind(folder: Path) -> str | None:
    """Return how a folder is one model, or None if it is not.

    Returns:
        `peft`, `saved-model`, `tfjs`, `sharded`, `huggingface` or None.
    """
    if (folder / "model_index.json").is_file():
        return None
    if (folder / "adapter_config.json").is_file():
        return "peft"
    if (folder / "saved_model.pb").is_file():
        return "saved-model"
    if (folder / "model.json").is_file() and sniff(folder / "model.json") == "tfjs":
        return "tfjs"
    if shard_indices(folder):
        return "sharded"
    if (folder / "config.json").is_file() and renderings(folder):
        return "huggingface"
    return None


def shard_indices(folder: Path) -> list[Path]:
    """Return the files in a folder that say which shard holds which tensor.

    One that may not be read is passed over: it need not be an index, and must not close the folder.
    Nor must a folder that may not be listed.
    """
    try:
        with os.scandir(folder) as entries:  # of thousands of files a quarter of the time of glob
            found = sorted(folder / entry.name for entry in entries if entry.name.endswith(".json"))
    except OSError:
        return []
    readable = (file for file in found if os.access(file, os.R_OK))
    return [file for file in readable if sniff(file) == "shard-index"]


def renderings(folder: Path) -> list[Path]:
    """Return the weight files of a folder, the preferred format first, shards left out."""
    found = []
    for file in sorted(folder.iterdir()):
        kind = sniff(file) if file.is_file() else None
        if kind in RENDERINGS or kind == "ctranslate2":
            place = RENDERINGS.index(kind) if kind in RENDERINGS else len(RENDERINGS)
            found.append((place, file))
    ggufs = [file for place, file in found if RENDERINGS[place:][:1] == ("gguf",)]
    if len(ggufs) > 1 and len(ggufs) == len(found):
        return []  # a folder of GGUF files is one model a file
    return [file for _, file in sorted(found)]


def whole_model(path: Path) -> Path:
    """Return what stands for the model that a file is a part of: often the file itself.

    Raises:
        UnknownFormatError: No reader recognises the file.
    """
    if _archive_of(path)[1]:
        return path
    parent = path.resolve().parent
    folder = folder_kind(parent)
    if folder in ("peft", "tfjs", "saved-model"):
        return path.parent
    if folder == "sharded" and any(
        path.name in shards_of(index) or path.name == index.name for index in shard_indices(parent)
    ):
        return path.parent
    if parent.name == "variables" and folder_kind(parent.parent) == "saved-model":
        return path.parent.parent
    kind = sniff(path)
    if kind is None:
        index = path.with_name(path.name.partition(".data-")[0] + ".index")
        if ".data-" in path.name and index.is_file():
            return index
        raise unknown(path)
    return path


def shards_of(index: Path) -> dict[str, list[str]]:
    """Return shard file name → names of the tensors in it, from an index of shards.

    Raises:
        CheckpointError: The index is not what it should be.
    """
    shards: dict[str, list[str]] = {}
    for tensor, file in _weight_map(index).items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(index, f"shard {file!r} of tensor {tensor!r} is not a file name")
        shards.setdefault(file, []).append(tensor)
    return dict(sorted(shards.items()))


def _weight_map(index: Path) -> dict[str, Any]:
    found = json.loads(index.read_bytes()).get("weight_map")
    if not isinstance(found, dict):
        raise CheckpointError(index, "its weight_map is not a table of tensor → file")
    return found


def _archive_of(path: Path) -> tuple[Path, str]:
    """Return the archive and the member that `archive!member` names."""
    before, mark, member = str(path).rpartition(ARCHIVE_MARK)
    if mark and Path(before).is_file():
        return Path(before), member
    return path, ""


def unknown(path: Path) -> UnknownFormatError:
    """Return the error for a file that no reader recognises."""
    if path.stat().st_size == 0:
        return UnknownFormatError(path, "the file is empty", "get it again")
    return UnknownFormatError(
        path,
        "no reader recognises its content",
        "see `lineage doctor` for the formats that can be read",
    )
