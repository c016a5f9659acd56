"""A tensor as a matrix from units that are read to units that are written, however it is stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from embedder.architecture import Architecture
from embedder.errors import ArchitectureError
from embedder.units import Axis, Gauge

Number = TypeVar("Number", bound=np.floating[Any])


@dataclass(frozen=True, slots=True)
class Layout:
    """Which axes of a stored tensor are those of a matrix.

    Args:
        row: The axis of what is written.
        column: The axis of what is read.
        rest: All other axes, in their order.
        out: What the rows run over.
        into: What the columns run over.
    """

    row: int
    column: int
    rest: tuple[int, ...]
    out: Axis
    into: Axis

    def split(self, values: NDArray[Number]) -> NDArray[Number]:
        """Return a tensor as places of out × places of in × all else."""
        turned = values.transpose(self.row, self.column, *self.rest)
        return turned.reshape(*turned.shape[:2], -1)


def layout_of(
    architecture: Architecture, name: str, ends: tuple[str, str], *, turned: bool = False
) -> Layout:
    """Return which axes of a tensor are those of the matrix between two groups.

    Args:
        architecture: What the axes mean.
        name: Of the tensor.
        ends: Names of the groups that are written and read.
        turned: Whether the one that is read comes first, where both are the same.

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
    return Layout(row, column, tuple(axes), out, into)


def as_matrix(
    values: NDArray[Number],
    architecture: Architecture,
    name: str,
    ends: tuple[str, str],
    *,
    turned: bool = False,
) -> tuple[NDArray[Number], Axis, Axis]:
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
    layout = layout_of(architecture, name, ends, turned=turned)
    return layout.split(values), layout.out, layout.into


def _axis_of(
    axes: Mapping[int, Axis | None], architecture: Architecture, group: str, name: str
) -> tuple[int, Axis]:
    """Return the first axis that runs over a group, or else over one with the same order.

    All groups whose units have a meaning have one order: words that are read are those written.
    """

    def order(name: str) -> str:
        root = architecture.root(name)
        return "" if architecture.groups[root].gauge is Gauge.NAMED else root

    known = [(place, axis) for place, axis in axes.items() if axis is not None]
    same = [(place, axis) for place, axis in known if axis.group == group]
    near = [(place, axis) for place, axis in known if order(axis.group) == order(group)]
    if not near:
        raise ArchitectureError(f"{name}: no axis of it runs over {group}")
    return (same or near)[0]
