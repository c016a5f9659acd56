"""Quantised ONNX graphs: units may be put in another order, and ONNX Runtime computes the same."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from embedder.errors import ArchitectureError
from embedder.onnx_tracing import describe_onnx_model
from embedder.symmetry import permuted

onnxruntime = pytest.importorskip("onnxruntime")

RNG = np.random.default_rng(11)
node = helper.make_node
STEP = np.float32(0.05)


def whole(*shape: int) -> NDArray[np.int8]:
    return RNG.integers(-99, 100, size=shape).astype(np.int8)


STATIC = [
    node("QuantizeLinear", ["x", "step", "zero"], ["xq"]),
    node("DequantizeLinear", ["xq", "step", "zero"], ["xd"]),
    node("DequantizeLinear", ["w", "step", "zero"], ["wd"]),
    node("Gemm", ["xd", "wd", "b"], ["h"], transB=1),
    node("Relu", ["h"], ["r"]),
    node("QuantizeLinear", ["r", "step", "zero"], ["rq"]),
    node("DequantizeLinear", ["rq", "step", "zero"], ["rd"]),
    node("DequantizeLinear", ["v", "step", "zero"], ["vd"]),
    node("Gemm", ["rd", "vd"], ["y"], transB=1),
]
DYNAMIC = [
    node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
    node("MatMulInteger", ["xq", "wt", "xz"], ["hi"]),
    node("Div", ["b", "xs"], ["bd"]),
    node("Floor", ["bd"], ["bf"]),
    node("Cast", ["bf"], ["bi"], to=TensorProto.INT32),
    node("Add", ["hi", "bi"], ["ha"]),
    node("Cast", ["ha"], ["hf"], to=TensorProto.FLOAT),
    node("Mul", ["xs", "step"], ["s"]),
    node("Mul", ["hf", "s"], ["h"]),
    node("Relu", ["h"], ["r"]),
    node("DynamicQuantizeLinear", ["r"], ["rq", "rs", "rz"]),
    node("MatMulInteger", ["rq", "vt", "rz"], ["yi"]),
    node("Cast", ["yi"], ["y"], to=TensorProto.FLOAT),
]
STORED = [
    node("Cast", ["wt"], ["wf"], to=TensorProto.FLOAT),
    node("Mul", ["wf", "step"], ["ws"]),
    node("MatMul", ["x", "ws"], ["h"]),
    node("Relu", ["h"], ["r"]),
    node("MatMul", ["r", "v2"], ["y"]),
]
CONVOLVED = [
    node("Unsqueeze", ["x", "two"], ["x3"]),
    node("DynamicQuantizeLinear", ["x3"], ["xq", "xs", "xz"]),
    node("ConvInteger", ["xq", "k", "xz"], ["hi"]),
    node("Cast", ["hi"], ["h"], to=TensorProto.FLOAT),
    node("Relu", ["h"], ["r"]),
    node("DynamicQuantizeLinear", ["r"], ["rq", "rs", "rz"]),
    node("ConvInteger", ["rq", "l", "rz"], ["yi"]),
    node("Cast", ["yi"], ["y"], to=TensorProto.FLOAT),
]


def model_of(nodes: Sequence[NodeProto], **more: NDArray[np.generic]) -> onnx.ModelProto:
    """Return a model with those of our constants that its nodes read."""
    constants: dict[str, NDArray[np.generic]] = {
        **{"step": np.array(STEP), "zero": np.array(0, np.int8), "two": np.array([2], np.int64)},
        **{"w": whole(6, 4), "b": RNG.normal(size=6).astype(np.float32), "v": whole(3, 6)},
        **{"wt": whole(4, 6), "vt": whole(6, 3), "k": whole(6, 4, 1), "l": whole(3, 6, 1)},
        **{"v2": RNG.normal(size=(6, 3)).astype(np.float32)},
        **more,
    }
    read = {name for made in nodes for name in made.input}
    tensors = [numpy_helper.from_array(v, name) for name, v in constants.items() if name in read]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 4))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def run(model: onnx.ModelProto) -> NDArray[np.floating]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    x = np.random.default_rng(2).normal(size=(2, 4)).astype(np.float32)
    found: NDArray[np.floating] = session.run(None, {"x": x})[0]
    return found


@pytest.mark.parametrize(
    ("nodes", "gauge"),
    [(STATIC, "order"), (DYNAMIC, "order"), (CONVOLVED, "order"), (STORED, "scale")],
)
def test_units_of_a_quantised_model_have_no_order(
    nodes: Sequence[NodeProto], gauge: str, tmp_path: Path
) -> None:
    model = model_of(nodes)
    found = describe_onnx_model(model)
    assert sorted(group.gauge.value for group in found.groups.values()) == sorted(
        ["named", gauge, "named"]
    )
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {name: numpy_helper.to_array(tensors[name]) for name in found.axes}
    changed = permuted(weights, found, np.random.default_rng(1))
    before = run(model)
    moved = 0
    for name, values in changed.items():
        moved += not np.array_equal(values, weights[name])
        tensors[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))
    assert moved >= 2
    np.testing.assert_allclose(run(model), before, rtol=1e-5, atol=1e-5)


def test_a_step_for_each_unit_keeps_the_units(tmp_path: Path) -> None:
    steps = np.linspace(0.01, 0.05, 6, dtype=np.float32)
    nodes = [
        *STATIC[:5],
        node("QuantizeLinear", ["r", "steps", "zeros"], ["rq"], axis=1),
        node("DequantizeLinear", ["rq", "steps", "zeros"], ["rd"], axis=1),
        *STATIC[7:],
    ]
    with pytest.raises(ArchitectureError, match="no hidden units"):
        describe_onnx_model(model_of(nodes, steps=steps, zeros=np.zeros(6, np.int8)))


def test_a_scale_found_on_the_way_has_no_units() -> None:
    nodes = [*DYNAMIC[:-2], node("Mul", ["r", "rs"], ["y"])]
    with pytest.raises(ArchitectureError, match="no hidden units"):
        describe_onnx_model(model_of(nodes))
