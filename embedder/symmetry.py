"""Changes of the weights that leave a model's function as it is.

Hidden units may be put in another order, scaled or flipped, as far as the `Architecture` says, if
every tensor that holds them goes along; streams and heads may be turned too (`embedder.rotation`).
A copy that was changed so has other numbers and is the same model. Training makes positives of
these, tests prove invariance with them.

Sources: Hecht-Nielsen 1990 (order and sign), Neyshabur et al. 2015, NeurIPS (scale), Jacob et al.
2018, CVPR (batch norm folded).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.architecture import Architecture, Axis, Gauge, Op, Step
from embedder.errors import ArchitectureError

Values = NDArray[np.floating[Any]]
Weights = Mapping[str, Values]
Order = NDArray[np.intp]

_SPREAD = 0.5
"""Standard deviation of log λ: scales from a third to three, as far as trained units differ."""


def reordered(
    weights: Weights, architecture: Architecture, orders: Mapping[str, Order]
) -> dict[str, Values]:
    """Return the weights with the units of some groups in another order.

    Args:
        weights: Name → values. Tensors that the architecture does not name are left as they are.
        architecture: Says which axes hold which units.
        orders: Root group → for each new place, the old one.

    Raises:
        ArchitectureError: The weights are not those described, or an order is none.

    Example:
        >>> from embedder.architecture import Builder
        >>> mlp = Builder("mlp").input("in", 1).linear("a", "in", "h", 2)
        >>> mlp = mlp.linear("b", "h", "out", 1, named=True).build()
        >>> weights = {"a": np.array([[1.0], [2.0]]), "b": np.array([[3.0, 4.0]])}
        >>> reordered(weights, mlp, {"h": np.array([1, 0])})["b"]
        array([[4., 3.]])
    """
    _check(weights, architecture)
    for name, order in orders.items():
        size = architecture.groups[name].size
        if not np.array_equal(np.sort(order), np.arange(size)):
            raise ArchitectureError(f"{name}: not an order of its {size} units")
    result = dict(weights)
    for name, place, axis in axes_of(architecture):
        found = orders.get(architecture.root(axis.group))
        if found is not None:
            size = architecture.groups[axis.group].size
            places = np.arange(axis.before * size * axis.inner).reshape(axis.before, size, -1)
            result[name] = np.take(result[name], places[:, found].ravel(), axis=place)
    return result


def multiplied(
    weights: Weights, architecture: Architecture, factors: Mapping[str, Values]
) -> dict[str, Values]:
    """Return the weights with the units of some groups multiplied.

    The function is kept if each group's gauge allows its factors, which is not checked here.

    Args:
        weights: Name → values.
        architecture: Says which axes hold which units, and with which power.
        factors: Group → λ of each unit, none zero.

    Raises:
        ArchitectureError: The weights are not those described.
    """
    _check(weights, architecture)
    result = dict(weights)
    for name, place, axis in axes_of(architecture):
        tied = architecture.groups[axis.group].tied
        for group, power in ((axis.group, axis.power), (tied, axis.tied_power)):
            if power and group in factors:
                places = np.repeat(factors[group].astype(np.float64) ** power, axis.inner)
                scale = np.tile(places, axis.before)
                result[name] = _along(result[name], place, scale)
    return result


def permuted(
    weights: Weights, architecture: Architecture, rng: np.random.Generator
) -> dict[str, Values]:
    """Return the weights with the units of every group that has no meaning in a random order.

    Example:
        >>> from embedder.architecture import Builder
        >>> mlp = Builder("mlp").input("in", 1).linear("a", "in", "h", 9)
        >>> mlp = mlp.linear("b", "h", "out", 1, named=True).build()
        >>> weights = {"a": np.ones((9, 1)), "b": np.arange(9.0)[None]}
        >>> found = permuted(weights, mlp, np.random.default_rng(0))
        >>> found["b"].sum(), bool((found["b"] == weights["b"]).all())
        (np.float64(36.0), False)
    """
    return reordered(weights, architecture, random_orders(architecture, rng))


def random_orders(architecture: Architecture, rng: np.random.Generator) -> dict[str, Order]:
    """Return a random order for each root group, unless it or a group tied to it has a meaning."""
    named = {
        architecture.root(name)
        for name, group in architecture.groups.items()
        if group.gauge == Gauge.NAMED
    }
    return {
        name: rng.permutation(group.size)
        for name, group in architecture.groups.items()
        if not group.tied and name not in named
    }


def rescaled(
    weights: Weights, architecture: Architecture, rng: np.random.Generator
) -> dict[str, Values]:
    """Return the weights with a random positive scale, log-normal, for each unit that allows one.

    Units of a gated map count too: `up` is scaled and `output` takes it back.
    """
    factors = {
        name: np.exp(rng.normal(scale=_SPREAD, size=architecture.groups[name].size))
        for name in _groups_with(architecture, Gauge.SCALE)
    }
    return multiplied(weights, architecture, factors)


def flipped(
    weights: Weights, architecture: Architecture, rng: np.random.Generator
) -> dict[str, Values]:
    """Return the weights with a random sign for each unit of an odd activation or a gated map."""
    factors = {
        name: rng.choice([-1.0, 1.0], size=architecture.groups[name].size)
        for name in _groups_with(architecture, Gauge.SIGN)
    }
    return multiplied(weights, architecture, factors)


def disguised(
    weights: Weights, architecture: Architecture, rng: np.random.Generator
) -> dict[str, Values]:
    """Return the weights with units scaled, flipped and put in another order, all at random."""
    found = dict(weights)
    for change in (rescaled, flipped, permuted):
        found = change(found, architecture, rng)
    return found


def _groups_with(architecture: Architecture, gauge: Gauge) -> list[str]:
    gated = {step.inside for step in architecture.steps if step.op == Op.GATED}
    return [name for name, g in architecture.groups.items() if g.gauge == gauge or name in gated]


# ------------------------------------------------------------------ norms


def folded(weights: Weights, architecture: Architecture) -> dict[str, Values]:
    """Return the weights with what norms multiply by moved into the weights beside them.

    A gain before a block goes into what reads it and becomes ±1. A batch norm goes into the matrix
    or convolution before it: its gain becomes 1, its mean 0, its variance 1 − ε, and its offset
    holds the bias. A gain stays where it is shared, as by a head that is the table of tokens, and
    a batch norm where no one tensor comes before it, or no offset or bias could hold its mean.

    Raises:
        ArchitectureError: The weights are not those described, or hold NaN.
    """
    _check(weights, architecture, finite=True)
    uses = [name for step in architecture.steps for name in step.tensors.values()]
    factors: dict[str, Values] = {}
    gains: dict[str, Values] = {}
    for step in architecture.steps:
        if _goes_into_readers(architecture, step, uses):
            gain = weights[step.tensors["gain"]].astype(np.float64)
            linear = architecture.groups[step.target].activation == "linear"
            left = np.where(gain == 0, 0, 1 if linear else np.sign(gain))
            factors[step.target] = np.where(gain == 0, 1, left / np.where(gain == 0, 1, gain))
            gains[step.tensors["gain"]] = left.astype(weights[step.tensors["gain"]].dtype)
    result = multiplied(weights, architecture, factors) | gains
    for place, step in enumerate(architecture.steps):
        if step.op == Op.NORM and step.kind == "batch" and step.target == step.source:
            before = [s for s in architecture.steps[:place] if s.target == step.source]
            if before and _can_fold(before[-1], step, architecture, uses):
                _fold(result, architecture, before[-1], step)
    return result


def _goes_into_readers(architecture: Architecture, step: Step, uses: list[str]) -> bool:
    """Say whether the gain of a norm may go into what reads it."""
    if step.op != Op.NORM or step.target == step.source or "gain" not in step.tensors:
        return False
    norms = [s for s in architecture.steps if s.op == Op.NORM and s.target == step.target]
    (axis,) = (axis for axis in architecture.axes[step.tensors["gain"]] if axis is not None)
    alone = len(norms) == 1 and uses.count(step.tensors["gain"]) == axis.before * axis.inner == 1
    return alone and architecture.groups[step.target].gauge == Gauge.SCALE


def _can_fold(before: Step, norm: Step, architecture: Architecture, uses: list[str]) -> bool:
    """Say whether a batch norm can go into the step before it."""
    if before.op not in (Op.LINEAR, Op.UNITWISE) or not {"mean", "variance"} <= set(norm.tensors):
        return False
    axis = _rows(architecture, before)[1]
    touched = (*before.tensors.values(), *norm.tensors.values())
    alone = all(uses.count(name) == 1 for name in touched)
    holds_mean = "offset" in norm.tensors or "bias" in before.tensors
    # What a norm follows leaves the scale of its rows to the gain.
    normed = axis.power == (-1 if before.op == Op.UNITWISE else 0)
    return alone and holds_mean and normed


def _rows(architecture: Architecture, step: Step) -> tuple[int, Axis]:
    """Return the axis of a step's weights that holds what it writes."""
    axes = architecture.axes[step.tensors["weight"]]
    found = [(place, axis) for place, axis in enumerate(axes) if axis is not None]
    # A square map of a stream to itself holds one group twice: what it reads has a power of −1.
    written = [pair for pair in found if pair[1].group == step.target and pair[1].power >= 0]
    return (written or found)[0]


def _fold(result: dict[str, Values], architecture: Architecture, before: Step, norm: Step) -> None:
    """Move one batch norm into the step before it."""

    def set_values(name: str, values: Values) -> None:
        result[name] = values.astype(result[name].dtype)

    wide = {role: result[name].astype(np.float64) for role, name in norm.tensors.items()}
    scale = wide.get("gain", np.ones_like(wide["mean"])) / np.sqrt(wide["variance"] + norm.epsilon)
    bias = before.tensors.get("bias")
    shift = scale * ((result[bias] if bias else 0) - wide["mean"]) + wide.get("offset", 0)
    weight = before.tensors["weight"]
    result[weight] = _along(result[weight], _rows(architecture, before)[0], scale)
    if "offset" in norm.tensors:
        set_values(norm.tensors["offset"], shift)
        shift = np.zeros_like(shift)
    if bias:
        set_values(bias, shift)
    if "gain" in norm.tensors:
        set_values(norm.tensors["gain"], np.ones_like(scale))
    set_values(norm.tensors["mean"], np.zeros_like(scale))
    set_values(norm.tensors["variance"], np.full_like(scale, 1 - norm.epsilon))


# ------------------------------------------------------------------ axes


def axes_of(architecture: Architecture) -> Iterator[tuple[str, int, Axis]]:
    """Yield each axis that belongs to a group: name of the tensor, place, axis."""
    for name, axes in architecture.axes.items():
        for place, axis in enumerate(axes):
            if axis is not None:
                yield name, place, axis


def _along(values: Values, place: int, scale: Values) -> Values:
    """Return values times a factor for each place of an axis."""
    shape = [1] * values.ndim
    shape[place] = -1
    return np.asarray(values * scale.reshape(shape), dtype=values.dtype)


def _check(weights: Weights, architecture: Architecture, *, finite: bool = False) -> None:
    architecture.check({name: values.shape for name, values in weights.items()})
    if finite:
        for name in architecture.axes:
            if not np.isfinite(weights[name]).all():
                raise ArchitectureError(f"{name}: holds NaN or infinity, which would spread")
