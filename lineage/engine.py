"""The main path on one screen: what the command line and every other face call.

paths ──add──▶ catalogue ──candidates──▶ comparison ──▶ parents, claims, duplicates, tree
"""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import Self

from index.catalogue import Catalogue, Entry, open_catalogue
from index.errors import CatalogueError, NotCataloguedError
from index.opening import FILE
from index.sqlite import SqliteCatalogue
from index.transfer import export_catalogue, import_catalogue
from lineage.adding import Added, Job, Watcher, add_models, plan
from lineage.claims import Verification, verify_model
from lineage.comparison import Comparison, compare_models
from lineage.duplicates import Group, find_duplicates
from lineage.known import Known
from lineage.models import Model, find_model
from lineage.relatives import Relatives, find_relatives
from lineage.tree import Tree, build_tree


class LineageEngine:
    """Reads models, remembers them, and names their relatives.

    Args:
        catalogue: URL of the catalogue; a plain path is a folder.
        create: Make the catalogue if it is not there.
        optional: Work without a catalogue if it is not there.

    Raises:
        CatalogueError: The catalogue is not there, or cannot be opened.
    """

    def __init__(self, catalogue: str, *, create: bool = False, optional: bool = False) -> None:
        self.url = catalogue
        self._catalogue: Catalogue | None = None
        try:
            self._catalogue = open_catalogue(catalogue, create=create)
        except CatalogueError:
            folder = Path(catalogue.removeprefix("file://"))
            if not optional or "://" in str(folder) or (folder / FILE).exists():
                raise
        self._known = None if self._catalogue is None else Known(self._catalogue)

    @property
    def catalogue(self) -> Catalogue:
        """The catalogue.

        Raises:
            CatalogueError: There is none.
        """
        if self._catalogue is None:
            raise CatalogueError(f"{self.url}: there is no catalogue here; make one: lineage add")
        return self._catalogue

    @property
    def known(self) -> Known:
        """The catalogued models.

        Raises:
            CatalogueError: There is no catalogue.
        """
        return self._known or Known(self.catalogue)

    def plan(
        self,
        paths: Sequence[Path],
        *,
        name: str = "",
        allow_partial: bool = False,
        codes: bool = True,
    ) -> tuple[list[Job], list[str]]:
        """Return the models that have to be read and the names of the unchanged ones."""
        return plan(paths, self._catalogue, name=name, allow_partial=allow_partial, codes=codes)

    def add(
        self,
        paths: Sequence[Path],
        *,
        name: str = "",
        allow_partial: bool = False,
        codes: bool = True,
        workers: int = 2,
        watcher: Watcher | None = None,
    ) -> Added:
        """Read models and remember them, each as soon as it is read."""
        jobs, unchanged = self.plan(paths, name=name, allow_partial=allow_partial, codes=codes)
        result = add_models(self.catalogue, jobs, workers=workers, watcher=watcher)
        result.unchanged = unchanged
        return result

    def remove(self, names: Sequence[str]) -> None:
        """Forget models: all of the named ones, or none if one is not there.

        Raises:
            NotCataloguedError: No model has one of these names.
        """
        for entry in [self.catalogue.get(name) for name in names]:
            self.catalogue.remove(entry.name)

    def check(self) -> list[str]:
        """Return what is wrong with the catalogue, in sentences; nothing if all is well."""
        return self.catalogue.check() or list(self.known.limits())

    def entries(self, pattern: str = "*") -> list[Entry]:
        """Return the catalogued models whose names match a shell pattern."""
        return [entry for entry in self.catalogue.entries() if fnmatch(entry.name, pattern)]

    def model(self, given: str) -> Model:
        """Return the model that a path or a catalogued name stands for."""
        return find_model(given, self._catalogue)

    def compare(self, first: str, second: str) -> Comparison:
        """Return what two models are to each other, with the evidence."""
        return compare_models(self.model(first), self.model(second), self._known)

    def relatives(self, given: str) -> Relatives:
        """Return all catalogued kin of a model: its parents and its children."""
        return find_relatives(self.model(given), self.known)

    def verify(self, given: str, parents: Sequence[str] = ()) -> Verification:
        """Check the claims made of a model against its weights."""
        return verify_model(self.model(given), self._known, parents)

    def duplicates(self) -> list[Group]:
        """Return all groups of duplicates in the catalogue."""
        return find_duplicates(self.known)

    def tree(self, pattern: str = "*") -> Tree:
        """Return the family trees of the catalogued models whose names match a pattern."""
        return build_tree(self.known, self.entries(pattern))

    def family(self, given: str) -> tuple[Tree, str]:
        """Return the tree of all models and the node that a catalogued model stands for.

        Raises:
            NotCataloguedError: The model is not in the catalogue.
        """
        tree = self.tree()
        return tree, self.node_of(tree, given)

    def node_of(self, tree: Tree, given: str) -> str:
        """Return the node of a tree that a catalogued model stands for.

        Raises:
            NotCataloguedError: The model is not in the catalogue.
        """
        node = tree.named(self.catalogue.get(self.model(given).name).name)
        if node is None:
            raise NotCataloguedError(given, self.url)
        return node.id

    def export(self, target: Path, *, redact: bool = False) -> int:
        """Write all models of the catalogue to one file; return how many."""
        return export_catalogue(self._sqlite(), target, redact=redact)

    def import_from(self, source: Path) -> tuple[list[str], list[str]]:
        """Add the models of an exported file; return the added and the names already there."""
        return import_catalogue(self._sqlite(), source)

    def _sqlite(self) -> SqliteCatalogue:
        if not isinstance(self.catalogue, SqliteCatalogue):
            raise CatalogueError(f"{self.url}: only a catalogue in a folder can do this")
        return self.catalogue

    def close(self) -> None:
        """Close the catalogue; a second call does nothing."""
        if self._known is not None:
            self._known.close()
        if self._catalogue is not None:
            self._catalogue.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
