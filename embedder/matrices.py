"""A tensor as a matrix from units that are read to units that are written, however it is stored."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from embedder.architecture import Architecture
from embedder.errors import ArchitectureError
from embedder.units import Axis

Array = NDArray[np.float64]


def as_matrix(
    values: Array,
    architecture: Architecture,
    name: str,
    ends: tuple[str, str],
    *,
    turned: bool = False,
) -> tuple[Array, Axis, Axis]:
    """Return a tensor as places of out × places of in × all else, however it is stored.

    Args:
        values: The tensor, with axes as the architecture says.
        architecture: What the axes mean.
        name: Of the tensor.
        ends: Names of the groups that are written and read.
        turned: Whether the one that is read comes first, where both are the same.

    Returns:
        The matrix, and what its first two axes run over.

    Raises:
        ArchitectureError: One of the groups has no axis in it.
    """
    axes = dict(enumerate(architecture.axes[name]))
    found: dict[str, tuple[int, Axis]] = {}
    for end, group in reversed(list(enumerate(ends))) if turned else enumerate(ends):
        place, axis = _axis_of(axes, architecture, group, name)
        found["in" if end else "out"] = place, axis
        del axes[place]
    (row, out), (column, into) = found["out"], found["in"]
    split = values.transpose(row, column, *axes)
    return split.reshape(*split.shape[:2], -1), out, into


def _axis_of(
    axes: Mapping[int, Axis | None], architecture: Architecture, group: str, name: str
) -> tuple[int, Axis]:
    """Return the first axis that runs over a group, or else over one with the same order."""
    root = architecture.root(group)
    known = [(place, axis) for place, axis in axes.items() if axis is not None]
    same = [(place, axis) for place, axis in known if axis.group == group]
    near = [(place, axis) for place, axis in known if architecture.root(axis.group) == root]
    if not near:
        raise ArchitectureError(f"{name}: no axis of it runs over {group}")
    return (same or near)[0]
