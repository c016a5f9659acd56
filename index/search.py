"""Which catalogued models may be related to one: candidates, for the evidence to judge."""

from dataclasses import dataclass

from embedder.fingerprint import Fingerprint
from index.catalogue import Catalogue
from index.vectors import VectorIndex, vector_index

NOISE = 0.12
"""Inner product from which a model is always a candidate: 1.5 to 2.4 standard deviations of that of
strangers of equal shapes (see `embedder.vector`). It is low because kin that share a small part lie
near it, and a stranger more costs 2 ms."""

ALWAYS = 12
"""The nearest models are candidates however far they are."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that may be related.

    Args:
        model: Its number in the catalogue.
        cosine: Inner product of the two vectors, or 0 if that route did not find it.
        shared: Share of the query's counted values in tensors whose size and norm it has too.
    """

    model: int
    cosine: float
    shared: float


class ModelIndex:
    """Finds candidates in a catalogue by equal tensors and by near vectors.

    Args:
        catalogue: Where the models are. It is the truth; vectors are loaded again when it changes.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._vectors: VectorIndex | None = None
        self._generation = -1

    def candidates(self, fingerprint: Fingerprint) -> list[Candidate]:
        """Return every model that shares a tensor or lies above the noise, the likeliest first."""
        counted = fingerprint.counted
        total = sum(tensor.size for tensor in counted) or 1
        keys = list({tensor.key for tensor in counted if tensor.summary.norm > 0})
        shared = self.catalogue.sharing(keys)
        vectors = self._current_vectors()
        near = dict(vectors.nearest(fingerprint.vector, ALWAYS))
        if near and min(near.values()) > NOISE:
            near = dict(vectors.above(fingerprint.vector, NOISE))
        found = [
            Candidate(model, near.get(model, 0.0), shared.get(model, 0) / total)
            for model in near.keys() | shared.keys()
        ]
        kept: list[Candidate] = []
        rest: list[Candidate] = []
        for candidate in found:
            likely = candidate.cosine > NOISE or candidate.shared > 0
            (kept if likely else rest).append(candidate)
        kept.sort(key=lambda c: (-max(c.shared, c.cosine), c.model))
        rest.sort(key=lambda c: (-c.cosine, c.model))
        return kept + rest[: max(0, ALWAYS - len(kept))]

    @property
    def size(self) -> int:
        """The number of models that are searched: those of this program's method."""
        return len(self._current_vectors())

    def _current_vectors(self) -> VectorIndex:
        generation = self.catalogue.generation()
        if self._vectors is None or generation != self._generation:
            self._vectors = vector_index(*self.catalogue.vectors())
            self._generation = generation
        return self._vectors
