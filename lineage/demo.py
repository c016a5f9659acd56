"""The demonstration: a family is made, indexed and drawn, and the answers are held to the truth."""

import time
from pathlib import Path

from embedder.errors import ModelLineageError
from index.opening import FILE
from lineage.engine import LineageEngine
from lineage.formats import to_text
from lineage.simulate import Birth, make_family

CATALOGUE = "catalogue"
MADE = frozenset(
    {CATALOGUE, "base-a.safetensors", "base-copy.npz", "base-12-classes.safetensors"}
    | {"base-pruned.safetensors", "base-reordered.safetensors", "chat.safetensors"}
    | {"chat-fp16.safetensors", "legal.safetensors", "legal-int8.safetensors"}
    | {"legal-v2.safetensors", "twin-b.safetensors"}
)
"""What a demonstration leaves in its folder: all that a later one may remove from it."""


class DemoError(ModelLineageError, FileExistsError):
    """The folder for the demonstration holds something else."""

    def __str__(self) -> str:
        return str(self.args[0])


def run_demo(folder: Path) -> str:
    """Make a small family in a folder and return what was found of it.

    Args:
        folder: Where to put it. A folder from an earlier demonstration is made anew.

    Raises:
        DemoError: The folder holds something else.
    """
    _clear(folder)
    # Made first, so that a demonstration that was stopped is known for one.
    (folder / CATALOGUE).mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    births, strangers = make_family(folder)
    made = time.perf_counter()
    with LineageEngine(str(folder / CATALOGUE), create=True) as engine:
        added = engine.add([folder], workers=1)
        read = time.perf_counter()
        drawn = to_text(engine.tree())
        right = sum(_is_found(engine, birth) for birth in births)
        accused = [s.child for s in strangers if not _is_found(engine, s)]
    done = time.perf_counter()
    twin = strangers[0]
    return "\n".join(
        [
            f"Made {len(added.added)} small models in {folder}: two founders of one design trained "
            f"on the same data, and the",
            f"first one's descendants.{'':<47}{made - start:.1f} s",
            f"Indexed them into {folder / CATALOGUE}{'':<20}{read - made:.1f} s",
            "",
            drawn,
            "",
            f"The truth is known here: {right} of {len(births)} relations right, "
            f"{len(accused)} strangers called kin.{'':<10}{done - read:.1f} s",
            f"{twin.child} has the design and the data of {twin.parent} and another seed: it is no "
            "relative.",
            "",
            f"Next: lineage parents legal-int8.safetensors --catalogue {folder / CATALOGUE}",
            f"      lineage compare {folder}/base-a.safetensors {folder}/twin-b.safetensors",
        ]
    )


def _clear(folder: Path) -> None:
    """Remove an earlier demonstration; whatever else is there must stay as it is."""
    if not folder.exists():
        return
    found = {file.name for file in folder.iterdir()} if folder.is_dir() else {""}
    inside = folder / CATALOGUE
    kept = {file.name for file in inside.iterdir()} if inside.is_dir() else set()
    whole = not found or CATALOGUE in found
    if not whole or found - MADE or any(not name.startswith(FILE) for name in kept):
        raise DemoError(f"{folder}: holds something else; nothing was changed; name a new folder")
    for name in found - {CATALOGUE}:
        (folder / name).unlink()
    for name in kept:
        (inside / name).unlink()


def _is_found(engine: LineageEngine, birth: Birth) -> bool:
    names = {Path(entry.name).stem: entry.name for entry in engine.entries()}
    found = engine.compare(names[birth.parent], names[birth.child])
    return found.relation is birth.relation
