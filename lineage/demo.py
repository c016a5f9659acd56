"""The demonstration: a family is made, indexed and drawn, and the answers are held to the truth."""

import shutil
import time
from pathlib import Path

from embedder.errors import ModelLineageError
from lineage.engine import LineageEngine
from lineage.formats import to_text
from lineage.simulate import Birth, make_family

CATALOGUE = "catalogue"


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
    if folder.exists():
        own = (folder / CATALOGUE).is_dir() or not any(folder.iterdir())
        if not own:
            raise DemoError(
                f"{folder}: holds something else; nothing was changed; name a new folder"
            )
        shutil.rmtree(folder)


def _is_found(engine: LineageEngine, birth: Birth) -> bool:
    names = {Path(entry.name).stem: entry.name for entry in engine.entries()}
    found = engine.compare(names[birth.parent], names[birth.child])
    return found.relation is birth.relation
