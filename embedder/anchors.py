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

Source:
    Path products as invariants of a model: Zeng et al. 2024 (HuRef, NeurIPS). Random anchors at
    both ends, and all that lies between, are our own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from embedder.architecture import GATES, Architecture, Op, Step
from embedder.errors import ArchitectureError
from embedder.matrices import as_matrix
from embedder.sketch import signs
from embedder.tucker import head_spectrum
from embedder.units import Axis, Gauge

Array = NDArray[np.float64]

WIDTH = 64
"""Numbers of a code. Strangers' codes have a cosine of about 1/√64 = .125."""

_WIDE = 1 << 20
"""Values of a tensor up to which it is multiplied in float64. Above, float32 takes half the time
and memory, and its rounding averages out."""

_STREAMS = {
    use: place << 40
    for place, use in enumerate(("inputs", "outputs", "bias", "space", "gate", "head"))
}
"""Where each use of the seeded sequence begins; no axis is as long as what lies between."""

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
        forward: (units, 64) float64, each of unit length; zeros for a unit that reads nothing.
        backward: The same of the backward codes, for an output its anchor; zeros for heads.
        read: (units,) lengths of the forward codes: these follow the scale of a unit.
        reach: (units,) lengths of the backward codes: these go against it.
        heads: Whether they are the heads of an attention.
        gates: Whether they are the gates of a gated map, whose units come just before.
        scaled: Whether each may have any scale, so that its lengths say nothing by themselves.
        spectrum: (heads, 13) of the score matrices (`embedder.tucker`); none for other units.
    """

    group: str
    depth: int
    gauge: Gauge
    forward: Array
    backward: Array
    read: Array
    reach: Array
    heads: bool = False
    gates: bool = False
    scaled: bool = False
    spectrum: Array | None = None


def anchored(
    weights: Mapping[str, NDArray[np.floating]],
    architecture: Architecture,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> list[Units]:
    """Return the codes of all hidden units, in the order of the forward pass.

    Args:
        weights: Name → values, of the shapes that the architecture describes. A mapping may read
            them as they are asked for: each is asked for at most twice.
        architecture: What the axes mean.
        shapes: Name → shape, where the mapping would have to read the values for it.

    Raises:
        ArchitectureError: A tensor is missing, has another shape, no values, or some that are not
            finite.

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
    return _Pass(weights, architecture).run()


class _Pass:
    """One pass of anchors forward, then one backward."""

    def __init__(
        self, weights: Mapping[str, NDArray[np.floating]], architecture: Architecture
    ) -> None:
        self._weights, self._architecture = weights, architecture
        self._codes: dict[str, Array] = {}
        self._heads: dict[str, Array] = {}
        self._spectra: dict[str, Array] = {}
        self._gates: dict[str, Array] = {}
        self._depth: dict[str, int] = {}
        self._pulls: list[Pull] = []
        self._before: dict[str, Array | float] = {}
        self._normed = set(_norms_of_one(architecture))
        self._bias = _seeded("bias", 1)
        self._streams = {
            step.target for step in architecture.steps if step.op in (Op.EMBEDDING, Op.ATTENTION)
        }
        self._steps: dict[Op, Callable[[Step], tuple[Array, Pull]]] = {
            Op.LINEAR: self._linear,
            Op.UNITWISE: self._unitwise,
            Op.EMBEDDING: self._linear,
            Op.NORM: self._norm,
            Op.RECURRENT: self._recurrent,
            Op.GATED: self._gated,
            Op.ATTENTION: self._attention,
        }

    def run(self) -> list[Units]:
        for depth, step in enumerate(self._architecture.steps):
            fresh, pull = self._steps[step.op](step)
            before = 0.0 if step.op is Op.NORM else self._codes.get(step.target, 0.0)
            if depth in self._normed:
                before = self._before[step.target]
            self._before[step.target] = before
            self._codes[step.target] = fresh + before
            self._pulls.append(pull)
            for name in (step.inside, step.target):
                if name:
                    self._depth.setdefault(name, depth)
        backward = self._backward()
        found = []
        for name in self._depth:
            if not self._is_stream(name):
                found.append(self._units(name, backward))
            if name in self._gates:
                forward, read = _directions(self._gates[name])
                depth, none = self._depth[name], np.zeros_like
                gates = Units(
                    name, depth, Gauge.ORDER, forward, none(forward), read, none(read), gates=True
                )
                found.append(gates)
        return found

    def _backward(self) -> dict[str, Array]:
        """Return the backward codes of each group as it was last written."""
        groups = self._architecture.groups
        flowing = {
            name: _seeded("outputs", groups[name].size)
            for name in self._depth
            if groups[name].gauge is Gauge.NAMED
        }
        found: dict[str, Array] = {}
        through: Array | None = None  # what reaches the step before through a norm of it alone
        for depth, step in reversed(list(enumerate(self._architecture.steps))):
            pull, codes = self._pulls[depth], flowing.get(step.target)
            if codes is None:
                continue
            found.setdefault(step.target, codes)
            if depth in self._normed:
                through = pull(codes)
                continue
            if step.op is Op.NORM and step.target == step.source:
                flowing[step.source] = pull(codes)
                continue
            codes, through = codes if through is None else through, None
            if step.op is Op.GATED:
                found[step.inside] = self._read_back(step, "output", codes)
            flowing[step.source] = pull(codes) + flowing.get(step.source, 0.0)
        return found

    def _is_stream(self, name: str) -> bool:
        """Say whether a group is a residual stream, whose units mean nothing by themselves."""
        tied = self._architecture.groups[name].tied
        return name in self._streams or (bool(tied) and self._is_stream(tied))

    def _units(self, name: str, backward: Mapping[str, Array]) -> Units:
        group = self._architecture.groups[name]
        codes = self._heads.get(name, self._codes.get(name))
        if codes is None:
            raise ArchitectureError(f"{name}: no step writes it")
        back = backward.get(name, np.zeros(codes.shape))
        (forward, read), (reached, reach) = _directions(codes), _directions(back)
        gated = name in self._gates
        return Units(
            name,
            self._depth[name],
            Gauge.SIGN if gated else group.gauge,
            forward,
            reached,
            read,
            reach,
            heads=name in self._heads,
            scaled=gated or group.gauge is Gauge.SCALE,
            spectrum=self._spectra.get(name),
        )

    def _code(self, name: str) -> Array:
        """Return the codes of a group; those of named inputs are their anchors."""
        if name not in self._codes:
            size = self._architecture.groups[name].size
            self._codes[name] = _seeded("inputs", size)
        return self._codes[name]

    def _values(self, name: str) -> Array:
        """Return a tensor's values.

        Raises:
            ArchitectureError: It has none, or some that are not finite.
        """
        values = np.asarray(self._weights[name])
        values = values.astype(np.float32 if values.size > _WIDE else np.float64, copy=False)
        if values.size == 0:
            raise ArchitectureError(f"{name}: has no values")
        if not np.isfinite(values).all():
            raise ArchitectureError(f"{name}: holds values that are NaN or infinite")
        return np.asarray(values)

    def _matrix(self, step: Step, role: str) -> tuple[Array, Axis]:
        """Return weights as out × in × the rest in one axis, and what their in-axis runs over."""
        name, (out, into) = step.tensors[role], (step.target, step.source)
        if step.op in (Op.GATED, Op.ATTENTION):
            out, into = (out, step.inside) if role == "output" else (step.inside, into)
        elif role == "recurrent":
            into = out
        matrix, _, axis = as_matrix(
            self._values(name), self._architecture, name, (out, into), turned=step.turned
        )
        return matrix, axis

    def _read(self, step: Step, role: str, source: str) -> Array:
        """Return weights · codes, (places of out, 64)."""
        values, into = self._matrix(step, role)
        return _through(values, _spread(self._code(source), into))

    def _read_back(self, step: Step, role: str, codes: Array) -> Array:
        """Return weightsᵀ · codes, (units of the source, 64)."""
        values, into = self._matrix(step, role)
        return _gathered(_through(np.swapaxes(values, 0, 1), codes), into)

    def _vector(self, name: str | None) -> Array | float:
        """Return a bias times the code of the constant input; 0 where there is none."""
        return 0.0 if name is None else self._values(name).reshape(-1, 1) * self._bias

    def _linear(self, step: Step) -> tuple[Array, Pull]:
        codes = self._read(step, "weight", step.source) + self._vector(step.tensors.get("bias"))
        return codes, lambda back: self._read_back(step, "weight", back)

    def _unitwise(self, step: Step) -> tuple[Array, Pull]:
        name = step.tensors["weight"]
        axes = self._architecture.axes[name]
        place = next(number for number, axis in enumerate(axes) if axis is not None)
        values = np.moveaxis(self._values(name), place, 0)
        kernel = values.reshape(len(values), -1)
        coins = kernel @ _seeded("space", kernel.shape[1])
        codes = coins * self._code(step.source) + self._vector(step.tensors.get("bias"))
        return codes, lambda back: coins * back

    def _norm(self, step: Step) -> tuple[Array, Pull]:
        codes, tensors = self._code(step.source), step.tensors
        if self._architecture.steps.index(step) in self._normed:
            codes = codes - self._before[step.source]
        factor = norm_factor(step, self._values)
        centred = step.kind == "layer"
        if step.kind == "batch":
            codes = codes - self._vector(tensors.get("mean"))
        else:
            codes = codes - codes.mean(axis=0) if centred else codes
            length = float(np.sqrt(np.mean(np.sum(codes**2, axis=1))))
            factor = factor * (1 / max(length, 1e-300))

        def pull(back: Array) -> Array:
            back = factor * back
            return back - back.mean(axis=0) if centred else back

        return codes * factor + self._vector(tensors.get("offset")), pull

    def _recurrent(self, step: Step) -> tuple[Array, Pull]:
        """Return the codes after one step from rest and one with that as the past."""
        gates = GATES[step.kind]
        read = self._read(step, "weight", step.source) + self._gate_bias(step, "bias")
        coins = _seeded("gate", 2 * gates)
        codes = _joined(read, coins[:gates])
        matrix, _ = self._matrix(step, "recurrent")
        past = _through(matrix, codes) + self._gate_bias(step, "recurrent_bias")

        def pull(back: Array) -> Array:
            matrix, _ = self._matrix(step, "recurrent")
            back = back + _through(np.swapaxes(matrix, 0, 1), _parted(back, coins[gates:]))
            return self._read_back(step, "weight", _parted(back, coins[:gates]))

        return codes + _joined(past, coins[gates:]), pull

    def _gate_bias(self, step: Step, role: str) -> Array | float:
        """Return what a bias of gates adds: both biases and directions may lie in one tensor."""
        name = step.tensors.get(role)
        if name is None:
            return 0.0
        axes = self._architecture.axes[name]
        place = next(number for number, axis in enumerate(axes) if axis is not None)
        values = np.moveaxis(self._values(name), place, -1)
        places = GATES[step.kind] * self._architecture.groups[step.target].size
        return np.asarray(values.reshape(-1, places).sum(axis=0)[:, None] * self._bias)

    def _gated(self, step: Step) -> tuple[Array, Pull]:
        """Keep the codes of the units inside and of their gates, and return what they add.

        The units are those of the plain map, whose scale and sign the output takes back; a gate
        has neither, and its code enters nothing that follows.
        """
        self._gates[step.inside] = self._read(step, "gate", step.source)
        self._codes[step.inside] = self._read(step, "up", step.source)

        def pull(back: Array) -> Array:
            return self._read_back(step, "up", self._read_back(step, "output", back))

        return self._read(step, "output", step.inside), pull

    def _attention(self, step: Step) -> tuple[Array, Pull]:
        """Keep a code for each head, and return what even attention adds to the target.

        Queries and keys enter as (A·Q)ᵀ(A·K), values and outputs as their product, so that the
        channels of a head may be mixed.
        """
        query, key, value = self._heads_of(step)
        output = self._outputs_of(step, value.shape[1])
        shared = [head * len(key) // len(query) for head in range(len(query))]
        stream = self._code(step.target)
        coins = _seeded("head", 6)
        codes = np.zeros((len(query), WIDTH))
        scores = query.transpose(0, 2, 1) @ key[shared]
        for head, source in enumerate(shared):
            moved = (stream.T @ output[head]) @ value[source]
            parts = (scores[head] @ coins[0], scores[head].T @ coins[1], moved @ coins[2])
            codes[head] = sum(_unit(p) * c for p, c in zip(parts, coins[3:], strict=True))
        self._heads[step.inside], self._spectra[step.inside] = codes, head_spectrum(scores)
        added = sum(output[head] @ value[source] for head, source in enumerate(shared))

        def pull(back: Array) -> Array:
            heard = np.zeros_like(value)
            for head, matrix in enumerate(self._outputs_of(step, value.shape[1])):
                heard[shared[head]] += matrix.T @ back / len(query)
            return self._values_back(step, heard.reshape(-1, WIDTH))

        return np.asarray(added) / len(query), pull

    def _values_back(self, step: Step, heard: Array) -> Array:
        """Return what reaches the source of an attention through its values."""
        if "joint" not in step.tensors:
            return self._read_back(step, "value", heard)
        return self._read_back(step, "joint", np.concatenate([np.zeros_like(heard)] * 2 + [heard]))

    def _heads_of(self, step: Step) -> tuple[Array, Array, Array]:
        """Return queries, keys and values as heads × channels × 64."""
        tensors = step.tensors
        roles = ("joint",) if "joint" in tensors else ("query", "key", "value")
        read = [
            self._read(step, role, step.source) + self._vector(tensors.get(f"{role}_bias"))
            for role in roles
        ]
        query, key, value = np.split(read[0], 3) if len(read) == 1 else read
        channels = len(key) // self._architecture.groups[step.inside].size
        query, key, value = (part.reshape(-1, channels, WIDTH) for part in (query, key, value))
        return query, key, value

    def _outputs_of(self, step: Step, channels: int) -> Array:
        """Return what heads write, as heads × out × channels."""
        out, _ = self._matrix(step, "output")
        return out[:, :, 0].reshape(len(out), -1, channels).transpose(1, 0, 2)


def norm_factor(norm: Step, values: Callable[[str], Array]) -> Array:
    """Return what a norm multiplies each unit by, but for statistics over units, (units or 1, 1).

    Args:
        norm: The step.
        values: Gives the values of a tensor by name.
    """
    factor = np.ones((1, 1))
    if norm.kind == "batch" and "variance" in norm.tensors:
        variance = values(norm.tensors["variance"]).reshape(-1, 1)
        factor = factor / np.sqrt(np.abs(variance) + norm.epsilon)
    if "gain" in norm.tensors:
        factor = factor * values(norm.tensors["gain"]).reshape(-1, 1)
    return factor


def _norms_of_one(architecture: Architecture) -> Iterator[int]:
    """Yield the places of batch norms that are of what the step before adds, not of the stream.

    So ends a block of a residual network; weights before such a norm have no scale of their own.
    """
    for depth, (before, step) in enumerate(pairwise(architecture.steps), 1):
        follows = before.target == step.target == step.source and before.op is not Op.NORM
        if follows and step.op is Op.NORM and step.kind == "batch":
            axes = architecture.axes[before.tensors["weight"]] if "weight" in before.tensors else ()
            if not any(axis and axis.power > 0 for axis in axes):
                yield depth


def _seeded(stream: str, count: int) -> Array:
    """Return the first codes of a stream, (count, 64) of ±1."""
    first = _STREAMS[stream]
    return signs(first, first + count, WIDTH).astype(np.float64)


def _through(values: Array, codes: Array) -> Array:
    """Return out × in × places weights times codes, whose signs each place flips in its own way."""
    places = values.shape[2]
    codes = codes.astype(values.dtype, copy=False)
    parts = ((values[:, :, place] @ codes).astype(np.float64) for place in range(places))
    if places == 1:
        return np.asarray(next(parts))
    return np.asarray(
        sum(part * coin for part, coin in zip(parts, _seeded("space", places), strict=True))
    )


def _spread(codes: Array, axis: Axis) -> Array:
    """Return a code for each place of an axis that may hold every unit several times."""
    if axis.before * axis.inner == 1:
        return codes
    coins = _seeded("space", axis.before * axis.inner).reshape(axis.before, 1, axis.inner, WIDTH)
    return np.asarray((coins * codes[None, :, None, :]).reshape(-1, WIDTH))


def _gathered(codes: Array, axis: Axis) -> Array:
    """Return one code for each unit from one for each place: the transposed `_spread`."""
    if axis.before * axis.inner == 1:
        return codes
    coins = _seeded("space", axis.before * axis.inner).reshape(axis.before, 1, axis.inner, WIDTH)
    return np.asarray((coins * codes.reshape(axis.before, -1, axis.inner, WIDTH)).sum(axis=(0, 2)))


def _joined(stacked: Array, coins: Array) -> Array:
    """Return one code for each unit from one for each of its gates."""
    gates = stacked.reshape(len(coins), -1, WIDTH)
    return np.asarray(np.einsum("guk,gk->uk", gates, coins))


def _parted(codes: Array, coins: Array) -> Array:
    """Return a code for each gate of each unit: the transposed `_joined`."""
    return np.asarray((coins[:, None, :] * codes).reshape(-1, WIDTH))


def _directions(codes: Array) -> tuple[Array, Array]:
    """Return codes of unit length, and their lengths."""
    lengths = np.linalg.norm(codes, axis=1)
    # What is left of a sum that cancels is noise of rounding, and no direction.
    alive = lengths > 1e-12 * max(float(lengths.max(initial=0)), 1e-300)
    lengths = np.where(alive, lengths, 0)
    return np.where(alive[:, None], codes, 0) / np.where(alive, lengths, 1)[:, None], lengths


def _unit(code: Array) -> Array:
    """Return one code of unit length; zeros stay zeros."""
    length = float(np.linalg.norm(code))
    return code / length if length else code
