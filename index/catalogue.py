"""What is remembered of a model, and the interface of every place that remembers.

`open_catalogue` looks at the scheme of a URL and imports the backend that it names.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import TracebackType
from typing import Any, Protocol, Self, cast

import numpy as np
from numpy.typing import NDArray

from embedder.fingerprint import Fingerprint
from embedder.identity import IdentityCode, Tokens
from index.errors import CatalogueError

BACKENDS = {"file": "index.sqlite:SqliteCatalogue"}
"""Scheme of a catalogue's URL → `module:class`. A plain path is a folder of SQLite's."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One model in a catalogue.

    Args:
        name: Unique in the catalogue.
        location: Where it was read from.
        format: Format of its files.
        sha256: Of its file or files.
        content: Digest of its stored tensors.
        identity: Digest of its tensors with their names and order.
        parameters: Values in all weight tensors.
        size_bytes: Of its file or files.
        adapter: Whether it is an adapter.
        method: Version of its fingerprint.
        added_at: UTC, ISO 8601.
        stamp: Path, size and time of change of each file, to see whether it has changed.
        declared: What card, config and header say.
        id: Number in this catalogue; 0 before it is added.
    """

    name: str
    location: str
    format: str
    sha256: str
    content: bytes
    identity: bytes
    parameters: int
    size_bytes: int
    adapter: bool
    method: int
    added_at: str
    stamp: str
    declared: Mapping[str, Any] = field(default_factory=dict)
    id: int = 0


class Catalogue(Protocol):
    """A place that remembers models. All parts of one model enter or leave together."""

    url: str

    def __len__(self) -> int:
        """Return the number of models."""

    def add(
        self, entry: Entry, fingerprint: Fingerprint, code: IdentityCode | None = None
    ) -> Entry:
        """Remember a model, in place of one of the same name; return it with its number."""

    def remove(self, name: str) -> None:
        """Forget a model and all that belongs to it.

        Raises:
            NotCataloguedError: No model has that name.
        """

    def get(self, name: str) -> Entry:
        """Return the model of a name.

        Raises:
            NotCataloguedError: No model has that name.
        """

    def by_id(self, ids: Sequence[int]) -> list[Entry]:
        """Return models by number, in the given order."""

    def find(self, *, location: str = "", sha256: str = "", content: bytes = b"") -> list[Entry]:
        """Return the models with all the given properties, in the order of their names."""

    def entries(self) -> Iterator[Entry]:
        """Yield all models in the order of their names."""

    def fingerprint(self, model: int) -> Fingerprint:
        """Return a model's fingerprint.

        Raises:
            CatalogueError: It was made by another method.
        """

    def vectors(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the numbers of all models and their vectors, (n,) and (n, 1024)."""

    def code(self, model: int) -> IdentityCode | None:
        """Return a model's identity code, if it has one."""

    def units(self, models: Sequence[int]) -> Mapping[int, Mapping[str, Tokens]]:
        """Return model → its units that are matched; models that have none are left out."""

    def codes(self, encoder: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the numbers of models and their codes by one encoder, (n,) and (n, 256)."""

    def encoders(self) -> dict[str, int]:
        """Return encoder → how many models have a code by it."""

    def sharing(self, keys: Sequence[bytes]) -> dict[int, int]:
        """Return model → values that it holds in tensors with one of these keys."""

    def generation(self) -> int:
        """Return a number that goes up with every change."""

    def measurement(self, first: bytes, second: bytes, method: int) -> str | None:
        """Return what was measured between two identities, if it was."""

    def remember(self, first: bytes, second: bytes, method: int, body: str) -> None:
        """Remember what was measured between two identities."""

    def check(self) -> list[str]:
        """Return what is wrong with the catalogue, in sentences; nothing if all is well."""

    def close(self) -> None:
        """Close it; a second call does nothing."""

    def __enter__(self) -> Self:
        """Return itself."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""


def open_catalogue(url: str, *, create: bool = False) -> Catalogue:
    """Open a catalogue.

    Args:
        url: A folder, or `scheme://…` with a scheme of `BACKENDS`.
        create: Make it if it is not there.

    Raises:
        CatalogueError: There is none, it cannot be opened, or no backend has that scheme.
    """
    scheme, mark, _ = url.partition("://")
    backend = BACKENDS.get(scheme if mark else "file")
    if backend is None:
        raise CatalogueError(
            f"{url}: no catalogue has the scheme {scheme!r}; give a folder, or one of "
            f"{', '.join(sorted(BACKENDS))}"
        )
    module, _, name = backend.partition(":")
    return cast("Catalogue", getattr(import_module(module), name)(url, create=create))
