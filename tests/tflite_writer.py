"""Writes TFLite files with the builders of the `flatbuffers` and `tflite` packages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import tflite
from numpy.typing import NDArray

Array = NDArray[np.generic]

TYPES = {
    "float32": tflite.TensorType.FLOAT32,
    "float16": tflite.TensorType.FLOAT16,
    "float64": tflite.TensorType.FLOAT64,
    "int8": tflite.TensorType.INT8,
    "uint8": tflite.TensorType.UINT8,
    "int16": tflite.TensorType.INT16,
    "int32": tflite.TensorType.INT32,
    "int64": tflite.TensorType.INT64,
    "int4": tflite.TensorType.INT4,
    "string": tflite.TensorType.STRING,
}


@dataclass
class Given:
    """A tensor to write; without values it is filled at run time."""

    shape: Sequence[int]
    values: Array | bytes | None = None
    type: str = ""
    scale: Sequence[float] = ()
    zero: Sequence[int] = ()
    axis: int = 0
    sparsity: "Sparsity | None" = None
    behind: bool = False
    """Whether its values lie behind the flatbuffer, as in models of more than 2 GiB."""

    @classmethod
    def of(cls, values: Array, **more: Any) -> "Given":
        return cls(values.shape, values, values.dtype.name, **more)


@dataclass
class Sparsity:
    """Levels are a size, or segments and indices."""

    order: Sequence[int]
    levels: Sequence[int | tuple[Array, Array]]
    blocks: Sequence[int] = ()
    vector: str = "Int32Vector"


@dataclass
class Step:
    """An operator to write; inputs and outputs are names of tensors."""

    op: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    options: Callable[[Any], tuple[int, int]] | None = None


@dataclass
class Graph:
    tensors: dict[str, Given]
    steps: Sequence[Step]
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()


@dataclass
class Writer:
    graphs: Sequence[Graph]
    description: str = "made for a test"
    repeated: int = 1
    """How often the list of graphs names each of them."""
    builder: Any = field(default_factory=lambda: flatbuffers.Builder(1024))
    buffers: list[Given | None] = field(default_factory=lambda: [None])
    codes: list[str] = field(default_factory=list)

    def write(self, path: Path) -> Path:
        # The places of values behind the flatbuffer are known once it is built: build it twice.
        build = self._build([0] * 100)
        starts, place = [], len(build)
        behind = b""
        for given in self.buffers:
            if given is not None and given.behind:
                starts.append(place)
                content = _bytes(given.values)
                behind += content
                place += len(content)
        if starts:
            self.builder = flatbuffers.Builder(1024)
            self.buffers, self.codes = [None], []
            build = self._build(starts)
        path.write_bytes(build + behind)
        return path

    def _build(self, starts: list[int]) -> bytes:
        builder = self.builder
        graphs = [self._graph(graph) for graph in self.graphs] * self.repeated
        rest = list(starts)
        buffers = [self._buffer(given, rest) for given in self.buffers]
        codes = [self._code(op) for op in self.codes]
        vectors = [self._offsets(each) for each in (graphs, buffers, codes)]
        description = builder.CreateString(self.description)
        tflite.ModelStart(builder)
        tflite.ModelAddVersion(builder, 3)
        tflite.ModelAddSubgraphs(builder, vectors[0])
        tflite.ModelAddBuffers(builder, vectors[1])
        tflite.ModelAddOperatorCodes(builder, vectors[2])
        tflite.ModelAddDescription(builder, description)
        builder.Finish(tflite.ModelEnd(builder), b"TFL3")
        return bytes(builder.Output())

    def _offsets(self, offsets: Sequence[int]) -> int:
        self.builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self.builder.PrependUOffsetTRelative(offset)
        return int(self.builder.EndVector())

    def _numbers(self, values: Sequence[Any] | Array, dtype: str) -> int:
        return int(self.builder.CreateNumpyVector(np.asarray(values, dtype)))

    def _buffer(self, given: Given | None, starts: list[int]) -> int:
        data = 0
        content = b"" if given is None else _bytes(given.values)
        if given is not None and not given.behind:
            data = self.builder.CreateByteVector(content)
        tflite.BufferStart(self.builder)
        if data:
            tflite.BufferAddData(self.builder, data)
        if given is not None and given.behind:
            tflite.BufferAddOffset(self.builder, starts.pop(0) or 2)
            tflite.BufferAddSize(self.builder, len(content))
        return int(tflite.BufferEnd(self.builder))

    def _code(self, op: str) -> int:
        number = vars(tflite.BuiltinOperator).get(op, tflite.BuiltinOperator.CUSTOM)
        name = self.builder.CreateString(op) if number == tflite.BuiltinOperator.CUSTOM else 0
        tflite.OperatorCodeStart(self.builder)
        tflite.OperatorCodeAddDeprecatedBuiltinCode(self.builder, min(number, 127))
        tflite.OperatorCodeAddBuiltinCode(self.builder, number)
        if name:
            tflite.OperatorCodeAddCustomCode(self.builder, name)
        return int(tflite.OperatorCodeEnd(self.builder))

    def _graph(self, graph: Graph) -> int:
        names = list(graph.tensors)
        tensors = self._offsets([self._tensor(name, graph.tensors[name]) for name in names])
        places = {"": -1, **{name: place for place, name in enumerate(names)}}
        steps = self._offsets([self._step(step, places) for step in graph.steps])
        inputs = self._numbers([places[name] for name in graph.inputs], "<i4")
        outputs = self._numbers([places[name] for name in graph.outputs], "<i4")
        tflite.SubGraphStart(self.builder)
        tflite.SubGraphAddTensors(self.builder, tensors)
        tflite.SubGraphAddOperators(self.builder, steps)
        tflite.SubGraphAddInputs(self.builder, inputs)
        tflite.SubGraphAddOutputs(self.builder, outputs)
        return int(tflite.SubGraphEnd(self.builder))

    def _step(self, step: Step, places: dict[str, int]) -> int:
        if step.op not in self.codes:
            self.codes.append(step.op)
        inputs = self._numbers([places[name] for name in step.inputs], "<i4")
        outputs = self._numbers([places[name] for name in step.outputs], "<i4")
        kind, options = step.options(self.builder) if step.options else (0, 0)
        tflite.OperatorStart(self.builder)
        tflite.OperatorAddOpcodeIndex(self.builder, self.codes.index(step.op))
        tflite.OperatorAddInputs(self.builder, inputs)
        tflite.OperatorAddOutputs(self.builder, outputs)
        if options:
            tflite.OperatorAddBuiltinOptionsType(self.builder, kind)
            tflite.OperatorAddBuiltinOptions(self.builder, options)
        return int(tflite.OperatorEnd(self.builder))

    def _tensor(self, name: str, given: Given) -> int:
        buffer = 0
        if given.values is not None:
            buffer = len(self.buffers)
            self.buffers.append(given)
        label = self.builder.CreateString(name)
        shape = self._numbers(given.shape, "<i4")
        scaling = self._scaling(given) if given.scale else 0
        sparsity = self._sparsity(given.sparsity) if given.sparsity else 0
        tflite.TensorStart(self.builder)
        tflite.TensorAddName(self.builder, label)
        tflite.TensorAddShape(self.builder, shape)
        tflite.TensorAddType(self.builder, TYPES[given.type or "float32"])
        tflite.TensorAddBuffer(self.builder, buffer)
        if scaling:
            tflite.TensorAddQuantization(self.builder, scaling)
        if sparsity:
            tflite.TensorAddSparsity(self.builder, sparsity)
        return int(tflite.TensorEnd(self.builder))

    def _scaling(self, given: Given) -> int:
        scale = self._numbers(given.scale, "<f4")
        zero = self._numbers(given.zero, "<i8")
        tflite.QuantizationParametersStart(self.builder)
        tflite.QuantizationParametersAddScale(self.builder, scale)
        tflite.QuantizationParametersAddZeroPoint(self.builder, zero)
        tflite.QuantizationParametersAddQuantizedDimension(self.builder, given.axis)
        return int(tflite.QuantizationParametersEnd(self.builder))

    def _sparsity(self, given: Sparsity) -> int:
        levels = self._offsets([self._level(level, given.vector) for level in given.levels])
        order = self._numbers(given.order, "<i4")
        blocks = self._numbers(given.blocks, "<i4")
        tflite.SparsityParametersStart(self.builder)
        tflite.SparsityParametersAddTraversalOrder(self.builder, order)
        tflite.SparsityParametersAddBlockMap(self.builder, blocks)
        tflite.SparsityParametersAddDimMetadata(self.builder, levels)
        return int(tflite.SparsityParametersEnd(self.builder))

    def _level(self, level: int | tuple[Array, Array], vector: str) -> int:
        if isinstance(level, int):
            tflite.DimensionMetadataStart(self.builder)
            tflite.DimensionMetadataAddFormat(self.builder, tflite.DimensionType.DENSE)
            tflite.DimensionMetadataAddDenseSize(self.builder, level)
            return int(tflite.DimensionMetadataEnd(self.builder))
        kind = getattr(tflite.SparseIndexVector, vector)
        tables = [self._vector(values, vector) for values in level]
        tflite.DimensionMetadataStart(self.builder)
        tflite.DimensionMetadataAddFormat(self.builder, tflite.DimensionType.SPARSE_CSR)
        tflite.DimensionMetadataAddArraySegmentsType(self.builder, kind)
        tflite.DimensionMetadataAddArraySegments(self.builder, tables[0])
        tflite.DimensionMetadataAddArrayIndicesType(self.builder, kind)
        tflite.DimensionMetadataAddArrayIndices(self.builder, tables[1])
        return int(tflite.DimensionMetadataEnd(self.builder))

    def _vector(self, values: Array, vector: str) -> int:
        dtype = {"Int32Vector": "<i4", "Uint16Vector": "<u2", "Uint8Vector": "<u1"}[vector]
        numbers = self._numbers(values, dtype)
        getattr(tflite, f"{vector}Start")(self.builder)
        getattr(tflite, f"{vector}AddValues")(self.builder, numbers)
        return int(getattr(tflite, f"{vector}End")(self.builder))


def _bytes(values: Array | bytes | None) -> bytes:
    if values is None or isinstance(values, bytes):
        return values or b""
    return values.tobytes()


def write_tflite(
    path: Path, tensors: dict[str, Given], steps: Sequence[Step], *more: Graph
) -> Path:
    """Write a model of one graph, and of those that it calls."""
    return Writer([Graph(tensors, steps), *more]).write(path)
