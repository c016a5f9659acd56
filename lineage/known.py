"""The catalogued models as the evidence uses them: found, compared, and kept at hand."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

from embedder.checkpoint import Checkpoint
from embedder.coding import Described
from embedder.errors import CheckpointError
from embedder.fingerprint import Fingerprint
from embedder.identity import IdentityCode
from embedder.opening import open_checkpoint
from index.catalogue import Catalogue, Entry
from index.search import Candidate, ModelIndex
from lineage.aligning import insides_of
from lineage.measure import METHOD, Measurement, measure
from lineage.models import Model, model_of

EXACT_BYTES = 4 << 30
"""Two models of this size together are still compared by their weights; larger ones by sketches,
which costs no reading."""

_MODELS_AT_HAND = 512
_OPEN_AT_HAND = 8
_DESCRIBED_AT_HAND = 128
_MEASURED_AT_HAND = 512

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
    if exact and may_be_read(first, second):
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


def may_be_read(first: Model, second: Model) -> bool:
    """Say whether two models are compared by their weights."""
    small = first.fingerprint.size_bytes + second.fingerprint.size_bytes <= EXACT_BYTES
    return small and first.readable() and second.readable()


class Known:
    """A catalogue with what is often asked of it kept in memory. Close it afterwards.

    Args:
        catalogue: The catalogue.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._index = ModelIndex(catalogue)
        self._models: OrderedDict[tuple[int, bytes], Model] = OrderedDict()
        self._described: OrderedDict[tuple[str, bytes], Described | None] = OrderedDict()
        self._open: OrderedDict[tuple[str, bytes], Checkpoint] = OrderedDict()
        self._measured: OrderedDict[tuple[bytes, bytes], Measurement] = OrderedDict()

    def candidates(
        self, fingerprint: Fingerprint, code: IdentityCode | None = None
    ) -> list[Candidate]:
        """Return the catalogued models that may be related, the likeliest first."""
        return self._index.candidates(fingerprint, code)

    @property
    def size(self) -> int:
        """The number of models that are searched: those of this program's method."""
        return self._index.size

    def limits(self) -> tuple[str, ...]:
        """Return what a search cannot see, in sentences."""
        number = self._index.outdated
        if number == 0:
            return ()
        models = "1 catalogued model has" if number == 1 else f"{number:,} catalogued models have"
        return (
            f"{models} an identity code of another encoder, and may be missed where hidden units "
            "were reordered; add them again",
        )

    def model(self, entry: Entry) -> Model:
        """Return a catalogued model with its fingerprint."""
        key = (entry.id, entry.identity)
        if key not in self._models:
            self._models[key] = model_of(entry, self.catalogue)
        _shortened(self._models, key, _MODELS_AT_HAND)
        return self._models[key]

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
        ours, theirs = first.identity, second.identity
        found = self._measured.get((ours, theirs))
        if found is None and (theirs, ours) in self._measured:
            found = self._measured[theirs, ours].reversed()
        if found is None or (exact and not found.exact and may_be_read(first, second)):
            found = self._remembered(first, second, exact=exact)
        self._measured[ours, theirs] = found
        _shortened(self._measured, (ours, theirs), _MEASURED_AT_HAND)
        return found

    def _remembered(self, first: Model, second: Model, *, exact: bool) -> Measurement:
        own = bool(first.entry and second.entry)
        if own:
            found = self.catalogue.measurement(first.identity, second.identity, METHOD)
            if found is not None:
                return Measurement.from_text(found)
            turned = self.catalogue.measurement(second.identity, first.identity, METHOD)
            if turned is not None:
                return Measurement.from_text(turned).reversed()
        measured = measure_pair(first, second, exact=exact, opener=self.opened)
        if own and measured.exact:
            text = measured.to_text()
            self.catalogue.remember(first.identity, second.identity, METHOD, text)
        return measured

    def opened(self, model: Model) -> Checkpoint:
        """Return an open model; it is closed when others have been asked for since.

        Raises:
            CheckpointError: It cannot be opened.
        """
        key = (str(model.location), model.identity)
        if key not in self._open:
            self._open[key] = open_checkpoint(model.location)
        for old in _shortened(self._open, key, _OPEN_AT_HAND):
            old.close()
        return self._open[key]

    def described(self, model: Model) -> Described | None:
        """Return what is matched of a model, if its architecture is known.

        Raises:
            CheckpointError: It cannot be opened or read.
        """
        if model.described is not None:
            return model.described
        key = (str(model.location), model.identity)
        if key not in self._described:
            self._described[key] = insides_of(self.opened(model))
        _shortened(self._described, key, _DESCRIBED_AT_HAND)
        return self._described[key]

    def close(self) -> None:
        """Close the files that are kept open; a second call does nothing."""
        while self._open:
            self._open.popitem()[1].close()


def _shortened(store: OrderedDict[Key, Value], newest: Key, most: int) -> list[Value]:
    """Keep the newest of a store; return what had to go for it."""
    store.move_to_end(newest)
    return [store.popitem(last=False)[1] for _ in range(len(store) - most)]
