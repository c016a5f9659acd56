"""Which rows and columns two tensors of different shape have in common."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

_VOTES = 48
"""Values of a row that are looked up to find the row it came from."""


def matched_parts(x: Array, y: Array, axes: tuple[int, ...]) -> tuple[Array, Array, str]:
    """Return the parts of two tensors that correspond, and how they were found.

    Along one axis slices are matched by equal values; where fewer than half are equal, by place
    from the start, as an extended vocabulary has them. Along two axes one tensor must be the other
    with rows and columns taken out, equal to the last bit; otherwise the parts are empty.

    Args:
        x: One tensor.
        y: Another, of equal length along all axes but these.
        axes: The axes along which their lengths differ: one, or the first two.
    """
    if len(axes) == 1:
        return _along_one(x, y, axes[0])
    small_first = x.size < y.size
    small, large = (x, y) if small_first else (y, x)
    block = _block_of(small, large)
    if block is None:
        return x[:0], y[:0], "neither is the other with rows and columns taken out"
    rows, columns = block
    part = large[np.ix_(rows, columns)]
    taken = f"{len(large) - len(rows)} rows and {large.shape[1] - len(columns)} columns taken out"
    return (small, part, taken) if small_first else (part, small, taken)


def _along_one(x: Array, y: Array, axis: int) -> tuple[Array, Array, str]:
    x, y = np.moveaxis(x, axis, 0), np.moveaxis(y, axis, 0)
    places: dict[bytes, list[int]] = {}
    for place, piece in enumerate(y):
        places.setdefault(_bytes_of(piece), []).append(place)
    ours, theirs = [], []
    for place, piece in enumerate(x):
        found = places.get(_bytes_of(piece))
        if found:
            ours.append(place)
            theirs.append(found.pop(0))
    shorter = min(len(x), len(y))
    if len(ours) >= max(1, shorter // 2):
        detail = f"{len(ours)} of {shorter} slices along axis {axis} are equal"
        return x[ours], y[theirs], detail
    return x[:shorter], y[:shorter], f"the first {shorter} slices along axis {axis}"


def _bytes_of(piece: Array) -> bytes:
    return np.ascontiguousarray(piece, np.float32).tobytes()


def _block_of(small: Array, large: Array) -> tuple[NDArray[np.intp], NDArray[np.intp]] | None:
    """Return the rows and columns of the larger tensor that make up the smaller, or None."""
    if small.shape[0] > large.shape[0] or small.shape[1] > large.shape[1]:
        return None
    rows = _origins(small, large, 0)
    columns = None if rows is None else _origins(small, large, 1)
    if rows is None or columns is None:
        return None
    return (rows, columns) if np.array_equal(large[np.ix_(rows, columns)], small) else None


def _origins(small: Array, large: Array, axis: int) -> NDArray[np.intp] | None:
    """Return for each slice of one tensor the slice of the other that shares most values with it.

    None if a slice shares too few, or two come from one.
    """
    pieces = np.moveaxis(small, axis, 0).reshape(small.shape[axis], -1)
    others = np.moveaxis(large, axis, 0).reshape(large.shape[axis], -1)
    values = others.reshape(-1)
    stride = max(1, pieces.shape[1] // _VOTES)
    wanted = pieces[:, ::stride][:, :_VOTES]
    if not np.isin(wanted[0], values).any():
        return None  # strangers, the common case, are told apart by a few values
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    at = np.minimum(np.searchsorted(ranked, wanted), len(ranked) - 1)
    equal = (ranked[at] == wanted) & (wanted != 0)
    origin = order[at] // others.shape[1]
    found = np.empty(len(pieces), np.intp)
    for place in range(len(pieces)):
        votes = origin[place][equal[place]]
        if votes.size < min(4, wanted.shape[1]):
            return None
        found[place] = np.bincount(votes).argmax()
    return found if len(set(found.tolist())) == len(found) else None
