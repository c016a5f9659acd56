"""From an open checkpoint to its identity code: describe it, code its units, take their mean."""

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.resources import as_file, files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.anchors import Units, anchored
from embedder.checkpoint import Checkpoint, Tensor
from embedder.describing import describe
from embedder.errors import ArchitectureError, CheckpointError, MissingExtraError
from embedder.identity import IdentityCode, IdentityCoder

LARGEST = 20_000_000
"""Values of the largest tensor that is read as a whole: 160 MB as float64."""


class _Weights(Mapping[str, NDArray[np.floating]]):
    """The tensors of a checkpoint, read as they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> NDArray[np.floating]:
        tensor = self._tensors[name]
        if tensor.size > LARGEST:
            raise ArchitectureError(f"{name}: has {tensor.size:,} values, more than {LARGEST:,}")
        return tensor.read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def units_of(checkpoint: Checkpoint) -> list[Units]:
    """Return the codes of a model's hidden units.

    Raises:
        ArchitectureError: It is not known how its tensors hang together, or it is too large.
        CheckpointError: A tensor cannot be read.
    """
    architecture = describe(checkpoint)
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return anchored(_Weights(tensors), architecture, shapes=shapes)


def identity_code(checkpoint: Checkpoint) -> IdentityCode:
    """Return the identity code of a model by the encoder that ships with this program.

    Raises:
        ArchitectureError: As `units_of`; or the model has no hidden units.
        CheckpointError: A tensor cannot be read.
    """
    coder = shipped_coder()
    vector = coder.code(units_of(checkpoint))
    if not vector.any():
        raise ArchitectureError("the model has no hidden units that read a named input")
    return IdentityCode(coder.version, vector)


def code_or_none(checkpoint: Checkpoint) -> IdentityCode | None:
    """Return the identity code of a model, or None where it cannot have one."""
    try:
        return identity_code(checkpoint)
    except (ArchitectureError, CheckpointError, MissingExtraError):
        return None


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
