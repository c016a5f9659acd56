"""Which catalogued models may be related to one: candidates, for the evidence to judge."""

from dataclasses import dataclass

import numpy as np

from embedder.coding import current_encoders
from embedder.fingerprint import Fingerprint
from embedder.identity import IdentityCode
from embedder.matching import COUNT, MARGIN, standing_out
from index.catalogue import Catalogue
from index.vectors import VectorIndex, vector_index

NOISE = 0.12
"""Inner product from which a model is always a candidate: 1.5 to 2.4 standard deviations of that of
strangers of equal shapes (see `embedder.vector`). It is low because kin that share a small part lie
near it, and a stranger more costs 2 ms."""

ALWAYS = 12
"""The nearest models are candidates however far they are."""


CODED = 6
"""So many models are candidates for their identity codes: of the hundred nearest those whose units
pair off best with the query's."""

UNLIKE = 0.2
"""Cosine of identity codes up to which no partners are looked for among units, which takes a
millisecond: of 2,119 children of a zoo whose units had some none lay below .246."""

ALIKE = 0.5
"""Cosine of identity codes above which these are. Of children in a zoo that the encoder had not
seen all lie above it to a drift of .3, 99 % to .6, 85 % to 1; of strangers, most of them of other
designs, one in a thousand lies above .51 (`alike` in `benchmarks/results/identity.json`)."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that may be related.

    Args:
        model: Its number in the catalogue.
        cosine: Inner product of the two vectors, or 0 if that route did not find it.
        shared: Share of the query's counted values in tensors whose size and norm it has too.
        alike: Cosine of the two identity codes, or 0 if that route did not find it.
        margin: How much nearer its units are to their partners than to any other unit, or 0 if
            that route did not find it, or it has no units (`embedder.matching.margin`).
    """

    model: int
    cosine: float
    shared: float
    alike: float = 0.0
    margin: float = 0.0


class ModelIndex:
    """Finds candidates in a catalogue by equal tensors, near vectors and near identity codes.

    Args:
        catalogue: Where the models are. It is the truth; vectors are loaded again when it changes.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._vectors: VectorIndex | None = None
        self._codes: dict[str, VectorIndex] = {}
        self._outdated: int | None = None
        self._generation = -1

    def candidates(
        self, fingerprint: Fingerprint, code: IdentityCode | None = None
    ) -> list[Candidate]:
        """Return every model that shares a tensor or lies above the noise, the likeliest first.

        Args:
            fingerprint: Of the model that is asked about.
            code: Its identity code; it is compared with those of the same encoder alone.
        """
        counted = fingerprint.counted
        total = sum(tensor.size for tensor in counted) or 1
        keys = list({tensor.key for tensor in counted if tensor.summary.norm > 0})
        shared = self.catalogue.sharing(keys)
        vectors = self._current_vectors()
        near = dict(vectors.nearest(fingerprint.vector, ALWAYS))
        if near and min(near.values()) > NOISE:
            near = dict(vectors.above(fingerprint.vector, NOISE))
        alike = self._alike(code)
        found = [
            Candidate(
                model,
                near.get(model, 0.0),
                shared.get(model, 0) / total,
                *alike.get(model, (0.0, 0.0)),
            )
            for model in near.keys() | shared.keys() | alike.keys()
        ]
        kept: list[Candidate] = []
        rest: list[Candidate] = []
        for candidate in found:
            likely = candidate.cosine > NOISE or candidate.shared > 0 or candidate.alike > 0
            (kept if likely else rest).append(candidate)
        kept.sort(key=lambda c: (-max(c.shared, c.cosine, c.alike, c.margin > MARGIN), c.model))
        rest.sort(key=lambda c: (-c.cosine, c.model))
        return kept + rest[: max(0, ALWAYS - len(kept))]

    @property
    def size(self) -> int:
        """The number of models that are searched: those of this program's method."""
        return len(self._current_vectors())

    @property
    def outdated(self) -> int:
        """The number of models whose codes were made by another encoder than this program's."""
        self._current_vectors()
        if self._outdated is None:
            known = self.catalogue.encoders()
            current = current_encoders() if known else frozenset()
            self._outdated = sum(n for encoder, n in known.items() if encoder not in current)
        return self._outdated

    def _alike(self, code: IdentityCode | None) -> dict[int, tuple[float, float]]:
        """Return models with near identity codes, the likeliest first, their cosines and margins.

        A model counts if its code is alike or its units are partners of the query's.
        """
        if code is None:
            return {}
        self._current_vectors()
        if code.encoder not in self._codes:
            self._codes[code.encoder] = vector_index(
                *self.catalogue.codes(code.encoder), exact=False
            )
        near = self._codes[code.encoder].nearest(code.vector, COUNT)
        nearest = {model: cosine for model, cosine in near if cosine > UNLIKE}
        known = self.catalogue.units(list(nearest)) if code.units else {}
        score, margin = dict(nearest), {}
        if known:
            cosines = np.array([nearest[model] for model in known])
            shown, margins = standing_out(code.units, list(known.values()), cosines)
            score |= zip(known, map(float, shown), strict=True)
            margin = dict(zip(known, map(float, margins), strict=True))
        best = sorted(nearest, key=lambda model: -score[model])
        found = {model: (nearest[model], margin.get(model, 0.0)) for model in best[:CODED]}
        return {model: told for model, told in found.items() if told[0] > ALIKE or told[1] > MARGIN}

    def _current_vectors(self) -> VectorIndex:
        generation = self.catalogue.generation()
        if self._vectors is None or generation != self._generation:
            self._vectors = vector_index(*self.catalogue.vectors())
            self._codes.clear()
            self._outdated = None
            self._generation = generation
        return self._vectors
