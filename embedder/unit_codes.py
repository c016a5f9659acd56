"""Arithmetic of codes: seeded ones, products with weights, and copies over places of an axis."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.errors import ArchitectureError
from embedder.sketch import signs
from embedder.units import Axis

Array = NDArray[np.floating[Any]]

WIDTH = 64
"""Numbers of a code. Strangers' codes have a cosine of about 1/√64 = .125."""

_STREAMS = {
    use: place << 40
    for place, use in enumerate(("inputs", "outputs", "bias", "space", "gate", "head"))
}
"""Where each use of the seeded sequence begins; no axis is as long as what lies between."""

_AT_ONCE = 1 << 14
"""Codes that are drawn at once: drawing takes five times their memory."""


def seeded(stream: str, count: int) -> Array:
    """Return the first codes of a stream, (count, 64) float64 of ±1."""
    first = _STREAMS[stream]
    found = np.empty((count, WIDTH))
    for start in range(0, count, _AT_ONCE):
        stop = min(start + _AT_ONCE, count)
        found[start:stop] = signs(first + start, first + stop, WIDTH)
    return found


def through(values: Array, codes: Array) -> Array:
    """Return out × in × places weights times codes, whose signs each place flips in its own way."""
    places = values.shape[2]
    codes = codes.astype(values.dtype, copy=False)
    parts = ((values[:, :, place] @ codes).astype(np.float64) for place in range(places))
    if places == 1:
        return np.asarray(next(parts))
    return np.asarray(
        sum(part * coin for part, coin in zip(parts, seeded("space", places), strict=True))
    )


def spread(codes: Array, axis: Axis) -> Array:
    """Return a code for each place of an axis that may hold every unit several times."""
    if axis.before * axis.inner == 1:
        return codes
    coins = seeded("space", axis.before * axis.inner).reshape(axis.before, 1, axis.inner, WIDTH)
    return np.asarray((coins * codes[None, :, None, :]).reshape(-1, WIDTH))


def gathered(codes: Array, axis: Axis) -> Array:
    """Return one code for each unit from one for each place: the transposed `spread`."""
    if axis.before * axis.inner == 1:
        return codes
    coins = seeded("space", axis.before * axis.inner).reshape(axis.before, 1, axis.inner, WIDTH)
    return np.asarray((coins * codes.reshape(axis.before, -1, axis.inner, WIDTH)).sum(axis=(0, 2)))


def joined(stacked: Array, coins: Array) -> Array:
    """Return one code for each unit from one for each of its gates."""
    gates = stacked.reshape(len(coins), -1, WIDTH)
    return np.asarray(np.einsum("guk,gk->uk", gates, coins))


def parted(codes: Array, coins: Array) -> Array:
    """Return a code for each gate of each unit: the transposed `joined`."""
    return np.asarray((coins[:, None, :] * codes).reshape(-1, WIDTH))


def directions(
    codes: Array, strength: NDArray[np.float64] | None = None
) -> tuple[Array, NDArray[np.float64]]:
    """Return codes of unit length, and their lengths; zeros for units that are dead.

    Args:
        codes: (units, 64).
        strength: (units,) by which it is told which units are dead; by default the lengths.
    """
    lengths = np.linalg.norm(codes, axis=1)
    strength = lengths if strength is None else strength
    # What is left of a sum that cancels is noise of rounding, and no direction.
    alive = strength > 1e-12 * max(float(strength.max(initial=0)), 1e-300)
    alive &= lengths > 0
    lengths = np.where(alive, lengths, 0)
    return np.where(alive[:, None], codes, 0) / np.where(alive, lengths, 1)[:, None], lengths


def strength_of(codes: Array, back: Array) -> NDArray[np.float64]:
    """Return how much units read times how much they do, (units,), whatever their scale.

    Of a unit that has been cut off on one side the other is told alone.
    """
    sides = np.stack([np.linalg.norm(side, axis=1) for side in (codes, back)]).astype(np.float64)
    sides /= np.maximum(sides.max(axis=1, initial=0, keepdims=True), 1e-300)
    return np.asarray(np.where(sides > 0, sides, 1).prod(axis=0) * sides.any(axis=0))


def check_length(codes: Array, name: str) -> None:
    """Make sure that codes, and the squares of their numbers, can be computed with.

    Raises:
        ArchitectureError: They cannot; it says whose codes they are.
    """
    flat = codes.reshape(-1)
    if not np.isfinite(np.dot(flat, flat)):
        raise ArchitectureError(f"{name}: weights are so large that its codes are not finite")


def unit(code: Array) -> Array:
    """Return one code of unit length; zeros stay zeros."""
    length = float(np.linalg.norm(code))
    return code / length if length else code


def root_of_moment(codes: Array) -> tuple[Array, NDArray[np.float64]]:
    """Return the square root of the second moment of codes, (64, 64), and the lengths of its rows.

    Neither a rotation of the codes nor their order or common scale changes it; its square has the
    trace 1. It is all zeros where the codes are, or where some are too large to be computed.
    """
    largest = float(np.abs(codes).max(initial=0))
    if not 0 < largest < np.inf:
        return np.zeros((WIDTH, WIDTH)), np.zeros(WIDTH)
    scaled = codes.astype(np.float64) / largest
    moment = scaled.T @ scaled
    values, vectors = np.linalg.eigh(moment / np.trace(moment))
    rows = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    return rows, np.linalg.norm(rows, axis=1)
