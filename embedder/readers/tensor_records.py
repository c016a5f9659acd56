"""What stands in for torch's tensors in a pickle: records that become tensors without torch.

A torch tensor is a view (offset, size, stride) of a storage, and the pickle holds the view alone;
the storage lies elsewhere in the file and is read in slices. Sizes are checked against it here.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedder.checkpoint import Tensor, kind_of
from embedder.encoding import PLAIN, UINT4, Affine, Encoding, Nibbles, Plain
from embedder.errors import MalformedError, RefusedError, TruncatedError, UnsupportedError
from embedder.readers.array_records import MOST_AXES, counts
from embedder.readers.unpickling import Bag, Global, Make, Record
from embedder.readers.views import Part, Strided
from embedder.readers.zipped import LARGEST_RATIO, LARGEST_UNPACKED_BYTES
from embedder.storage import Storage

_DTYPES = {
    "float64": "F64",
    "double": "F64",
    "float32": "F32",
    "float": "F32",
    "float16": "F16",
    "half": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64",
    "long": "I64",
    "int32": "I32",
    "int": "I32",
    "int16": "I16",
    "short": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
    "cfloat": "C64",
    "complex128": "C128",
    "cdouble": "C128",
}
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "ComplexDoubleStorage": "C128",
    "UntypedStorage": "U8",
    "_UntypedStorage": "U8",
    # Quantised: the type of the stored integer.
    "QInt8Storage": "I8",
    "QUInt8Storage": "U8",
    "QInt32Storage": "I32",
    "QUInt4x2Storage": "U8",
}
_PACKED = "QUInt4x2Storage"  # two values a byte


class StorageRecord(Record):
    """A storage: its class's name, and where its bytes are once that is known."""

    __slots__ = ("class_name", "source")

    def __init__(self, class_name: str, *, source: Storage | None = None) -> None:
        self.class_name, self.source = class_name, source

    @property
    def plain(self) -> str | None:
        """Our name of the stored type."""
        return _STORAGES.get(self.class_name)

    @property
    def width(self) -> int:
        """Bytes of a stored number."""
        return PLAIN[self.plain].itemsize if self.plain else 1


class TensorRecord(Record):
    """A view of a storage."""

    __slots__ = ("dtype", "offset", "quantiser", "size", "storage", "stride")

    def __init__(
        self,
        storage: object,
        offset: object,
        size: object,
        stride: object,
        *,
        dtype: str | None = None,
        quantiser: tuple[object, ...] = (),
    ) -> None:
        if not isinstance(storage, StorageRecord):
            raise TypeError("a tensor without a storage")
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride
        self.dtype, self.quantiser = dtype, quantiser


class Unreadable(Record):
    """A tensor of a kind that we do not turn into numbers."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


@dataclass(frozen=True, slots=True)
class View:
    """A checked view, sorted so that it lies in one run where it can.

    Args:
        shape: Sizes, the slowest-varying axis first.
        strides: Values between neighbours on each axis.
        offset: Place of the first value.
        axes: The order that brings `shape` back to the tensor's own; empty if it is that.
        dense: Whether the values lie in one run, in this order.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    axes: tuple[int, ...]
    dense: bool

    @property
    def reach(self) -> int:
        """How many values of the storage the view spans, from the storage's start."""
        steps = zip(self.shape, self.strides, strict=True)
        return self.offset + sum((size - 1) * stride for size, stride in steps) + 1


def view_of(path: Path, name: str, record: TensorRecord) -> View:
    """Return a tensor's view of its storage.

    Raises:
        MalformedError: Sizes, strides and offset are not counts that belong together.
    """
    size, stride = counts(path, name, record.size), counts(path, name, record.stride)
    (offset,) = counts(path, name, (record.offset,))
    if len(size) != len(stride) or len(size) > MOST_AXES:
        raise MalformedError(path, f"tensor {name!r} has {len(size)} sizes, {len(stride)} strides")
    # Sorted from wide strides to narrow ones, a transposed tensor lies in one run, and any other
    # view is read from front to back. The order of a tensor that lies so already stays.
    order = list(range(len(size)))
    if not _is_dense(size, stride):
        order.sort(key=lambda axis: (size[axis] > 1, -stride[axis]))
    shape = tuple(size[axis] for axis in order)
    strides = tuple(stride[axis] for axis in order)
    axes = tuple(order.index(axis) for axis in range(len(size)))
    return View(
        shape=shape,
        strides=strides,
        offset=offset,
        axes=() if axes == tuple(range(len(size))) else axes,
        dense=_is_dense(shape, strides),
    )


def _is_dense(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    if 0 in size:
        return True
    expected = 1
    for places, step in zip(reversed(size), reversed(stride), strict=True):
        if places > 1 and step != expected:
            return False
        expected *= places
    return True


def record_tensor(path: Path, name: str, record: TensorRecord, file_bytes: int) -> Tensor:
    """Return the tensor that a record describes.

    Args:
        path: The file, for messages.
        name: Name of the tensor.
        record: Its view of a storage.
        file_bytes: Size of the file, which bounds what an expanded tensor may claim.

    Raises:
        MalformedError: The view does not make sense, or the storage is not in the file.
        TruncatedError: The storage is shorter than the view.
        RefusedError: An expanded tensor claims far more values than the file could hold.
        UnsupportedError: A type that we cannot decode.
    """
    view = view_of(path, name, record)
    source = record.storage.source
    if source is None:
        raise MalformedError(path, f"the storage of tensor {name!r} is not in the file")
    encoding = _encoding(path, name, record, view, file_bytes)
    unit, width = encoding.unit_values, encoding.unit_bytes
    reach = 0 if 0 in view.shape else view.reach
    if -(-reach // unit) * width > source.size_bytes:
        raise TruncatedError(
            path,
            f"TRUNCATED: tensor {name!r} of shape {list(view.shape)} reaches value {reach:,} of a "
            f"storage of {source.size_bytes:,} bytes",
            "get the file again, then run the same command",
        )
    if view.dense:
        storage = _run(path, name, source, view, encoding)
    else:
        storage = _gathered(path, name, source, view, encoding, file_bytes)
    kind = kind_of(name, view.shape, encoding)
    return Tensor(name, view.shape, encoding, storage, kind, view.axes)


def _run(path: Path, name: str, source: Storage, view: View, encoding: Encoding) -> Storage:
    """Return the run of the storage that a dense view is."""
    values, unit = math.prod(view.shape), encoding.unit_values
    if view.offset % unit and values:
        raise UnsupportedError(path, f"tensor {name!r} begins inside a packed byte")
    start = view.offset // unit * encoding.unit_bytes if values else 0
    return Part(source, start, -(-values // unit) * encoding.unit_bytes)


def _gathered(
    path: Path, name: str, source: Storage, view: View, encoding: Encoding, file_bytes: int
) -> Storage:
    """Return the values of a view with gaps or repeats, written out as they are read."""
    width = encoding.unit_bytes
    if encoding.unit_values > 1:
        raise UnsupportedError(path, f"tensor {name!r} is a strided view of packed values")
    if math.prod(view.shape) * width > max(LARGEST_UNPACKED_BYTES, LARGEST_RATIO * file_bytes):
        raise RefusedError(
            path,
            f"tensor {name!r} of shape {list(view.shape)} repeats a storage of "
            f"{source.size_bytes:,} bytes beyond all measure",
            "save the tensor without expanding it",
        )
    return Strided(source, width=width, shape=view.shape, strides=view.strides, offset=view.offset)


def _encoding(path: Path, name: str, record: TensorRecord, view: View, file_bytes: int) -> Encoding:
    plain = record.storage.plain if record.dtype is None else _DTYPES.get(record.dtype)
    if plain is None:
        shown = record.dtype or record.storage.class_name
        raise UnsupportedError(path, f"tensor {name!r} is stored as {shown}, not decoded yet")
    packed = record.storage.class_name == _PACKED
    if not record.quantiser:
        if record.storage.class_name.startswith("Q"):
            raise UnsupportedError(path, f"tensor {name!r} is quantised and has no scale")
        return Plain(plain)
    scheme, *rest = record.quantiser
    scheme_name = scheme.path if isinstance(scheme, Global) else ""
    axis = 0
    if scheme_name == "torch.per_tensor_affine" and len(rest) >= 2:
        scale, zero = (_number(path, name, number) for number in rest[:2])
    elif scheme_name.startswith("torch.per_channel_affine") and len(rest) >= 3:
        (axis,) = counts(path, name, (rest[2],))
        if axis >= len(view.shape):
            raise MalformedError(path, f"tensor {name!r} is scaled along axis {axis}: it has none")
        axis = view.axes[axis] if view.axes else axis
        places = view.shape[axis]
        scale, zero = (_factors(path, name, part, places, file_bytes) for part in rest[:2])
    else:
        raise UnsupportedError(path, f"tensor {name!r} is quantised by {scheme_name or 'no rule'}")
    affine = Affine(plain, view.shape, scale, zero, axis)
    return Nibbles("U4 scaled", UINT4, affine) if packed else affine


def _number(path: Path, name: str, number: object) -> NDArray[np.float32]:
    if type(number) not in (int, float) or not abs(number) < 1e30:  # type: ignore[arg-type]
        raise MalformedError(path, f"a scale or zero point of tensor {name!r} is not a number")
    return np.array([number], np.float32)


def _factors(
    path: Path, name: str, part: object, places: int, file_bytes: int
) -> NDArray[np.float32]:
    """Return the scales or zero points of a tensor's channels."""
    if not isinstance(part, TensorRecord) or part.quantiser or part.storage.class_name == _PACKED:
        raise MalformedError(path, f"the scales of tensor {name!r} are not a tensor")
    tensor = record_tensor(path, f"{name} (scales)", part, file_bytes)
    if tensor.size != places:
        raise MalformedError(
            path, f"tensor {name!r} has {tensor.size:,} scales for {places:,} channels"
        )
    return tensor.read().reshape(-1).astype(np.float32)


def storage_of_id(identity: object) -> tuple[str, StorageRecord, tuple[object, ...]] | None:
    """Return key, storage and view of a persistent id, or None if it names no storage.

    The id is ("storage", class, key, device, values) and, in the legacy format, a view.
    """
    if not isinstance(identity, tuple) or len(identity) < 5:
        return None
    tag, kind, key, _, _, *rest = identity
    if tag not in ("storage", b"storage") or not isinstance(kind, Global):
        return None
    view = rest[0] if rest and isinstance(rest[0], tuple) else ()
    return text_of(key), StorageRecord(kind.path.rpartition(".")[2]), view


def text_of(key: object) -> str:
    """Return a key as text: Python 2 wrote bytes, and some versions integers."""
    if isinstance(key, bytes):
        return key.decode("latin-1")
    if isinstance(key, str):
        return key
    return str(key) if type(key) is int and abs(key) < 1 << 64 else ""


def _tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> Record:
    return TensorRecord(storage, offset, size, stride)


def _tensor_of_dtype(
    storage: object,
    offset: object,
    size: object,
    stride: object,
    grad: object,
    hooks: object,
    dtype: object,
    *_: object,
) -> Record:
    name = dtype.path.rpartition(".")[2] if isinstance(dtype, Global) else "no type"
    return TensorRecord(storage, offset, size, stride, dtype=name)


def _quantised(
    storage: object, offset: object, size: object, stride: object, quantiser: object, *_: object
) -> Record:
    if not isinstance(quantiser, tuple) or not quantiser:
        raise TypeError("a quantised tensor without its rule")
    return TensorRecord(storage, offset, size, stride, quantiser=quantiser)


def _first(value: object = None, *_: object) -> object:
    return value


def _from_type(function: object, kind: object, args: object, *_: object) -> object:
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise TypeError("a tensor subclass that is not rebuilt by a function")
    return function.make(*args)


def _parameter(*args: object) -> object:
    return args[0] if args and isinstance(args[0], TensorRecord) else Bag("Parameter", args)


def _unreadable(reason: str) -> Make:
    return lambda *_: Unreadable(reason)


_SPARSE = _unreadable("a sparse tensor, which is not read yet")

TENSOR_MAKERS: dict[str, Make] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_qtensor": _quantised,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._utils._rebuild_sparse_tensor": _SPARSE,
    "torch._utils._rebuild_sparse_csr_tensor": _SPARSE,
    "torch._utils._rebuild_nested_tensor": _unreadable("a nested tensor, which is not read yet"),
    "torch._utils._rebuild_meta_tensor_no_storage": _unreadable("a meta tensor, without values"),
    "torch._utils._rebuild_wrapper_subclass": _unreadable("a wrapped tensor, not read yet"),
    "torch._tensor._rebuild_from_type": _from_type,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.nn.parameter.Buffer": _parameter,
    "torch.Size": _first,
    "torch.jit._pickle.build_boollist": _first,
    "torch.jit._pickle.build_doublelist": _first,
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_tensorlist": _first,
    "torch.jit._pickle.restore_type_tag": _first,
}
"""Names that torch's own pickles import, and our functions in their place."""

TENSOR_NAMES = frozenset(
    {f"torch.{name}" for name in _DTYPES}
    | {f"torch.{name}" for name in _STORAGES}
    | {f"torch.cuda.{name}" for name in _STORAGES}
    | {f"torch.{name.replace('Storage', 'Tensor')}" for name in _STORAGES}
    | {f"torch.cuda.{name.replace('Storage', 'Tensor')}" for name in _STORAGES}
    | {f"torch.storage.{name}" for name in (*_STORAGES, "TypedStorage", "_TypedStorage")}
    | {f"torch.{name}" for name in ("device", "Tensor", "Generator", "finfo", "iinfo")}
    | {f"torch.{name}" for name in ("QUInt2x4Storage", "qint8", "quint8", "qint32", "quint4x2")}
    | {f"torch.{name}" for name in ("float4_e2m1fn_x2", "bits8", "uint1", "uint2", "uint3")}
    | {f"torch.per_{name}" for name in ("tensor_affine", "channel_affine", "tensor_symmetric")}
    | {"torch.per_channel_affine_float_qparams", "torch.per_channel_symmetric"}
    | {"torch._tensor.Tensor", "torch.serialization._get_layout", "torch.strided"}
    | {"torch.torch_version.TorchVersion", "torch.Storage", "torch.contiguous_format"}
)
"""Names that only label a type, a device or a layout."""
