"""The models that a question names: a path, or a name in the catalogue."""

from dataclasses import dataclass
from pathlib import Path

from embedder.coding import Described, coded
from embedder.discovery import is_there, located
from embedder.errors import NotFoundError, UnsupportedError
from embedder.fingerprint import Fingerprint, take_fingerprint
from embedder.identity import IdentityCode
from embedder.opening import open_checkpoint
from index.catalogue import Catalogue, Entry
from lineage.adding import restamped
from lineage.aligning import LARGEST


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A model that a question is about.

    Args:
        name: Its catalogued name, or the path as given.
        fingerprint: Its fingerprint.
        location: What to open for its weights.
        entry: Its entry in the catalogue, if it has one.
        code: Its identity code, if it has one.
        described: Its architecture and units, if they were told on the way.
    """

    name: str
    fingerprint: Fingerprint
    location: Path
    entry: Entry | None = None
    code: IdentityCode | None = None
    described: Described | None = None

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
        return is_there(self.location)


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
    if "://" in given:
        raise UnsupportedError(
            given, "models at an address are not read yet", "download it and give its path"
        )
    path = Path(given)
    if is_there(path):
        entry = _entry_at(path, catalogue)
        if entry is not None and catalogue is not None:
            return model_of(entry, catalogue)
        with open_checkpoint(path) as opened:
            checkpoint = opened if catalogue is None else opened.read_once()
            fingerprint = take_fingerprint(checkpoint)
            code, known = coded(checkpoint) if catalogue is not None else (None, None)
            if checkpoint.parameters > LARGEST:
                known = None  # it is never aligned, and may be gigabytes
            return Model(given, fingerprint, path, code=code, described=known)
    if catalogue is None:
        raise NotFoundError(given, "no such file or folder, and there is no catalogue to look in")
    return model_of(catalogue.get(given), catalogue)


def _entry_at(path: Path, catalogue: Catalogue | None) -> Entry | None:
    if catalogue is None:
        return None
    found = catalogue.find(location=str(located(path)))
    fresh = [entry for entry in found if restamped(entry.stamp) == entry.stamp]
    return fresh[0] if fresh else None


def model_of(entry: Entry, catalogue: Catalogue) -> Model:
    """Return a catalogued model."""
    fingerprint, code = catalogue.fingerprint(entry.id), catalogue.code(entry.id)
    return Model(entry.name, fingerprint, Path(entry.location), entry, code)
