"""Simple codes that others use, for comparison with the encoder on the same queries.

Each takes weights by name and gives numbers for a cosine; none is trained. All of them depend on
the order of hidden units but the last three, and on their scale but the last one.

Sources: statistics of layers, Unterthiner et al. 2020, arXiv 2002.11448; flat weights as Schürholt
et al. 2021, NeurIPS, reduce them; singular values, as in spectral fingerprints; products along the
path, Zeng et al. 2024 (HuRef), NeurIPS.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from embedder.anchors import Units
from embedder.units import Gauge

Values = NDArray[np.floating]
Code = NDArray[np.float64]

_MOST = 4096
"""Numbers of a flat code: longer models are cut, shorter ones filled with zeros."""


def statistics(weights: Mapping[str, Values], units: Sequence[Units]) -> Code:
    """Return mean, deviation and five quantiles of each tensor (StatNN)."""
    del units
    found = []
    for values in weights.values():
        flat = np.asarray(values, np.float64).ravel()
        found += [flat.mean(), flat.std(), *np.quantile(flat, [0, 0.25, 0.5, 0.75, 1])]
    return _filled(np.array(found), 7 * 40)


def flat(weights: Mapping[str, Values], units: Sequence[Units]) -> Code:
    """Return the weights themselves, one after another."""
    del units
    joined = np.concatenate([np.asarray(values, np.float64).ravel() for values in weights.values()])
    return _filled(joined, _MOST)


def singular_values(weights: Mapping[str, Values], units: Sequence[Units]) -> Code:
    """Return the eight largest singular values of each matrix, against their sum."""
    del units
    found: list[float] = []
    for values in weights.values():
        if values.ndim > 1 and values.size:
            matrix = np.asarray(values, np.float64).reshape(len(values), -1)
            largest = np.zeros(8)
            some = np.linalg.svd(matrix, compute_uv=False)[:8]
            largest[: len(some)] = some
            found += list(largest / max(float(largest.sum()), 1e-12))
    return _filled(np.array(found), 8 * 24)


def path_product(weights: Mapping[str, Values], units: Sequence[Units]) -> Code:
    """Return what outputs read of inputs through all layers, as if they were linear."""
    del weights
    total = np.zeros((64, 64))
    for group in units:
        if group.gauge is Gauge.NAMED:
            total += (group.forward * group.read[:, None]).T @ (
                group.backward * group.reach[:, None]
            )
    return total.ravel()


RIVALS: Mapping[str, Callable[[Mapping[str, Values], Sequence[Units]], Code]] = {
    "statistics": statistics,
    "flat": flat,
    "flat PCA": flat,
    "singular values": singular_values,
    "path product": path_product,
}
"""Name → how it codes a model."""

STANDARDISED = frozenset({"statistics", "singular values"})
"""Those whose numbers have units of their own, and are set to mean 0 and deviation 1."""


REDUCED = frozenset({"flat PCA"})
"""Those that are told by their principal components alone."""

_COMPONENTS = 256


def reduced(
    queries: NDArray[np.float32], gallery: NDArray[np.float32]
) -> list[NDArray[np.float32]]:
    """Return both by the 256 principal components of the gallery, as Schürholt et al. 2021 do."""
    mean = gallery.mean(axis=0)
    covariance = np.cov(gallery.T)
    size = len(covariance)
    kept = (max(size - _COMPONENTS, 0), size - 1)
    _, vectors = eigh(covariance, subset_by_index=kept)
    return [np.asarray((rows - mean) @ vectors, np.float32) for rows in (queries, gallery)]


def standardised(
    queries: NDArray[np.float32], gallery: NDArray[np.float32]
) -> list[NDArray[np.float32]]:
    """Return both with the mean and deviation that the gallery has taken out."""
    mean, deviation = gallery.mean(axis=0), np.maximum(gallery.std(axis=0), 1e-6)
    return [(rows - mean) / deviation for rows in (queries, gallery)]


def _filled(numbers: Code, size: int) -> Code:
    """Return the first numbers, filled with zeros up to a size."""
    found = np.zeros(size)
    found[: min(size, len(numbers))] = numbers[:size]
    return found
