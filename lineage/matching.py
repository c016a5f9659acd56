"""Whether hidden units stand in another order: rows or columns that find each other.

A network whose units were reordered computes the same, and trained further it agrees with its
parent no more in place than a stranger does. Where one axis still has its order (inputs, classes, a
residual stream) the slices along the other find their partners all the same.
"""

import math

import numpy as np
from numpy.typing import NDArray

_SAMPLED = 256
_SMALLEST_AXIS = 8
_TOO_EASY = 0.6
_STANDS_OUT = 0.2

MOST_WORK = 2e10
"""Multiplications spent on one pair of models: half a second on one core."""


def matching_work(shape: tuple[int, ...]) -> float:
    """Return the multiplications that `best_matches` takes for tensors of a shape."""
    if len(shape) < 2 or min(shape[:2]) < _SMALLEST_AXIS:
        return 0.0
    return float(sum(min(length, _SAMPLED) for length in shape[:2]) * math.prod(shape))


def best_matches(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """Return how well slices of two tensors find each other in whatever order.

    Args:
        x: One tensor; its first two axes are looked at.
        y: Another of the same shape.

    Returns:
        The mean cosine of sampled slices with the best of the other's, along the better axis; 0
        where slices are so short, or so alike, that strangers find good partners too.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(40, 300))
        >>> best_matches(x, x[::-1]) > 0.99, best_matches(x, -x) < 0.3
        (True, True)
    """
    if x.ndim < 2 or min(x.shape[:2]) < _SMALLEST_AXIS:
        return 0.0
    return max(_along(x, y, axis) for axis in (0, 1))


def _along(x: NDArray[np.floating], y: NDArray[np.floating], axis: int) -> float:
    ours, theirs = (_unit_slices(values, axis) for values in (x, y))
    number, width = theirs.shape
    places = np.linspace(0, len(ours) - 1, min(len(ours), _SAMPLED)).astype(int)
    cosines = ours[places] @ theirs.T  # (sampled, number)
    best = cosines.max(axis=1)
    # The largest of n independent cosines in d dimensions is about √(2 ln n / d).
    if math.sqrt(2 * math.log(max(number, 2)) / max(width - 1, 1)) > _TOO_EASY:
        return 0.0
    # A partner stands out; slices that are all alike, as box regressors are, have many near ones.
    second = np.partition(cosines, -2, axis=1)[:, -2]
    return float(best.mean()) if float((best - second).mean()) > _STANDS_OUT else 0.0


def _unit_slices(values: NDArray[np.floating], axis: int) -> NDArray[np.float32]:
    """Return the slices along an axis, centred and of unit length, (places, values of one)."""
    slices = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1).astype(np.float32)
    slices = slices - slices.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(slices, axis=1, keepdims=True)
    return np.asarray(slices / np.where(lengths > 0, lengths, 1))
