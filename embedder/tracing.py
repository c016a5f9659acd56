"""Which axes of a model's tensors run over the same units, found by following them through a graph.

A front end walks a graph in its order and tells a `Tracer` what each node does. A value that is
computed on the way carries labels: on which axis which units lie. A matrix makes new units; a sum
joins those of its terms; an activation takes away a scale or a sign; what cannot be followed gives
units a meaning, so that they stay where they are. All of that is safe: a description may allow
less than it could, never more.

Steps name what writes and reads units, not how values meet: a product of two maps is noted like
their sum, and attention as its four matrices, with heads that stay where they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from embedder.architecture import Architecture, Op, Step
from embedder.errors import ArchitectureError
from embedder.followed import Constant, FollowedUnits, Label, Value
from embedder.units import Axis, Gauge, Group


@dataclass(slots=True)
class _Draft:
    """An axis of a tensor before the units are final; `source` of a depthwise weight."""

    label: Label
    power: int = 0
    source: int | None = None


@dataclass
class Tracer(FollowedUnits):
    """Collects units, axes and steps while a graph is walked."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    _axes: dict[str, list[_Draft | None]] = field(default_factory=dict)
    _steps: list[Step] = field(default_factory=list)

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
            target = self.new_units(self.units[self.find(label.units)].size, tied=label.units)
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
        units = self.units[target]
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

    def _fitting(self, value: Value, at: int, size: int) -> Label:
        """Return the label that is read, one of inputs with a meaning if there is none."""
        label = value.labels.get(at)
        return (
            Label(self.new_units(size, named=True)) if label is None else self._sized(label, size)
        )

    def _sized(self, label: Label, length: int) -> Label:
        """Return a label that fills a length, its flattened map measured by it."""
        places = self.units[self.find(label.units)].size * label.before
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
                self.units[self.find(draft.label.units)].named = True
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
                        self.units[self.find(draft.label.units)].named = True
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
        roots = sorted({self.find(units) for units in range(len(self.units))})
        groups = {self._name(root): self._group(root) for root in roots}
        return Architecture(family, groups, axes, steps)

    def _name(self, units: int) -> str:
        return f"units{self.find(units)}"

    def _group(self, root: int) -> Group:
        units = self.units[root]
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
