"""The weight graph: hidden units as nodes, weights as edges, all of it free of order and scale.

A node carries the two codes of its unit (`embedder.anchors`); an edge from unit i to unit j carries
‖F_i‖ · W_ji · ‖B_j‖, which no scale changes: what W_ji is multiplied by, the lengths of the codes
are divided by. So any graph network on these features is invariant to order and scale exactly, and
needs nothing special for it. Residual streams have no units and hence no nodes; what lies on both
sides of one is tied by the product of the weights along the stream, as a path.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from embedder.anchors import WIDTH, Units, anchored, norm_factor
from embedder.architecture import Architecture, Builder, Op, Step
from embedder.errors import ArchitectureError
from embedder.matrices import as_matrix
from embedder.tucker import SPECTRUM
from embedder.units import Gauge

Array = NDArray[np.float32]

MOST_EDGES = 200_000
"""Above this a graph is not worth its cost, and the units are used without edges."""

NODE_KINDS = ("hidden", "output", "head", "gate")
EDGE_ROLES = ("linear", "recurrent", "unitwise", "path")
SCALARS = 7 + len(NODE_KINDS)
EDGE_FEATURES = 3 + len(EDGE_ROLES)


@dataclass(frozen=True, slots=True, eq=False)
class WeightGraph:
    """Nodes and edges of one model.

    Args:
        forward: (nodes, 64) what units read, of unit length.
        backward: (nodes, 64) what units do, of unit length.
        scalars: (nodes, 11) log ‖F‖‖B‖ against the mean of its layer, the same of ‖F‖ where it may
            not be scaled, depth from 0 to 1, log of the layer's size, whether a code stands for its
            negative too, log of the mean of its layer, cosine of what it reads with the constant
            input (its size, where a code stands for its negative too); then one-hot: kind of the
            node.
        spectra: (nodes, 13) of heads, what their scores are like (`embedder.tucker`); else zeros.
        layer: (nodes,) which layer a node is in, counted in the order of the forward pass.
        edges: (2, edges) source and target.
        edge_features: (edges, 7) the invariant weight against the root mean square of its tensor
            (0 where signs mean nothing), its size, place in the kernel from 0 to 1; then one-hot:
            role.
    """

    forward: Array
    backward: Array
    scalars: Array
    spectra: Array
    layer: NDArray[np.int64]
    edges: NDArray[np.int64]
    edge_features: Array


def weight_graph(
    weights: Mapping[str, NDArray[np.floating]], architecture: Architecture, *, gauge: bool = True
) -> WeightGraph:
    """Return the weight graph of a model.

    Args:
        weights: Name → values.
        architecture: What the axes mean.
        gauge: Whether scales and signs are taken out. Without, edges are the bare weights and each
            unit tells how much it reads; only the order stays free. For ablations.

    Raises:
        ArchitectureError: As `anchored`; or the model has no hidden units that could be nodes.

    Example:
        >>> from embedder.architecture import Builder
        >>> b = Builder("mlp").input("in", 3).linear("a", "in", "h", 5, activation="relu")
        >>> mlp = b.linear("b", "h", "out", 2, named=True).build()
        >>> graph = weight_graph({"a": np.ones((5, 3)), "b": np.ones((2, 5))}, mlp)
        >>> graph.forward.shape, graph.edges.shape
        ((7, 64), (2, 10))
    """
    every = anchored(weights, architecture)
    units = [group for group in every if not (group.stream or group.channels)]
    if not units:
        raise ArchitectureError("the model has no hidden units")
    if not gauge:
        units = [_with_scale(group) for group in units]
    starts = np.cumsum([0, *(len(group.read) for group in units)])
    places = {
        group.group: (int(start), group if gauge else _without_lengths(group))
        for start, group in zip(starts, units, strict=False)
        if not group.gates
    }
    found = list(_edges(weights, architecture, places))
    number = sum(pairs.shape[1] for pairs, _ in found)
    if number > MOST_EDGES or not found:
        found = [(np.zeros((2, 0), np.int64), np.zeros((0, EDGE_FEATURES), np.float32))]
    return WeightGraph(
        forward=np.concatenate([group.forward for group in units]).astype(np.float32),
        backward=np.concatenate([group.backward for group in units]).astype(np.float32),
        scalars=np.concatenate([_scalars(group, len(architecture.steps)) for group in units]),
        spectra=np.concatenate([_spectra(group) for group in units]),
        layer=np.repeat(np.arange(len(units)), np.diff(starts)),
        edges=np.concatenate([pairs for pairs, _ in found], axis=1),
        edge_features=np.concatenate([features for _, features in found]),
    )


def _with_scale(group: Units) -> Units:
    """Return units as if each had to keep its scale and sign."""
    named = group.gauge is Gauge.NAMED
    return replace(group, scaled=False, gauge=Gauge.NAMED if named else Gauge.ORDER)


def _without_lengths(group: Units) -> Units:
    """Return units whose lengths change no edge."""
    return replace(group, read=np.ones_like(group.read), reach=np.ones_like(group.reach))


def _spectra(group: Units) -> Array:
    if group.spectrum is None:
        return np.zeros((len(group.read), SPECTRUM), np.float32)
    return group.spectrum.astype(np.float32)


def _scalars(group: Units, steps: int) -> Array:
    """Return the numbers of each unit that are no codes, (units, 11)."""
    strength = _against_mean(group.read * group.reach)
    # Where a unit has no scale of its own, how much it reads is a fact about it.
    own = np.zeros_like(strength) if group.scaled else _against_mean(group.read)
    constant = group.forward @ _constant_input()
    if group.gauge is Gauge.SIGN:
        constant = np.abs(constant)
    kind = "head" if group.heads else "gate" if group.gates else "hidden"
    kind = "output" if group.gauge is Gauge.NAMED else kind
    same = [
        (group.depth + 1) / steps,
        np.log(max(len(strength), 1)),
        float(group.gauge is Gauge.SIGN),
        _log_mean(group),
    ]
    shared = np.tile(same, (len(strength), 1))
    kinds = np.tile([float(kind == name) for name in NODE_KINDS], (len(strength), 1))
    return np.column_stack([strength, own, shared, constant, kinds]).astype(np.float32)


@cache
def _constant_input() -> NDArray[np.float64]:
    """Return the direction of what a unit reads that has a bias and nothing else, (64,)."""
    builder = Builder("constant").input("in", 1)
    network = builder.linear("weight", "in", "out", 1, bias="bias", named=True).build()
    (out,) = anchored({"weight": np.zeros((1, 1)), "bias": np.ones(1)}, network)
    return np.asarray(out.forward[0])


def _log_mean(group: Units) -> float:
    """Return the log of ‖F‖‖B‖, its mean over a layer, as if anchors were of unit length."""
    alone = not group.reach.any()  # heads and gates do nothing that has a code
    mean = float((group.read if alone else group.read * group.reach).mean())
    return float(np.log(max(mean, 1e-9) / (np.sqrt(WIDTH) if alone else WIDTH)))


def _against_mean(lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log(length / mean), at least −5, and 0 where there are none."""
    mean = float(lengths.mean()) if len(lengths) else 0.0
    if mean == 0:
        return np.zeros_like(lengths)
    return np.asarray(np.maximum(np.log(np.maximum(lengths / mean, 1e-9)), -5))


Places = Mapping[str, tuple[int, Units]]
Edges = tuple[NDArray[np.int64], Array]


def _edges(
    weights: Mapping[str, NDArray[np.floating]], architecture: Architecture, places: Places
) -> Iterator[Edges]:
    """Yield the edges of each tensor that ties two groups of units."""
    for step, after in zip_longest(architecture.steps, architecture.steps[1:]):
        known = {step.source, step.target} <= set(places)
        if step.op is Op.LINEAR and known:
            kernels = _kernels(weights, architecture, step)
            if after is not None and after.op is Op.NORM and after.target == step.target:
                # The gain carries the scale of the units, not the weights that come before it.
                factor = norm_factor(after, lambda name: np.asarray(weights[name], np.float64))
                kernels = kernels * factor[:, :, None]
            yield _between(kernels, step, places, "linear")
        elif step.op is Op.UNITWISE and known:
            kernel = weights[step.tensors["weight"]].reshape(len(places[step.source][1].read), -1)
            spread = np.eye(len(kernel))[:, :, None] * kernel[:, None]
            yield _between(spread, step, places, "unitwise")
        elif step.op is Op.RECURRENT:
            past = replace(step, source=step.target, tensors={"weight": step.tensors["recurrent"]})
            yield _between(_kernels(weights, architecture, past), past, places, "recurrent")
            if known:
                yield _between(_kernels(weights, architecture, step), step, places, "linear")
    yield from _paths(weights, architecture, places)


def _paths(
    weights: Mapping[str, NDArray[np.floating]], architecture: Architecture, places: Places
) -> Iterator[Edges]:
    """Yield edges from the units that wrote a residual stream last to those that read it next."""
    written: dict[str, tuple[str, NDArray[np.float64]]] = {}
    gains: dict[str, NDArray[np.float64]] = {}
    for step in architecture.steps:
        stream = architecture.root(step.source)
        if step.op is Op.NORM and "gain" in step.tensors and step.target != step.source:
            gains[step.target] = np.asarray(weights[step.tensors["gain"]], np.float64)
        if step.op not in (Op.LINEAR, Op.GATED):
            continue
        reader = step.inside or step.target
        role, back = ("weight", "weight") if step.op is Op.LINEAR else ("up", "output")
        if reader in places and stream in written:
            before, matrix = written[stream]
            read = _kernels(weights, architecture, step, role, (step.source, reader))
            path = (read[:, :, 0] * gains.get(step.source, 1.0)) @ matrix
            yield _between(
                path[:, :, None], replace(step, source=before, target=reader), places, "path"
            )
        writer, target = step.inside or step.source, architecture.root(step.target)
        if writer in places and target not in places:
            out = _kernels(weights, architecture, step, back, (writer, step.target))
            written[target] = writer, out[:, :, 0]


def _kernels(
    weights: Mapping[str, NDArray[np.floating]],
    architecture: Architecture,
    step: Step,
    role: str = "weight",
    ends: tuple[str, str] | None = None,
) -> NDArray[np.float64]:
    """Return a tensor as units of the target × units of the source × places."""
    name = step.tensors[role]
    source, target = ends or (step.source, step.target)
    values = np.asarray(weights[name], np.float64)
    matrix, out, into = as_matrix(values, architecture, name, (target, source), turned=step.turned)
    shape = [architecture.groups[group].size for group in (target, source)]
    split = matrix.reshape(out.before, shape[0], out.inner, into.before, shape[1], into.inner, -1)
    return split.transpose(1, 4, 0, 2, 3, 5, 6).reshape(*shape, -1)


def _between(kernels: NDArray[np.float64], step: Step, places: Places, role: str) -> Edges:
    """Return an edge for each weight of units × units × places that is not zero."""
    (first, source), (second, target) = places[step.source], places[step.target]
    invariant = kernels * source.read[None, :, None] * target.reach[:, None, None]
    to, start, place = np.nonzero(kernels)
    sizes = invariant[to, start, place]
    sizes = sizes / max(float(np.sqrt(np.mean(sizes**2))) if sizes.size else 0.0, 1e-300)
    signed = Gauge.SIGN not in (source.gauge, target.gauge)
    features = np.zeros((len(sizes), EDGE_FEATURES), np.float32)
    features[:, 0] = sizes if signed else 0
    features[:, 1] = np.abs(sizes)
    features[:, 2] = (place + 1) / kernels.shape[2]
    features[:, 3 + EDGE_ROLES.index(role)] = 1
    return np.stack([start + first, to + second]), features
