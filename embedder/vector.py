"""One vector for a whole model, so that relatives have a large inner product.

Each counted tensor gives its sketch, centred and scaled to √size; tensors of one *group* are
added up, and each group is spread over the vector by its own random signs. The inner product of
two vectors then estimates the size-weighted mean of the cosines of corresponding tensors, and
needs no correspondence: of the cross terms between tensors of one group only noise is left.
A group is the shape without its longest axis, so a vocabulary may grow.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from embedder.sketch import sketch_of_ones, transposed

if TYPE_CHECKING:
    from embedder.fingerprint import TensorPrint

DIMENSION = 1024
"""4 KB a model. The inner product of strangers of equal shapes has a standard deviation of .05 to
.08, most of it from the sketches of a few large tensors."""


def model_vector(tensors: "Sequence[TensorPrint]") -> NDArray[np.float32]:
    """Return the vector of a model, (1024,) float32 of unit length, or zeros if nothing counts."""
    groups: dict[tuple[int, ...], NDArray[np.float64]] = {}
    for tensor in tensors:
        if not tensor.counted or tensor.sketch.size == 0:
            continue
        numbers = centred_sketch(tensor)
        length = float(np.linalg.norm(numbers))
        if length == 0:
            continue
        shape = tensor.squeezed
        order = tuple(int(axis) for axis in np.argsort([-n for n in shape], kind="stable"))
        numbers = transposed(numbers, shape, order)
        group = (len(shape), *sorted(shape)[:-1], numbers.size)
        total = groups.setdefault(group, np.zeros(numbers.size))
        total += numbers * (np.sqrt(tensor.size) / length)
    vector = np.zeros(DIMENSION)
    for group, total in groups.items():
        places, coins = _spread(group, total.size)
        np.add.at(vector, places, coins * total)
    length = float(np.linalg.norm(vector))
    return np.asarray(vector / length if length else vector, dtype=np.float32)


def centred_sketch(tensor: "TensorPrint") -> NDArray[np.float32]:
    """Return the sketch of a tensor after its mean is taken off."""
    shape = tensor.squeezed
    centred = tensor.sketch - np.float32(tensor.summary.mean) * sketch_of_ones(shape)
    return np.asarray(centred, dtype=np.float32)


def _spread(group: tuple[int, ...], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the numbers of a group go in the vector, and with which signs."""
    seed = int.from_bytes(blake2b(repr(group).encode(), digest_size=8).digest(), "little")
    rng = np.random.Generator(np.random.PCG64(seed))
    return rng.integers(0, DIMENSION, count), rng.integers(0, 2, count) * 2 - 1
