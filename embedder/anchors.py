"""Codes for hidden units that do not depend on their order, scale or basis.

Inputs and tokens have a meaning, so each carries a seeded code: its *anchor*. Passing the anchors
forward through the weights, as if the model were linear, gives every hidden unit a code of its
own: what it reads of which inputs. Passing the anchors of the outputs backward gives it a second
one: what it does to which outputs. Reordered units take their codes along; a unit that is scaled
up has one code scaled up and the other down, and nothing else changes. So the directions of the
codes are the same in every copy of a model, and stay nearly so when it is trained on.

Only products of weights with codes enter, so a residual stream may be rotated and the channels of
a head mixed. A bias reads one more anchor, the constant input. Convolutions flip the code's signs
by place in the kernel, and gates by gate, so that the places stay apart in the sum.

A tensor may be given as values or as a `Tensor` that is still in its file: then it is multiplied
block by block (`embedder.products`), once or twice in each direction.

Source:
    Path products as invariants of a model: Zeng et al. 2024 (HuRef, NeurIPS). Random anchors at
    both ends, and all that lies between, are our own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.architecture import GATES, Architecture, Op, Step
from embedder.errors import ArchitectureError
from embedder.step_weights import MOST_UNITS, StepWeights, Weights, norm_factor, norms_of_one
from embedder.tucker import head_spectrum
from embedder.unit_codes import (
    WIDTH,
    check_length,
    directions,
    gathered,
    joined,
    parted,
    root_of_moment,
    seeded,
    spread,
    strength_of,
    unit,
)
from embedder.units import Gauge

__all__ = ["MANY_UNITS", "WIDTH", "Units", "Weights", "anchored", "norm_factor"]

Array = NDArray[np.floating[Any]]

MANY_UNITS = 1 << 17
"""Hidden units of a model from which their codes are kept in float32: 64 MB for one direction."""

Pull = Callable[[Array], Array]
"""From the backward codes of a step's target to those of its source."""


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """The codes of one group of hidden units, or of the heads of one attention.

    Args:
        group: Name of the group.
        depth: Number of steps before.
        gauge: What the units allow; where it is `SIGN`, codes stand for themselves and their
            negatives.
        forward: (units, 64), each of unit length; zeros for a unit that reads nothing. float64,
            or float32 where a model has more than 131,072 units.
        backward: The same of the backward codes, for an output its anchor; zeros for heads.
        read: (units,) lengths of the forward codes: these follow the scale of a unit.
        reach: (units,) lengths of the backward codes: these go against it.
        heads: Whether they are the heads of an attention.
        gates: Whether they are the gates of a gated map, whose units come just before.
        stream: Whether they stand for a residual stream as it is first read. Its channels may be
            rotated, so these are the rows of the square root of its second moment, which are 64
            however many channels there are.
        channels: Whether they are the channels of a residual stream, by what each holds when it is
            first read and by what it does when it was last written. No code of a model takes them,
            as they may be rotated; they tell the order where they were not.
        scaled: Whether each may have any scale, so that its lengths say nothing by themselves.
        spectrum: (heads, 13) of the score matrices (`embedder.tucker`); none for other units.
    """

    group: str
    depth: int
    gauge: Gauge
    forward: Array
    backward: Array
    read: NDArray[np.float64]
    reach: NDArray[np.float64]
    heads: bool = False
    gates: bool = False
    stream: bool = False
    channels: bool = False
    scaled: bool = False
    spectrum: Array | None = None


def anchored(
    weights: Weights,
    architecture: Architecture,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> list[Units]:
    """Return the codes of all hidden units, in the order of the forward pass.

    Args:
        weights: Name → values, of the shapes that the architecture describes, or a tensor that is
            multiplied from its file. A mapping may read values as they are asked for.
        architecture: What the axes mean.
        shapes: Name → shape, where the mapping would have to read the values for it.

    Raises:
        ArchitectureError: A tensor is missing, has another shape, no values, or some that are not
            finite or so large that no code can be computed; or there are too many units.
        CheckpointError: A tensor cannot be read.

    Example:
        >>> from embedder.architecture import Builder
        >>> b = Builder("mlp").input("in", 3).linear("a", "in", "h", 5, activation="relu")
        >>> mlp = b.linear("b", "h", "out", 2, named=True).build()
        >>> rng = np.random.default_rng(0)
        >>> w = {"a": rng.normal(size=(5, 3)), "b": rng.normal(size=(2, 5))}
        >>> before = anchored(w, mlp)[0].forward
        >>> w["a"], w["b"] = 2 * w["a"][::-1], w["b"][:, ::-1] / 2
        >>> bool(np.allclose(anchored(w, mlp)[0].forward, before[::-1]))
        True
    """
    if shapes is None:
        shapes = {name: weights[name].shape for name in architecture.axes if name in weights}
    architecture.check(shapes)
    units = sum(group.size for group in architecture.groups.values() if not group.tied)
    if units > MOST_UNITS:
        raise ArchitectureError(f"has {units:,} units; at most {MOST_UNITS:,} are coded")
    with np.errstate(over="ignore", invalid="ignore"):  # codes are looked at in the end
        return _Pass(weights, architecture).run()


class _Steps:
    """What each step makes of the codes of its source, forward and backward."""

    def __init__(self, weights: Weights, architecture: Architecture) -> None:
        self._weights, self._architecture = StepWeights(weights, architecture), architecture
        self._codes: dict[str, Array] = {}
        self._heads: dict[str, Array] = {}
        self._spectra: dict[str, Array] = {}
        self._gates: dict[str, Array] = {}
        self._inside_back: dict[str, Array] = {}
        self._before: dict[str, Array | float] = {}
        self._normed = set(norms_of_one(architecture))
        self._normed_targets = {architecture.steps[depth].target for depth in self._normed}
        self._streams = {
            step.target for step in architecture.steps if step.op in (Op.EMBEDDING, Op.ATTENTION)
        }
        hidden = (g.size for g in architecture.groups.values() if not self._is_stream(g.name))
        self._kept = np.float32 if sum(hidden) > MANY_UNITS else np.float64
        self._steps: dict[Op, Callable[[Step], tuple[Array, Pull]]] = {
            Op.LINEAR: self._linear,
            Op.UNITWISE: self._unitwise,
            Op.EMBEDDING: self._linear,
            Op.NORM: self._norm,
            Op.RECURRENT: self._recurrent,
            Op.GATED: self._gated,
            Op.ATTENTION: self._attention,
        }

    def _is_stream(self, name: str) -> bool:
        """Say whether a group is a residual stream, whose units mean nothing by themselves."""
        tied = self._architecture.groups[name].tied
        return name in self._streams or (bool(tied) and self._is_stream(tied))

    def _keep(self, name: str, codes: Array) -> Array:
        """Return the codes of hidden units as they are kept.

        Raises:
            ArchitectureError: They do not fit into float32, where that is how they are kept.
        """
        if self._is_stream(name) or self._kept is np.float64:
            return codes
        largest = float(np.abs(codes).max(initial=0))
        if largest and not 1e-30 < largest < 1e30:
            raise ArchitectureError(f"{name}: its codes are of size {largest:.0e}, out of float32")
        return codes.astype(np.float32, copy=False)

    def _code(self, name: str) -> Array:
        """Return the codes of a group; those of named inputs are their anchors."""
        if name not in self._codes:
            size = self._architecture.groups[name].size
            self._codes[name] = seeded("inputs", size)
        return self._codes[name]

    def _read(self, step: Step, role: str, source: str) -> Array:
        """Return weights · codes, (places of out, 64)."""
        matrix, into = self._weights.matrix(step, role)
        return matrix.times(spread(self._code(source), into))

    def _read_back(self, step: Step, role: str, codes: Array) -> Array:
        """Return weightsᵀ · codes, (units of the source, 64)."""
        matrix, into = self._weights.matrix(step, role)
        return gathered(matrix.back(codes), into)

    def _linear(self, step: Step) -> tuple[Array, Pull]:
        codes = self._read(step, "weight", step.source) + self._weights.vector(
            step.tensors.get("bias")
        )
        return codes, lambda back: self._read_back(step, "weight", back)

    def _unitwise(self, step: Step) -> tuple[Array, Pull]:
        name = step.tensors["weight"]
        axes = self._architecture.axes[name]
        place = next(number for number, axis in enumerate(axes) if axis is not None)
        values = np.moveaxis(self._weights.values(name), place, 0)
        kernel = values.reshape(len(values), -1)
        coins = kernel @ seeded("space", kernel.shape[1])
        codes = coins * self._code(step.source) + self._weights.vector(step.tensors.get("bias"))
        return codes, lambda back: coins * back

    def _norm(self, step: Step) -> tuple[Array, Pull]:
        codes, tensors = self._code(step.source), step.tensors
        if self._architecture.steps.index(step) in self._normed:
            codes = codes - self._before[step.source]
        factor = norm_factor(step, self._weights.values)
        centred = step.kind == "layer"
        if step.kind == "batch":
            codes = codes - self._weights.vector(tensors.get("mean"))
        else:
            codes = codes - codes.mean(axis=0) if centred else codes
            check_length(codes, step.source)
            length = float(np.sqrt(np.mean(np.sum(codes**2, axis=1))))
            factor = factor * (1 / max(length, 1e-300))

        def pull(back: Array) -> Array:
            back = factor * back
            return back - back.mean(axis=0) if centred else back

        return codes * factor + self._weights.vector(tensors.get("offset")), pull

    def _recurrent(self, step: Step) -> tuple[Array, Pull]:
        """Return the codes after one step from rest and one with that as the past."""
        gates = GATES[step.kind]
        read = self._read(step, "weight", step.source) + self._weights.gate_bias(step, "bias")
        coins = seeded("gate", 2 * gates)
        codes = joined(read, coins[:gates])
        matrix, _ = self._weights.matrix(step, "recurrent")
        past = matrix.times(codes) + self._weights.gate_bias(step, "recurrent_bias")

        def pull(back: Array) -> Array:
            matrix, _ = self._weights.matrix(step, "recurrent")
            back = back + matrix.back(parted(back, coins[gates:]))
            return self._read_back(step, "weight", parted(back, coins[:gates]))

        return codes + joined(past, coins[gates:]), pull

    def _gated(self, step: Step) -> tuple[Array, Pull]:
        """Keep the codes of the units inside and of their gates, and return what they add.

        The units are those of the plain map, whose scale and sign the output takes back; a gate
        has neither, and its code enters nothing that follows.
        """
        inside = step.inside
        self._gates[inside] = self._keep(inside, self._read(step, "gate", step.source))
        self._codes[inside] = self._keep(inside, self._read(step, "up", step.source))

        def pull(back: Array) -> Array:
            heard = self._read_back(step, "output", back)
            self._inside_back[inside] = self._keep(inside, heard)
            return self._read_back(step, "up", heard)

        return self._read(step, "output", inside), pull

    def _attention(self, step: Step) -> tuple[Array, Pull]:
        """Keep a code for each head, and return what even attention adds to the target.

        Queries and keys enter as (A·Q)ᵀ(A·K), values and outputs as their product, so that the
        channels of a head may be mixed.
        """
        query, key, value = self._heads_of(step)
        heads, shape = len(query), value.shape
        shared = [head * len(key) // heads for head in range(heads)]
        output, _ = self._weights.matrix(step, "output")
        heard = output.back_by_head(self._code(step.target), heads)
        coins = seeded("head", 6)
        codes = np.zeros((heads, WIDTH))
        scores = query.transpose(0, 2, 1) @ key[shared]
        for head, source in enumerate(shared):
            moved = heard[head].T @ value[source]
            parts = (scores[head] @ coins[0], scores[head].T @ coins[1], moved @ coins[2])
            codes[head] = sum(unit(p) * c for p, c in zip(parts, coins[3:], strict=True))
        self._heads[step.inside], self._spectra[step.inside] = codes, head_spectrum(scores)
        added = output.times_by_head(value[shared])

        def pull(back: Array) -> Array:
            heard = np.zeros(shape)
            output, _ = self._weights.matrix(step, "output")
            for head, reached in enumerate(output.back_by_head(back, heads)):
                heard[shared[head]] += reached / heads
            return self._values_back(step, heard.reshape(-1, WIDTH))

        return added / heads, pull

    def _values_back(self, step: Step, heard: Array) -> Array:
        """Return what reaches the source of an attention through its values."""
        if "joint" not in step.tensors:
            return self._read_back(step, "value", heard)
        parts = heard.reshape(self._architecture.groups[step.inside].size, -1, WIDTH)
        none = np.zeros_like(parts)  # nothing reaches it through queries and keys
        joint = np.stack([none, none, parts], axis=1 if step.by_head else 0)
        return self._read_back(step, "joint", joint.reshape(-1, WIDTH))

    def _heads_of(self, step: Step) -> tuple[Array, Array, Array]:
        """Return queries, keys and values as heads × channels × 64."""
        tensors = step.tensors
        roles = ("joint",) if "joint" in tensors else ("query", "key", "value")
        read = [
            self._read(step, role, step.source) + self._weights.vector(tensors.get(f"{role}_bias"))
            for role in roles
        ]
        heads = self._architecture.groups[step.inside].size
        if step.by_head:
            query, key, value = read[0].reshape(heads, 3, -1, WIDTH).swapaxes(0, 1)
            return query, key, value
        query, key, value = np.split(read[0], 3) if len(read) == 1 else read
        query, key, value = (
            part.reshape(-1, len(key) // heads, WIDTH) for part in (query, key, value)
        )
        return query, key, value


class _Pass(_Steps):
    """One pass of anchors forward, then one backward."""

    def __init__(self, weights: Weights, architecture: Architecture) -> None:
        super().__init__(weights, architecture)
        self._anchors: dict[int, Array] = {}
        self._anchor_directions: dict[int, tuple[Array, NDArray[np.float64]]] = {}
        self._depth: dict[str, int] = {}
        self._entered: dict[str, tuple[int, Array]] = {}
        self._pulls: list[Pull] = []
        self._last_use = {
            name: depth
            for depth, step in enumerate(architecture.steps)
            for name in (step.source, step.target)
        }

    def run(self) -> list[Units]:
        for depth, step in enumerate(self._architecture.steps):
            self._enter(step, depth)
            fresh, pull = self._steps[step.op](step)
            check_length(fresh, step.target)
            before = 0.0 if step.op is Op.NORM else self._codes.get(step.target, 0.0)
            if depth in self._normed:
                before = self._before[step.target]
            if step.target in self._normed_targets:
                self._before[step.target] = before
            self._codes[step.target] = self._keep(step.target, fresh + before)
            self._pulls.append(pull)
            for name in (step.inside, step.target):
                if name:
                    self._depth.setdefault(name, depth)
            self._forget(step, depth)
        backward = self._backward()
        found = []
        for name in self._depth:
            if not self._is_stream(name):
                found.append(self._units(name, backward.pop(name, None)))
            if name in self._gates:
                forward, read = self._directions(name, self._gates.pop(name))
                none, gone = self._nothing(len(read))
                depth, gauge = self._depth[name], Gauge.ORDER
                found.append(Units(name, depth, gauge, forward, none, read, gone, gates=True))
        found.extend(map(self._stream_units, self._entered))
        return [*found, *(self._channel_units(name, backward.get(name)) for name in self._entered)]

    def _enter(self, step: Step, depth: int) -> None:
        """Keep what a residual stream holds where it is first read: what was embedded."""
        name = self._architecture.root(step.source)
        if self._is_stream(name) and step.source in self._codes:
            self._entered.setdefault(name, (depth, self._codes[step.source]))

    def _stream_units(self, name: str) -> Units:
        """Return what stands for a stream as it is first read, whichever way it is turned."""
        depth, codes = self._entered[name]
        rows, lengths = root_of_moment(codes)
        rows = rows.astype(self._kept, copy=False)
        none, gone = self._nothing(len(lengths))
        return Units(name, depth, Gauge.ORDER, rows, none, lengths, gone, stream=True)

    def _channel_units(self, name: str, back: Array | None) -> Units:
        """Return the channels of a stream; they are named if any group tied to it is."""
        depth, codes = self._entered[name]
        groups = self._architecture.groups.values()
        tied = [group.gauge for group in groups if self._architecture.root(group.name) == name]
        gauge = Gauge.NAMED if Gauge.NAMED in tied else Gauge.ORDER
        forward, read = self._directions(name, codes)
        nothing = self._nothing(len(read))
        reached, reach = nothing if back is None else self._directions(name, back)
        return Units(name, depth, gauge, forward, reached, read, reach, channels=True)

    def _forget(self, step: Step, depth: int) -> None:
        """Let go of codes of inputs and streams after their last use: they are nobody's units."""
        for name in {step.source, step.target}:
            done = self._last_use[name] == depth
            if done and (name not in self._depth or self._is_stream(name)):
                self._codes.pop(name, None)
                self._before.pop(name, None)

    def _backward(self) -> dict[str, Array]:
        """Return the backward codes of each group of units as it was last written."""
        flowing: dict[str, Array] = {}
        found: dict[str, Array] = {}
        through: Array | None = None  # what reaches the step before through a norm of it alone
        for depth, step in reversed(list(enumerate(self._architecture.steps))):
            pull, codes = self._pulls.pop(), self._flow(flowing, step.target)
            if codes is None:
                continue
            if not self._is_stream(step.target):
                is_anchor = codes is self._anchors.get(len(codes))
                kept = codes if is_anchor else self._keep(step.target, codes)
                found.setdefault(step.target, kept)
            elif step.target in self._entered:
                found.setdefault(step.target, codes)
            if depth == self._depth[step.target]:
                flowing.pop(step.target, None)
            if depth in self._normed:
                through = pull(codes)
                continue
            if step.op is Op.NORM and step.target == step.source:
                flowing[step.source] = pull(codes)
                continue
            codes, through = codes if through is None else through, None
            if step.source not in self._depth and step.op in (Op.LINEAR, Op.EMBEDDING):
                continue  # nothing was written before: what would reach the inputs is nobody's
            before = self._flow(flowing, step.source)
            flowing[step.source] = pull(codes) + (0.0 if before is None else before)
            if step.op is Op.GATED:
                found[step.inside] = self._inside_back.pop(step.inside)
        return found

    def _flow(self, flowing: Mapping[str, Array], name: str) -> Array | None:
        """Return what has reached a group so far: at first the anchors of outputs, if it is one."""
        group = self._architecture.groups[name]
        if name in flowing or name not in self._depth or group.gauge is not Gauge.NAMED:
            return flowing.get(name)
        return self._anchor(group.size)

    def _anchor(self, size: int) -> Array:
        """Return the anchors of so many outputs; groups of one size share them."""
        if size not in self._anchors:
            self._anchors[size] = seeded("outputs", size)
        return self._anchors[size]

    def _units(self, name: str, back: Array | None) -> Units:
        group = self._architecture.groups[name]
        codes = self._heads.get(name)
        codes = self._codes.pop(name, None) if codes is None else codes
        if codes is None:
            raise ArchitectureError(f"{name}: no step writes it")
        gated = name in self._gates
        scaled = gated or group.gauge is Gauge.SCALE
        paired = back if scaled and back is not None and back.any() else None
        strength = None if paired is None else strength_of(codes, paired)
        forward, read = self._directions(name, codes, strength)
        if back is None:
            reached, reach = self._nothing(len(codes))
        elif back is self._anchors.get(len(back)):
            if len(back) not in self._anchor_directions:
                self._anchor_directions[len(back)] = self._directions(name, back)
            reached, reach = self._anchor_directions[len(back)]
        else:
            reached, reach = self._directions(name, back, strength)
        return Units(
            name,
            self._depth[name],
            Gauge.SIGN if gated else group.gauge,
            forward,
            reached,
            read,
            reach,
            heads=name in self._heads,
            scaled=scaled,
            spectrum=self._spectra.get(name),
        )

    def _nothing(self, count: int) -> tuple[Array, NDArray[np.float64]]:
        """Return codes of units that do nothing, and their lengths: zeros that take no memory."""
        return np.broadcast_to(self._kept(0), (count, WIDTH)), np.broadcast_to(np.zeros(1), count)

    def _directions(
        self, name: str, codes: Array, strength: NDArray[np.float64] | None = None
    ) -> tuple[Array, NDArray[np.float64]]:
        """Return codes of unit length as they are kept, and their lengths.

        Raises:
            ArchitectureError: Some are too large to be computed.
        """
        codes = codes.astype(np.float64, copy=False)
        check_length(codes, name)
        found, lengths = directions(codes, strength)
        return found.astype(self._kept, copy=False), lengths
