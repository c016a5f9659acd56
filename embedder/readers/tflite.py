"""TFLite: a flatbuffer of operators, and buffers with the constants that they use.

The package `tflite` knows where in the flatbuffer things are, and believes what it finds there. So
every count is held against the size of the file before anything is done with it, and what the
package stumbles over in a damaged file is told as damage.

Kernels of LSTM and RNN layers are separate tensors here and lie as out × in already.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.checkpoint import Checkpoint, Tensor
from embedder.encoding import INT4, Affine, Encoding, Nibbles, Plain
from embedder.errors import (
    CheckpointError,
    MalformedError,
    MissingExtraError,
    TruncatedError,
    UnsupportedError,
)
from embedder.readers.dataflow import (
    ABSENT,
    Dataflow,
    Layout,
    Node,
    Role,
    strongest,
    tensor_kind,
)
from embedder.readers.stored import check_shape, stored_tensor
from embedder.readers.tflite_graph import Operator, Operators, role_in
from embedder.readers.tflite_sparse import LARGEST_VALUES, Level, places_of
from embedder.storage import MemoryStorage, OpenFile, Storage

_PLAIN = {
    0: "F32",
    1: "F16",
    2: "I32",
    3: "U8",
    4: "I64",
    6: "BOOL",
    7: "I16",
    8: "C64",
    9: "I8",
    10: "F64",
    11: "C128",
    12: "U64",
    15: "U32",
    16: "U16",
    18: "BF16",
}
"""Number of a type in the file → name of the plain encoding."""

_INT4 = 17
_WITHOUT_NUMBERS = frozenset({5, 13, 14})  # text, resource, variant
_CUSTOM = 32
_SHUFFLED = "some dense layers are stored shuffled; their values are right and their places not"
_LARGEST_ARGUMENT = 64
_MOST_ENTRIES = 500_000  # tensors, operators and so on; the largest model at hand has 3,000
_ROOM_FACTOR = 16
"""How many times the file's own size its tensors may refer to; a real one refers to a buffer from
one or two tensors."""

# What the flatbuffers package raises when an offset in the file leads nowhere.
_STUMBLES = (struct.error, IndexError, ValueError, TypeError, OverflowError, AttributeError)


def open_tflite(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open one TFLite file.

    Args:
        path: The file.
        allow_partial: Leave out constants that lie behind the end of the file.

    Raises:
        MalformedError: The file is no TFLite flatbuffer, or is damaged.
        TruncatedError: The file ends before a constant does.
        UnsupportedError: A stored type that we do not know.
        MissingExtraError: The package tflite is not installed.
    """
    try:
        schema = import_module("tflite")
    except ImportError as error:
        raise MissingExtraError("tflite", "formats", "reading TFLite") from error
    file = OpenFile(path)
    try:
        model = _Model(file, schema, allow_partial=allow_partial)
        tensors = model.tensors()
        declared = model.declared()
    except CheckpointError:
        file.close()
        raise
    except _STUMBLES as error:
        file.close()
        raise MalformedError(
            path, f"is no valid TFLite flatbuffer ({error})", "get the file again"
        ) from error
    except BaseException:
        file.close()
        raise
    return Checkpoint(
        location=str(path),
        format="tflite",
        tensors=tensors,
        files=(path,),
        declared=declared,
        limits=model.limits,
        open_files=[file],
    )


class _Budget:
    """Reads lists and texts of a flatbuffer, all together no more than the file can hold.

    Offsets may lead anywhere, so that a small file can name one long list many times over.
    """

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._bytes_left = 2 * file.size_bytes
        self._entries_left = _MOST_ENTRIES

    def count(self, number: int) -> range:
        """Return the places of a list of records."""
        self.take(number * 4)
        self._entries_left -= number
        if self._entries_left < 0:
            raise MalformedError(
                self._file.path, f"its lists have more than {_MOST_ENTRIES:,} entries"
            )
        return range(number)

    def take(self, size_bytes: int) -> None:
        """Account for bytes before they are copied."""
        self._bytes_left -= size_bytes
        if self._bytes_left < 0:
            raise MalformedError(
                self._file.path,
                f"its lists promise more entries than its {self._file.size_bytes:,} bytes can hold",
                "get the file again",
            )

    def text(self, record: Any, slot: int) -> str:
        """Return the text in a slot of a record."""
        table = record._tab
        offset = table.Offset(slot)
        if not offset:
            return ""
        length, start = table.VectorLen(offset), table.Vector(offset)
        self.take(length)
        return bytes(table.Bytes[start : start + length]).decode("utf-8", "surrogateescape")

    def numbers(self, found: Any) -> NDArray[Any]:
        """Return a list of numbers; the package gives 0 for one that is not there."""
        if not isinstance(found, np.ndarray):
            return np.zeros(0, np.int64)
        self.take(found.nbytes)
        return found.copy()


class _Model:
    """A model that is being read."""

    def __init__(self, file: OpenFile, schema: Any, *, allow_partial: bool) -> None:
        self.file, self.schema, self.allow_partial = file, schema, allow_partial
        self.limits: list[str] = []
        self._budget = _Budget(file)
        self._data_room = file.size_bytes * _ROOM_FACTOR
        self._dense_room = LARGEST_VALUES
        with file.path.open("rb") as opened:
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self._root = schema.Model.GetRootAsModel(content, 0)
        self._operator_names: dict[Any, str] = {
            number: name for name, number in vars(schema.BuiltinOperator).items()
        }
        self._flow = Dataflow()
        self._constants: dict[int, Tensor] = {}
        self._values: list[list[int]] = []

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the constants of all subgraphs."""
        graphs = [
            self._root.Subgraphs(place)
            for place in self._budget.count(self._root.SubgraphsLength())
        ]
        codes = [
            self._operator_name(place)
            for place in self._budget.count(self._root.OperatorCodesLength())
        ]
        for graph in graphs:
            numbers = self._budget.count(graph.TensorsLength())
            self._values.append([self._flow.new_value() for _ in numbers])
            for place, value in zip(numbers, self._values[-1], strict=True):
                self._add_tensor(graph.Tensors(place), value)
        for place, graph in enumerate(graphs):
            for operator in self._budget.count(graph.OperatorsLength()):
                self._add_operator(graphs, place, graph.Operators(operator), codes)
        self._flow.find_static()
        operators = Operators(self._argument)
        made = tuple(
            self._made(value, tensor, operators) for value, tensor in self._constants.items()
        )
        if self._flow.gave_up:
            self.limits.append(
                "the graph is too entangled to follow: tensors are told apart by shape"
            )
        return made

    def declared(self) -> dict[str, Any]:
        """Return what the file says of itself."""
        root = self._root
        signatures = [  # their keys
            self._budget.text(root.SignatureDefs(place), 8)
            for place in self._budget.count(root.SignatureDefsLength())
        ]
        metadata = [
            self._budget.text(root.Metadata(place), 4)
            for place in self._budget.count(root.MetadataLength())
        ]
        facts = {
            "version": int(root.Version()),
            "description": self._budget.text(root, 10),
            "signatures": signatures,
            "metadata": metadata,
        }
        return {key: value for key, value in facts.items() if value}

    def _operator_name(self, place: int) -> str:
        code = self._root.OperatorCodes(place)
        # Old files have the small numbers in a byte of their own, new ones both.
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        if number == _CUSTOM:
            return f"CUSTOM:{self._budget.text(code, 6)}"
        return self._operator_names.get(number, f"#{number}")

    def _add_tensor(self, record: Any, value: int) -> None:
        """Add a tensor if it is a constant that holds numbers."""
        storage = self._data(record)
        kind = record.Type()
        if storage is None or kind in _WITHOUT_NUMBERS:
            return
        name = self._budget.text(record, 10)
        shape = tuple(int(length) for length in self._budget.numbers(record.ShapeAsNumpy()))
        check_shape(self.file.path, name, shape)
        if kind in _PLAIN:
            encoding: Encoding = Plain(_PLAIN[kind])
        elif kind == _INT4:
            encoding = Nibbles("INT4", INT4)
        else:
            raise UnsupportedError(
                self.file.path, f"tensor {name!r} has the type number {kind}, unknown to us"
            )
        if record.Sparsity() is not None:
            storage = self._dense(record.Sparsity(), name, shape, encoding, storage)
        scaled = self._scaled(record.Quantization(), name, shape, encoding)
        self._flow.constants.add(value)
        self._constants[value] = stored_tensor(
            self.file.path, name, shape, encoding=scaled, storage=storage
        )

    def _data(self, record: Any) -> Storage | None:
        """Return the bytes of a tensor's buffer, None if it is filled at run time."""
        if not record.Buffer() or record.Buffer() >= self._root.BuffersLength():
            return None
        buffer = self._root.Buffers(record.Buffer())
        table = buffer._tab
        offset = table.Offset(4)
        start, size_bytes = 0, 0
        if offset:
            start, size_bytes = table.Vector(offset), table.VectorLen(offset)
        if not size_bytes and buffer.Offset() > 1:
            # Behind the flatbuffer, whose own offsets end at 2 GiB.
            start, size_bytes = int(buffer.Offset()), int(buffer.Size())
        if not size_bytes:
            return None
        self._data_room -= size_bytes
        if self._data_room < 0 and start + size_bytes <= self.file.size_bytes:
            raise MalformedError(
                self.file.path,
                f"its tensors refer to more than {_ROOM_FACTOR} times the bytes of the file",
            )
        try:
            return self.file.part(start, size_bytes, f"buffer {record.Buffer()}")
        except TruncatedError as error:
            if not self.allow_partial:
                raise
            self.limits.append(f"a constant is left out: {error.problem}")
            return None

    def _dense(
        self, record: Any, name: str, shape: tuple[int, ...], encoding: Encoding, storage: Storage
    ) -> Storage:
        """Return the bytes of a sparse tensor with its zeros."""
        if not isinstance(encoding, Plain):
            raise UnsupportedError(
                self.file.path, f"tensor {name!r} is sparse and stored as {encoding.name}"
            )
        self._dense_room -= math.prod(shape)
        if self._dense_room < 0:
            raise UnsupportedError(
                self.file.path,
                f"sparse tensor {name!r} has the shape {list(shape)}; at most "
                f"{LARGEST_VALUES:,} values of all sparse tensors are expanded",
            )
        values = np.frombuffer(storage.read(0, storage.size_bytes), np.uint8)
        width = encoding.unit_bytes
        order = self._budget.numbers(record.TraversalOrderAsNumpy()).tolist()
        blocks = self._budget.numbers(record.BlockMapAsNumpy()).tolist()
        levels = [
            self._level(record.DimMetadata(place))
            for place in self._budget.count(record.DimMetadataLength())
        ]
        try:
            places = places_of(shape, order, blocks, levels, stored=values.size // width)
        except ValueError as error:
            raise MalformedError(
                self.file.path, f"sparse tensor {name!r} of shape {list(shape)}: {error}"
            ) from error
        dense = np.zeros((math.prod(shape), width), np.uint8)
        dense[places] = values[: len(places) * width].reshape(-1, width)
        return MemoryStorage(dense)

    def _level(self, record: Any) -> Level:
        if record.Format() == self.schema.DimensionType.DENSE:
            size = int(record.DenseSize())
            if not 0 <= size <= LARGEST_VALUES:
                raise MalformedError(self.file.path, f"a sparse tensor has a level of {size:,}")
            return Level(size)
        segments = self._vector(record.ArraySegmentsType(), record.ArraySegments())
        return Level(0, segments, self._vector(record.ArrayIndicesType(), record.ArrayIndices()))

    def _vector(self, kind: int, table: Any) -> NDArray[np.int64]:
        names = vars(self.schema.SparseIndexVector)
        name = next((name for name, value in names.items() if value == kind), "NONE")
        if name == "NONE" or table is None:
            raise MalformedError(self.file.path, "a sparse tensor has a level without indices")
        vector = getattr(self.schema, name)()
        vector.Init(table.Bytes, table.Pos)
        return self._budget.numbers(vector.ValuesAsNumpy()).astype(np.int64)

    def _scaled(
        self, record: Any, name: str, shape: tuple[int, ...], encoding: Encoding
    ) -> Encoding:
        """Return the encoding with the scales that a record holds, if any."""
        if record is None or (isinstance(encoding, Plain) and encoding.is_float):
            return encoding
        scale = self._budget.numbers(record.ScaleAsNumpy()).astype(np.float32)
        zero = self._budget.numbers(record.ZeroPointAsNumpy()).astype(np.float32)
        if not scale.size:
            return encoding
        axis = int(record.QuantizedDimension())
        zero = zero if zero.size else np.zeros(1, np.float32)
        along = shape[axis] if 0 <= axis < len(shape) else 1
        if scale.size not in (1, along) or zero.size not in (1, scale.size):
            raise MalformedError(
                self.file.path,
                f"tensor {name!r} of shape {list(shape)} has {scale.size:,} scales and "
                f"{zero.size:,} zero points along axis {axis}",
            )
        affine = Affine(encoding.name, shape, scale, zero, axis if scale.size > 1 else 0)
        if isinstance(encoding, Nibbles):
            return Nibbles(f"{encoding.name} scaled", encoding.levels, affine)
        return affine

    def _add_operator(self, graphs: list[Any], place: int, record: Any, codes: list[str]) -> None:
        values = self._values[place]
        inputs = self._places(record.InputsAsNumpy(), values)
        outputs = self._places(record.OutputsAsNumpy(), values)
        op = codes[record.OpcodeIndex()]
        shape: tuple[int, ...] = ()
        if outputs and outputs[0] != ABSENT:
            output = graphs[place].Tensors(record.Outputs(0))
            shape = tuple(int(length) for length in self._budget.numbers(output.ShapeAsNumpy()))
        source = Operator(shape, self._options(op, record))
        self._flow.add(Node(op, tuple(inputs), tuple(filter(None, outputs)), source))
        for called in self._called(op, record):
            if 0 <= called < len(graphs):
                given = inputs[1:] if op == "IF" else inputs
                self._join(graphs[called], self._values[called], given, varies=op == "WHILE")

    def _places(self, found: Any, values: list[int]) -> list[int]:
        return [values[at] if at >= 0 else ABSENT for at in self._budget.numbers(found).tolist()]

    def _options(self, op: str, record: Any) -> dict[str, int]:
        if record.BuiltinOptions() is None:
            return {}
        if op == "FULLY_CONNECTED":
            options = self._option_table("FullyConnectedOptions", record)
            if options.WeightsFormat() and _SHUFFLED not in self.limits:
                self.limits.append(_SHUFFLED)
        if op != "BATCH_MATMUL":
            return {}
        options = self._option_table("BatchMatMulOptions", record)
        return {"adj_x": int(options.AdjX()), "adj_y": int(options.AdjY())}

    def _option_table(self, name: str, record: Any) -> Any:
        options = getattr(self.schema, name)()
        table = record.BuiltinOptions()
        options.Init(table.Bytes, table.Pos)
        return options

    def _called(self, op: str, record: Any) -> Iterator[int]:
        """Yield the subgraphs that an operator hands its inputs to."""
        if record.BuiltinOptions() is None:
            return
        if op == "IF":
            options = self._option_table("IfOptions", record)
            yield options.ThenSubgraphIndex()
            yield options.ElseSubgraphIndex()
        elif op == "WHILE":
            yield self._option_table("WhileOptions", record).BodySubgraphIndex()

    def _join(self, graph: Any, values: list[int], given: list[int], *, varies: bool) -> None:
        """Say which values of a subgraph are which inputs of the operator that calls it."""
        for value, inside in zip(given, self._places(graph.InputsAsNumpy(), values), strict=False):
            if value != ABSENT and inside != ABSENT:
                self._flow.link(value, inside)
                if varies:  # from round to round of a loop
                    self._flow.link(self._flow.new_value(), inside)

    def _argument(self, value: int) -> NDArray[Any] | None:
        """Return a small constant, such as an order of axes."""
        tensor = self._constants.get(value)
        if tensor is None or tensor.size > _LARGEST_ARGUMENT:
            return None
        return tensor.read().astype(np.int64)

    def _made(self, value: int, tensor: Tensor, operators: Operators) -> Tensor:
        found: list[tuple[Role, Layout]] = []
        for use in self._flow.uses(value, tensor.shape, operators):
            role = role_in(use.node, use.place, tensor.shape, use.layout) if use.last else None
            if role is not None:
                found.append((role, use.layout))
        kind, axes = tensor_kind(tensor.name, tensor.shape, tensor.encoding, strongest(found))
        return Tensor(tensor.name, tensor.shape, tensor.encoding, tensor.storage, kind, axes)
