"""Errors of the catalogue.

ModelLineageError
└── CatalogueError                the catalogue cannot be read or written
    ├── NotCataloguedError        no model of that name in it
    └── NameTakenError            another model has that name already
"""

from collections.abc import Sequence

from embedder.errors import ModelLineageError


class CatalogueError(ModelLineageError):
    """The catalogue cannot be read or written."""


class NotCataloguedError(CatalogueError, KeyError):
    """No model of that name is in the catalogue."""

    def __init__(self, name: str, catalogue: str, close: Sequence[str] = ()) -> None:
        near = f"; close names: {', '.join(close)}" if close else ""
        super().__init__(
            f"{name}: not in the catalogue {catalogue}{near}; add it with: lineage add PATH"
        )
        self.name, self.close = name, tuple(close)

    def __str__(self) -> str:
        # KeyError's own __str__ would quote the message.
        return str(self.args[0])


class NameTakenError(CatalogueError, ValueError):
    """Another model has that name already."""
