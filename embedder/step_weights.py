"""What the steps of an architecture multiply by: matrices, biases and the factors of norms."""

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.architecture import GATES, Architecture, Op, Step
from embedder.checkpoint import Tensor
from embedder.errors import ArchitectureError
from embedder.matrices import layout_of
from embedder.products import Matrix, Streamed, Whole, not_finite
from embedder.unit_codes import Array, seeded
from embedder.units import Axis

Weights = Mapping[str, NDArray[np.floating[Any]] | Tensor]
"""Name → values, or a tensor that is multiplied from its file."""

MOST_UNITS = 1 << 22
"""Units of a model that is coded, and values of a bias or of what else is read as a whole: codes of
so many take 1 GB for each direction."""

_WIDE = 1 << 20
"""Values of a tensor up to which it is multiplied in float64. Above, float32 takes half the time
and memory, and its rounding averages out."""


class StepWeights:
    """The weights of one model, as its steps use them.

    Args:
        weights: Name → values or tensor.
        architecture: What their axes mean.
    """

    def __init__(self, weights: Weights, architecture: Architecture) -> None:
        self._weights, self._architecture = weights, architecture
        self._bias = seeded("bias", 1)

    def values(self, name: str) -> Array:
        """Return a tensor's values.

        Raises:
            ArchitectureError: It has none, too many, or some that are not finite.
        """
        given = self._weights[name]
        if isinstance(given, Tensor):
            if given.size > MOST_UNITS:
                raise ArchitectureError(f"{name}: has {given.size:,} values and is no matrix")
            given = given.read()
        values: Array = np.asarray(given)
        values = values.astype(np.float32 if values.size > _WIDE else np.float64, copy=False)
        if values.size == 0:
            raise ArchitectureError(f"{name}: has no values")
        if not np.isfinite(values).all():
            raise not_finite(name)
        return values

    def matrix(self, step: Step, role: str) -> tuple[Matrix, Axis]:
        """Return weights as a matrix, and what its columns run over.

        Raises:
            ArchitectureError: As `values`; those of a tensor in its file are looked at when they
                are multiplied.
        """
        name, (out, into) = step.tensors[role], (step.target, step.source)
        if step.op in (Op.GATED, Op.ATTENTION):
            out, into = (out, step.inside) if role == "output" else (step.inside, into)
        elif role == "recurrent":
            into = out
        layout = layout_of(self._architecture, name, (out, into), turned=step.turned)
        given = self._weights[name]
        if isinstance(given, Tensor):
            return Streamed(given, layout), layout.into
        return Whole(layout.split(self.values(name))), layout.into

    def vector(self, name: str | None) -> Array | float:
        """Return a bias times the code of the constant input; 0 where there is none."""
        return 0.0 if name is None else self.values(name).reshape(-1, 1) * self._bias

    def gate_bias(self, step: Step, role: str) -> Array | float:
        """Return what a bias of gates adds: both biases and directions may lie in one tensor."""
        name = step.tensors.get(role)
        if name is None:
            return 0.0
        axes = self._architecture.axes[name]
        place = next(number for number, axis in enumerate(axes) if axis is not None)
        values = np.moveaxis(self.values(name), place, -1)
        places = GATES[step.kind] * self._architecture.groups[step.target].size
        return np.asarray(values.reshape(-1, places).sum(axis=0)[:, None] * self._bias)


def norm_factor(norm: Step, values: Callable[[str], Array]) -> Array:
    """Return what a norm multiplies each unit by, but for statistics over units, (units or 1, 1).

    Args:
        norm: The step.
        values: Gives the values of a tensor by name.
    """
    factor: Array = np.ones((1, 1))
    if norm.kind == "batch" and "variance" in norm.tensors:
        variance = values(norm.tensors["variance"]).reshape(-1, 1)
        factor = factor / np.sqrt(np.abs(variance) + norm.epsilon)
    if "gain" in norm.tensors:
        factor = factor * values(norm.tensors["gain"]).reshape(-1, 1)
    return factor


def norms_of_one(architecture: Architecture) -> Iterator[int]:
    """Yield the places of batch norms that are of what the step before adds, not of the stream.

    So ends a block of a residual network; weights before such a norm have no scale of their own.
    """
    for depth, (before, step) in enumerate(pairwise(architecture.steps), 1):
        follows = before.target == step.target == step.source and before.op is not Op.NORM
        if follows and step.op is Op.NORM and step.kind == "batch":
            axes = architecture.axes[before.tensors["weight"]] if "weight" in before.tensors else ()
            if not any(axis and axis.power > 0 for axis in axes):
                yield depth
