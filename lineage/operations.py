"""What was done to a tensor to make another of it, told from the values of both.

Each test is deterministic: it finds the values equal once its operation is undone, or it does not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from embedder.fingerprint import TensorPrint

Array = NDArray[np.floating]

KIN = 0.3
"""Cosine below which only the tests run that need no likeness in place."""

_ROUNDING = 2e-5
"""Largest relative residual that arithmetic in float32 leaves: a scale folded into a weight is one
multiplication (6e-8), and exporters fold through square roots and quotients (seen: 2e-6)."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What alone turns one tensor into another.

    Args:
        name: `turned`, `reordered`, `rounded`, `cast`, `rescaled`, `quantised` or `pruned`.
        detail: More of it, in words.
        child: Which of the two it was applied to: `first`, `second`, or empty if that cannot
            be told.
    """

    name: str
    detail: str = ""
    child: str = ""


Prints = tuple[TensorPrint, TensorPrint]


def operation_between(x: Array, y: Array, prints: Prints, cosine: float) -> Operation | None:
    """Return the operation that alone turns one tensor into the other.

    Args:
        x: The first tensor.
        y: The second, of equal shape, its axes in the first's order.
        prints: The records of both.
        cosine: Their cosine.

    Returns:
        The operation, or None where nothing fits.
    """
    likely: list[Callable[[Array, Array, Prints], Operation | None]] = [
        _equal,
        _cast,
        _quantised,
        _pruned,
    ]
    for test in [*(likely if cosine > KIN else []), _rescaled, _reordered]:
        found = test(x, y, prints)
        if found is not None:
            return found
    return None


def operation_by_type(prints: Prints, step: float) -> Operation | None:
    """Return the operation that the stored types suggest where values are not at hand.

    Args:
        prints: The records of both tensors.
        step: ‖Y − X‖ / ‖X‖, estimated from sketches.
    """
    first, second = prints
    if first.quantised != second.quantised and step < _LARGEST_QUANTISATION_ERROR:
        child, dtype = ("second", second.dtype) if second.quantised else ("first", first.dtype)
        return Operation("quantised", f"{dtype}, relative error about {step:.3f}", child)
    digits = {"F32": 24, "F64": 53, "F16": 11, "BF16": 8}
    ours, theirs = digits.get(first.narrow, 0), digits.get(second.narrow, 0)
    if ours and theirs and ours != theirs and step < 2.0 ** -min(ours, theirs):
        child = "second" if theirs < ours else "first"
        return Operation("cast", f"rounded to {prints[child == 'second'].narrow}", child)
    return None


def _equal(x: Array, y: Array, prints: Prints) -> Operation | None:
    return Operation("turned", "in another order of axes") if np.array_equal(x, y) else None


def _cast(x: Array, y: Array, prints: Prints) -> Operation | None:
    """One is the other rounded to a narrower type."""
    for wide, narrow, child in ((x, y, "second"), (y, x, "first")):
        for name, dtype in (("F16", np.float16), ("BF16", ml_dtypes.bfloat16)):
            with np.errstate(over="ignore"):
                rounded = wide.astype(dtype).astype(np.float64)
            if np.array_equal(rounded, narrow):
                return Operation("cast", f"rounded to {name}", child)
    if np.allclose(x, y, rtol=1e-6, atol=1e-9 * float(np.abs(x).max())):
        return Operation("rounded", "equal to the rounding of float32")
    return None


ON_LATTICE = "on a lattice"
"""Detail of a pair of which one tensor is quantised and more was done between them."""


def is_on_lattice(coarse: Array, smooth: Array) -> bool:
    """Say whether one tensor lies on a lattice, on which the other does not."""
    return _lattice(coarse, smooth) > 0


def coarser(x: Array, y: Array, prints: Prints) -> str:
    """Return which of two tensors alone lies on a lattice: `first`, `second` or empty."""
    for coarse, smooth, theirs, ours, child in (
        (y, x, prints[1], prints[0], "second"),
        (x, y, prints[0], prints[1], "first"),
    ):
        if (theirs.quantised and not ours.quantised) or _lattice(coarse, smooth):
            return child
    return ""


def _quantised(x: Array, y: Array, prints: Prints) -> Operation | None:
    """One lies on a lattice, and the other within about half a step of it."""
    for smooth, coarse, ours, theirs, child in (
        (x, y, prints[0], prints[1], "second"),
        (y, x, prints[1], prints[0], "first"),
    ):
        stored = theirs.quantised and not ours.quantised
        run = _lattice(coarse, smooth)
        if not stored and not run:
            continue
        step = _steps(coarse, run)
        apart = np.abs(smooth - coarse)
        # Half a step, and a little for scales rounded to float16. The outermost levels may be
        # clipped, so a few values in a thousand may lie farther off.
        if np.mean(apart <= 0.55 * step) > 0.99:
            return Operation("quantised", theirs.dtype if stored else "values on a lattice", child)
        relative = float(np.linalg.norm(apart)) / max(float(np.linalg.norm(smooth)), 1e-300)
        if stored and relative < _LARGEST_QUANTISATION_ERROR:
            what = "values on a lattice" if theirs.dtype in _FLOATS else theirs.dtype
            return Operation("quantised", f"{what}, relative error {relative:.3f}", child)
    return None


_FLOATS = ("F32", "F16", "BF16")
"""Types in which values that were on a lattice lie once they are turned or rescaled."""

_LARGEST_QUANTISATION_ERROR = 0.13
"""Relative error of round-to-nearest with 4 bits (.118) and less for every finer type, as measured
for Q8_0 (.005) to NF4 (.092) in the scout notes of `lineage-methods`."""


def _lattice(coarse: Array, smooth: Array) -> int:
    """Return how many neighbouring values share a scale: a row's length, 32, or 0 for no lattice.

    The other must lie on none, or both are coarse and neither was made from the other by rounding.
    """
    rows, others = (values.reshape(len(values), -1)[:32, :4096] for values in (coarse, smooth))
    if rows.shape[1] >= 16 and _share_even(rows, 256) > 0.9 and _share_even(others, 256) < 0.5:
        return coarse.size // len(coarse)
    if rows.shape[1] % _GROUP:
        return 0
    grouped = [values.reshape(-1, _GROUP)[:256] for values in (rows, others)]
    return _GROUP if _share_even(grouped[0], 16) > 0.9 > 0.5 > _share_even(grouped[1], 16) else 0


_GROUP = 32
"""Values that share a scale in the common 4-bit types."""


def _share_even(rows: Array, levels: int) -> float:
    """Return the share of rows whose values are whole multiples of one step apart.

    Args:
        rows: (rows, values).
        levels: Most levels between the smallest and the largest value.
    """
    ordered = np.sort(rows.astype(np.float64), axis=1)
    gaps = np.diff(ordered, axis=1)
    reach = ordered[:, -1:] - ordered[:, :1]
    gaps = np.where(gaps > 1e-5 * reach, gaps, np.inf)
    smallest = gaps.min(axis=1, keepdims=True, initial=np.inf)
    even = np.zeros(len(rows), bool)
    for part in (1, 2, 3):  # the smallest gap that occurs may be a few steps
        step = smallest / part
        with np.errstate(invalid="ignore", divide="ignore"):
            places = (ordered - ordered[:, :1]) / step
            off = np.abs(places - np.round(places)).max(axis=1)
        even |= (off < 0.05) & (places[:, -1] <= levels) & np.isfinite(smallest[:, 0])
    return float(np.mean(even))


def _steps(coarse: Array, run: int) -> Array:
    """Return the smallest gap between the levels of each run of values, for every value.

    Args:
        coarse: Values on a lattice.
        run: How many share a scale; 0 for a row.
    """
    runs = coarse.reshape(-1, run or coarse.size // len(coarse))
    gaps = np.diff(np.sort(runs, axis=1), axis=1)
    scale = np.abs(runs).max(axis=1, keepdims=True)
    gaps = np.where(gaps > 1e-6 * scale, gaps, np.inf)
    step = gaps.min(axis=1, initial=np.inf)
    step = np.where(np.isfinite(step), step, 0.0)
    return np.broadcast_to(step[:, None], runs.shape).reshape(coarse.shape)


def _pruned(x: Array, y: Array, prints: Prints) -> Operation | None:
    """One is the other with values set to zero."""
    for whole, thinned, child in ((x, y, "second"), (y, x, "first")):
        set_to_zero = (thinned == 0) & (whole != 0)
        share = float(np.mean(set_to_zero))
        if share > 0 and np.array_equal(whole[~set_to_zero], thinned[~set_to_zero]):
            return Operation("pruned", f"{share:.0%} of the values set to zero", child)
    return None


def _rescaled(x: Array, y: Array, prints: Prints) -> Operation | None:
    """Every value is multiplied by a factor of its row and one of its column.

    A norm folded into a convolution scales rows; a rescaled hidden unit a row of one tensor and a
    column of the next. The columns' factors are read off one row, the rows' follow as medians, and
    the fit must hold for all values.
    """
    if x.ndim < 2:
        return None
    a, b = (part.reshape(*part.shape[:2], -1)[:512, :512].astype(np.float64) for part in (x, y))
    rows, columns, _ = a.shape
    if a.size < rows + columns + _SURPLUS:
        return None  # so few values would fit whatever they are
    live = (a != 0) & (b != 0)
    if np.mean((a != 0) == (b != 0)) < 0.999:
        return None
    ratio = np.divide(b, a, out=np.full_like(a, np.nan), where=live)
    pivot = int(np.argmax(live.sum(axis=(1, 2))))
    by_column = _median(ratio[pivot], axis=1)  # (columns,)
    by_row = _median((ratio / by_column[:, None]).reshape(rows, -1), axis=1)  # (rows,)
    fitted = a * by_row[:, None, None] * by_column[:, None]
    close = np.abs(b - fitted) <= _ROUNDING * np.maximum(np.abs(b), 1e-3 * np.abs(b).max())
    if np.mean(close) < 0.999:
        return None
    spread = {
        name: float(factors.max() - factors.min()) / float(np.abs(factors).max())
        for name, factors in (("rows", by_row), ("columns", by_column))
    }
    words = " and ".join(name for name, width in spread.items() if width > 1e-3)
    return Operation("rescaled", f"{words or 'all values'} scaled")


_SURPLUS = 16
"""Values beyond the number of factors from which a fit to 2e-5 is no accident."""


def _median(values: Array, axis: int) -> Array:
    """Return medians over the numbers that are not NaN; 1 where there is none."""
    empty = np.isnan(values).all(axis=axis)
    safe = np.where(np.expand_dims(empty, axis), 1.0, values)
    return np.asarray(np.nanmedian(safe, axis=axis))


def _reordered(x: Array, y: Array, prints: Prints) -> Operation | None:
    """Rows or columns, or both, stand in another order, as permuted units and gates do."""
    if x.ndim == 1 and np.array_equal(np.sort(x), np.sort(y)):
        return Operation("reordered", "values in another order")
    if x.ndim < 2:
        return None
    energies = (
        float(np.sum(np.square(x, dtype=np.float64))),
        float(np.sum(np.square(y, dtype=np.float64))),
    )
    if abs(energies[0] - energies[1]) > 1e-9 * max(energies) or x.max() != y.max():
        return None
    # The two longest axes are those of units, wherever a layout puts its kernels.
    order = sorted(range(x.ndim), key=lambda axis: -x.shape[axis])
    if order[:2] not in ([0, 1], [1, 0]):
        x, y = x.transpose(order), y.transpose(order)
    if _same_pieces(x, y, 0, in_order=True):
        return Operation("reordered", "rows in another order")
    if _same_pieces(x, y, 1, in_order=True):
        return Operation("reordered", "columns in another order")
    if all(_same_pieces(x, y, axis, in_order=False) for axis in (0, 1)):
        return Operation("reordered", "rows and columns in another order")
    return None


def _same_pieces(x: Array, y: Array, axis: int, *, in_order: bool) -> bool:
    """Say whether two tensors have the same slices along an axis, in whatever order."""
    found = []
    for values in (x, y):
        pieces = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
        pieces = np.ascontiguousarray(pieces if in_order else np.sort(pieces, axis=1))
        found.append(sorted(piece.tobytes() for piece in pieces))
    return found[0] == found[1]
