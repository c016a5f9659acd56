"""The words for what two models are to each other, and everything that the rules look at."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from embedder.fingerprint import Fingerprint
from lineage.chance import Chance, chance_of, shipped_controls, spread_of, tensor_variance
from lineage.measure import Measurement, PairMeasure


class Relation(StrEnum):
    """The words of CONTRACTS 3, the first that applies first."""

    IDENTICAL_FILE = "identical-file"
    SAME_TENSORS = "same-tensors"
    SAME_WEIGHTS = "same-weights"
    MERGE = "merge"
    LAYER_EDIT = "layer-edit"
    ADAPTER = "adapter"
    LORA = "lora"
    FINE_TUNE = "fine-tune"
    PART_OF = "part-of"
    EXTENDED = "extended"
    PRUNED = "pruned"
    QUANTISED = "quantised"
    PERTURBED = "perturbed"
    SIBLING = "sibling"
    SAME_START = "same-start"
    UNRELATED = "unrelated"
    CANNOT_SAY = "cannot-say"

    @property
    def related(self) -> bool | None:
        """Whether the two are kin; None where that is not known."""
        if self in (Relation.SAME_START, Relation.CANNOT_SAY):
            return None
        return self is not Relation.UNRELATED


KIN_Z = 4.0
KIN_COSINE = 0.1
"""A tensor beats the controls from four standard deviations and a cosine of .1: of 1,067 tensors
of unrelated pairs of the corpus .2 % pass three deviations and none five."""

COPIES = frozenset({Relation.IDENTICAL_FILE, Relation.SAME_TENSORS, Relation.SAME_WEIGHTS})
"""Relations of one model with itself."""

NUMERIC = {"quantised": Relation.QUANTISED, "pruned": Relation.PRUNED}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A relation with the reasons for it.

    Args:
        relation: The first word that applies.
        operations: All that was done, in the order in which it seems to have been done.
        agreement: Size-weighted centred cosine above chance; None where nothing is matched.
        distance: ‖Y − X‖ / ‖X‖ over the matched tensors; None where nothing is matched.
        first_share: Share of the first's counted values in tensors that beat the controls.
        second_share: The same for the second.
        chance: How likely strangers agree as much; None for relations shown by equal values.
        reasons: Sentences.
        limits: What was not read, not paired, not calibrated, or fits two explanations.
    """

    relation: Relation
    operations: tuple[str, ...]
    agreement: float | None
    distance: float | None
    first_share: float
    second_share: float
    chance: Chance | None
    reasons: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()


@dataclass(slots=True)
class Case:
    """Everything that the rules look at."""

    first: Fingerprint
    second: Fingerprint
    measured: Measurement
    constants: frozenset[bytes]
    same: list[PairMeasure] = field(default_factory=list)
    explained: list[PairMeasure] = field(default_factory=list)
    moved: list[PairMeasure] = field(default_factory=list)
    uncompared: list[PairMeasure] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for pair in self.measured.pairs:
            if self.first.tensors[pair.first_place].values in self.constants:
                self.limits.append(
                    f"{pair.first}: bit-equal in models that share nothing else; not counted"
                )
            elif pair.first_size != pair.second_size and not pair.exact:
                self.uncompared.append(pair)
            elif pair.same_values:
                self.same.append(pair)
            elif pair.operation in NUMERIC:
                self.explained.append(pair)
            else:
                self.moved.append(pair)

        if self.uncompared:
            names = ", ".join(pair.first for pair in self.uncompared[:3])
            self.limits.append(f"of different length, and not compared without weights: {names}")

    @property
    def matched(self) -> list[PairMeasure]:
        """All pairs that were compared and count."""
        return [*self.same, *self.explained, *self.moved]

    @property
    def grown(self) -> list[PairMeasure]:
        """Same or explained pairs in which one tensor has rows or columns that the other lacks."""
        pairs = [*self.matched, *self.uncompared]
        return [pair for pair in pairs if pair.first_size != pair.second_size]

    @property
    def more(self) -> tuple[int, int]:
        """Counted values of each model in tensors that the other has no partner for."""
        return (
            sum(self.first.tensors[place].size for place in self.measured.first_alone),
            sum(self.second.tensors[place].size for place in self.measured.second_alone),
        )

    @property
    def kin(self) -> list[PairMeasure]:
        """Pairs that beat the controls."""
        kappa, mean = shipped_controls().kappa, shipped_controls().mean
        found = [*self.same, *self.explained]
        for pair in self.moved:
            deviation = math.sqrt(tensor_variance(pair, kappa))
            if pair.cosine > KIN_COSINE and (pair.cosine - mean) / deviation > KIN_Z:
                found.append(pair)
        return found

    def verdict(self, relation: Relation, *reasons: str, operations: Sequence[str] = ()) -> Verdict:
        """Return a relation with the numbers of this case.

        Args:
            relation: The word.
            reasons: Sentences.
            operations: What was done, in order.
        """
        agreement, distance, chance = numbers_of(self)
        counted = (
            sum(tensor.size for tensor in self.first.counted) or 1,
            sum(tensor.size for tensor in self.second.counted) or 1,
        )
        kin = sum(pair.size for pair in self.kin)
        proven = relation in _PROVEN
        limits = [*self.limits, *self.measured.limits]
        if chance is not None and not proven:
            limits += chance.limits
        return Verdict(
            relation,
            tuple(operations),
            agreement,
            distance,
            min(1.0, kin / counted[0]),
            min(1.0, kin / counted[1]),
            None if proven else chance,
            reasons,
            tuple(limits),
        )


_PROVEN = frozenset(
    {
        Relation.IDENTICAL_FILE,
        Relation.SAME_TENSORS,
        Relation.SAME_WEIGHTS,
        Relation.PART_OF,
        Relation.EXTENDED,
        Relation.PRUNED,
        Relation.QUANTISED,
    }
)


def numbers_of(case: Case) -> tuple[float | None, float | None, Chance | None]:
    """Return agreement, distance and chance over the matched tensors."""
    pairs = case.matched
    total = sum(pair.size for pair in pairs)
    if total == 0:
        return None, None, None
    same = {id(pair) for pair in case.same}
    cosine = sum(pair.size * (1.0 if id(pair) in same else pair.cosine) for pair in pairs) / total
    steps = sum(0.0 if id(pair) in same else pair.difference for pair in pairs)
    energy = sum(pair.first_energy for pair in pairs)
    mean = shipped_controls().mean
    chance = chance_of(cosine, spread_of(pairs))
    distance = math.sqrt(steps / energy) if energy > 0 else 0.0
    return (cosine - mean) / (1 - mean), distance, chance
