"""Units that are followed through a graph, and the values that carry them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from embedder.errors import ArchitectureError

HOMOGENEOUS = frozenset({"relu", "leaky_relu", "prelu"})
"""Activations that let a positive scale through."""

ODD = frozenset({"tanh", "erf", "sin"})
"""Activations that let a sign through."""


@dataclass(frozen=True, slots=True)
class Label:
    """Units along an axis: place (a · size + unit) · inner + b, as in `Axis`.

    `inner` is None where a map was flattened whose size the graph does not say.
    """

    units: int
    before: int = 1
    inner: int | None = 1

    @property
    def whole(self) -> bool:
        """Whether each unit has one place, in their order."""
        return (self.before, self.inner) == (1, 1)


@dataclass(frozen=True, slots=True)
class Trail:
    """The linear maps that a value comes from which may be part of an attention or a gated map.

    Args:
        maps: Units that one map writes; those of query and key, once they have met; those of value
            behind them, once what was attended to is added up; or those of a gate and of what it
            was multiplied with.
        plain: Whether their channels were only moved, scaled alike and given their bias.
        gated: Whether they are those of a gated map.
    """

    maps: tuple[int, ...]
    plain: bool = True
    gated: bool = False

    @property
    def single(self) -> int | None:
        """The units of the one map; None if there are several."""
        return self.maps[0] if len(self.maps) == 1 else None

    def meeting(self, other: "Trail") -> "Trail | None":
        """Return the trail of a product of values; None if it is none of an attention."""
        if self.gated or len(other.maps) > 1 or len(self.maps) > 2:
            return None
        if len(self.maps) == 2:  # values may not be changed on the way, queries and keys may
            return Trail(self.maps + other.maps, self.plain) if other.plain else None
        return Trail(self.maps + other.maps, self.plain and other.plain)

    def opening(self, other: "Trail") -> "Trail | None":
        """Return the trail of one map's units times those of another; None if neither is a gate."""
        gate, up = sorted((self, other), key=lambda trail: trail.plain)
        if None in (gate.single, up.single) or gate.plain or not up.plain or gate.maps == up.maps:
            return None
        return Trail(gate.maps + up.maps, gated=True)


@dataclass(frozen=True, slots=True)
class Value:
    """What is computed on the way.

    Args:
        labels: Axis, counted from the end (−1 is the last) → units along it.
        shape: Its shape, None for a size that the graph does not say; None if not even the number
            of axes is known.
        fresh: Number of the step that made it, where nothing else was added since.
        trail: The linear maps that it comes from, where it may be part of an attention.
    """

    labels: Mapping[int, Label] = field(default_factory=dict)
    shape: tuple[int | None, ...] | None = None
    fresh: int | None = None
    trail: Trail | None = None

    @property
    def single(self) -> int | None:
        """The units of the one linear map that it comes from; None if there are several or none."""
        return None if self.trail is None else self.trail.single

    def length(self, place: int) -> int | None:
        """Return how many places it has on an axis, counted from the end; None if not known."""
        if self.shape is None:
            return None
        return 1 if len(self.shape) + place < 0 else self.shape[place]

    def is_single(self, place: int) -> bool:
        """Say whether it certainly has one place on an axis, counted from the end."""
        return self.length(place) == 1

    def without(self, places: Collection[int], shape: tuple[int | None, ...] | None) -> "Value":
        """Return a value of a shape, with the units of this one on all but some of its axes."""
        return Value({p: u for p, u in self.labels.items() if p not in places}, shape)


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor of the model, or a view of one.

    Args:
        name: Its name; empty for one that was computed from others, which nothing can follow.
        shape: The shape of the view.
        stored: For each axis of the view, the axis of the tensor; None for one of length 1 that
            was put in.
        scalar: Its value, where it has a single one that is known.
    """

    name: str
    shape: tuple[int, ...]
    stored: tuple[int | None, ...]
    scalar: float | None = None


@dataclass(slots=True)
class Units:
    """Units before it is known which others they are joined with, and what they allow."""

    size: int
    named: bool = False
    scale: bool = True
    sign: bool = True
    activation: str = "linear"
    tied: int | None = None


@dataclass
class FollowedUnits:
    """All units of a graph; some of them turn out to be the same."""

    units: list[Units] = field(default_factory=list)
    same: list[int] = field(default_factory=list)
    held: set[int] = field(default_factory=set)
    """Units that something treats one by one, so that they may not be rotated."""

    def new_units(self, size: int, *, named: bool = False, tied: int | None = None) -> int:
        """Return new units."""
        self.units.append(Units(size, named=named, tied=tied))
        self.same.append(len(self.same))
        return len(self.same) - 1

    def find(self, units: int) -> int:
        """Return the units that stand for all that were joined."""
        while self.same[units] != units:
            units = self.same[units]
        return units

    def order_of(self, units: int) -> int:
        """Return the units that give units their order: themselves, unless they are tied."""
        root = self.find(units)
        while (tied := self.units[root].tied) is not None:
            root = self.find(tied)
        return root

    def join(self, first: int, second: int) -> None:
        """Make two units the same, with one order and one scale."""
        a, b = self.find(first), self.find(second)
        if a == b:
            return
        one, other = self.units[a], self.units[b]
        if one.size != other.size:
            raise ArchitectureError(f"{one.size} units are added to {other.size}")
        self.same[b] = a
        one.named |= other.named
        one.scale &= other.scale
        one.sign &= other.sign
        one.activation = other.activation if one.activation == "linear" else one.activation
        ties = [units.tied for units in (one, other) if units.tied is not None]
        one.tied = ties[0] if ties else None
        if len(ties) == 2:
            self.join(*ties)
        self._break_circle(a)

    def _break_circle(self, units: int) -> None:
        """Join units that are tied to themselves in a circle, as by a sum around a convolution."""
        chain: list[int] = []
        tied = self.units[self.find(units)].tied
        while tied is not None:
            if self.find(tied) == self.find(units):
                self.units[self.find(units)].tied = None
                for link in chain:
                    self.join(units, link)
                return
            chain.append(tied)
            tied = self.units[self.find(tied)].tied

    def keep(self, value: Value, places: Iterable[int] | None = None) -> None:
        """Give the units of a value, or of some of its axes, a meaning: they stay as they are."""
        for place in value.labels if places is None else places:
            if place in value.labels:
                self.units[self.find(value.labels[place].units)].named = True

    def keep_changed(
        self, value: Value, shape: tuple[int | None, ...], *, ordered: bool
    ) -> list[int]:
        """Give the units of axes that were cut or made longer a meaning, and return these axes.

        Args:
            value: What was cut, of known shape.
            shape: What came of it, of as many axes.
            ordered: Whether places that are left stand as they did; if not, all axes are kept.
        """
        before = value.shape or ()
        changed = [
            place
            for place in value.labels
            if not ordered or shape[place] is None or shape[place] != before[place]
        ]
        self.keep(value, changed)
        return changed

    def fix(self, value: Value, *, sign: bool = True, scale: bool = True) -> None:
        """Take away the scale, the sign or both of a value's units."""
        for label in value.labels.values():
            units = self.units[self.find(label.units)]
            units.scale &= not scale
            units.sign &= not sign

    def keep_all(self, values: Sequence[Value], place: int) -> None:
        """Give the units of several values on one axis a meaning."""
        for value in values:
            if place in value.labels:
                self.keep(value, [place])

    def fix_all(self, values: Sequence[Value], place: int) -> None:
        """Take away scale and sign of the units of several values on one axis."""
        for value in values:
            if place in value.labels:
                self.fix(Value({place: value.labels[place]}))

    def joined(self, values: Sequence[Value], *, product: bool = False) -> dict[int, Label]:
        """Return the labels of values whose axes meet from the end: units that meet are one."""
        labels: dict[int, Label] = {}
        for place in sorted({place for value in values for place in value.labels}):
            first: Label | None = None
            longest = max(
                max(self.places(value, place), value.length(place) or 0) for value in values
            )
            for value in values:
                label = value.labels.get(place)
                if label is not None and self.places(value, place) < longest:
                    self.keep(value, [place])  # one unit meets many
                    label = None
                if label is None:
                    if not value.is_single(place):
                        self.keep_all(values, place)
                    elif not product:
                        self.fix_all(values, place)
                elif first is None:
                    first = label
                elif (label.before, label.inner) == (first.before, first.inner):
                    self.join(first.units, label.units)
                else:
                    self.keep_all(values, place)
            if first is not None:
                labels[place] = first
        return labels

    def size(self, label: Label) -> int:
        """Return the number of units of a label."""
        return self.units[self.find(label.units)].size

    def places(self, value: Value, place: int) -> int:
        """Return how many places units are known to fill on an axis of a value."""
        label = value.labels.get(place)
        return 0 if label is None else self.size(label) * label.before * (label.inner or 1)

    def activate(self, value: Value, activation: str) -> Value:
        """Return a value after a function of each element."""
        self.fix(value, scale=activation not in HOMOGENEOUS, sign=activation not in ODD)
        for label in value.labels.values():
            units = self.units[self.find(label.units)]
            if units.activation == "linear":
                units.activation = activation
        return Value(value.labels, value.shape)
