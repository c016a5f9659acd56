"""Quantised ONNX weights: ONNX Runtime, given an identity, is the oracle of what they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from embedder.checkpoint import Kind
from embedder.opening import open_checkpoint
from onnx_writer import Array, random, run, save_graph, tensor_named
from reader_contract import assembled

RNG = np.random.default_rng(12)
MS = "com.microsoft"


def integers(dtype: str, *shape: int) -> Array:
    limits = np.iinfo(dtype)
    return RNG.integers(limits.min, limits.max + 1, shape).astype(dtype)


def scales(*shape: int) -> NDArray[np.float32]:
    return RNG.uniform(0.01, 0.1, shape).astype(np.float32)


def check(
    path: Path, expected: NDArray[np.floating[Any]], *, name: str = "q", rtol: float = 0.0
) -> None:
    """Compare the weight, as out × in, in one piece and in slices."""
    with open_checkpoint(path) as checkpoint:
        tensor = tensor_named(checkpoint, name)
        assert tensor.kind is Kind.WEIGHT
        assert tensor.encoding.quantised
        assert checkpoint.limits == []
        np.testing.assert_allclose(tensor.canonical(), expected, rtol=rtol)
        np.testing.assert_array_equal(assembled(tensor, 5), tensor.read())
        kinds = {other.name: other.kind for other in checkpoint.tensors}
        assert kinds.get("s", Kind.SCALE) is Kind.SCALE
        integer_zero = kinds.get("z", Kind.SCALE)
        assert integer_zero in (Kind.SCALE, Kind.BUFFER)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_dequantize_linear_with_one_scale_or_one_for_each_channel(
    tmp_path: Path, dtype: str, axis: int | None
) -> None:
    shape = (9, 7)  # in × out
    count = () if axis is None else (shape[axis],)
    constants: dict[str, Array] = {
        "q": integers(dtype, *shape),
        "s": scales(*count),
        "z": integers(dtype, *count),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=axis or 0),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    path = save_graph(tmp_path / "m.onnx", nodes, constants)
    check(path, run(path, np.eye(9, dtype=np.float32)).T, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["INT4", "UINT4", "INT8"])
def test_dequantize_linear_in_blocks(tmp_path: Path, axis: int, kind: str) -> None:
    shape = (12, 6)
    blocks = tuple(length // 3 if place == axis else length for place, length in enumerate(shape))
    low, high = {"INT4": (-8, 8), "UINT4": (0, 16), "INT8": (-128, 128)}[kind]
    dtype = helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(kind))
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=axis, block_size=3),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    constants: dict[str, Array] = {
        "q": RNG.integers(low, high, shape).astype(dtype),
        "s": scales(*blocks),
        "z": RNG.integers(low, high, blocks).astype(dtype),
    }
    path = save_graph(tmp_path / "m.onnx", nodes, constants)
    (expected,) = ReferenceEvaluator(str(path)).run(None, {"x": np.eye(12, dtype=np.float32)})
    check(path, np.asarray(expected).T, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 7), (9, 1), ()], ids=["columns", "rows", "one"])
@pytest.mark.parametrize("shifted", [False, True], ids=["symmetric", "shifted"])
def test_a_cast_a_difference_and_a_product(
    tmp_path: Path, shape: tuple[int, ...], shifted: bool
) -> None:
    constants: dict[str, Array] = {"q": integers("int8", 9, 7), "s": scales(*shape)}
    nodes = [helper.make_node("Cast", ["q"], ["f"], to=TensorProto.FLOAT)]
    if shifted:
        constants["z"] = np.round(random(*shape) * 9).astype(np.float32)
        nodes.append(helper.make_node("Sub", ["f", "z"], ["d"]))
    nodes += [
        helper.make_node("Mul", ["d" if shifted else "f", "s"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    path = save_graph(tmp_path / "m.onnx", nodes, constants)
    check(path, run(path, np.eye(9, dtype=np.float32)).T, rtol=1e-6)


@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_an_integer_product_is_scaled_by_what_multiplies_its_result(
    tmp_path: Path, per_column: bool, zero: bool
) -> None:
    count = (7,) if per_column else ()
    # The names are shuffled on purpose: only the graph ties scale and weight together.
    constants: dict[str, Array] = {"q": integers("uint8", 9, 7), "s": scales(*count)}
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "q_scale", "xz"]),
        helper.make_node(
            "MatMulInteger", ["xq", "q", "xz", "z"] if zero else ["xq", "q", "xz"], ["i"]
        ),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["q_scale", "s"], ["both"]),
        helper.make_node("Mul", ["f", "both"], ["y"]),
    ]
    if zero:
        constants["z"] = integers("uint8")
    path = save_graph(tmp_path / "m.onnx", nodes, constants)
    check(path, run(path, np.eye(9, dtype=np.float32)).T, rtol=1e-5)


def test_an_integer_convolution_with_an_offset_between(tmp_path: Path) -> None:
    constants: dict[str, Array] = {
        "q": integers("uint8", 7, 9, 1, 1),
        "s": scales(7),
        "z": integers("uint8"),
        "shape": np.array([1, 7, 1, 1]),
        "b": integers("int32", 7) % 5,
    }
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        helper.make_node("ConvInteger", ["xq", "q", "xz", "z"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "s"], ["both"]),
        helper.make_node("Reshape", ["both", "shape"], ["spread"]),
        helper.make_node("Mul", ["f", "spread"], ["y"]),
    ]
    path = save_graph(tmp_path / "m.onnx", nodes, constants)
    eye = np.eye(9, dtype=np.float32).reshape(9, 9, 1, 1)
    check(path, run(path, eye).T.reshape(7, 9, 1, 1), rtol=1e-5)


def test_the_scale_of_a_static_input_is_not_the_weights(tmp_path: Path) -> None:
    constants: dict[str, Array] = {
        "q": integers("int8", 9, 7),
        "s": scales(),
        "in": np.array(0.25, np.float32),
        "inz": np.array(0, np.uint8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "in", "inz"], ["xq"]),
        helper.make_node("MatMulInteger", ["xq", "q", "inz"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "in"], ["half"]),
        helper.make_node("Mul", ["half", "s"], ["y"]),
    ]
    path = save_graph(tmp_path / "m.onnx", nodes, constants)
    check(path, run(path, np.eye(9, dtype=np.float32)).T, rtol=1e-6)


@pytest.mark.parametrize(
    ("op", "inputs", "zero_type"),
    [
        ("DynamicQuantizeMatMul", ["x", "q", "s", "z"], "int8"),
        ("MatMulIntegerToFloat", ["xq", "q", "xs", "s", "xz", "z"], "int8"),
    ],
)
def test_operations_that_take_integers_and_their_scales(
    tmp_path: Path, op: str, inputs: Sequence[str], zero_type: str
) -> None:
    constants: dict[str, Array] = {
        "q": integers("int8", 9, 7),
        "s": scales(7),
        "z": integers(zero_type, 7),
    }
    nodes = [helper.make_node(op, list(inputs), ["y"], domain=MS)]
    if "xq" in inputs:
        nodes.insert(0, helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]))
    path = save_graph(tmp_path / "m.onnx", nodes, constants)
    check(path, run(path, np.eye(9, dtype=np.float32)).T, rtol=1e-5)


@pytest.mark.parametrize("turned", [0, 1])
def test_qgemm_and_its_offset(tmp_path: Path, turned: int) -> None:
    weight = integers("int8", 7, 9)  # out × in
    one, none = np.array(1, np.float32), np.array(0, np.uint8)
    constants: dict[str, Array] = {
        "q": weight if turned else np.ascontiguousarray(weight.T),
        "s": scales(7),
        "z": np.zeros(7, np.int8),
        "b": integers("int32", 7) % 100,
        "one": one,
        "none": none,
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "none"], ["xq"]),
        helper.make_node(
            "QGemm",
            ["xq", "one", "none", "q", "s", "z", "b"],
            ["y"],
            domain=MS,
            transB=turned,
        ),
    ]
    path = save_graph(tmp_path / "m.onnx", nodes, constants)
    offset = run(path, np.zeros((1, 9), np.float32))[0]
    found = run(path, np.eye(9, dtype=np.float32)) - offset
    check(path, found.T, rtol=1e-4)
    with open_checkpoint(path) as checkpoint:
        bias = tensor_named(checkpoint, "b")
        assert bias.kind is Kind.BIAS
        np.testing.assert_allclose(bias.read(), offset, rtol=1e-6)


def test_a_quantised_convolution_and_its_offset(tmp_path: Path) -> None:
    constants: dict[str, Array] = {
        "q": integers("int8", 7, 9, 1, 1),
        "s": scales(7),
        "z": np.zeros(7, np.int8),
        "b": integers("int32", 7) % 100,
        "xs": np.array(0.5, np.float32),
        "none": np.array(0, np.int8),
        "ys": np.array(1e-3, np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "none"], ["xq"]),
        helper.make_node(
            "QLinearConv", ["xq", "xs", "none", "q", "s", "z", "ys", "none", "b"], ["yq"]
        ),
        helper.make_node("DequantizeLinear", ["yq", "ys", "none"], ["y"]),
    ]
    path = save_graph(tmp_path / "m.onnx", nodes, constants)
    stored = np.asarray(constants["q"], np.float64)
    expected = stored * np.asarray(constants["s"], np.float64).reshape(7, 1, 1, 1)
    check(path, expected, rtol=1e-6)
    with open_checkpoint(path) as checkpoint:
        found = tensor_named(checkpoint, "b").read()
    offset = np.asarray(constants["b"], np.float64) * np.asarray(constants["s"], np.float64) * 0.5
    np.testing.assert_allclose(found, offset, rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("blocks", [2, 3])
def test_a_packed_matrix_with_a_scale_for_each_block(
    tmp_path: Path, bits: int, zero: bool, blocks: int
) -> None:
    rows, size = 7, 16
    row = blocks * size
    constants: dict[str, Array] = {
        "q": integers("uint8", rows, blocks, size * bits // 8),
        "s": scales(rows * blocks),
    }
    if zero:
        constants["z"] = integers("uint8", rows * -(-blocks * bits // 8))
    node = helper.make_node(
        "MatMulNBits",
        ["x", "q", "s", "z"] if zero else ["x", "q", "s"],
        ["y"],
        domain=MS,
        N=rows,
        K=row,
        bits=bits,
        block_size=size,
    )
    path = save_graph(tmp_path / "m.onnx", [node], constants)
    expected = run(path, np.eye(row, dtype=np.float32)).T
    with open_checkpoint(path) as checkpoint:
        tensor = tensor_named(checkpoint, "q")
        assert tensor.shape == (rows, row)
        assert checkpoint.parameters == rows * row
        np.testing.assert_allclose(tensor.canonical(), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(assembled(tensor, 5), tensor.read())


def test_the_scales_of_blocks_stay_in_the_file(tmp_path: Path) -> None:
    constants: dict[str, Array] = {
        "q": integers("uint8", 512, 8, 8),
        "s": scales(512 * 8),
    }
    node = helper.make_node(
        "MatMulNBits", ["x", "q", "s"], ["y"], domain=MS, N=512, K=128, bits=4, block_size=16
    )
    path = save_graph(tmp_path / "m.onnx", [node], constants)
    with open_checkpoint(path) as checkpoint:
        read = []
        for file in checkpoint.open_files:
            original = file.read
            file.read = lambda a, b, _f=original: (read.append(b - a), _f(a, b))[1]  # type: ignore[method-assign,func-returns-value,misc]
        for _ in tensor_named(checkpoint, "q").blocks(256):
            pass
    assert max(read) <= 1024  # one row of 8 scales is 32 bytes; all are 16,384


def test_a_quantised_lstm_has_its_kernels_turned_and_scaled(tmp_path: Path) -> None:
    inside, hidden = 9, 5
    # Some processors add two products of bytes in 16 bits: above half the range they saturate.
    constants: dict[str, Array] = {
        "w": integers("int8", 1, inside, 4 * hidden) // 16,
        "r": integers("int8", 1, hidden, 4 * hidden) // 16,
        "b": random(1, 8 * hidden) * 0,
        "ws": scales(1),
        "rs": scales(1),
        "wz": integers("int8", 1) // 16,
        "rz": np.zeros(1, np.int8),
    }
    inputs = ["x", "w", "r", "b", "", "", "", "", "ws", "wz", "rs", "rz"]
    quantised = save_graph(
        tmp_path / "q.onnx",
        [helper.make_node("DynamicQuantizeLSTM", inputs, ["y"], domain=MS, hidden_size=hidden)],
        constants,
    )
    with open_checkpoint(quantised) as checkpoint:
        kernels = {name: tensor_named(checkpoint, name).canonical() for name in ("w", "r")}
    plain = save_graph(
        tmp_path / "f.onnx",
        [helper.make_node("LSTM", ["x", "w", "r", "b"], ["y"], hidden_size=hidden)],
        {**kernels, "b": constants["b"]},
    )
    x = random(6, 2, inside)
    # The input is rounded to 8 bits on the way, so that the two agree to about a hundredth.
    np.testing.assert_allclose(run(quantised, x), run(plain, x), atol=0.05)


def test_rows_that_are_looked_up_in_blocks(tmp_path: Path) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(TensorProto.UINT4)
    constants: dict[str, Array] = {
        "q": RNG.integers(0, 16, (11, 32)).astype(dtype),
        "s": scales(11, 2),
    }
    node = helper.make_node(
        "GatherBlockQuantized",
        ["q", "ids", "s"],
        ["y"],
        domain=MS,
        gather_axis=0,
        quantize_axis=1,
        block_size=16,
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    check(path, run(path, np.arange(11)), rtol=1e-6)


def test_integers_whose_scale_is_not_in_the_graph_are_read_and_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        helper.make_node("MatMulInteger", ["xq", "q", "xz"], ["i"]),
        helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT),
    ]
    stored = integers("int8", 9, 7)
    path = save_graph(tmp_path / "m.onnx", nodes, {"q": stored})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.limits == ["q: its scale is not in the graph; read without it"]
        np.testing.assert_array_equal(tensor_named(checkpoint, "q").canonical(), stored.T)
        assert checkpoint.parameters == 63


def test_whole_numbers_that_are_cast_and_multiplied_are_not_taken_for_weights(
    tmp_path: Path,
) -> None:
    nodes = [
        helper.make_node("Cast", ["positions"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "rate"], ["angles"]),
        helper.make_node("Add", ["x", "angles"], ["y"]),
    ]
    constants: dict[str, Array] = {"positions": np.arange(12).reshape(3, 4), "rate": scales()}
    with open_checkpoint(save_graph(tmp_path / "m.onnx", nodes, constants)) as checkpoint:
        assert tensor_named(checkpoint, "positions").kind is Kind.BUFFER
