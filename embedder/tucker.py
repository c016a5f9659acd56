"""Numbers of an attention's heads taken as one tensor: its singular values along each mode.

The score matrices of the heads, heads × codes × codes, are unfolded along each of the three modes.
The singular values of the unfoldings are the norms of the slices of the core of the higher-order
singular value decomposition: how many kinds of heads there are, and in how many directions they
look for queries and keys. No order of the heads changes them, and what the matrices are products of
does not either.

Source:
    De Lathauwer, De Moor, Vandewalle 2000, SIAM J. Matrix Anal. Appl. 21, property 3: a multilinear
    singular value decomposition, in the form of Tucker 1966.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEADING = 4
"""Singular values that are kept of each mode; attentions of the zoo have two heads."""
SPECTRUM = 3 * LEADING + 1
"""Numbers of a head: the spectra of the three modes, which all share, and its own share."""


def head_spectrum(scores: Array) -> Array:
    """Return what the score matrices of an attention are like together, for each head.

    Args:
        scores: (heads, n, m), one matrix for each head.

    Returns:
        (heads, 13): the four leading singular values of each mode over the norm of all, then the
        head's norm over the root mean square of all heads. Zeros where all scores are zero.

    Example:
        >>> one = np.outer([1.0, 0.0], [0.0, 2.0])
        >>> head_spectrum(np.stack([one, one])).round(2)[0]
        array([1., 0., 0., 0., 1., 0., 0., 0., 1., 0., 0., 0., 1.])
    """
    norms = np.linalg.norm(scores, axis=(1, 2))
    total = float(np.linalg.norm(norms))
    if total == 0:
        return np.zeros((len(scores), SPECTRUM))
    modes = [_leading(scores, mode) / total for mode in range(3)]
    own = norms / total * np.sqrt(len(norms))
    return np.column_stack([np.tile(np.concatenate(modes), (len(norms), 1)), own])


def _leading(tensor: Array, mode: int) -> Array:
    """Return the leading singular values of an unfolding, with zeros where it has fewer."""
    unfolded = np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)
    # The small side is at most 64 or the heads, the other their product: the Gram matrix is enough.
    squares = np.linalg.eigvalsh(unfolded @ unfolded.T)[::-1][:LEADING]
    values = np.sqrt(np.maximum(squares, 0))
    return np.pad(values, (0, LEADING - len(values)))
