"""A tensor whose bytes lie somewhere as they are, its shape checked against them."""

import math
from collections.abc import Sequence

from embedder.checkpoint import Kind, Tensor, kind_of
from embedder.encoding import Encoding
from embedder.errors import MalformedError
from embedder.storage import Storage

_MOST_AXES = 32  # numpy allows 64; no format here writes more than a handful
_MOST_VALUES = 1 << 60  # beyond it numpy cannot even name the shape of an empty array


def stored_tensor(
    location: object,
    name: str,
    shape: Sequence[int],
    *,
    encoding: Encoding,
    storage: Storage,
    kind: Kind | None = None,
    axes: tuple[int, ...] = (),
) -> Tensor:
    """Return a tensor over stored bytes, after checking that its shape takes just these.

    Args:
        location: The file, for the error message.
        name: Its name in the file.
        shape: Its shape in stored order, as the file gives it.
        encoding: How stored bytes become values.
        storage: Where the bytes are.
        kind: What it is for; guessed from shape and name where it is not known.
        axes: The order that brings it to out × in × space.

    Raises:
        MalformedError: The shape takes more or fewer bytes, or is no shape at all.

    Example:
        >>> from embedder.encoding import Plain
        >>> from embedder.storage import MemoryStorage
        >>> stored_tensor(
        ...     "x", "w", [2, 1], encoding=Plain("F32"), storage=MemoryStorage(bytes(8))
        ... ).shape
        (2, 1)
    """
    check_shape(location, name, shape)
    size_bytes = -(-math.prod(shape) // encoding.unit_values) * encoding.unit_bytes
    if size_bytes != storage.size_bytes:
        raise MalformedError(
            location,
            f"tensor {name!r} of shape {list(shape)} and type {encoding.name} takes "
            f"{size_bytes:,} bytes and has {storage.size_bytes:,}",
            "get the file again",
        )
    return Tensor(
        name=name,
        shape=tuple(shape),
        encoding=encoding,
        storage=storage,
        kind=kind or kind_of(name, tuple(shape), encoding),
        axes=axes,
    )


def check_shape(location: object, name: str, shape: Sequence[int]) -> None:
    """Refuse what cannot be the shape of a tensor.

    Raises:
        MalformedError: A length is no count, or there are too many axes or values.
    """
    if (
        len(shape) > _MOST_AXES
        or any(type(length) is not int or length < 0 for length in shape)
        or math.prod(max(length, 1) for length in shape) > _MOST_VALUES
    ):
        shown = ", ".join(str(length) for length in shape[:8]) + (", …" if shape[8:] else "")
        raise MalformedError(
            location, f"tensor {name!r} has the impossible shape [{shown}]", "get the file again"
        )
