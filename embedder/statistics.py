"""Robust statistics of one tensor, taken from its blocks in one pass.

Norm, sum, extremes and zeros are exact, summed in float64; moments, quantiles and the number of
levels come from a sample of at most 4,096 values in up to eight rows.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from embedder.checkpoint import Block, Tensor

_SAMPLED_ROWS = 8
_SAMPLED_COLUMNS = 512
SAMPLE = _SAMPLED_ROWS * _SAMPLED_COLUMNS
"""Most values that moments and quantiles are taken from."""
_PROFILE = np.linspace(0, 1, 8)
_QUANTILES = np.array([0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])


@dataclass(frozen=True, slots=True, eq=False)
class Summary:
    """Statistics of one tensor's finite values.

    Args:
        norm: Euclidean norm, exact to float64.
        mean: Arithmetic mean.
        minimum: Smallest value.
        maximum: Largest value.
        zeros: Share of values that are zero.
        not_finite: Number of values that are NaN or infinite.
        skewness: Third standardised moment of the sample.
        kurtosis: Fourth standardised moment of the sample, less 3.
        levels: Most distinct values in a sampled row; 0 where too few to tell a lattice.
        quantiles: (7,) float32, at .01 .05 .25 .5 .75 .95 .99 of the sample.
        row_norms: (8,) float32, evenly spaced quantiles of the norms along the first axis.
        column_norms: (8,) float32, the same along the second axis.
    """

    norm: float = 0.0
    mean: float = 0.0
    minimum: float = 0.0
    maximum: float = 0.0
    zeros: float = 0.0
    not_finite: int = 0
    skewness: float = 0.0
    kurtosis: float = 0.0
    levels: int = 0
    quantiles: NDArray[np.float32] = field(default_factory=lambda: np.zeros(7, np.float32))
    row_norms: NDArray[np.float32] = field(default_factory=lambda: np.zeros(8, np.float32))
    column_norms: NDArray[np.float32] = field(default_factory=lambda: np.zeros(8, np.float32))


class TensorStatistics:
    """Sums up the statistics of one tensor from its blocks."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._squares = self._sum = 0.0
        self._minimum, self._maximum = np.inf, -np.inf
        self._zeros = 0
        self.not_finite = 0
        self._sample: list[NDArray[np.floating]] = []
        self._rows: list[NDArray[np.float32]] = []
        self._columns: NDArray[np.float64] | None = None

    def add(self, block: Block) -> None:
        """Add the next block."""
        flat = block.values.reshape(-1)
        exact = flat.astype(np.float64, copy=False)
        with np.errstate(invalid="ignore", over="ignore"):
            squares = float(np.dot(exact, exact))
        if not np.isfinite(squares):
            flat = self._finite_part(flat)
            exact = flat.astype(np.float64, copy=False)
            squares = float(np.dot(exact, exact))
        self._squares += squares
        self._sum += float(exact.sum())
        if flat.size:
            self._minimum = min(self._minimum, float(flat.min()))
            self._maximum = max(self._maximum, float(flat.max()))
        self._zeros += flat.size - int(np.count_nonzero(flat))
        if self.not_finite == 0:
            self._add_profiles(block)
            if len(self._sample) < _SAMPLED_ROWS:
                self._add_sample(block)

    def _finite_part(self, flat: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return the values that can be counted, and count the others."""
        kept = np.isfinite(flat)
        # Finite float64 values whose squares overflow are as useless as infinite ones.
        kept &= np.abs(np.where(kept, flat, 0)) < np.float64(1e150)
        self.not_finite += flat.size - int(kept.sum())
        return np.asarray(flat[kept])

    def _add_profiles(self, block: Block) -> None:
        if block.prefix or len(self._tensor.shape) < 2:
            return
        part = block.values.reshape(len(block.values), -1).astype(np.float32, copy=False)
        with np.errstate(over="ignore"):
            squares = part * part
        self._rows.append(squares @ np.ones(squares.shape[1], np.float32))
        if self._columns is None:
            self._columns = np.zeros(squares.shape[1], np.float64)
        self._columns += np.ones(len(squares), np.float32) @ squares

    def _add_sample(self, block: Block) -> None:
        rows = block.values.reshape(len(block.values), -1)
        if len(self._tensor.shape) < 2:
            rows = rows.reshape(1, -1)
        stride = max(1, rows.shape[1] // _SAMPLED_COLUMNS)
        places = np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLED_ROWS)).astype(int)
        self._sample.extend(rows[places, ::stride][:, :_SAMPLED_COLUMNS])

    def result(self) -> Summary:
        """Return the statistics of everything added."""
        count = self._tensor.size - self.not_finite
        if count <= 0 or not np.isfinite(self._minimum):
            return Summary(not_finite=self.not_finite)
        sample = np.concatenate([row.astype(np.float64) for row in self._sample] or [np.zeros(1)])
        with np.errstate(over="ignore", invalid="ignore"):
            skewness, kurtosis = _moments(sample)
            rows, columns = self._profiles()
            return Summary(
                norm=float(np.sqrt(self._squares)),
                mean=self._sum / count,
                minimum=float(self._minimum),
                maximum=float(self._maximum),
                zeros=self._zeros / count,
                not_finite=self.not_finite,
                skewness=skewness,
                kurtosis=kurtosis,
                levels=max((_levels(row) for row in self._sample[:4]), default=0),
                quantiles=_at(np.sort(sample), _QUANTILES),
                row_norms=rows,
                column_norms=columns,
            )

    def _profiles(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the norm profiles along the first two axes of out × in × space."""
        if not self._rows or self._columns is None:
            return np.zeros(8, np.float32), np.zeros(8, np.float32)
        shape, order = self._tensor.shape, self._tensor.order
        along = {0: np.concatenate(self._rows).astype(np.float64)}
        rest = self._columns.reshape(shape[1:])
        for axis in range(1, len(shape)):
            others = tuple(other - 1 for other in range(1, len(shape)) if other != axis)
            along[axis] = rest.sum(axis=others)
        profiles = [_at(np.sort(np.sqrt(along[axis])), _PROFILE) for axis in order[:2]]
        return profiles[0], profiles[1]


def _at(sorted_values: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the values at given shares of a sorted array, without interpolation."""
    places = np.round(shares * (len(sorted_values) - 1)).astype(int)
    return np.asarray(sorted_values[places], dtype=np.float32)


def _moments(sample: NDArray[np.float64]) -> tuple[float, float]:
    centred = sample - sample.mean()
    variance = float(np.mean(centred**2))
    if not variance > 0:
        return 0.0, 0.0
    skewness = float(np.mean(centred**3)) / variance**1.5
    return skewness, float(np.mean(centred**4)) / variance**2 - 3.0


def _levels(row: NDArray[np.floating]) -> int:
    """Return the number of distinct values, or 0 if the row is too short to tell a lattice."""
    if row.size < 64:
        return 0
    ordered = np.sort(row)
    return 1 + int(np.count_nonzero(np.diff(ordered)))
