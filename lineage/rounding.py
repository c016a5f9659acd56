"""What rounding explains of the difference of weights that were turned or rescaled.

Both move values off the numbers that a type can hold, or off the lattice of a quantisation.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from embedder.checkpoint import Tensor
from embedder.encoding import PLAIN
from embedder.symmetry import Values
from lineage.operations import is_on_lattice

_ROUNDED = {"float64": 1e-6, "float32": 1e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Stored type → relative error of a tensor that was turned or rescaled which rounding explains:
twice the largest that rounding to nearest makes, as scales and bases of heads amplify it (seen:
.0029 of .0039 in a rotated and rescaled copy); of wide types what turning there and back leaves."""


def but_for_rounding(
    ours: Mapping[str, Values],
    theirs: Mapping[str, Values],
    stored: Mapping[str, Tensor],
    tensors: Sequence[Tensor],
) -> Iterator[tuple[str, Values]]:
    """Yield the tensors that differ from the first's by no more than their types round away.

    To turn weights, or to rescale them, rounds them anew, and not to what the first's are rounded
    to; so they are given the first's values, rounded as the second's are stored.

    Args:
        ours: The weights of the first, by the names of the second's, of the same shapes.
        theirs: Those of the second, turned back.
        stored: The tensors of the first, by the names of the second's.
        tensors: Those of the second.
    """
    for tensor in tensors:
        name = tensor.name
        if name in ours:
            types = [str(PLAIN.get(side.encoding.name)) for side in (tensor, stored[name])]
            limit = max(_ROUNDED.get(dtype, 0.0) for dtype in types)
            apart = np.linalg.norm(theirs[name].astype(np.float64) - ours[name])
            if 0 < apart <= limit * np.linalg.norm(ours[name].astype(np.float64)):
                dtype = types[0] if types[0] in _ROUNDED else "float32"
                yield name, ours[name].astype(dtype).astype(np.float32)


def on_lattices(ours: Mapping[str, Values], tensors: Sequence[Tensor]) -> frozenset[str]:
    """Return the names of those of the second's tensors that lie on lattices as they are stored.

    Args:
        ours: The weights of the first, by the names of the second's, of the same shapes.
        tensors: Those of the second.
    """
    return frozenset(
        tensor.name
        for tensor in tensors
        if tensor.name in ours
        and len(tensor.shape) > 1
        and is_on_lattice(tensor.read(), ours[tensor.name])
    )
