"""Which axes of a model's tensors run over the same units, found by following them through a graph.

A front end walks a graph in its order and tells a `Tracer` what each node does. A value that is
computed on the way carries labels: on which axis which units lie. A matrix makes new units; a sum
joins those of its terms; an activation takes away a scale or a sign; what cannot be followed gives
units a meaning, so that they stay where they are. All of that is safe: a description may allow
less than it could, never more.

Steps name what writes and reads units, not how values meet: a product of two maps is noted like
their sum, and attention as its four matrices, with heads that stay where they are.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from embedder.architecture import Architecture, Op, Step
from embedder.errors import ArchitectureError
from embedder.units import Axis, Gauge, Group

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


@dataclass(frozen=True, slots=True)
class Value:
    """What is computed on the way.

    Args:
        labels: Axis, counted from the end (−1 is the last) → units along it.
        shape: Its shape, None for a size that the graph does not say; None if not even the number
            of axes is known.
        fresh: Number of the step that made it, where nothing else was added since.
    """

    labels: Mapping[int, Label] = field(default_factory=dict)
    shape: tuple[int | None, ...] | None = None
    fresh: int | None = None


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
class _Units:
    size: int
    named: bool = False
    scale: bool = True
    sign: bool = True
    activation: str = "linear"
    tied: int | None = None


@dataclass(slots=True)
class _Draft:
    """An axis of a tensor before the units are final; `source` of a depthwise weight."""

    label: Label
    power: int = 0
    source: int | None = None


@dataclass
class Tracer:
    """Collects units, axes and steps while a graph is walked."""

    shapes: Mapping[str, tuple[int, ...]]
    _units: list[_Units] = field(default_factory=list)
    _same: list[int] = field(default_factory=list)
    _axes: dict[str, list[_Draft | None]] = field(default_factory=dict)
    _steps: list[Step] = field(default_factory=list)

    # -------------------------------------------------------------- units

    def new_units(self, size: int, *, named: bool = False, tied: int | None = None) -> int:
        """Return new units."""
        self._units.append(_Units(size, named=named, tied=tied))
        self._same.append(len(self._same))
        return len(self._same) - 1

    def find(self, units: int) -> int:
        """Return the units that stand for all that were joined."""
        while self._same[units] != units:
            units = self._same[units]
        return units

    def join(self, first: int, second: int) -> None:
        """Make two units the same, with one order and one scale."""
        a, b = self.find(first), self.find(second)
        if a == b:
            return
        one, other = self._units[a], self._units[b]
        if one.size != other.size:
            raise ArchitectureError(f"{one.size} units are added to {other.size}")
        self._same[b] = a
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
        tied = self._units[self.find(units)].tied
        while tied is not None:
            if self.find(tied) == self.find(units):
                self._units[self.find(units)].tied = None
                for link in chain:
                    self.join(units, link)
                return
            chain.append(tied)
            tied = self._units[self.find(tied)].tied

    def keep(self, value: Value, places: Iterable[int] | None = None) -> None:
        """Give the units of a value, or of some of its axes, a meaning: they stay as they are."""
        for place in value.labels if places is None else places:
            if place in value.labels:
                self._units[self.find(value.labels[place].units)].named = True

    def fix(self, value: Value, *, sign: bool = True, scale: bool = True) -> None:
        """Take away the scale, the sign or both of a value's units."""
        for label in value.labels.values():
            units = self._units[self.find(label.units)]
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

    def size(self, label: Label) -> int:
        """Return the number of units of a label."""
        return self._units[self.find(label.units)].size

    def activate(self, value: Value, activation: str) -> Value:
        """Return a value after a function of each element."""
        self.fix(value, scale=activation not in HOMOGENEOUS, sign=activation not in ODD)
        for label in value.labels.values():
            units = self._units[self.find(label.units)]
            if units.activation == "linear":
                units.activation = activation
        return Value(value.labels, value.shape)

    # -------------------------------------------------------------- layers

    def linear(
        self,
        value: Value,
        weight: Constant,
        *,
        read: int,
        written: int,
        at: int,
        bias: Constant | None = None,
    ) -> tuple[int, int]:
        """Add a matrix or convolution; return its units and the number of the step.

        Args:
            value: What is read.
            weight: The weights.
            read: Axis of the weights that meets the value.
            written: Axis of the weights with the new units.
            at: Axis of the value that is read, from the end.
            bias: The bias.
        """
        size = weight.shape[read]
        label = self._fitting(value, at, size)
        target = self.new_units(weight.shape[written])
        axes: dict[int, _Draft] = {read: _Draft(label, -1), written: _Draft(Label(target), 1)}
        tensors = {"weight": self._describe(weight, axes)}
        if bias is not None:
            tensors["bias"] = self.vector(bias, Label(target), power=1)
        turned = weight.stored[read] == 0
        self._add(Op.LINEAR, label.units, target, tensors, turned=turned)
        return target, len(self._steps) - 1

    def unitwise(
        self, value: Value, weight: Constant, *, at: int, bias: Constant | None = None
    ) -> tuple[int, int]:
        """Add a depthwise convolution; return its units and the number of the step."""
        label = self._fitting(value, at, weight.shape[0])
        if (label.before, label.inner) != (1, 1):
            raise ArchitectureError(f"{weight.name}: reads units that lie apart")
        target = self.new_units(weight.shape[0], tied=label.units)
        draft = _Draft(Label(target), 1, source=label.units)
        tensors = {"weight": self._describe(weight, {0: draft})}
        if bias is not None:
            tensors["bias"] = self.vector(bias, Label(target), power=1)
        self._add(Op.UNITWISE, label.units, target, tensors)
        return target, len(self._steps) - 1

    def embedding(self, weight: Constant) -> int:
        """Add a table whose rows are looked up; return its units."""
        source = self.new_units(weight.shape[0], named=True)
        target = self.new_units(weight.shape[1])
        axes = {0: _Draft(Label(source)), 1: _Draft(Label(target), 1)}
        tensors = {"weight": self._describe(weight, axes)}
        self._add(Op.EMBEDDING, source, target, tensors, turned=True)
        return target

    def norm(
        self,
        value: Value,
        kind: str,
        vectors: Mapping[str, Constant],
        *,
        at: int,
        alone: bool,
        epsilon: float,
    ) -> Value:
        """Return a value after a norm.

        Args:
            value: What is read.
            kind: `batch`, `layer` or `rms`.
            vectors: Role → tensor.
            at: Axis of the units, from the end.
            alone: Whether nothing else reads the value.
            epsilon: What is added to the variance.
        """
        label = self._fitting(value, at, next(iter(vectors.values())).shape[-1])
        if kind == "batch" and alone and value.fresh is not None:
            # Its scale begins at the gain, so the rows before it are left as they are.
            self._begin_later(value.fresh)
            self.fix(Value({p: other for p, other in value.labels.items() if p != at}))
            target = label.units
        else:
            self.fix(value)
            target = self.new_units(self._units[self.find(label.units)].size, tied=label.units)
        after = Label(target, label.before, label.inner)
        tensors = {
            role: self.vector(
                vector,
                after if role in ("gain", "offset") else label,
                power=1 if role in ("gain", "offset") else 0,
            )
            for role, vector in vectors.items()
        }
        self._add(Op.NORM, label.units, target, tensors, kind=kind, epsilon=epsilon)
        return Value({**value.labels, at: after}, value.shape)

    def _begin_later(self, number: int) -> None:
        step = self._steps[number]
        for name in step.tensors.values():
            for draft in self._axes.get(name, ()):
                if draft is not None and draft.power == 1:
                    # A depthwise weight still takes back the scale of what it reads.
                    source, draft.source = draft.source, None
                    draft.power = 0 if source is None else -1
                    draft.label = draft.label if source is None else Label(source)

    def recurrent(self, value: Value, weights: Sequence[Constant], *, kind: str, gates: int) -> int:
        """Add cells as ONNX has them, directions × (gates · units) × in; return their units."""
        inputs, past = weights[:2]
        size = past.shape[2]
        label = self._fitting(value, -1, inputs.shape[2])
        target = self.new_units(size)
        rows = Label(target, before=gates)
        tensors = {
            "weight": self._describe(inputs, {1: _Draft(rows, 1), 2: _Draft(label, -1)}),
            "recurrent": self._describe(past, {1: _Draft(rows, 1), 2: _Draft(Label(target), -1)}),
        }
        if len(weights) > 2:
            both = Label(target, before=2 * gates)
            tensors["bias"] = self._describe(weights[2], {1: _Draft(both, 1)})
        self._add(Op.RECURRENT, label.units, target, tensors, kind=kind)
        units = self._units[target]
        units.scale = False
        units.sign = kind == "elman"
        units.activation = "tanh" if kind == "elman" else "sigmoid"
        return target

    def vector(self, constant: Constant, label: Label, *, power: int) -> str:
        """Note a tensor whose last axis runs over units; return its name."""
        return self._describe(constant, {len(constant.shape) - 1: _Draft(label, power)})

    def along(self, value: Value, constant: Constant, *, power: int) -> None:
        """Note a tensor that is added (power 1) to a value or multiplied with it (0)."""
        axes: dict[int, _Draft] = {}
        for place, label in value.labels.items():
            axis = len(constant.shape) + place
            length = constant.shape[axis] if axis >= 0 else 1
            if length > 1:
                axes[axis] = _Draft(self._sized(label, length), power)
            elif power and constant.scalar != 0:
                # The same number is added to units that may have other scales.
                self.fix(Value({place: label}))
        if axes:
            self._describe(constant, axes)

    # -------------------------------------------------------------- axes

    def _fitting(self, value: Value, at: int, size: int) -> Label:
        """Return the label that is read, one of inputs with a meaning if there is none."""
        label = value.labels.get(at)
        return (
            Label(self.new_units(size, named=True)) if label is None else self._sized(label, size)
        )

    def _sized(self, label: Label, length: int) -> Label:
        """Return a label that fills a length, its flattened map measured by it."""
        places = self._units[self.find(label.units)].size * label.before
        inner = label.inner if label.inner is not None else max(length // places, 1)
        if places * inner != length:
            raise ArchitectureError(f"{places * inner} places of units meet {length}")
        return Label(label.units, label.before, inner)

    def _describe(self, constant: Constant, axes: Mapping[int, _Draft]) -> str:
        """Note which axes of a tensor run over which units, and return its name."""
        drafts: list[_Draft | None] = [None] * len(self.shapes.get(constant.name, ()))
        for place, draft in axes.items():
            stored = constant.stored[place] if constant.name else None
            if stored is None:
                self._units[self.find(draft.label.units)].named = True
            else:
                drafts[stored] = draft
        if not constant.name:
            return ""
        there = self._axes.setdefault(constant.name, drafts)
        if there is not drafts:
            self._agree(constant.name, there, drafts)
        return constant.name

    def _agree(
        self, name: str, there: Sequence[_Draft | None], again: Sequence[_Draft | None]
    ) -> None:
        """Join the units of a tensor that is used twice, or keep them if it is used differently."""
        for one, other in zip(there, again, strict=True):
            if one is None or other is None or not self._joined(one, other):
                for draft in (one, other):
                    if draft is not None:
                        self._units[self.find(draft.label.units)].named = True
            elif (one.power, one.source) != (other.power, other.source):
                for units in (one.label.units, one.source, other.source):
                    if units is not None:
                        self.fix(Value({-1: Label(units)}))

    def _joined(self, one: _Draft, other: _Draft) -> bool:
        """Join the units of two axes, if they lie alike; say whether they did."""
        alike = (one.label.before, one.label.inner) == (other.label.before, other.label.inner)
        if not alike or self.size(one.label) != self.size(other.label):
            return False
        self.join(one.label.units, other.label.units)
        return True

    def _add(
        self,
        op: Op,
        source: int,
        target: int,
        tensors: Mapping[str, str],
        *,
        kind: str = "",
        turned: bool = False,
        epsilon: float = 1e-5,
    ) -> None:
        named = {role: name for role, name in tensors.items() if name}
        self._steps.append(
            Step(op, str(source), str(target), named, kind=kind, turned=turned, epsilon=epsilon)
        )

    # -------------------------------------------------------------- the end

    def finish(self, family: str) -> Architecture:
        """Return what was found.

        Raises:
            ArchitectureError: No tensor runs over units that were followed.
        """
        if not self._axes:
            raise ArchitectureError("the graph has no layer whose units could be followed")
        axes = {
            name: tuple(None if draft is None else self._axis(draft) for draft in drafts)
            for name, drafts in self._axes.items()
        }
        steps = tuple(
            Step(
                step.op,
                self._name(int(step.source)),
                self._name(int(step.target)),
                step.tensors,
                kind=step.kind,
                turned=step.turned,
                epsilon=step.epsilon,
            )
            for step in self._steps
        )
        roots = sorted({self.find(units) for units in range(len(self._units))})
        groups = {self._name(root): self._group(root) for root in roots}
        return Architecture(family, groups, axes, steps)

    def _name(self, units: int) -> str:
        return f"units{self.find(units)}"

    def _group(self, root: int) -> Group:
        units = self._units[root]
        gauge = Gauge.ORDER
        if units.named:
            gauge = Gauge.NAMED
        elif units.scale:
            gauge = Gauge.SCALE
        elif units.sign:
            gauge = Gauge.SIGN
        tied = "" if units.tied is None else self._name(units.tied)
        return Group(self._name(root), units.size, gauge, units.activation, tied)

    def _axis(self, draft: _Draft) -> Axis:
        name, power, tied_power = self._name(draft.label.units), draft.power, 0
        if draft.source is not None:
            # The weights of a depthwise convolution between one and the same units keep theirs.
            alone = self._name(draft.source) == name
            power, tied_power = (0, 0) if alone else (1, -1)
        return Axis(name, draft.label.before, draft.label.inner or 1, power, tied_power)
