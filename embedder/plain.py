"""A code for models whose architecture is not known: what each matrix is like by itself.

Without an architecture it is not known which units of two tensors are the same, so each matrix is
told by numbers that no order, sign or scale of its rows and columns changes: it is *equilibrated*
first, so that all rows and all columns have a mean square of one. Then come its singular values,
and how its rows, columns and entries are distributed. The code of a model is the sum of its
matrices' numbers, whitened and spread by a seed of the matrix's shape: no name and no order of
tensors enters. It leads to candidates and proves nothing.

Source: Sinkhorn and Knopp 1967, Pacific J. Math. 21 (equilibrated matrices).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from importlib.resources import as_file, files

import numpy as np
from numpy.typing import NDArray

from embedder.checkpoint import Checkpoint, Kind, Tensor
from embedder.errors import ArchitectureError
from embedder.identity import DIMENSION, IdentityCode

Array = NDArray[np.float64]

ENCODER = "plain-1"
"""Names this code: it is compared with its like alone."""

DIRECTIONS = 48
"""Numbers of a matrix after whitening. Of 24 and 48, 48 finds more parents at a drift below .3."""

_LEADING, _SPECTRUM, _PROFILE, _ENTRIES = 16, 32, 17, 33
NUMBERS = _LEADING + _SPECTRUM + 10 * _PROFILE + _ENTRIES

_LONGEST = 1024
"""Rows or columns of the largest matrix that is taken: the products of all pairs of rows enter."""
_MOST_VALUES = 1 << 23
"""Values that are taken in all, from the largest shapes on: a few seconds."""
_ROUNDS = 200
_SETTLED = 1e-10
_CLIPPED = 3.0


def numbers_of(values: NDArray[np.floating]) -> Array | None:
    """Return what a matrix or kernel is like by itself, (251,); None where there is nothing to say.

    Args:
        values: out × in × space.

    Raises:
        ArchitectureError: Some values are not finite.

    Example:
        >>> values = np.random.default_rng(0).normal(size=(6, 5))
        >>> other = 3 * values[::-1] * np.arange(1, 6)
        >>> bool(np.allclose(numbers_of(values), numbers_of(other)))
        True
    """
    shape = [length for length in values.shape if length > 1]
    if len(shape) < 2:
        return None
    kernel = values.reshape(*shape[:2], -1).astype(np.float64)
    if not np.isfinite(kernel).all():
        raise ArchitectureError("a matrix holds values that are NaN or infinite")
    kernel = _equilibrated(kernel)
    if not kernel.any():
        return None
    rows = kernel.reshape(len(kernel), -1)
    columns = np.swapaxes(kernel, 0, 1).reshape(kernel.shape[1], -1)
    shares = np.linalg.svd(rows, compute_uv=False) / np.linalg.norm(rows)
    leading = np.zeros(_LEADING)
    leading[: min(_LEADING, len(shares))] = shares[:_LEADING]
    places = np.linspace(0, 1, _SPECTRUM), np.linspace(0, 1, len(shares))
    spectrum = np.interp(*places, shares)
    entries = np.quantile(np.abs(rows), np.linspace(0, 1, _ENTRIES))
    singular = np.log(np.concatenate([leading, spectrum]) + 0.01)
    return np.concatenate([singular, _profile(rows), _profile(columns), entries])


def _equilibrated(kernel: Array) -> Array:
    """Return a kernel whose rows and columns are scaled to a mean square of one."""
    largest = float(np.abs(kernel).max(initial=0))
    if largest == 0:
        return kernel
    kernel = kernel / largest
    squares = np.sum(kernel**2, axis=2)
    out, into = squares.shape
    row, column = np.ones(out), np.ones(into)
    for _ in range(_ROUNDS):
        before = row
        row = _inverse(squares @ column / into)
        column = _inverse(squares.T @ row / out)
        if np.abs(row - before).max() <= _SETTLED * row.max():
            break
    return np.asarray(kernel * np.sqrt(row)[:, None, None] * np.sqrt(column)[None, :, None])


def _inverse(sums: Array) -> Array:
    """Return the inverses of sums; a row of zeros stays one."""
    return np.asarray(np.where(sums > 0, 1 / np.where(sums > 0, sums, 1), 0))


def _profile(rows: Array) -> Array:
    """Return how rows are distributed: quantiles of five numbers of each."""
    products = rows @ rows.T / rows.shape[1]
    cubes = np.sum((products @ products) * products, axis=1)
    each = (
        np.mean(np.abs(rows), axis=1),
        np.log(np.mean(rows**4, axis=1) + 1e-6),
        np.log(np.sum(products**2, axis=1) + 1e-6),
        np.log(np.maximum(cubes, 1e-6)),
        np.abs(rows).max(axis=1),
    )
    return np.concatenate([np.quantile(one, np.linspace(0, 1, _PROFILE)) for one in each])


Matrices = Sequence[tuple[tuple[int, ...], Array]]
"""Shape and numbers of each matrix of a model."""


@dataclass(frozen=True, eq=False)
class PlainCoder:
    """Turns the numbers of a model's matrices into its code.

    Args:
        centre: (251,) their mean over many matrices.
        directions: (48, 251) the directions in which they differ most, scaled to a variance of one.
    """

    centre: Array
    directions: Array

    @classmethod
    def fit(cls, matrices: Matrices) -> "PlainCoder":
        """Return the coder that whitens the numbers of some matrices."""
        numbers = np.array([found for _, found in matrices])
        centre = numbers.mean(axis=0)
        variances, axes = np.linalg.eigh(np.cov((numbers - centre).T))
        scale = np.sqrt(variances[-DIRECTIONS:] + 1e-6)
        return cls(centre, np.asarray((axes[:, -DIRECTIONS:] / scale).T))

    def code(self, matrices: Matrices) -> NDArray[np.float32]:
        """Return the code of a model, (256,) float32 of unit length; zeros without a matrix."""
        total = np.zeros(DIMENSION)
        for shape, numbers in matrices:
            told = np.clip(self.directions @ (numbers - self.centre), -_CLIPPED, _CLIPPED)
            total += _spread(shape) @ (told / max(float(np.linalg.norm(told)), 1e-12))
        return np.asarray(total / max(float(np.linalg.norm(total)), 1e-12), np.float32)


@lru_cache(maxsize=256)
def _spread(shape: tuple[int, ...]) -> Array:
    """Return how the numbers of matrices of a shape are spread over a code."""
    seed = int.from_bytes(blake2b(repr(shape).encode(), digest_size=8).digest(), "little")
    rng = np.random.Generator(np.random.PCG64(seed))
    return np.asarray(rng.normal(size=(DIMENSION, DIRECTIONS)) / np.sqrt(DIMENSION))


def matrices_of(tensors: Iterable[Tensor]) -> Iterator[tuple[tuple[int, ...], Array]]:
    """Yield shape and numbers of the matrices of a model, without those that are too large.

    Raises:
        ArchitectureError: A value is not finite.
        CheckpointError: A tensor cannot be read.
    """
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for tensor in tensors:
        shape = tuple(length for length in tensor.canonical_shape if length > 1)
        if tensor.kind is Kind.WEIGHT and len(shape) > 1 and max(shape[:2]) <= _LONGEST:
            by_shape.setdefault(shape, []).append(tensor)
    room = _MOST_VALUES
    for shape, alike in sorted(by_shape.items(), key=lambda item: (-item[1][0].size, item[0])):
        room -= sum(tensor.size for tensor in alike)
        if room < 0:  # all of a shape or none, so that their order plays no part
            return
        for tensor in alike:
            numbers = numbers_of(tensor.canonical())
            if numbers is not None:
                yield shape, numbers


def plain_code(checkpoint: Checkpoint) -> IdentityCode | None:
    """Return the code of a model that needs no architecture; None if it has no matrix to tell.

    Raises:
        ArchitectureError: A value is not finite.
        CheckpointError: A tensor cannot be read.
    """
    matrices = list(matrices_of(checkpoint.tensors))
    return IdentityCode(ENCODER, shipped_plain().code(matrices)) if matrices else None


@lru_cache(maxsize=1)
def shipped_plain() -> PlainCoder:
    """Return the coder in this package."""
    from safetensors.numpy import load_file

    with as_file(files("embedder").joinpath("pretrained/plain.safetensors")) as path:
        arrays = load_file(path)
    return PlainCoder(*(arrays[name].astype(np.float64) for name in ("centre", "directions")))
