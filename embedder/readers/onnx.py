"""ONNX: a graph of operations whose constants are the weights.

Initialisers, the tensors of Constant nodes, and those of branches, loops and functions are read.
What each is for, and how its axes lie, is told by the operation that uses it. Kernels of LSTM,
GRU and RNN keep the order (directions, gates · hidden, in) that ONNX gives them.
"""

import math
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embedder.checkpoint import Checkpoint, Kind, Tensor, tensor_of
from embedder.encoding import Encoding, Plain
from embedder.errors import MalformedError, MissingExtraError, UnsupportedError
from embedder.readers.dataflow import Layout, Role, Use, strongest, tensor_kind
from embedder.readers.onnx_file import STRING, OnnxFile, text
from embedder.readers.onnx_graph import Evaluator, Graph, role_in
from embedder.readers.onnx_scales import Scales
from embedder.storage import ComputedStorage

if TYPE_CHECKING:
    import onnx

_LARGEST_SPARSE_VALUES = 1 << 30
_LONGEST_TEXT = 4096
_MOST_FACTS = 100

_INTEGER_PLACES = {
    "MatMulInteger": {0, 1},
    "ConvInteger": {0, 1},
    "MatMulNBits": {1},
    "QLinearConv": {3, 8},
    "QLinearMatMul": {0, 3},
    "QGemm": {3, 6},
    "QAttention": {1},
    "DynamicQuantizeMatMul": {1},
    "MatMulIntegerToFloat": {0, 1},
    "DynamicQuantizeLSTM": {1, 2},
    "GatherBlockQuantized": {0},
    "DequantizeLinear": {0},
}
"""Operation → places of quantised inputs; an integer tensor there is a weight, scale or not."""


def open_onnx(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open one ONNX file, with the data files that it names in its own folder.

    Args:
        path: The file.
        allow_partial: Do without data files that are missing.

    Raises:
        MalformedError: The file is no ONNX message, or its tensors do not fit their bytes.
        TruncatedError: A data file ends before a tensor does.
        MissingPartError: A data file is not there.
        RefusedError: A tensor points outside the model's folder.
        UnsupportedError: A stored type that we do not know.
        MissingExtraError: The package onnx is not installed.
    """
    file = OnnxFile(path, allow_partial=allow_partial)
    try:
        model = _parse(file)
        graph = Graph()
        graph.add_model(model)
        tensors, limits = _tensors(graph, file)
        declared = _declared(model)
    except BaseException:
        file.close()
        raise
    return Checkpoint(
        location=str(path),
        format="onnx",
        tensors=tensors,
        files=(path, *(other.path for other in file.open_files[1:])),
        declared=declared,
        limits=[*file.limits, *limits],
        open_files=file.open_files,
    )


def _parse(file: OnnxFile) -> "onnx.ModelProto":
    try:
        import onnx

        failures = import_module("google.protobuf.message")  # without types, so not by `import`
    except ImportError as error:
        raise MissingExtraError("onnx", "formats", "reading ONNX") from error
    left = file.graph_bytes()
    model = onnx.ModelProto()
    try:
        model.ParseFromString(left)
    except failures.DecodeError as error:
        raise MalformedError(
            file.path, f"is no ONNX message ({error})", "get the file again"
        ) from error
    return model


def _tensors(graph: Graph, file: OnnxFile) -> tuple[tuple[Tensor, ...], list[str]]:
    """Return the tensors of a graph, and what could not be read."""
    constants: dict[int, Tensor] = {}
    for value, (name, proto) in graph.protos.items():
        tensor = _stored(file, name, proto)
        if tensor is not None:
            constants[value] = tensor
    evaluator = Evaluator(graph, constants)
    scales = Scales(evaluator)
    made: dict[int, Tensor] = {}
    limits: list[str] = []
    for value, tensor in constants.items():
        uses = list(graph.flow.uses(value, tensor.shape, evaluator))
        made[value] = _made(tensor, uses, scales, limits)
    for value in scales.found:
        made[value] = replace(made[value], kind=Kind.SCALE)
    if graph.flow.gave_up:
        limits.append("the graph is too entangled to follow: tensors are told apart by shape")
    return _with_own_names(made.values()), limits


def _made(tensor: Tensor, uses: list[Use], scales: Scales, limits: list[str]) -> Tensor:
    """Return a tensor with its kind, its order of axes and its scales."""
    scaling = scales.of(tensor, uses)
    if scaling is not None:
        encoding, shape = scaling.encoding, scaling.shape
    else:
        encoding, shape = tensor.encoding, tensor.shape
        if any(use.place in _INTEGER_PLACES.get(use.node.op, ()) for use in uses):
            limits.append(f"{tensor.name}: its scale is not in the graph; read without it")
            encoding = Plain(encoding.name, quantised=True) if _is_plain(encoding) else encoding
    found = _roles(tensor, uses)
    if shape != tensor.shape:
        # Unpacked: the stored axes are not those that the graph was followed along.
        found = [(Role(role.kind), tuple(range(len(shape)))) for role, _ in found]
    kind, axes = tensor_kind(tensor.name, shape, encoding, strongest(found))
    return replace(tensor, shape=shape, encoding=encoding, kind=kind, axes=axes)


def _is_plain(encoding: Encoding) -> bool:
    return isinstance(encoding, Plain)


def _roles(tensor: Tensor, uses: list[Use]) -> list[tuple[Role, Layout]]:
    """Return what the nodes that use a tensor do with it."""
    found: list[tuple[Role, Layout]] = []
    for use in uses:
        role = role_in(use.node, use.place, tensor.shape, use.layout) if use.last else None
        if role is not None:
            found.append((role, use.layout))
    return found


def _stored(file: OnnxFile, name: str, proto: Any) -> Tensor | None:
    """Return a constant as it is stored, None if it holds no numbers or is not there."""
    if isinstance(proto, np.ndarray):
        return tensor_of(name, proto)
    if hasattr(proto, "indices"):
        return _sparse(file, name, proto)
    if proto.data_type == STRING:
        return None
    found = file.tensor(name, proto)
    if found is None:
        return None
    shape, encoding, storage = found
    return Tensor(name, shape, encoding, storage)


def _sparse(file: OnnxFile, name: str, proto: "onnx.SparseTensorProto") -> Tensor | None:
    """Return a tensor of which only the values that are not zero are stored."""
    shape = tuple(int(length) for length in proto.dims)
    size = math.prod(shape)
    if any(length < 1 for length in shape) or size > _LARGEST_SPARSE_VALUES:
        raise UnsupportedError(
            file.path,
            f"sparse tensor {name!r} has the shape {list(shape)}; at most "
            f"{_LARGEST_SPARSE_VALUES:,} values are expanded",
        )
    values, places = _stored(file, name, proto.values), _stored(file, name, proto.indices)
    if values is None or places is None:
        return None
    flat = places.read().astype(np.int64)
    if flat.ndim == 2 and flat.shape[1] == len(shape):
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        flat = flat @ np.array(strides, np.int64)
    if flat.shape != values.shape or (flat.size and not 0 <= flat.min() <= flat.max() < size):
        raise MalformedError(
            file.path, f"sparse tensor {name!r}: its places do not fit its shape {list(shape)}"
        )
    order = np.argsort(flat, kind="stable")
    flat, stored = flat[order], values.read().astype(np.float32)[order]
    row = math.prod(shape[1:])

    def rows(first: int, last: int) -> NDArray[np.float32]:
        dense = np.zeros((last - first) * row, np.float32)
        here = slice(*np.searchsorted(flat, [first * row, last * row]))
        dense[flat[here] - first * row] = stored[here]
        return dense.reshape(last - first, row)

    storage = ComputedStorage(shape[0], row, rows)
    return Tensor(name, shape, Plain("F32"), storage)


def _with_own_names(tensors: Any) -> tuple[Tensor, ...]:
    """Return the tensors, with a number behind names that several of them have."""
    seen: dict[str, int] = {}
    named = []
    for tensor in tensors:
        count = seen[tensor.name] = seen.get(tensor.name, 0) + 1
        named.append(tensor if count == 1 else replace(tensor, name=f"{tensor.name}#{count}"))
    return tuple(named)


def _declared(model: "onnx.ModelProto") -> dict[str, Any]:
    """Return what the file says of itself."""
    facts = {
        "producer": f"{text(model.producer_name)} {text(model.producer_version)}".strip(),
        "ir_version": model.ir_version,
        "opset": {text(opset.domain) or "ai.onnx": opset.version for opset in model.opset_import},
        "domain": text(model.domain),
        "model_version": model.model_version,
        "description": text(model.doc_string)[:_LONGEST_TEXT],
        "graph": text(model.graph.name)[:_LONGEST_TEXT],
        "metadata": {
            text(entry.key): text(entry.value)[:_LONGEST_TEXT]
            for entry in list(model.metadata_props)[:_MOST_FACTS]
        },
    }
    return {key: value for key, value in facts.items() if value}
