"""The family of `lineage.simulate`, made once, and its catalogue."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from lineage.engine import LineageEngine
from lineage.simulate import Births, make_family

SHARDS = ("f000", "c00")
"""Of a zoo: one family of perceptrons with its descendants, and one control set."""


@dataclass(frozen=True)
class Family:
    """A family of models with known descent.

    Args:
        folder: Where its files are.
        catalogue: A catalogue of all of them.
        births: How each came to be.
        strangers: Pairs that are no kin.
    """

    folder: Path
    catalogue: Path
    births: Births
    strangers: Births

    def file(self, stem: str) -> Path:
        """Return the file of a model."""
        (found,) = self.folder.glob(f"{stem}.*")
        return found

    @property
    def names(self) -> list[str]:
        """Catalogued names, sorted."""
        return sorted(file.name for file in self.folder.iterdir())


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Make the family. Tests ask its catalogue and do not change it."""
    place = tmp_path_factory.mktemp("family")
    births, strangers = make_family(place / "models")
    with LineageEngine(str(place / "catalogue"), create=True) as engine:
        added = engine.add([place / "models"], workers=1)
    assert len(added.added) == len(list((place / "models").iterdir()))
    return Family(place / "models", place / "catalogue", births, strangers)


@pytest.fixture
def own_catalogue(family: Family, tmp_path: Path) -> Path:
    """Return a copy of the family's catalogue that a test may change."""
    copied: Path = shutil.copytree(family.catalogue, tmp_path / "own-catalogue")
    return copied


@pytest.fixture(scope="session")
def zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build two shards of a zoo in processes of their own. Tests read it and do not change it."""
    from embedder.zoo.building import build_zoo

    place = tmp_path_factory.mktemp("zoo") / "zoo"
    built = build_zoo(place, "sample", only=SHARDS, workers=2)
    assert sorted(built.made) == sorted(SHARDS)
    assert built.left_out == []
    return place


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, with no settings."""
    for name in list(os.environ):
        if name.startswith("LINEAGE_"):
            monkeypatch.delenv(name)
    folder = tmp_path / "somewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
