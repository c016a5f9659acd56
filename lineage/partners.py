"""Partners of hidden units: which unit of one model is which of another, and in which scale.

Every unit is given a partner of its own, by what the two read of which inputs and what they do to
which outputs.
"""

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from embedder.anchors import Units
from embedder.coding import Described, shipped_coder
from embedder.identity import is_hidden, unit_rows
from embedder.matching import standing_apart
from embedder.symmetry import Values
from embedder.units import Gauge

AGREED = 0.6
"""Share of a stream's channels about which what they hold and what they do must agree; else it may
have been rotated, and they stay."""

_DEAD = 1e-6
"""Length of a code, by the longest of its group, up to which a unit is cut off: what float32 rounds
away of a sum."""


def partners_of(ours: Described, theirs: Described) -> list["Match"]:
    """Return the units of two models, matched; none if the two are not of one design."""
    matched = match_units(ours.units, theirs.units)
    if ours.unknown:
        signless = match_units(ours.units, theirs.units, ours.unknown)
        # Others come nearer with signs left open, so partners do so only if they were flipped.
        matched = max(matched, signless, key=_apart)
    return matched


def _apart(matched: Sequence["Match"]) -> float:
    """Return how far all partners stand apart from others."""
    return sum(match.units * match.apart for match in matched)


def match_units(
    ours: Sequence[Units], theirs: Sequence[Units], signless: Collection[str] = ()
) -> list["Match"]:
    """Return the groups of two models' units, matched from both sides; none if designs differ.

    Args:
        ours: What `embedder.anchors.anchored` returns for one model.
        theirs: The same for the other.
        signless: Groups whose units may have another sign, though their gauge does not say it.
    """
    if _design(ours) != _design(theirs):
        return []
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if _is_matched(a)]
    first = min((a.depth for a, _ in pairs), default=0)
    last = max((a.depth for a, _ in pairs), default=0)
    return [
        Match(a, b, first=a.depth == first, last=a.depth == last, signless=a.group in signless)
        for a, b in pairs
    ]


def _design(units: Sequence[Units]) -> list[tuple[int, Gauge, bool, bool]]:
    """Return what models of one design have in common; another head may have other outputs."""
    named = Gauge.NAMED
    return [
        (0 if group.gauge is named else len(group.read), group.gauge, group.heads, group.gates)
        for group in units
    ]


def _is_matched(group: Units) -> bool:
    """Say whether a group has units that may be reordered, and that do something."""
    return is_hidden(group) and not group.gates and bool(group.reach.any()) and len(group.read) > 1


def orders_beside(ours: Described, theirs: Described) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """Yield the order of streams' channels, if both sides agree about it, and that of heads.

    Args:
        ours: One model.
        theirs: The other, of the same design.
    """
    for a, b in zip(ours.units, theirs.units, strict=True):
        if a.channels and Gauge.NAMED not in (a.gauge, b.gauge):
            # What they hold came from the inputs, and what they do goes to the outputs.
            match = Match(a, b, first=True, last=True)
            if match.agreed >= AGREED * match.units:
                yield b.group, match.order
        elif a.heads:
            turn = shipped_coder().arrays["heads/turn"]
            # Query heads that share a key are one unit.
            size = theirs.architecture.groups[b.group].size
            one, other = (unit_rows(side.forward @ turn).reshape(size, -1) for side in (a, b))
            yield b.group, _partners(one @ other.T)


class Match:
    """The units of one group of both models, matched from both sides.

    Args:
        ours: The group of one model.
        theirs: The same group of the other.
        first: Whether its units read the inputs.
        last: Whether they feed the outputs.
        signless: Whether units may have another sign, whatever their gauge says.
    """

    def __init__(
        self, ours: Units, theirs: Units, *, first: bool, last: bool, signless: bool = False
    ) -> None:
        self.ours, self.theirs = ours, theirs
        arrays = shipped_coder().arrays
        read = arrays["first read/turn" if first else "deep read/turn"]
        reach = arrays["last reach/turn" if last else "deep reach/turn"]
        self._below = unit_rows(ours.forward @ read) @ unit_rows(theirs.forward @ read).T
        self._above = unit_rows(ours.backward @ reach) @ unit_rows(theirs.backward @ reach).T
        self.even = signless or ours.gauge is Gauge.SIGN
        self.units = len(ours.read)

    @cached_property
    def agreed(self) -> int:
        """Units whose partner is the same from both sides."""
        one, other = (_partners(self._sized(side)) for side in (self._below, self._above))
        return int((one == other).sum())

    @cached_property
    def order(self) -> NDArray[np.intp]:
        """The partner of each unit, by what units read or by both sides."""
        return _partners(self._sized(self._told))

    @property
    def apart(self) -> float:
        """How much nearer partners are than all others, in cosine."""
        return float(standing_apart(self._sized(self._told)).min())

    @property
    def signs(self) -> Values:
        """The sign that each partner has to be given."""
        return np.where(self._told[np.arange(self.units), self.order] < 0, -1.0, 1.0)

    @cached_property
    def _told(self) -> Values:
        """The cosines that partners are told by: those among which they stand out most.

        Training moves what units do further than what they read, and a new head changes all of
        it: of children of a zoo that had drifted by .3 to .6, both sides together told 80 % of the
        partners right, the better of this and what units read 97 %.
        """
        return max((self._below, self._below + self._above), key=self._deviations)

    def _deviations(self, cosines: Values) -> float:
        """Return how far partners stand apart from all others, in standard deviations."""
        sized = self._sized(cosines)
        return float(standing_apart(sized).min() / max(float(sized.std()), 1e-12))

    def _sized(self, cosines: Values) -> Values:
        return np.abs(cosines) if self.even else cosines

    def factors(self) -> Values:
        """Return what each unit, in its new place, is multiplied by.

        A scale makes what a unit reads longer and what it does shorter; their ratio tells it, and
        training changes that little. Of a unit that was cut off on one side the other tells it.
        """
        if self.even:
            return self.signs
        theirs = self.theirs.read[self.order], self.theirs.reach[self.order]
        sides = (self.ours.read, theirs[0]), (theirs[1], self.ours.reach)
        told = np.array([_alive(one) & _alive(other) for one, other in sides])
        longer, shorter = (np.where(told, side, 1.0) for side in zip(*sides, strict=True))
        logs = np.log(longer) - np.log(shorter)
        return np.asarray(np.exp(logs.sum(axis=0) / np.maximum(told.sum(axis=0), 1)))


def _alive(lengths: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which units read, or do, anything that is more than noise of rounding."""
    return np.asarray(lengths > _DEAD * lengths.max(initial=0))


def _partners(cosines: Values) -> NDArray[np.intp]:
    """Return a partner of its own for each row, for the largest sum of cosines."""
    from scipy.optimize import linear_sum_assignment  # half a second, for few pairs

    return np.asarray(linear_sum_assignment(-cosines)[1])
