"""Identity codes: one vector a model, alike for a parent and its children, unlike for strangers.

The code is the kernel mean of the directions of a model's hidden units: with random features φ
whose inner product is a Gaussian kernel, ⟨mean φ(u), mean φ(v)⟩ is the mean of k(u, v) over all
pairs of units. Units that found no partner add next to nothing, so the inner product counts the
matched units, and nearest neighbours need no alignment.

Source:
    Random features: Rahimi and Recht 2007, NeurIPS. Kernel means: Smola et al. 2007, ALT.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from embedder.anchors import WIDTH, Units
from embedder.units import Gauge

BANDWIDTH = 0.5
FEATURES = 256
LEVELS = ("first", "inner", "last", "heads", "first back", "inner back")
DIMENSION = len(LEVELS) * FEATURES


def identity_code(
    units: Sequence[Units], *, bandwidth: float = BANDWIDTH, features: int = FEATURES
) -> NDArray[np.float32]:
    """Return the untrained identity code of a model, (6 · features,) float32 of unit length.

    Its parts are the kernel means of the forward codes of the first hidden units, the inner ones,
    the outputs and the heads of attentions, and of the backward codes of the first two. A part that
    a model lacks is zero.

    Args:
        units: What `embedder.anchors.anchored` returns.
        bandwidth: σ of the kernel exp(−‖u − v‖² / 2σ²).
        features: Numbers of each part.
    """
    parts = {level: np.zeros(features) for level in LEVELS}
    hidden = [group for group in units if group.gauge is not Gauge.NAMED and not group.heads]
    for group in units:
        level = level_of(group, hidden)
        even = group.gauge is Gauge.SIGN
        parts[level] += kernel_mean(group.forward, bandwidth, features, even=even)
        if f"{level} back" in parts:
            parts[f"{level} back"] += kernel_mean(group.backward, bandwidth, features, even=even)
    return _unit(np.concatenate([_unit(parts[level]) for level in LEVELS])).astype(np.float32)


def level_of(group: Units, hidden: Sequence[Units]) -> str:
    """Return which part of the code the forward codes of a group enter."""
    if group.heads:
        return "heads"
    if group.gauge is Gauge.NAMED:
        return "last"
    return "first" if group.depth == hidden[0].depth else "inner"


def kernel_mean(
    directions: NDArray[np.float64], bandwidth: float, features: int, *, even: bool = False
) -> NDArray[np.float64]:
    """Return the mean random features of codes of unit length, (features,).

    Args:
        directions: (units, 64); rows of zeros are left out.
        bandwidth: σ of the kernel.
        features: Numbers, half of them cosines and half sines.
        even: Whether a code stands for its negative too; then the sines are zero.
    """
    alive = directions[np.any(directions != 0, axis=1)]
    if len(alive) == 0:
        return np.zeros(features)
    phase = alive @ _frequencies(features // 2) / bandwidth
    odd = np.zeros(phase.shape) if even else np.sin(phase)
    return np.asarray(np.concatenate([np.cos(phase), odd], axis=1).mean(axis=0))


@lru_cache(maxsize=4)
def _frequencies(count: int) -> NDArray[np.float64]:
    return np.random.Generator(np.random.PCG64(20260)).normal(size=(WIDTH, count))


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    length = float(np.linalg.norm(vector))
    return vector / length if length else vector
