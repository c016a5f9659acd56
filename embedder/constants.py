"""Tensors that a formula gives: nobody trained them, so sharing them shows nothing.

Windows, Fourier and mel bases, positional sinusoids, identities and ramps are bit-equal in models
that have nothing else in common (the Fourier basis is 15 to 21 % of the parameters of three
separately trained voice detectors of the corpus). The tests below look at values alone.
"""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

LARGEST = 1 << 23
"""Values of the largest tensor that is looked at: 8 M, a positional table of 8,192 × 1,024."""

_RESIDUAL = 2e-3
"""Largest relative residual of a tone. Tables stored in float16 reach 1.2e-3 (rounding, √6 times
2⁻¹¹/√3 at an amplitude of one half)."""

_NARROW = 0.8
"""Share of a row's energy near its strongest frequency from which a closer look is worth it; a
Hann-windowed tone has .99, white noise of 64 places .25."""


def formula_of(values: NDArray[np.floating]) -> str:
    """Return the name of the formula that gives a tensor, or an empty string.

    Args:
        values: Any shape; axes of length 1 are ignored.

    Returns:
        `all equal`, `zeros and ones`, `ramp`, `sinusoids`, `windowed Fourier basis`,
        `mel filters`, or an empty string.

    Example:
        >>> formula_of(np.eye(5)), formula_of(np.arange(6.0)), formula_of(np.ones((2, 2)))
        ('zeros and ones', 'ramp', 'all equal')
    """
    squeezed = np.squeeze(np.asarray(values, dtype=np.float64))
    if squeezed.size < 2 or squeezed.size > LARGEST or not np.isfinite(squeezed).all():
        return ""
    if squeezed.min() == squeezed.max():
        return "all equal"
    if np.isin(squeezed[..., :64], (0.0, 1.0)).all() and np.isin(squeezed, (0.0, 1.0)).all():
        return "zeros and ones"
    if squeezed.ndim > 2:
        return ""
    return "ramp" if _is_ramp(squeezed) else _basis_of(squeezed)


def _basis_of(squeezed: Matrix) -> str:
    """Return which kind of basis the rows or columns are, or an empty string."""
    if squeezed.ndim < 2 or min(squeezed.shape) < 8:
        return ""
    tests = (
        ("sinusoids", _are_tones),
        ("windowed Fourier basis", _are_windowed_tones),
        ("mel filters", _are_mel_filters),
    )
    for matrix in (squeezed, squeezed.T):
        for name, passes in tests:
            if passes(matrix):
                return name
    return ""


def worth_a_look(part: NDArray[np.floating]) -> bool:
    """Say from some neighbouring places of a tensor whether `formula_of` could find anything.

    It costs a few rows' work where `formula_of` reads everything.

    Args:
        part: Rows of a tensor of two or fewer axes longer than 1; whole rows, not all of them.
    """
    squeezed = np.atleast_2d(np.squeeze(part))
    if squeezed.size < 2 or squeezed.ndim > 2:
        return False
    few = np.asarray(squeezed[:64], dtype=np.float64)
    if not np.isfinite(few).all():
        return False
    if few.shape[0] == 1 and few.shape[1] < 4096:
        return True
    if np.all((few == 0) | (few == 1)) or few.min() == few.max():
        return True
    if few.min() >= 0 and np.mean(few == 0) > 0.3:
        return True
    steps = np.diff(few[:, :64], axis=1)
    if steps.size and np.ptp(steps) <= 1e-3 * np.abs(few).max():
        return True
    return any(_are_narrow(rows) for rows in (few[:16], few[:, :16].T))


def _are_narrow(rows: Matrix) -> bool:
    """Say whether most of each row's energy lies near its strongest frequency."""
    if rows.shape[1] < 16:
        return False
    power = np.abs(np.fft.rfft(rows, axis=1)) ** 2
    peaks = np.argmax(power, axis=1)
    near = np.abs(np.arange(power.shape[1]) - peaks[:, None]) <= 3
    total = np.maximum(power.sum(axis=1), 1e-300)
    return bool(np.median((power * near).sum(axis=1) / total) > _NARROW)


def _is_ramp(values: Matrix) -> bool:
    """A straight line along every axis, of eight places or more along one of them."""
    if values.size < 8:
        return values.ndim == 1 and values.size > 3 and bool(np.ptp(np.diff(values)) == 0)
    scale = np.abs(values).max()
    for axis in range(values.ndim):
        steps = np.diff(values, axis=axis)
        if steps.size and np.ptp(steps) > 1e-6 * scale:
            return False
    return True


def _are_tones(rows: Matrix) -> bool:
    """Say whether each row is a sine or cosine: x[t+1] + x[t−1] is a fixed multiple of x[t]."""
    if rows.shape[1] < 16:
        return False
    live = rows[np.abs(rows).max(axis=1) > 0]
    return len(live) >= 8 and bool(np.all(_tone_residuals(live[:, :]) < _RESIDUAL))


def _tone_residuals(rows: Matrix) -> NDArray[np.float64]:
    middle, sides = rows[:, 1:-1], rows[:, :-2] + rows[:, 2:]
    energy = np.sum(middle**2, axis=1)
    ratio = np.sum(middle * sides, axis=1) / np.where(energy > 0, energy, 1)
    left_over = np.linalg.norm(sides - ratio[:, None] * middle, axis=1)
    return np.asarray(left_over / np.maximum(np.linalg.norm(rows, axis=1), 1e-300))


def _are_windowed_tones(rows: Matrix) -> bool:
    """Say whether the rows are sines and cosines under one common window."""
    if rows.shape[1] < 16 or len(rows) < 16:
        return False
    window = np.sqrt(np.mean(rows**2, axis=0) * 2)
    inside = window > 0.05 * window.max()
    first, last = int(np.argmax(inside)), len(inside) - int(np.argmax(inside[::-1]))
    if last - first < 16 or not inside[first:last].all():
        return False
    flat = rows[:, first:last] / window[first:last]
    live = flat[np.linalg.norm(flat, axis=1) > 1e-3 * np.sqrt(last - first)]
    # The window is estimated from the rows themselves, which leaves a little of it in each.
    return len(live) >= 16 and float(np.quantile(_tone_residuals(live), 0.9)) < 20 * _RESIDUAL


def _are_mel_filters(rows: Matrix) -> bool:
    """Say whether the rows are triangles, each starting where or after the one before does."""
    if rows.min() < 0 or np.mean(rows == 0) < 0.5:
        return False
    live = rows[rows.max(axis=1) > 0]
    if len(live) < 8:
        return False
    starts, peaks = np.argmax(live > 0, axis=1), np.argmax(live, axis=1)
    if np.any(np.diff(starts) < 0) or np.any(np.diff(peaks) < 0):
        return False
    for row, peak in zip(live, peaks, strict=True):
        support = np.flatnonzero(row)
        if len(support) != support[-1] - support[0] + 1:
            return False
        for side in (row[support[0] : peak + 1], row[peak : support[-1] + 1]):
            if len(side) > 2 and np.ptp(np.diff(side)) > 0.02 * row[peak]:
                return False
    return True
