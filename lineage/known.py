"""The catalogued models as the evidence uses them: found, compared, and kept at hand."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

from embedder.checkpoint import Checkpoint
from embedder.errors import CheckpointError
from embedder.fingerprint import Fingerprint
from embedder.opening import open_checkpoint
from index.catalogue import Catalogue, Entry
from index.search import Candidate, ModelIndex
from lineage.measure import METHOD, Measurement, measure
from lineage.models import Model, model_of

EXACT_BYTES = 4 << 30
"""Two models of this size together are still compared by their weights; larger ones by sketches,
which costs no reading."""

_MODELS_AT_HAND = 512
_OPEN_AT_HAND = 8

Key = TypeVar("Key")
Value = TypeVar("Value")


def measure_pair(
    first: Model,
    second: Model,
    *,
    exact: bool = True,
    opener: Callable[[Model], Checkpoint] | None = None,
) -> Measurement:
    """Measure two models, from their weights where those are at hand.

    Args:
        first: One model.
        second: The other.
        exact: Whether to read weights at all.
        opener: Opens a model and keeps it open; if None both are opened here and closed again.
    """
    prints = first.fingerprint, second.fingerprint
    small = prints[0].size_bytes + prints[1].size_bytes <= EXACT_BYTES
    if exact and small and first.readable() and second.readable():
        try:
            if opener is not None:
                return measure(*prints, (opener(first), opener(second)))
            with ExitStack() as stack:
                one, other = (
                    stack.enter_context(open_checkpoint(model.location))
                    for model in (first, second)
                )
                return measure(*prints, (one, other))
        except (CheckpointError, OSError):
            pass  # gone or changed since: what the fingerprints say is still true
    return measure(*prints)


class Known:
    """A catalogue with what is often asked of it kept in memory. Close it afterwards.

    Args:
        catalogue: The catalogue.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._index = ModelIndex(catalogue)
        self._models: OrderedDict[tuple[int, bytes], Model] = OrderedDict()
        self._open: OrderedDict[tuple[str, bytes], Checkpoint] = OrderedDict()

    def candidates(self, fingerprint: Fingerprint) -> list[Candidate]:
        """Return the catalogued models that may be related, the likeliest first."""
        return self._index.candidates(fingerprint)

    @property
    def size(self) -> int:
        """The number of models that are searched: those of this program's method."""
        return self._index.size

    def model(self, entry: Entry) -> Model:
        """Return a catalogued model with its fingerprint."""
        key = (entry.id, entry.identity)
        model, _ = _kept(
            self._models, key, lambda: model_of(entry, self.catalogue), _MODELS_AT_HAND
        )
        return model

    def candidate(self, candidate: Candidate) -> Model:
        """Return the model that a candidate stands for."""
        (entry,) = self.catalogue.by_id([candidate.model])
        return self.model(entry)

    def measure(self, first: Model, second: Model, *, exact: bool = True) -> Measurement:
        """Measure two models and remember it, if both are catalogued.

        Args:
            first: One model.
            second: The other.
            exact: Whether to read weights at all.
        """
        own = bool(first.entry and second.entry)
        if own:
            found = self.catalogue.measurement(first.identity, second.identity, METHOD)
            if found is not None:
                return Measurement.from_text(found)
            turned = self.catalogue.measurement(second.identity, first.identity, METHOD)
            if turned is not None:
                return Measurement.from_text(turned).reversed()
        measured = measure_pair(first, second, exact=exact, opener=self._opened)
        if own and measured.exact:
            text = measured.to_text()
            self.catalogue.remember(first.identity, second.identity, METHOD, text)
        return measured

    def _opened(self, model: Model) -> Checkpoint:
        key = (str(model.location), model.identity)
        checkpoint, dropped = _kept(
            self._open, key, lambda: open_checkpoint(model.location), _OPEN_AT_HAND
        )
        for old in dropped:
            old.close()
        return checkpoint

    def close(self) -> None:
        """Close the files that are kept open; a second call does nothing."""
        while self._open:
            self._open.popitem()[1].close()


def _kept(
    store: OrderedDict[Key, Value], key: Key, make: Callable[[], Value], most: int
) -> tuple[Value, list[Value]]:
    """Return the value of a key, made if it is not there, and what had to go for it."""
    if key not in store:
        store[key] = make()
    store.move_to_end(key)
    dropped = []
    while len(store) > most:
        dropped.append(store.popitem(last=False)[1])
    return store[key], dropped
