"""CTranslate2: `model.bin`, a list of named variables with their bytes behind each other.

Weights are out × in (× width) already. Where `name_scale` stands beside an integer `name`, the
values are stored / scale, with one scale for each row, or a single one for int16.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedder.checkpoint import Checkpoint, Kind, Tensor, kind_of
from embedder.encoding import Affine, Encoding, Plain
from embedder.errors import MalformedError, TruncatedError, UnsupportedError
from embedder.readers.stored import check_shape, stored_tensor
from embedder.storage import OpenFile, Storage

_TYPES = ("F32", "I8", "I16", "I32", "F16", "BF16")
"""Types by the number that files of version 4 and later have for them."""

_TYPE_OF_WIDTH = {4: "F32", 2: "I16", 1: "I8"}
"""What files before version 4 have instead: the width of one number."""

_NEWEST_VERSION = 6
_MOST_VARIABLES = 1_000_000


def open_ctranslate2(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open a `model.bin`; `allow_partial` changes nothing.

    Raises:
        MalformedError: The list of variables breaks the rules of the format.
        TruncatedError: The file ends before its variables do.
        UnsupportedError: A version or a type of numbers that we do not know.
    """
    file = OpenFile(path)
    try:
        walk = _Walk(file)
        version = walk.number("I")
        if not 2 <= version <= _NEWEST_VERSION:
            raise UnsupportedError(
                path,
                f"is of binary version {version}; we read 2 to {_NEWEST_VERSION}",
                "convert the model again",
            )
        specification, revision = walk.text(), walk.number("I")
        count = walk.number("I")
        if count > _MOST_VARIABLES:
            raise MalformedError(path, f"promises {count:,} variables", "get the file again")
        variables = [_variable(walk, version) for _ in range(count)]
        if version >= 3:
            for _ in range(walk.number("I")):  # other names for the same variables
                walk.text(), walk.text()
        if walk.place != file.size_bytes:
            raise MalformedError(
                path,
                f"{file.size_bytes - walk.place:,} bytes follow the last variable",
                "get the file again",
            )
        limits: list[str] = []
        tensors = _tensors(path, variables, limits)
    except BaseException:
        file.close()
        raise
    return Checkpoint(
        location=str(path),
        format="ctranslate2",
        tensors=tensors,
        files=(path,),
        declared={"specification": specification, "revision": revision, "binary_version": version},
        limits=limits,
        open_files=[file],
    )


@dataclass(frozen=True, slots=True)
class _Variable:
    """One entry of the list."""

    name: str
    shape: tuple[int, ...]
    type: str
    storage: Storage


class _Walk:
    """A place that moves over the file."""

    def __init__(self, file: OpenFile) -> None:
        self.file, self.place = file, 0

    def number(self, form: str) -> int:
        """Return the next number, of a form as `struct` has it."""
        size = struct.calcsize(form)
        (found,) = struct.unpack(f"<{form}", self._take(size))
        return int(found)

    def text(self) -> str:
        """Return the next text: its length with the zero at its end, then its bytes."""
        return self._take(self.number("H")).rstrip(b"\0").decode("utf-8", "surrogateescape")

    def part(self, size_bytes: int, what: str) -> Storage:
        """Return the next bytes, unread."""
        found = self.file.part(self.place, size_bytes, what)
        self.place += size_bytes
        return found

    def _take(self, size: int) -> bytes:
        if self.place + size > self.file.size_bytes:
            raise TruncatedError(
                self.file.path,
                f"TRUNCATED: ends in the list of variables, at byte {self.place:,}",
                "get the file again, then run the same command",
            )
        raw = self.file.read(self.place, self.place + size)
        self.place += size
        return raw


def _variable(walk: _Walk, version: int) -> _Variable:
    name = walk.text()
    rank = walk.number("B")
    shape = tuple(walk.number("I") for _ in range(rank))
    check_shape(walk.file.path, name, shape)
    code, size = walk.number("B"), walk.number("I")
    if version >= 4:
        stored = _TYPES[code] if code < len(_TYPES) else None
    else:
        stored = _TYPE_OF_WIDTH.get(code)
        size *= code
    if stored is None:
        raise UnsupportedError(
            walk.file.path,
            f"variable {name!r} is of the unknown type {code}",
            "convert the model again",
        )
    return _Variable(name, shape, stored, walk.part(size, f"variable {name!r}"))


def _tensors(path: Path, variables: list[_Variable], limits: list[str]) -> tuple[Tensor, ...]:
    by_name = {variable.name: variable for variable in variables}
    tensors = []
    for variable in variables:
        encoding: Encoding = Plain(variable.type)
        kind = kind_of(variable.name, variable.shape, encoding)
        base = by_name.get(variable.name.removesuffix("_scale").removesuffix("_zero"))
        scale = by_name.get(f"{variable.name}_scale")
        if base is not None and base is not variable:
            kind = Kind.SCALE
        elif scale is not None and variable.type in ("I8", "I16"):
            encoding, kind = _scaled(path, variable, scale), Kind.WEIGHT
        elif scale is not None and variable.type == "I32":
            limits.append(f"{variable.name!r} is packed in 4 bits (AWQ), which we do not unpack")
        tensors.append(
            stored_tensor(
                path,
                variable.name,
                variable.shape,
                encoding=encoding,
                storage=variable.storage,
                kind=kind,
            )
        )
    return tuple(tensors)


def _scaled(path: Path, variable: _Variable, scale: _Variable) -> Affine:
    """Return the encoding of integers q whose values are q / scale."""
    rows = variable.shape[0] if variable.shape else 1
    stored = Plain(scale.type)
    count = scale.storage.size_bytes // stored.unit_bytes
    if not stored.is_float or count not in (1, rows):
        raise MalformedError(
            path,
            f"variable {variable.name!r} has {rows:,} rows and {count:,} scales of type "
            f"{scale.type}",
            "get the file again",
        )
    raw = scale.storage.read(0, count * stored.unit_bytes)
    divisors = stored.decode(raw, 0).astype(np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        factors = np.where(divisors == 0, np.float32(0), np.float32(1) / divisors)
    return Affine(
        stored=variable.type,
        shape=variable.shape,
        scale=factors.astype(np.float32),
        zero=np.zeros(1, np.float32),
    )
