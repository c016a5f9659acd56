"""Which axes of tensors were seen to run over which units, before the units are final."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from embedder.errors import ArchitectureError
from embedder.followed import Constant, FollowedUnits, Label, Value
from embedder.units import Axis


@dataclass(slots=True)
class Draft:
    """An axis of a tensor before the units are final; `source` of a depthwise weight."""

    label: Label
    power: int = 0
    source: int | None = None


@dataclass
class NotedAxes(FollowedUnits):
    """Axes of tensors by their names, and how often each tensor is read."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    axes: dict[str, list[Draft | None]] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)
    """How often a tensor was noted."""
    all_uses: Counter[str] = field(default_factory=Counter)
    """How often a node reads it, whatever it does with it."""

    def use(self, names: Iterable[str]) -> None:
        """Note that a node reads tensors, whatever it does with them."""
        self.all_uses.update(names)

    def vector(self, constant: Constant, label: Label, *, power: int) -> str:
        """Note a tensor whose last axis runs over units; return its name."""
        return self.note(constant, {len(constant.shape) - 1: Draft(label, power)})

    def fitting(self, value: Value, at: int, size: int) -> Label:
        """Return the label that is read, one of inputs with a meaning if there is none."""
        label = value.labels.get(at)
        return Label(self.new_units(size, named=True)) if label is None else self.sized(label, size)

    def sized(self, label: Label, length: int) -> Label:
        """Return a label that fills a length, its flattened map measured by it."""
        places = self.units[self.find(label.units)].size * label.before
        inner = label.inner if label.inner is not None else max(length // places, 1)
        if places * inner != length:
            raise ArchitectureError(f"{places * inner} places of units meet {length}")
        return Label(label.units, label.before, inner)

    def note(self, constant: Constant, axes: Mapping[int, Draft]) -> str:
        """Note which axes of a tensor run over which units, and return its name."""
        drafts: list[Draft | None] = [None] * len(self.shapes.get(constant.name, ()))
        for place, draft in axes.items():
            stored = constant.stored[place] if constant.name else None
            if stored is None:
                self.units[self.find(draft.label.units)].named = True
            else:
                drafts[stored] = draft
        if not constant.name:
            return ""
        self.uses[constant.name] += 1
        there = self.axes.setdefault(constant.name, drafts)
        if there is not drafts:
            self._agree(constant.name, there, drafts)
        return constant.name

    def _agree(
        self, name: str, there: Sequence[Draft | None], again: Sequence[Draft | None]
    ) -> None:
        """Join the units of a tensor that is used twice, or keep them if it is used differently."""
        for one, other in zip(there, again, strict=True):
            if one is None or other is None or not self._joined(one, other):
                for draft in (one, other):
                    if draft is not None:
                        self.units[self.find(draft.label.units)].named = True
            elif (one.power, one.source) != (other.power, other.source):
                for units in (one.label.units, one.source, other.source):
                    if units is not None:
                        self.fix(Value({-1: Label(units)}))

    def _joined(self, one: Draft, other: Draft) -> bool:
        """Join the units of two axes, if they lie alike; say whether they did."""
        alike = (one.label.before, one.label.inner) == (other.label.before, other.label.inner)
        if not alike or self.size(one.label) != self.size(other.label):
            return False
        self.join(one.label.units, other.label.units)
        return True

    def times(self, name: str) -> int:
        """Return how many nodes read a tensor."""
        return max(self.uses[name], self.all_uses[name])

    def final_axis(self, draft: Draft) -> Axis:
        """Return an axis as it is when all units are final."""
        name, power, tied_power = self.name_of(draft.label.units), draft.power, 0
        if draft.source is not None:
            # The weights of a depthwise convolution between one and the same units keep theirs.
            alone = self.name_of(draft.source) == name
            power, tied_power = (0, 0) if alone else (1, -1)
        return Axis(name, draft.label.before, draft.label.inner or 1, power, tied_power)

    def name_of(self, units: int) -> str:
        """Return the name of the group that units are in."""
        return f"units{self.find(units)}"

    def keep_what_is_read_elsewhere(self) -> None:
        """Give a meaning to units of tensors that are also read where nothing is known of them."""
        for name, drafts in self.axes.items():
            if self.uses[name] < self.all_uses[name]:
                for draft in drafts:
                    if draft is not None:
                        self.units[self.find(draft.label.units)].named = True
