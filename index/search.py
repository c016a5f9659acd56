"""Which catalogued models may be related to one: candidates, for the evidence to judge."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from embedder.coding import current_encoders
from embedder.fingerprint import Fingerprint
from embedder.identity import IdentityCode, Tokens
from embedder.matching import COUNT, MARGIN, counts_of, margin_of_kin, standing_out
from index.catalogue import Catalogue
from index.vectors import VectorIndex, vector_index

NOISE = 0.12
"""Inner product from which a model is always a candidate: 1.5 to 2.4 standard deviations of that of
strangers of equal shapes (see `embedder.vector`). It is low because kin that share a small part lie
near it, and a stranger more costs 2 ms."""

ALWAYS = 12
"""The nearest models are candidates however far they are."""


CODED = 6
"""So many models are candidates for their identity codes alone: of the hundred nearest those whose
units pair off best with the query's."""

UNLIKE = 0.2
"""Cosine of identity codes up to which no partners are looked for among units, which takes a
millisecond: of 2,119 children of a zoo whose units had some none lay below .246."""

ALIKE = 0.5
"""Cosine of identity codes above which these are. Of children in a zoo that the encoder had not
seen all lie above it to a drift of .3, 99 % to .6, 85 % to 1; of strangers, most of them of other
designs, one in a thousand lies above .51 (`alike` in `benchmarks/results/identity.json`)."""


AMONG = 20
"""Near models with as many units in each part as the query whose units must have been compared
before one of them can stand out: a lone stranger of its design stands out from all others too."""

AHEAD = 40.0
"""How much further than the next a model must stand out to be named for it. Of 500 queries of folds
6 and 7, an encoder of folds 0 to 5, whose kin was not among 6,451, 3,000 or 1,000 bases, one, none
and none have such a model (worst kind one in 90), with any second as the next; where 8 or 16 bases
of a query's own design and task were left, 3 and 1.6 % have (worst kind 12 and 4.5 %). If its base
was there it was named for .94 .88 .85 .68 of them, by drift."""


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
        ahead: How much further its units stand out, among `AMONG` models of the query's shape or
            more, than those of the next that is no kin of it (`embedder.matching.standing_out`);
            0 for all but the first that is no partner, and its kin right behind it.
    """

    model: int
    cosine: float = 0.0
    shared: float = 0.0
    alike: float = 0.0
    margin: float = 0.0
    ahead: float = 0.0

    @property
    def told_by_units(self) -> bool:
        """Whether its units say that it may be kin, whatever the rest says."""
        return self.margin > MARGIN or self.ahead > AHEAD


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
        sketched = {model for model, cosine in near.items() if cosine > NOISE} | shared.keys()
        alike = self._alike(code, sketched)
        found = [
            replace(
                alike.get(model, Candidate(model)),
                cosine=near.get(model, 0.0),
                shared=shared.get(model, 0) / total,
            )
            for model in near.keys() | shared.keys() | alike.keys()
        ]
        kept: list[Candidate] = []
        rest: list[Candidate] = []
        for candidate in found:
            likely = candidate.cosine > NOISE or candidate.shared > 0 or candidate.alike > 0
            (kept if likely else rest).append(candidate)
        kept.sort(key=lambda c: (-max(c.shared, c.cosine, c.alike, c.told_by_units), c.model))
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

    def _alike(self, code: IdentityCode | None, sketched: Collection[int]) -> dict[int, Candidate]:
        """Return models with near identity codes as candidates.

        A model counts if its code is alike, or its units are partners of the query's or stand out.

        Args:
            code: Of the model that is asked about.
            sketched: Models that are candidates for their tensors; they take no other's place.
        """
        if code is None:
            return {}
        nearest = self._near_codes(code)
        known = self.catalogue.units(list(nearest)) if code.units else {}
        score, margin = dict(nearest), dict.fromkeys(nearest, 0.0)
        if known:
            cosines = np.array([nearest[model] for model in known])
            shown, margins = standing_out(code.units, list(known.values()), cosines)
            score |= zip(known, map(float, shown), strict=True)
            margin |= zip(known, map(float, margins), strict=True)
        best = sorted(nearest, key=lambda model: -score[model])
        # Partners are named as such; the query itself and its copies are among them.
        ranked = {m: score[m] for m in best if m in known and margin[m] <= MARGIN}
        ahead = _ahead(ranked, known, code.units)
        chosen = {*sketched, *[model for model in best if model not in sketched][:CODED]}
        found = [
            Candidate(model, alike=nearest[model], margin=margin[model], ahead=ahead.get(model, 0))
            for model in best
            if model in chosen
        ]
        return {c.model: c for c in found if c.alike > ALIKE or c.told_by_units}

    def _near_codes(self, code: IdentityCode) -> dict[int, float]:
        """Return the cosines of the models whose units may be compared."""
        self._current_vectors()
        if code.encoder not in self._codes:
            self._codes[code.encoder] = vector_index(
                *self.catalogue.codes(code.encoder), exact=False
            )
        near = self._codes[code.encoder].nearest(code.vector, COUNT)
        return {model: cosine for model, cosine in near if cosine > UNLIKE}

    def _current_vectors(self) -> VectorIndex:
        generation = self.catalogue.generation()
        if self._vectors is None or generation != self._generation:
            self._vectors = vector_index(*self.catalogue.vectors())
            self._codes.clear()
            self._outdated = None
            self._generation = generation
        return self._vectors


def _ahead(
    scores: Mapping[int, float],
    units: Mapping[int, Mapping[str, Tokens]],
    query: Mapping[str, Tokens],
) -> dict[int, float]:
    """Return how much further the first of some models, and its kin, stand out than the next.

    Args:
        scores: Model → how much it stands out, the most first.
        units: Model → its units.
        query: The units of the model that is asked about.
    """
    if sum(counts_of(units[model]) == counts_of(query) for model in scores) < AMONG:
        return {}
    first, *others = list(scores)[: CODED + 1]
    kin = takewhile(lambda other: margin_of_kin(units[first], units[other]), others[:-1])
    family = [first, *kin]
    beyond = scores[others[len(family) - 1]]
    return {model: scores[model] - beyond for model in family}
