"""From an open checkpoint to its identity code: describe it, code its units, take their mean."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import as_file, files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.anchors import Units, anchored
from embedder.architecture import Architecture
from embedder.checkpoint import Checkpoint, Tensor
from embedder.describing import describe
from embedder.errors import ArchitectureError, CheckpointError, MissingExtraError
from embedder.identity import (
    FEATURES,
    PARTS,
    IdentityCode,
    IdentityCoder,
    Sum,
    Tokens,
    is_hidden,
    tokens_of,
)
from embedder.matching import of_pieces, turned
from embedder.plain import ENCODER, plain_code
from embedder.products import THREADS, in_order

LARGEST = 1 << 20
"""Values of the largest tensor that is read as a whole and multiplied in float64: 8 MB. Others are
multiplied block by block in two threads."""

_MANY = 1 << 15
"""Units of a model from which they are taken a few at a time."""
_UNITS_AT_ONCE = 1 << 10
"""Units whose features are in memory at once: 1 MB of float32 for each of four arrays."""


class _Weights(Mapping[str, NDArray[np.floating] | Tensor]):
    """The tensors of a checkpoint: small ones as values, read as they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> NDArray[np.floating] | Tensor:
        tensor = self._tensors[name]
        return tensor.read() if tensor.size <= LARGEST else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True, slots=True, eq=False)
class Described:
    """What is known of a model's insides: small, and it takes all weights to make.

    Args:
        architecture: How its tensors hang together.
        units: The codes of its hidden units.
    """

    architecture: Architecture
    units: Sequence[Units]

    @property
    def unknown(self) -> frozenset[str]:
        """Groups of which it is not known what is applied to them: it may be odd, as tanh is."""
        groups = self.architecture.groups.values()
        return frozenset(group.name for group in groups if group.activation == "unknown")


def described(checkpoint: Checkpoint, architecture: Architecture | None = None) -> Described:
    """Return what is known of a model's insides.

    Args:
        checkpoint: The model.
        architecture: How its tensors hang together, if that has been told already.

    Raises:
        ArchitectureError: As `units_of`.
        CheckpointError: A tensor cannot be read.
    """
    architecture = describe(checkpoint) if architecture is None else architecture
    return Described(architecture, units_of(checkpoint, architecture))


def units_of(checkpoint: Checkpoint, architecture: Architecture | None = None) -> list[Units]:
    """Return the codes of a model's hidden units.

    Args:
        checkpoint: The model.
        architecture: How its tensors hang together, if that has been told already.

    Raises:
        ArchitectureError: It is not known how its tensors hang together, or it has too many units,
            or values that no code can be made of.
        CheckpointError: A tensor cannot be read.
    """
    architecture = describe(checkpoint) if architecture is None else architecture
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return anchored(_Weights(tensors), architecture, shapes=shapes)


def identity_code(units: Sequence[Units]) -> IdentityCode:
    """Return the identity code of a model by the encoder that ships with this program.

    Args:
        units: The codes of its units, what `units_of` returns.

    Raises:
        ArchitectureError: The model has no hidden units, or its code is not finite.
    """
    coder = shipped_coder()
    vector, kept = code_of(coder, units)
    if not np.isfinite(vector).all():
        raise ArchitectureError("its code is not finite: weights are too large to compute with")
    if not vector.any():
        raise ArchitectureError("the model has no hidden units that read a named input")
    return IdentityCode(coder.version, vector, kept)


def code_of(
    coder: IdentityCoder, units: Sequence[Units]
) -> tuple[NDArray[np.float32], dict[str, Tokens]]:
    """Return the code of a model by its units, and those units that are matched one by one.

    The units of a large model are taken a few at a time.

    Args:
        coder: The encoder.
        units: What `anchored` returns.
    """
    if sum(len(group.forward) for group in units) <= _MANY:
        tokens = tokens_of(units)
        return coder.code_of(tokens), turned(tokens, coder)
    sums = {part: (np.zeros(FEATURES), 0) for part in PARTS}
    kept: dict[str, Tokens] = {}

    def work(piece: Sequence[Units]) -> tuple[list[tuple[str, int, Sum]], dict[str, Tokens]]:
        tokens = tokens_of(piece)
        added = [
            (part, len(tokens[part].even), coder.sum_of(part, tokens[part]))
            for part in PARTS
            if len(tokens[part].even)
        ]
        return added, turned(tokens, coder)

    for found, some in in_order(work, _pieces(units), THREADS):
        for part, count, added in found:
            total, known = sums[part]
            sums[part] = total + added, known + count
        kept = of_pieces([kept, some])
    return coder.code_of_sums(sums), kept


def _pieces(units: Sequence[Units]) -> Iterator[list[Units]]:
    """Yield a few units at a time, behind the emptied groups that say where a model ends.

    Streams, which are short, come together: they are matched by one moment of them all.
    """
    by_depth = sorted(filter(is_hidden, units), key=lambda group: group.depth)
    ends = [_cut(group, 0, 0) for group in (*by_depth[:1], *by_depth[-1:])]
    yield [*ends, *(group for group in units if group.stream)]
    for group in units:
        if group.stream:
            continue
        for first in range(0, len(group.forward), _UNITS_AT_ONCE):
            yield [*ends, _cut(group, first, first + _UNITS_AT_ONCE)]


def _cut(group: Units, first: int, last: int) -> Units:
    """Return some of a group's units."""
    forward, backward = group.forward[first:last], group.backward[first:last]
    return replace(group, forward=forward, backward=backward)


def coded(checkpoint: Checkpoint) -> tuple[IdentityCode | None, Described | None]:
    """Return the code by which a model is searched, and what it was made of.

    That is its identity code or, where its architecture is not known, the plain one; None where it
    can have neither.
    """
    try:
        try:
            architecture = describe(checkpoint)
        except ArchitectureError:
            return plain_code(checkpoint), None
        known = described(checkpoint, architecture)
        return identity_code(known.units), known
    except (ArchitectureError, CheckpointError, MissingExtraError):
        return None, None


def current_encoders() -> frozenset[str]:
    """Return the names of the encoders whose codes this program makes."""
    return frozenset({shipped_coder().version, ENCODER})


_PRETRAINED = files("embedder").joinpath("pretrained")


@lru_cache(maxsize=1)
def shipped_coder() -> IdentityCoder:
    """Return the encoder in this package."""
    with as_file(_PRETRAINED.joinpath("identity.safetensors")) as path:
        return IdentityCoder.load(path)


def shipped_card() -> dict[str, Any]:
    """Return what is known of its training."""
    card: dict[str, Any] = json.loads(_PRETRAINED.joinpath("identity.json").read_text("utf-8"))
    return card
