"""How stored bytes become values.

An encoding decodes a run of whole *units* (one value for plain types, a block of 32 or 256 for
GGUF types) at a known place in the tensor, so that scales of a channel or a group can be applied
to a slice. All arithmetic gives float32, but for stored float64, which stays.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.floating[Any]]
"""float32, but for stored float64, which stays."""

PLAIN: dict[str, np.dtype[np.generic]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
    "C128": np.dtype(np.complex128),
}
"""Names of the plain stored types, as safetensors writes them, and their numpy types."""

NAME_OF = {dtype: name for name, dtype in PLAIN.items()}
FLOATS = frozenset(name for name in PLAIN if name[0] in "FB" and name != "BOOL")


class Encoding(Protocol):
    """Turns stored bytes into values."""

    @property
    def name(self) -> str:
        """The stored type, as shown to users: `BF16`, `Q4_K`, `I8 scaled`."""

    @property
    def unit_values(self) -> int:
        """Number of values that cannot be taken apart."""

    @property
    def unit_bytes(self) -> int:
        """Number of bytes that hold them."""

    @property
    def quantised(self) -> bool:
        """Whether the values lie on a lattice of scaled integers."""

    def decode(self, raw: bytes | memoryview, first: int) -> Values:
        """Return the values of whole units; `first` is the place of the first in the tensor."""


@dataclass(frozen=True, slots=True)
class Plain:
    """Numbers stored as they are.

    Example:
        >>> Plain("BF16").decode(bytes([0x80, 0x3F, 0x00, 0xC0]), 0)
        array([ 1., -2.], dtype=float32)
    """

    name: str
    quantised: bool = False

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The numpy type of the stored numbers."""
        return PLAIN[self.name]

    @property
    def unit_values(self) -> int:
        """Each value stands alone."""
        return 1

    @property
    def unit_bytes(self) -> int:
        """Bytes of one value."""
        return self.dtype.itemsize

    @property
    def is_float(self) -> bool:
        """Whether the stored numbers are real floating-point numbers."""
        return self.name in FLOATS

    def decode(self, raw: bytes | memoryview, first: int) -> Values:
        """Return the values as float32 (float64 where they are stored so)."""
        stored = np.frombuffer(raw, self.dtype)
        if self.name in ("C64", "C128"):
            return np.abs(stored).astype(np.float32)
        if self.name == "F64":
            return stored.astype(np.float64, copy=False)
        return stored.astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """Integers with a scale and a zero point: value = scale · (stored − zero).

    Args:
        stored: Name of the plain integer type.
        shape: Shape of the tensor in stored order.
        scale: One scale, or one for each place on `axis` (or each group of places, see `group`).
        zero: Zero points, of the same length as `scale` or 1.
        axis: The axis of the channels; ignored for a single scale.
        group: Neighbouring places on `axis` that share a scale.
    """

    stored: str
    shape: tuple[int, ...]
    scale: NDArray[np.float32]
    zero: NDArray[np.float32]
    axis: int = 0
    group: int = 1

    @property
    def name(self) -> str:
        """The stored type and the word scaled."""
        return f"{self.stored} scaled"

    @property
    def quantised(self) -> bool:
        """Always: the values lie on a lattice."""
        return True

    @property
    def unit_values(self) -> int:
        """Each value stands alone."""
        return 1

    @property
    def unit_bytes(self) -> int:
        """Bytes of one stored integer."""
        return PLAIN[self.stored].itemsize

    def decode(self, raw: bytes | memoryview, first: int) -> Values:
        """Return scale · (stored − zero) for values `first` and on."""
        return self.apply(np.frombuffer(raw, PLAIN[self.stored]).astype(np.float32), first)

    def apply(self, numbers: NDArray[np.float32], first: int) -> NDArray[np.float32]:
        """Scale stored numbers in place; `first` is the place of the first in the tensor."""
        scale, zero = self.scale.reshape(-1), self.zero.reshape(-1)
        if scale.size == 1 and zero.size == 1:
            numbers -= zero[0]
            numbers *= scale[0]
            return numbers
        stride = int(np.prod(self.shape[self.axis + 1 :], dtype=np.int64))
        along = (np.arange(first, first + numbers.size) // stride) % self.shape[self.axis]
        place = along // self.group
        numbers -= zero[0] if zero.size == 1 else zero[place]
        numbers *= scale[0] if scale.size == 1 else scale[place]
        return numbers


INT4 = np.concatenate([np.arange(8), np.arange(-8, 0)]).astype(np.float32)
UINT4 = np.arange(16, dtype=np.float32)
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""What the sixteen patterns of a nibble mean: two's complement, unsigned, and E2M1 floats."""


@dataclass(frozen=True, slots=True, eq=False)
class Nibbles:
    """Two 4-bit numbers a byte, low half first, looked up in a table and then scaled.

    Args:
        name: The stored type, as shown to users.
        levels: What each of the 16 patterns means.
        scaling: Scales and zero points, if any.

    Example:
        >>> Nibbles("INT4", INT4).decode(bytes([0xF1]), 0)
        array([ 1., -1.], dtype=float32)
    """

    name: str
    levels: NDArray[np.float32]  # (16,)
    scaling: Affine | None = None

    @property
    def quantised(self) -> bool:
        """Always: the values lie on a lattice of 16 levels."""
        return True

    @property
    def unit_values(self) -> int:
        """Two values share a byte."""
        return 2

    @property
    def unit_bytes(self) -> int:
        """One byte."""
        return 1

    def decode(self, raw: bytes | memoryview, first: int) -> Values:
        """Return the values of whole bytes."""
        packed = np.frombuffer(raw, np.uint8)
        numbers = np.empty(packed.size * 2, np.float32)
        numbers[0::2] = self.levels[packed & 15]
        numbers[1::2] = self.levels[packed >> 4]
        return numbers if self.scaling is None else self.scaling.apply(numbers, first)
