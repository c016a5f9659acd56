"""Which axes of a model's tensors run over the same units, found by following them through a graph.

A front end walks a graph in its order and tells a `Tracer` what each node does. A value that is
computed on the way carries labels: on which axis which units lie. A matrix makes new units; a sum
joins those of its terms; an activation takes away a scale or a sign; what cannot be followed gives
units a meaning, so that they stay where they are. All of that is safe: a description may allow
less than it could, never more.

Steps name what writes and reads units, not how values meet: a product of two maps is noted like
their sum. Attention is told by how heads meet (`embedder.traced_blocks`); where it is not, it is
noted as its four matrices, with heads that stay where they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from embedder.architecture import Architecture, Op, Step
from embedder.errors import ArchitectureError
from embedder.followed import Constant, Label, Value
from embedder.noted import Draft
from embedder.traced_blocks import TracedBlocks
from embedder.units import Gauge, Group


@dataclass
class Tracer(TracedBlocks):
    """Collects units, axes and steps while a graph is walked."""

    _steps: list[Step] = field(default_factory=list)
    _tables: set[int] = field(default_factory=set)
    """Numbers of steps that add a table."""
    _behind: dict[int, Step] = field(default_factory=dict)
    """Batch norms by the number of the step before them."""

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
        label = self.fitting(value, at, size)
        target = self.new_units(weight.shape[written])
        axes: dict[int, Draft] = {read: Draft(label, -1), written: Draft(Label(target), 1)}
        tensors = {"weight": self.note(weight, axes)}
        if bias is not None:
            tensors["bias"] = self.vector(bias, Label(target), power=1)
        turned = weight.stored[read] == 0
        self._add(Op.LINEAR, label.units, target, tensors, turned=turned)
        number = len(self._steps) - 1
        self._writers[target] = number
        self.reads(number, value.trail)
        return target, number

    def bias_of(self, units: int) -> str:
        """Return the name of the bias of the map that made units; empty if it has none."""
        number = self._writers.get(units)
        return "" if number is None else self._steps[number].tensors.get("bias", "")

    def number_of(self, value: Value) -> int | None:
        """Return the number of the step that a value comes from unchanged, but for rounding."""
        if value.fresh is not None or value.trail is None or not value.trail.plain:
            return value.fresh
        return None if value.single is None else self._writers.get(value.single)

    def unitwise(
        self, value: Value, weight: Constant, *, at: int, bias: Constant | None = None
    ) -> tuple[int, int]:
        """Add a depthwise convolution; return its units and the number of the step."""
        label = self.fitting(value, at, weight.shape[0])
        if not label.whole:
            raise ArchitectureError(f"{weight.name}: reads units that lie apart")
        target = self.new_units(weight.shape[0], tied=label.units)
        draft = Draft(Label(target), 1, source=label.units)
        tensors = {"weight": self.note(weight, {0: draft})}
        if bias is not None:
            tensors["bias"] = self.vector(bias, Label(target), power=1)
        self._add(Op.UNITWISE, label.units, target, tensors)
        return target, len(self._steps) - 1

    def embedding(self, weight: Constant) -> int:
        """Add a table whose rows are looked up; return its units."""
        source = self.new_units(weight.shape[0], named=True)
        target = self.new_units(weight.shape[1])
        axes = {0: Draft(Label(source)), 1: Draft(Label(target), 1)}
        tensors = {"weight": self.note(weight, axes)}
        self._add(Op.EMBEDDING, source, target, tensors, turned=True)
        return target

    def table(self, constant: Constant) -> Label:
        """Return new units that a table holds on its last axis, for each place on the one before.

        It is read as positions are, if what it is added to turns out to be a residual stream. A
        table without another axis is one row, which nothing tells from a bias.
        """
        units, last = self.new_units(constant.shape[-1]), len(constant.shape) - 1
        axes = {last: Draft(Label(units), 1)}
        if last == 0:
            self.note(constant, axes)
            return Label(units)
        rows = self.new_units(constant.shape[-2], named=True)
        tensors = {"weight": self.note(constant, {**axes, last - 1: Draft(Label(rows))})}
        self._add(Op.EMBEDDING, rows, units, tensors, turned=True)
        self._tables.add(len(self._steps) - 1)
        return Label(units)

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
        label = self.fitting(value, at, next(iter(vectors.values())).shape[-1])
        number = value.fresh
        in_place = number is not None and kind == "batch" and alone and self._ends(number, label)
        if in_place and number is not None:
            # Its scale begins at the gain, so the rows before it are left as they are.
            self._begin_later(number)
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
        if in_place and number is not None:
            self._behind[number] = self._steps.pop()
            return Value({**value.labels, at: after}, value.shape)
        return Value({**value.labels, at: after}, value.shape, len(self._steps) - 1)

    def _ends(self, number: int, label: Label) -> bool:
        """Say whether a step made the units of a label, with tensors that it alone uses."""
        step = self._steps[number]
        alone = all(self.uses[name] == 1 for name in step.tensors.values())
        return alone and step.op is not Op.NORM and step.target == str(label.units)

    def _begin_later(self, number: int) -> None:
        step = self._steps[number]
        for name in step.tensors.values():
            for draft in self.axes.get(name, ()):
                if draft is not None and draft.power == 1:
                    # A depthwise weight still takes back the scale of what it reads.
                    source, draft.source = draft.source, None
                    draft.power = 0 if source is None else -1
                    draft.label = draft.label if source is None else Label(source)

    def recurrent(self, value: Value, weights: Sequence[Constant], *, kind: str, gates: int) -> int:
        """Add cells as ONNX has them, directions × (gates · units) × in; return their units."""
        inputs, past = weights[:2]
        size = past.shape[2]
        label = self.fitting(value, -1, inputs.shape[2])
        target = self.new_units(size)
        rows = Label(target, before=gates)
        tensors = {
            "weight": self.note(inputs, {1: Draft(rows, 1), 2: Draft(label, -1)}),
            "recurrent": self.note(past, {1: Draft(rows, 1), 2: Draft(Label(target), -1)}),
        }
        if len(weights) > 2:
            both = Label(target, before=2 * gates)
            tensors["bias"] = self.note(weights[2], {1: Draft(both, 1)})
        self._add(Op.RECURRENT, label.units, target, tensors, kind=kind)
        units = self.units[target]
        units.scale = False
        units.sign = kind == "elman"
        units.activation = "tanh" if kind == "elman" else "sigmoid"
        return target

    def along(self, value: Value, constant: Constant, *, power: int) -> None:
        """Note a tensor that is added (power 1) to a value or multiplied with it (0)."""
        axes: dict[int, Draft] = {}
        for place, label in value.labels.items():
            axis = len(constant.shape) + place
            length = constant.shape[axis] if axis >= 0 else 1
            if length > 1:
                axes[axis] = Draft(self.sized(label, length), power)
            elif power and constant.scalar != 0:
                # The same number is added to units that may have other scales.
                self.fix(Value({place: label}))
        if axes:
            self.note(constant, axes)
        if axes and power and value.fresh is not None and constant.stored == (0,):
            step = self._steps[value.fresh]
            alone = len(axes) == 1 and step.target == str(axes[0].label.units)
            role = "offset" if step.op is Op.NORM else "bias"
            if alone and role not in step.tensors:
                tensors = {**step.tensors, role: constant.name}
                self._steps[value.fresh] = replace(step, tensors=tensors)

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

    def finish(self, family: str) -> Architecture:
        """Return what was found.

        Raises:
            ArchitectureError: No tensor runs over units that were followed.
        """
        if not self.axes:
            raise ArchitectureError("the graph has no layer whose units could be followed")
        self.keep_what_is_read_elsewhere()
        traced = self._without_other_tables(
            self.in_blocks(dict(enumerate(self._steps)), self._behind)
        )
        axes = {
            name: tuple(None if draft is None else self.final_axis(draft) for draft in drafts)
            for name, drafts in self.axes.items()
        }
        steps = tuple(
            replace(
                step,
                source=self.name_of(int(step.source)),
                target=self.name_of(int(step.target)),
                inside=self.name_of(int(step.inside)) if step.inside else "",
                tensors=self._alone(step, number),
            )
            for number, first in traced.items()
            for step in (first, self._behind.get(number))
            if step is not None
        )
        roots = sorted({self.find(units) for units in range(len(self.units))} - self._gone)
        streams = {self.order_of(int(s.source)) for s in traced.values() if s.kind == "rms"}
        held = {self.find(units) for units in self.held if self.order_of(units) in streams}
        groups = {self.name_of(root): self._group(root, held) for root in roots}
        return Architecture(family, groups, axes, steps)

    def _without_other_tables(self, steps: Mapping[int, Step]) -> dict[int, Step]:
        """Return the steps without tables that are not added to a residual stream."""
        streams = {
            self.order_of(int(step.target))
            for number, step in steps.items()
            if step.op in (Op.EMBEDDING, Op.ATTENTION) and number not in self._tables
        }
        return {
            number: step
            for number, step in steps.items()
            if number not in self._tables or self.order_of(int(step.target)) in streams
        }

    def _alone(self, step: Step, number: int) -> dict[str, str]:
        """Return the tensors of a step; of a norm those that may be changed with it alone."""
        if step.op != Op.NORM:
            return dict(step.tensors)
        before = self._steps[number].tensors if self._behind.get(number) is step else {}
        touched = (*before.values(), *step.tensors.values())
        single = all(self.times(name) == 1 for name in touched)
        return {
            role: name
            for role, name in step.tensors.items()
            if self.times(name) == 1 and (single or role in ("gain", "offset"))
        }

    def _group(self, root: int, held: set[int]) -> Group:
        units = self.units[root]
        gauge = Gauge.ORDER
        if units.named:
            gauge = Gauge.NAMED
        elif units.scale:
            gauge = Gauge.SCALE
        elif units.sign:
            gauge = Gauge.SIGN
        tied = "" if units.tied is None else self.name_of(units.tied)
        activation = units.activation
        if activation == "linear" and units.scale and not units.sign:
            activation = "maximum"  # without a function of its own, and yet not linear
        elif activation == "linear" and root in held:
            activation = "unit by unit"  # a stream that may not be rotated
        return Group(self.name_of(root), units.size, gauge, activation, tied)
