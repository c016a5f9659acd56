"""Scales of units that their codes do not tell, told by the weights on both sides of them."""

from collections.abc import Mapping

import numpy as np

from embedder.architecture import Architecture, Op
from embedder.symmetry import Values, multiplied
from embedder.units import Gauge

RESCALED = 0.2
"""Standard deviation of the logarithm of scales from which units were rescaled: training to a drift
of .3 leaves .12 in nineteen of twenty networks of the zoo, a random rescaling about .5."""


def is_scaled(factors: Values) -> bool:
    """Say whether units were rescaled by these factors, and not only trained."""
    return bool(np.std(np.log(np.abs(factors))) > RESCALED)


def _untold(architecture: Architecture, told: Mapping[str, Values]) -> list[str]:
    """Return the groups whose units may have scales that their codes do not tell.

    These are the channels after a norm, which its gain and what reads them share, and the units of
    a gated map, whose codes stand for their negatives too and tell the sign alone.
    """
    gated = {step.inside for step in architecture.steps if step.op is Op.GATED}
    return [
        name
        for name, group in architecture.groups.items()
        if name in gated or (group.gauge is Gauge.SCALE and name not in told)
    ]


_ROUNDS = 4
"""How often scales are told: those of the rows of a matrix and of its columns depend on each other.
In a disguised transformer of the zoo's design twelve rounds more move no tensor by over .001."""


def scales_undone(
    ours: Mapping[str, Values],
    theirs: dict[str, Values],
    architecture: Architecture,
    told: Mapping[str, Values],
) -> tuple[dict[str, Values], dict[str, Values]]:
    """Return the second model's weights without the scales of those groups that were rescaled.

    Args:
        ours: The weights of the first model, by the names of the second's, of the same shapes.
        theirs: Those of the second, in the order of the first's.
        architecture: What their axes mean.
        told: The groups whose scales have been undone.

    Returns:
        The weights, and what the units of which groups were multiplied by.
    """
    groups = _untold(architecture, told)
    found: dict[str, Values] = {}
    for _ in range(_ROUNDS):
        for name in groups:
            ratio = _ratio(ours, theirs, architecture, name)
            if name in found or is_scaled(ratio):
                theirs = multiplied(theirs, architecture, {name: ratio})
                found[name] = found.get(name, 1.0) * ratio
        if not found:
            break
    return theirs, found


def _ratio(
    ours: Mapping[str, Values], theirs: Mapping[str, Values], architecture: Architecture, name: str
) -> Values:
    """Return what the units of a group have to be multiplied by, as weights on both sides tell."""
    size = architecture.groups[name].size
    # By power: the inner product of each unit's weights with the other's, and with themselves.
    products = {power: np.zeros((2, size)) for power in (1, -1)}
    for tensor in filter(ours.__contains__, architecture.axes):
        for place, axis in enumerate(architecture.axes[tensor]):
            if axis is not None and axis.group == name and axis.power in products:
                one, other = (
                    np.moveaxis(side[tensor], place, 0)
                    .reshape(axis.before, size, axis.inner, -1)
                    .astype(np.float64)
                    for side in (ours, theirs)
                )
                products[axis.power] += [
                    np.einsum("busv,busv->u", known, other) for known in (one, other)
                ]
    (read, own), (reach, heard) = products[1], products[-1]
    told = (read > 0) & (reach > 0)
    squared = np.where(told, read * heard, 1.0) / np.where(told, own * reach, 1.0)
    return np.asarray(np.sqrt(squared))
