"""The models that a question names: a path, or a name in the catalogue."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from embedder.checkpoint import Checkpoint
from embedder.discovery import located
from embedder.errors import CheckpointError, NotFoundError
from embedder.fingerprint import Fingerprint, take_fingerprint
from embedder.opening import open_checkpoint
from index.catalogue import Catalogue, Entry
from lineage.adding import restamped
from lineage.measure import METHOD, Measurement, measure

EXACT_BYTES = 4 << 30
"""Two models of this size together are still compared by their weights; larger ones by sketches,
which costs no reading."""


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A model that a question is about.

    Args:
        name: Its catalogued name, or the path as given.
        fingerprint: Its fingerprint.
        location: What to open for its weights.
        entry: Its entry in the catalogue, if it has one.
    """

    name: str
    fingerprint: Fingerprint
    location: Path
    entry: Entry | None = None

    @property
    def content(self) -> bytes:
        """Digest of its stored tensors."""
        return self.entry.content if self.entry else self.fingerprint.content

    @property
    def identity(self) -> bytes:
        """Digest of its tensors with their names and order."""
        return self.entry.identity if self.entry else self.fingerprint.identity

    def readable(self) -> bool:
        """Say whether its weights are at hand and still those of the fingerprint."""
        if self.entry is not None:
            return bool(self.entry.stamp) and restamped(self.entry.stamp) == self.entry.stamp
        return self.location.exists()


def find_model(given: str, catalogue: Catalogue | None) -> Model:
    """Return the model that a user named.

    A path that exists is read, unless the catalogue has it and its files have not changed.

    Args:
        given: A path, or a name in the catalogue.
        catalogue: Where to look for names; may be None.

    Raises:
        NotCataloguedError: It is neither a path nor a catalogued name.
        CheckpointError: It is a path that cannot be read.
    """
    path = Path(given)
    if path.exists() or "!" in given:
        entry = _entry_at(path, catalogue)
        if entry is not None and catalogue is not None:
            return known_model(entry, catalogue)
        with open_checkpoint(path) as checkpoint:
            return Model(given, take_fingerprint(checkpoint), path)
    if catalogue is None:
        raise NotFoundError(given, "no such file or folder, and there is no catalogue to look in")
    return known_model(catalogue.get(given), catalogue)


def _entry_at(path: Path, catalogue: Catalogue | None) -> Entry | None:
    if catalogue is None:
        return None
    found = catalogue.find(location=str(located(path)))
    fresh = [entry for entry in found if restamped(entry.stamp) == entry.stamp]
    return fresh[0] if fresh else None


def known_model(entry: Entry, catalogue: Catalogue) -> Model:
    """Return a catalogued model."""
    return Model(entry.name, catalogue.fingerprint(entry.id), Path(entry.location), entry)


def measure_models(
    first: Model, second: Model, catalogue: Catalogue | None, *, exact: bool = True
) -> Measurement:
    """Measure two models, from their weights where those are at hand, and remember it.

    Args:
        first: One model.
        second: The other.
        catalogue: Where measurements of catalogued models are kept.
        exact: Whether to read weights at all.
    """
    known = catalogue if first.entry and second.entry else None
    if known is not None:
        found = known.measurement(first.identity, second.identity, METHOD)
        if found is not None:
            return Measurement.from_text(found)
        turned = known.measurement(second.identity, first.identity, METHOD)
        if turned is not None:
            return Measurement.from_text(turned).reversed()
    measured = _measured(first, second, exact=exact)
    if known is not None and measured.exact:
        known.remember(first.identity, second.identity, METHOD, measured.to_text())
    return measured


def _measured(first: Model, second: Model, *, exact: bool) -> Measurement:
    small = first.fingerprint.size_bytes + second.fingerprint.size_bytes <= EXACT_BYTES
    if exact and small and first.readable() and second.readable():
        try:
            with _opened(first, second) as opened:
                return measure(first.fingerprint, second.fingerprint, opened)
        except (CheckpointError, OSError):
            pass  # gone or changed since: what the fingerprints say is still true
    return measure(first.fingerprint, second.fingerprint)


@contextmanager
def _opened(first: Model, second: Model) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    with ExitStack() as stack:
        yield (
            stack.enter_context(open_checkpoint(first.location)),
            stack.enter_context(open_checkpoint(second.location)),
        )
