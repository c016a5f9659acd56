"""What a model is made of: which axes of its tensors run over the same units, and in what order.

A hidden unit shows up in several tensors: as a row of the weights that feed it, in the bias, as a
column of the weights that it feeds. An `Architecture` says which axes run over the same units (a
`Group`), what may be done to those units without changing the function (its `Gauge`), and which
steps lead from the inputs to the outputs. It is the one source for the weight graph, for alignment
and for surgery that keeps the function.

Architectures come from a `Builder`, which is told the steps in the order of the forward pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from embedder.errors import ArchitectureError
from embedder.steps import GATES, Op, Step
from embedder.units import GAUGE_OF_ACTIVATION, Axis, Gauge, Group

__all__ = [
    "GATES",
    "GAUGE_OF_ACTIVATION",
    "Architecture",
    "Axis",
    "Builder",
    "Gauge",
    "Group",
    "Op",
    "Step",
]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Groups, axes and steps of one model.

    Args:
        family: What it is called: `mlp`, `llama`.
        groups: Name → group.
        axes: Name of a tensor → its axes in order; None for an axis that belongs to no group
            (space, or a single place).
        steps: In the order of the forward pass.
        confidence: Probability that this describes the model: 1 where its graph or config say so,
            less where it was inferred from names and shapes.
        unexplained: Names of tensors that no step uses.
    """

    family: str
    groups: Mapping[str, Group]
    axes: Mapping[str, tuple[Axis | None, ...]]
    steps: tuple[Step, ...]
    confidence: float = 1.0
    unexplained: tuple[str, ...] = ()

    def root(self, name: str) -> str:
        """Return the group that gives a group its order: itself, unless it is tied."""
        while self.groups[name].tied:
            name = self.groups[name].tied
        return name

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Make sure that the tensors of a model have the shapes that are described.

        Raises:
            ArchitectureError: A tensor is missing or has another shape; it names the first.

        Example:
            >>> mlp = Builder("mlp").input("in", 3).linear("w", "in", "out", 2, named=True).build()
            >>> mlp.check({"w": (2, 3)})
            >>> mlp.check({"w": (2, 4)})
            Traceback (most recent call last):
            embedder.errors.ArchitectureError: w: axis 1 has 4 places, and 3 units of in need 3
        """
        for name, axes in self.axes.items():
            shape = shapes.get(name)
            if shape is None:
                raise ArchitectureError(f"{name}: the model has no such tensor")
            if 0 in shape:
                raise ArchitectureError(f"{name}: has no values, its shape is {tuple(shape)}")
            if len(shape) != len(axes):
                raise ArchitectureError(f"{name}: has {len(shape)} axes, and not {len(axes)}")
            for place, axis in enumerate(axes):
                if axis is None:
                    continue
                size = self.groups[axis.group].size
                needed = axis.before * size * axis.inner
                if shape[place] != needed:
                    raise ArchitectureError(
                        f"{name}: axis {place} has {shape[place]} places, and {size} units of "
                        f"{axis.group} need {needed}"
                    )


@dataclass(slots=True)
class _FeedForward:
    """The steps without a past, and what a builder keeps."""

    family: str
    confidence: float = 1.0
    _groups: dict[str, Group] = field(default_factory=dict)
    _axes: dict[str, tuple[Axis | None, ...]] = field(default_factory=dict)
    _steps: list[Step] = field(default_factory=list)

    def input(self, name: str, size: int) -> Self:
        """Name the inputs, tokens or positions: units whose order has a meaning."""
        self._groups[name] = Group(name, size, Gauge.NAMED)
        return self

    def linear(
        self,
        weight: str,
        source: str,
        target: str,
        size: int,
        *,
        bias: str = "",
        activation: str = "linear",
        gauge: Gauge | None = None,
        named: bool = False,
        space: int = 0,
        inner: int = 1,
        channels_last: bool = False,
        normed: bool = False,
        turned: bool = False,
    ) -> Self:
        """Add a matrix or convolution from one group to another.

        Args:
            weight: Name of the weights, out × in × space.
            source: Group that is read.
            target: Group that is written.
            size: Its number of units.
            bias: Name of the bias, if there is one.
            activation: What is applied to the target.
            gauge: What the target allows, where its activation does not say it.
            named: Whether the targets are outputs with a meaning.
            space: Number of spatial axes.
            inner: Pixels of a map that is flattened before it is read.
            channels_last: Whether each pixel's channels lie together in the flattened map.
            normed: Whether a batch norm follows, which takes any scale out again.
            turned: Whether the weights are in × out.
        """
        self._write(target, size, activation, Gauge.NAMED if named else gauge)
        before, inner = (inner, 1) if channels_last else (1, inner)
        rows = Axis(target, power=0 if normed else 1)
        columns = Axis(source, before, inner, power=-1)
        pair = (columns, rows) if turned else (rows, columns)
        self._describe(weight, (*pair, *(None,) * space))
        tensors = {"weight": weight, **self._vector("bias", bias, rows)}
        self._steps.append(Step(Op.LINEAR, source, target, tensors, turned=turned))
        return self

    def slopes(self, name: str, group: str) -> Self:
        """Name the slopes of a leaky ReLU that has one for each unit."""
        self._describe(name, (Axis(group),))
        return self

    def unitwise(
        self,
        weight: str,
        source: str,
        target: str,
        *,
        bias: str = "",
        activation: str = "linear",
        space: int = 2,
        normed: bool = True,
    ) -> Self:
        """Add a depthwise convolution, units × 1 × space; `normed`: a batch norm follows.

        The target's units are the source's, in the same order, with scales of their own.
        """
        self._write(target, self._groups[source].size, activation, None, tied=source)
        rows = Axis(source, power=-1) if normed else Axis(target, power=1, tied_power=-1)
        self._describe(weight, (rows, *(None,) * (1 + space)))
        offset = Axis(source) if normed else Axis(target, power=1)
        tensors = {"weight": weight, **self._vector("bias", bias, offset)}
        self._steps.append(Step(Op.UNITWISE, source, target, tensors))
        return self

    def embedding(self, weight: str, source: str, target: str, size: int, *, lead: int = 0) -> Self:
        """Add a table with a row for each token or position, that a residual stream reads.

        `lead` is the number of axes before those of the table, as in ViT's 1 × positions × units.
        """
        self._write(target, size, "linear", Gauge.ORDER)
        self._describe(weight, (*(None,) * lead, Axis(source), Axis(target)))
        self._steps.append(Step(Op.EMBEDDING, source, target, {"weight": weight}, turned=True))
        return self

    def norm(
        self,
        source: str,
        kind: str,
        *,
        gain: str = "",
        offset: str = "",
        mean: str = "",
        variance: str = "",
        target: str = "",
        activation: str = "linear",
        epsilon: float = 1e-5,
    ) -> Self:
        """Add a norm.

        In place, a batch norm is that of the last step that wrote the source.

        Args:
            source: Group that is read.
            kind: `batch` (over examples), `layer` or `rms` (over units).
            gain: Name of γ.
            offset: Name of β.
            mean: Name of the running mean.
            variance: Name of the running variance.
            target: Group that is written, where the source is read again without the norm, as
                before a block of a transformer: tied to the source. By default, the source itself.
            activation: What is applied to another target.
            epsilon: What is added to the variance.

        Raises:
            ArchitectureError: The target is there already and is not tied to the source.
        """
        target = target or source
        if target != source:
            if target in self._groups and self._root(target) != self._root(source):
                raise ArchitectureError(f"{target} is there and has other units than {source}")
            gauge = None if gain else Gauge.ORDER
            self._write(target, self._groups[source].size, activation, gauge, tied=source)
        if target != source or not self._is_free_before(source, kind):
            self._fix(source)
        after = Axis(target, power=1)
        tensors = {
            **self._vector("gain", gain, after),
            **self._vector("offset", offset, after),
            **self._vector("mean", mean, Axis(source)),
            **self._vector("variance", variance, Axis(source)),
        }
        self._steps.append(Step(Op.NORM, source, target, tensors, kind=kind, epsilon=epsilon))
        return self

    def build(self) -> Architecture:
        """Return what was put together."""
        return Architecture(
            self.family, dict(self._groups), dict(self._axes), tuple(self._steps), self.confidence
        )

    def _write(
        self, name: str, size: int, activation: str, gauge: Gauge | None, *, tied: str = ""
    ) -> None:
        """Make a group, or make sure that the one there has this size."""
        there = self._groups.get(name)
        if there is None:
            gauge = gauge or GAUGE_OF_ACTIVATION.get(activation, Gauge.ORDER)
            self._groups[name] = Group(name, size, gauge, activation, tied)
        elif there.size != size:
            raise ArchitectureError(f"{name} has {there.size} units, and {size} are added to it")

    def _vector(self, role: str, name: str, axis: Axis) -> dict[str, str]:
        """Note a tensor with one value for each place of an axis, if there is one."""
        if not name:
            return {}
        self._describe(name, (axis,))
        return {role: name}

    def _describe(self, name: str, axes: tuple[Axis | None, ...]) -> None:
        """Note the axes of a tensor; the units of one that two steps use differently stay fixed."""
        there = self._axes.setdefault(name, axes)
        if there == axes:
            return
        if list(map(self._places, there)) != list(map(self._places, axes)):
            raise ArchitectureError(f"{name}: two steps use it over different units")
        for axis in (*there, *axes):
            if axis:
                self._fix(axis.group)

    def _places(self, axis: Axis | None) -> tuple[str, int, int] | None:
        """Return what decides which places of an axis belong to which unit."""
        if axis is None:
            return None
        root = self._root(axis.group)
        named = self._groups[root].gauge == Gauge.NAMED
        return ("" if named else root, axis.before, axis.inner)

    def _root(self, name: str) -> str:
        while self._groups[name].tied:
            name = self._groups[name].tied
        return name

    def _fix(self, name: str) -> None:
        """Leave the units of a group no scale and no sign of their own."""
        group = self._groups[name]
        if group.gauge in (Gauge.SCALE, Gauge.SIGN):
            self._groups[name] = replace(group, gauge=Gauge.ORDER)

    def _is_free_before(self, name: str, kind: str) -> bool:
        """Say whether the scale of a group begins at a norm in place, and not before it."""
        writers = [step for step in self._steps if step.target == name and step.op != Op.NORM]
        return all(
            axis.power == 0
            for step in (writers[-1:] if kind == "batch" else writers)
            for tensor in step.tensors.values()
            for axis in self._axes[tensor]
            if axis and axis.group == name
        )


@dataclass(slots=True)
class Builder(_FeedForward):
    """Puts an architecture together, step by step in the order of the forward pass.

    A group is made by the first step that writes it. Steps that write it later are added to it, as
    in a residual stream; they may not change its size.

    Example:
        >>> b = Builder("mlp").input("pixels", 4)
        >>> b = b.linear("0.weight", "pixels", "hidden", 8, bias="0.bias", activation="relu")
        >>> b = b.linear("2.weight", "hidden", "classes", 3, bias="2.bias", named=True)
        >>> mlp = b.build()
        >>> mlp.groups["hidden"].gauge
        <Gauge.SCALE: 'scale'>
        >>> mlp.axes["2.weight"][1]
        Axis(group='hidden', before=1, inner=1, power=-1, tied_power=0)
    """

    def recurrent(
        self,
        weight: str,
        recurrent: str,
        source: str,
        target: str,
        size: int,
        *,
        kind: str,
        bias: str = "",
        recurrent_bias: str = "",
        activation: str = "",
    ) -> Self:
        """Add a recurrent layer whose gates are stacked along axis 0, as in PyTorch.

        Args:
            weight: Name of the weights from the source, (gates · units) × in.
            recurrent: Name of the weights from the past, (gates · units) × units.
            source: Group that is read.
            target: Group that is written.
            size: Its number of units.
            kind: `elman` (tanh), `gru` or `lstm`.
            bias: Name of the bias of the first.
            recurrent_bias: Name of the bias of the second.
            activation: Of an Elman cell, where it is not tanh.
        """
        gates = GATES[kind]
        activation = activation or ("tanh" if gates == 1 else "sigmoid")
        self._write(target, size, activation, None)
        rows = Axis(target, before=gates, power=1)
        self._describe(weight, (rows, Axis(source, power=-1)))
        self._describe(recurrent, (rows, Axis(target, power=-1)))
        tensors = {
            "weight": weight,
            "recurrent": recurrent,
            **self._vector("bias", bias, rows),
            **self._vector("recurrent_bias", recurrent_bias, rows),
        }
        self._steps.append(Step(Op.RECURRENT, source, target, tensors, kind=kind))
        return self

    def gated(
        self,
        gate: str,
        up: str,
        output: str,
        source: str,
        target: str,
        size: int,
        *,
        inside: str,
        activation: str = "silu",
    ) -> Self:
        """Add output(activation(gate · x) ⊙ (up · x)), as in Llama; `inside` names its units.

        A unit may be scaled in `up` and back in `output`, which the gauge does not say: its `gate`
        has no scale.
        """
        self._write(inside, size, activation, Gauge.ORDER)
        self._describe(gate, (Axis(inside), Axis(source, power=-1)))
        self._describe(up, (Axis(inside, power=1), Axis(source, power=-1)))
        self._describe(output, (Axis(target, power=1), Axis(inside, power=-1)))
        tensors = {"gate": gate, "up": up, "output": output}
        self._steps.append(Step(Op.GATED, source, target, tensors, inside=inside))
        return self

    def attention(
        self,
        tensors: Mapping[str, str],
        source: str,
        target: str,
        *,
        inside: str,
        heads: int,
        channels: int,
        key_heads: int = 0,
        rotary: bool = False,
        turned: bool = False,
        interleaved: bool = False,
        fixed: bool = False,
        by_head: bool = False,
        gains: Sequence[str] = (),
    ) -> Self:
        """Add attention of a source to itself; `inside` names its heads.

        Args:
            tensors: `query`, `key`, `value`, `output` and `…_bias` → name; or `joint` and
                `joint_bias` for query, key and value stacked in this order, or head `by_head`.
            source: Group that is read.
            target: Group that is written.
            inside: Name of the group of key heads, with the query heads that read each.
            heads: Number of query heads.
            channels: Channels of a head.
            key_heads: Number of key and value heads; 0 for as many as query heads.
            rotary: Whether positions turn queries and keys.
            turned: Whether weights are in × out.
            interleaved: Whether positions turn neighbouring channels.
            fixed: Whether the channels of queries and keys have a basis of their own.
            by_head: Whether joint weights hold query, key and value of each head in turn.
            gains: Names of a number for each channel of all queries or keys, after a norm.
        """
        key_heads = key_heads or heads
        self._write(inside, key_heads, "linear", Gauge.ORDER)
        read, written = Axis(source, power=-1), Axis(target, power=1)
        rows = _axes_of_heads(inside, heads // key_heads, channels, by_head)
        for role, name in tensors.items():
            base = role.removesuffix("_bias")
            out, into = (written, rows["query"]) if base == "output" else (rows[base], read)
            pair = (into, out) if turned else (out, into)
            self._describe(name, pair if role == base else (out,))
        for name in gains:
            self._describe(name, (None,))
        step = Step(Op.ATTENTION, source, target, dict(tensors), inside, turned=turned)
        step = replace(step, rotary=rotary, interleaved=interleaved, by_head=by_head)
        self._steps.append(replace(step, fixed=fixed or bool(gains)))
        return self


def _axes_of_heads(inside: str, queries: int, channels: int, by_head: bool) -> dict[str, Axis]:
    """Return how query, key and value, apart or joint, hold heads with so many queries a key."""
    key = Axis(inside, inner=channels)
    joint = replace(key, inner=3 * channels) if by_head else replace(key, before=3)
    query = replace(key, inner=queries * channels)
    return {"query": query, "key": key, "value": key, "joint": joint}
