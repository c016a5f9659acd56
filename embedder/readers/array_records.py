"""What stands in for numpy's arrays in a pickle: records that become tensors without numpy's help.

numpy builds an array in two steps, an empty one and its state (version, shape, type, order,
bytes), and numpy would believe the state. Here the shape is checked against the bytes first.
"""

import math
from pathlib import Path

import numpy as np

from embedder.checkpoint import Tensor, kind_of
from embedder.encoding import PLAIN, Plain
from embedder.errors import MalformedError, TruncatedError
from embedder.readers.unpickling import Bag, Global, Make, Record
from embedder.readers.views import Part, Swapped
from embedder.storage import MemoryStorage, Storage

PLAIN_OF_CODE = {
    np.dtype(PLAIN[name]).str[1:]: name for name in PLAIN if PLAIN[name].type.__module__ == "numpy"
}
"""numpy's letter and size, as in `f4`, and our name of the type."""

PLAIN_OF_ML_DTYPE = {
    str(PLAIN[name]): name for name in PLAIN if PLAIN[name].type.__module__ == "ml_dtypes"
}
"""Names of the extension types of JAX, as in `bfloat16`."""

MOST_AXES = 64  # numpy's own limit
_MOST_VALUES = 1 << 59  # beyond it numpy cannot name even the shape of an empty array


class DtypeRecord(Record):
    """An element type: `code` is numpy's letter and size, as in `f4`."""

    __slots__ = ("code", "order")

    def __init__(self, code: object = None, *_: object) -> None:
        text = code.path.rpartition(".")[2] if isinstance(code, Global) else _text(code)
        self.order = text[0] if text[:1] in ("<", ">", "=", "|") else "<"
        self.code = text.lstrip("<>=|")

    def build(self, state: object) -> None:
        """Take the byte order, and note a type with fields, which has no single code."""
        if not isinstance(state, tuple) or len(state) < 5:
            raise TypeError("the state of a numpy type is not what numpy writes")
        self.order = _text(state[1]) or self.order
        if state[2] is not None or state[4] is not None:
            self.code = "V"

    @property
    def plain(self) -> str | None:
        """Our name of the type; None if it is not one of numbers."""
        return PLAIN_OF_CODE.get(self.code) or PLAIN_OF_ML_DTYPE.get(self.code)


class Encoded(Record):
    """Bytes that protocol 2 writes as Latin-1 text, 1.5 bytes each."""

    __slots__ = ("_raw", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self._raw: bytes | None = None

    @property
    def raw(self) -> bytes:
        """The bytes, made once even where many arrays share them."""
        if self._raw is None:
            self._raw = self.text.encode("latin-1")
        return self._raw


class ArrayRecord(Record):
    """An array: shape, type, and bytes or a list of objects."""

    __slots__ = ("dtype", "fortran", "raw", "shape")

    def __init__(self) -> None:
        self.shape: object = (0,)
        self.dtype: object = None
        self.fortran: bool = False
        self.raw: object = b""

    def build(self, state: object) -> None:
        """Take (version, shape, type, Fortran order, bytes); the version is left out at times."""
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise TypeError("the state of a numpy array is not what numpy writes")
        self.shape, self.dtype, fortran, self.raw = state[-4:]
        self.fortran = bool(fortran)

    @property
    def objects(self) -> list[object] | None:
        """The members of an array of objects, None for an array of numbers."""
        return self.raw if isinstance(self.raw, list) else None


def array_tensor(path: Path, name: str, record: ArrayRecord) -> Tensor | None:
    """Return the tensor that an array's record describes, None if it holds no numbers.

    Args:
        path: The file, for messages.
        name: Name of the tensor.
        record: A record whose state is set.

    Raises:
        MalformedError: Shape and bytes do not agree.
    """
    plain = record.dtype.plain if isinstance(record.dtype, DtypeRecord) else None
    if plain is None or not isinstance(record.dtype, DtypeRecord):
        return None
    shape = counts(path, name, record.shape)
    try:
        storage = _storage(record.raw)
    except ValueError as error:
        raise MalformedError(path, f"array {name!r} holds text where bytes belong") from error
    if storage is None:
        return None
    return plain_tensor(
        path,
        name,
        storage,
        shape=shape,
        plain=plain,
        fortran=record.fortran,
        swapped=record.dtype.order == ">",
    )


def plain_tensor(
    path: Path,
    name: str,
    storage: Storage,
    *,
    shape: tuple[int, ...],
    plain: str,
    fortran: bool = False,
    swapped: bool = False,
) -> Tensor:
    """Return the tensor over an array's bytes.

    Args:
        path: The file, for messages.
        name: Name of the tensor.
        storage: The bytes of the array; more than it needs are left out.
        shape: Shape of the array.
        plain: Our name of its type.
        fortran: Whether its first axis varies fastest.
        swapped: Whether the other byte order is stored.

    Raises:
        TruncatedError: There are fewer bytes than the shape needs.
    """
    encoding = Plain(plain)
    size_bytes = math.prod(shape) * encoding.unit_bytes
    if size_bytes > storage.size_bytes:
        raise TruncatedError(
            path,
            f"TRUNCATED: array {name!r} of shape {list(shape)} and type {plain} takes "
            f"{size_bytes:,} bytes and has {storage.size_bytes:,}",
            "get the file again, then run the same command",
        )
    content: Storage = Part(storage, 0, size_bytes)
    if swapped and encoding.unit_bytes > 1:
        content = Swapped(content, encoding.unit_bytes // (2 if plain[0] == "C" else 1))
    # In Fortran order the bytes are those of the transposed array in C order.
    fortran = fortran and len(shape) > 1
    return Tensor(
        name=name,
        shape=shape[::-1] if fortran else shape,
        encoding=encoding,
        storage=content,
        kind=kind_of(name, shape, encoding),
        axes=tuple(range(len(shape)))[::-1] if fortran else (),
    )


def counts(path: Path, name: str, found: object) -> tuple[int, ...]:
    """Return a shape from a file, checked.

    Raises:
        MalformedError: It is not a short tuple of counts that numpy could hold.
    """
    numbers = tuple(found) if isinstance(found, list | tuple) else None
    if (
        numbers is None
        or len(numbers) > MOST_AXES
        or not all(type(number) is int and number >= 0 for number in numbers)
        or math.prod(number or 1 for number in numbers) > _MOST_VALUES
    ):
        raise MalformedError(path, f"{name!r} has a shape that no array can have")
    return numbers


def _storage(raw: object) -> Storage | None:
    if isinstance(raw, Part):
        return raw
    if isinstance(raw, bytes):
        return MemoryStorage(raw)
    return MemoryStorage(raw.raw) if isinstance(raw, Encoded) else None


def _text(found: object) -> str:
    if isinstance(found, bytes):
        return found.decode("latin-1")
    return found if isinstance(found, str) else ""


def _encode(text: object = "", codec: object = "latin1", *_: object) -> Record:
    if isinstance(text, str) and codec in ("latin1", "latin-1"):
        return Encoded(text)
    return Bag("_codecs.encode", (text, codec))


def _reconstruct(*_: object) -> ArrayRecord:
    return ArrayRecord()


def _from_buffer(raw: object, dtype: object, shape: object, order: object = "C") -> ArrayRecord:
    record = ArrayRecord()
    record.build((shape, dtype, order == "F", raw))
    return record


def _scalar(*_: object) -> None:
    return None  # a single number, such as a learning rate, is no tensor


_CORE: dict[str, Make] = {
    "multiarray._reconstruct": _reconstruct,
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _from_buffer,
}

ARRAY_MAKERS: dict[str, Make] = {
    "_codecs.encode": _encode,
    "numpy.dtype": DtypeRecord,
    "numpy.ndarray": _reconstruct,
    **{f"numpy.core.{name}": make for name, make in _CORE.items()},
    **{f"numpy._core.{name}": make for name, make in _CORE.items()},  # since numpy 2
}
"""Names that numpy's own pickles import, and our functions in their place."""
