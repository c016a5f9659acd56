"""ONNX: the contract, kinds and order of axes from the graph."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from embedder.checkpoint import Kind
from embedder.opening import open_checkpoint
from embedder.readers import dataflow, onnx_file
from onnx_writer import Array, random, run, save_graph, tensor_named
from reader_contract import ReaderContract, Weights


def write_contract_model(path: Path, weights: Weights, *, as_constants: bool = False) -> Path:
    constants: dict[str, Array] = dict(weights)
    constants["dense"] = weights["dense"].T.copy()
    nodes = [
        helper.make_node("Gather", ["embedding", "ids"], ["a"]),
        helper.make_node("Conv", ["image", "conv"], ["b"]),
        helper.make_node("Gemm", ["x", "dense", "bias"], ["y"]),
    ]
    if as_constants:
        made = [
            helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values))
            for name, values in constants.items()
        ]
        return save_graph(path, made + nodes, {}, inputs=("x", "ids", "image"))
    return save_graph(path, nodes, constants, inputs=("x", "ids", "image"))


class TestOnnx(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        return write_contract_model(folder / "model.onnx", weights)


class TestOnnxWithTensorsLeftInTheFile(ReaderContract):
    @pytest.fixture(autouse=True)
    def _small_tensors_stay_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(onnx_file, "_LIFTED_BYTES", 16)
        monkeypatch.setattr(onnx_file, "_ENTERED_BYTES", 16)

    def write(self, folder: Path, weights: Weights) -> Path:
        return write_contract_model(folder / "model.onnx", weights, as_constants=True)


class TestOnnxWithExternalData(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        model = onnx.load(write_contract_model(folder / "model.onnx", weights))
        onnx.save(
            model,
            folder / "model.onnx",
            save_as_external_data=True,
            location="model.data",
            size_threshold=0,
        )
        return folder / "model.onnx"


ORIENTATIONS: dict[str, tuple[Sequence[onnx.NodeProto], Callable[[Array], Array]]] = {
    "Gemm transB": (
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        lambda weight: weight,
    ),
    "Gemm": ([helper.make_node("Gemm", ["x", "w"], ["y"])], lambda weight: weight.T),
    "MatMul right": ([helper.make_node("MatMul", ["x", "w"], ["y"])], lambda weight: weight.T),
    "MatMul of a transposed": (
        [
            helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["y"]),
        ],
        lambda weight: weight,
    ),
    "MatMul through casts": (
        [
            helper.make_node("Identity", ["w"], ["i"]),
            helper.make_node("Unsqueeze", ["i", "front"], ["u"]),
            helper.make_node("Reshape", ["u", "shape"], ["r"]),
            helper.make_node("MatMul", ["x", "r"], ["y"]),
        ],
        lambda weight: weight.T,
    ),
    "FusedMatMul transB": (
        [helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft", transB=1)],
        lambda weight: weight,
    ),
}


@pytest.mark.parametrize("case", ORIENTATIONS)
def test_a_matrix_comes_back_as_out_times_in(tmp_path: Path, case: str) -> None:
    nodes, as_stored = ORIENTATIONS[case]
    weight = random(7, 9)  # out × in
    stored = np.ascontiguousarray(as_stored(weight))
    constants: dict[str, Array] = {"w": stored}
    if case.endswith("casts"):
        constants |= {"front": np.array([0]), "shape": np.array([9, -1])}
    path = save_graph(tmp_path / "m.onnx", nodes, constants)
    # The graph itself is the oracle: with an identity for its input it gives the weight.
    np.testing.assert_array_equal(run(path, np.eye(9, dtype=np.float32)), weight.T)
    with open_checkpoint(path) as checkpoint:
        tensor = tensor_named(checkpoint, "w")
        assert tensor.kind is Kind.WEIGHT
        np.testing.assert_array_equal(tensor.canonical(), weight)


def test_a_left_operand_stays_as_it_is(tmp_path: Path) -> None:
    weight = random(7, 9)
    nodes = [helper.make_node("MatMul", ["w", "x"], ["y"])]
    with open_checkpoint(save_graph(tmp_path / "m.onnx", nodes, {"w": weight})) as checkpoint:
        np.testing.assert_array_equal(tensor_named(checkpoint, "w").canonical(), weight)


@pytest.mark.parametrize("group", [1, 2])
def test_a_transposed_convolution_is_turned_unless_it_has_groups(
    tmp_path: Path, group: int
) -> None:
    weight = random(4, 6, 3, 2)  # in × out/group × space
    nodes = [helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], group=group)]
    path = save_graph(tmp_path / "m.onnx", nodes, {"w": weight, "b": random(6 * group)})
    with open_checkpoint(path) as checkpoint:
        tensor = tensor_named(checkpoint, "w")
        assert tensor.axes == ((1, 0, 2, 3) if group == 1 else ())
        assert tensor_named(checkpoint, "b").kind is Kind.BIAS


def test_kinds_come_from_the_graph_and_not_from_names(tmp_path: Path) -> None:
    constants: dict[str, Array] = {
        "running_mean": random(7, 9),  # really a weight
        "kernel": random(7),  # really a batch norm
        "bias": random(7),
        "scale": random(7),
        "weight": np.abs(random(7)),
        "table": random(1, 5, 7),
        "gain": random(7),
        "slope": random(7),
        "half": np.array(0.5, np.float32),
        "shape": np.array([-1, 7]),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "running_mean"], ["a"], transB=1),
        helper.make_node("BatchNormalization", ["a", "kernel", "bias", "scale", "weight"], ["b"]),
        helper.make_node("Add", ["b", "table"], ["c"]),
        helper.make_node("Mul", ["c", "gain"], ["d"]),
        helper.make_node("Mul", ["d", "half"], ["e"]),
        helper.make_node("PRelu", ["e", "slope"], ["f"]),
        helper.make_node("Reshape", ["f", "shape"], ["y"]),
    ]
    with open_checkpoint(save_graph(tmp_path / "m.onnx", nodes, constants)) as checkpoint:
        kinds = {tensor.name: tensor.kind for tensor in checkpoint.tensors}
    assert kinds == {
        "running_mean": Kind.WEIGHT,
        "kernel": Kind.NORM,
        "bias": Kind.NORM,
        "scale": Kind.STATISTIC,
        "weight": Kind.STATISTIC,
        "table": Kind.WEIGHT,  # a matrix that is added, such as learned positions
        "gain": Kind.NORM,
        "half": Kind.BUFFER,
        "slope": Kind.NORM,
        "shape": Kind.BUFFER,
    }


def test_lstm_kernels_keep_the_order_that_onnx_gives_them(tmp_path: Path) -> None:
    constants: dict[str, Array] = {"w": random(1, 20, 3), "r": random(1, 20, 5), "b": random(1, 40)}
    nodes = [helper.make_node("LSTM", ["x", "w", "r", "b"], ["y"], hidden_size=5)]
    with open_checkpoint(save_graph(tmp_path / "m.onnx", nodes, constants)) as checkpoint:
        found = {tensor.name: (tensor.kind, tensor.axes) for tensor in checkpoint.tensors}
    assert found == {"w": (Kind.WEIGHT, ()), "r": (Kind.WEIGHT, ()), "b": (Kind.BIAS, ())}


def test_constants_in_branches_are_read_and_know_the_outer_graph(tmp_path: Path) -> None:
    inner, outer = random(7, 9), random(9, 7)

    def branch(node: onnx.NodeProto, *constants: onnx.NodeProto) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
        return helper.make_graph([*constants, node], "branch", [], [output])

    held = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(inner))
    chosen = helper.make_node(
        "If",
        ["flag"],
        ["y"],
        then_branch=branch(helper.make_node("Gemm", ["x", "k"], ["t"], transB=1), held),
        else_branch=branch(helper.make_node("MatMul", ["x", "w"], ["e"])),
    )
    path = save_graph(tmp_path / "m.onnx", [chosen], {"w": outer, "flag": np.array(True)})
    with open_checkpoint(path) as checkpoint:
        np.testing.assert_array_equal(tensor_named(checkpoint, "k").canonical(), inner)
        np.testing.assert_array_equal(tensor_named(checkpoint, "w").canonical(), outer.T)


def test_a_value_that_a_loop_carries_is_not_taken_for_constant(tmp_path: Path) -> None:
    # The state begins as a constant; what multiplies it is a weight all the same.
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["next"]),
            helper.make_node("Identity", ["go"], ["again"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    loop = helper.make_node("Loop", ["rounds", "flag", "start"], ["y"], body=body)
    constants: dict[str, Array] = {
        "w": random(5, 6),
        "start": random(1, 5),
        "rounds": np.array(1),
        "flag": np.array(True),
    }
    with open_checkpoint(save_graph(tmp_path / "m.onnx", [loop], constants)) as checkpoint:
        tensor = tensor_named(checkpoint, "w")
        assert (tensor.kind, tensor.axes) == (Kind.WEIGHT, (1, 0))


def test_weights_are_followed_into_the_models_own_functions(tmp_path: Path) -> None:
    function = helper.make_function(
        "own",
        "Linear",
        ["input", "kernel", "offset"],
        ["out"],
        [
            helper.make_node("Transpose", ["kernel"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["input", "turned"], ["product"]),
            helper.make_node("Add", ["product", "offset"], ["out"]),
        ],
        [helper.make_opsetid("", 21)],
    )
    weights = {"a": random(9, 7), "b": random(7, 9), "c": random(9)}
    nodes = [
        helper.make_node("Linear", ["x", "b", "z"], ["h"], domain="own"),
        helper.make_node("Linear", ["h", "a", "c"], ["y"], domain="own"),
    ]
    constants: dict[str, Array] = {**weights, "z": random(7)}
    path = save_graph(tmp_path / "m.onnx", nodes, constants, functions=[function])
    with open_checkpoint(path) as checkpoint:
        for name in ("a", "b"):
            tensor = tensor_named(checkpoint, name)
            assert (tensor.kind, tensor.axes) == (Kind.WEIGHT, ())
        assert tensor_named(checkpoint, "c").kind is Kind.BIAS


def test_functions_that_call_each_other_in_a_circle_end(tmp_path: Path) -> None:
    functions = [
        helper.make_function(
            "own",
            name,
            ["a"],
            ["b"],
            [helper.make_node(other, ["a"], ["b"], domain="own")],
            [helper.make_opsetid("own", 1)],
        )
        for name, other in (("F", "G"), ("G", "F"))
    ]
    nodes = [helper.make_node("F", ["w"], ["y"], domain="own")]
    path = save_graph(tmp_path / "m.onnx", nodes, {"w": random(7, 9)}, functions=functions)
    with open_checkpoint(path) as checkpoint:
        assert tensor_named(checkpoint, "w").kind is Kind.WEIGHT


def test_what_the_file_says_of_itself_is_declared(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = save_graph(tmp_path / "m.onnx", nodes, {"w": random(3, 4)})
    model = onnx.load(path)
    model.producer_name, model.producer_version, model.doc_string = "maker", "1.2", "words"
    model.metadata_props.add(key="author", value="somebody")
    path.write_bytes(model.SerializeToString())
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.declared == {
            "producer": "maker 1.2",
            "ir_version": 10,
            "opset": {"ai.onnx": 21, "com.microsoft": 1},
            "description": "words",
            "graph": "graph",
            "metadata": {"author": "somebody"},
        }


def test_names_that_several_tensors_have_are_numbered(tmp_path: Path) -> None:
    def branch(name: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        nodes = [
            helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(random(4, 4))),
            helper.make_node("MatMul", ["x", "k"], [name]),
        ]
        return helper.make_graph(nodes, "branch", [], [output])

    chosen = helper.make_node(
        "If", ["flag"], ["y"], then_branch=branch("t"), else_branch=branch("e")
    )
    path = save_graph(tmp_path / "m.onnx", [chosen], {"flag": np.array(True)})
    with open_checkpoint(path) as checkpoint:
        weights = [t.name for t in checkpoint.tensors if t.kind is Kind.WEIGHT]
    assert weights == ["k", "k#2"]


def test_a_graph_that_is_too_entangled_to_follow_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataflow, "_MOST_STEPS", 500)
    names = [f"w{number}" for number in range(40)]
    nodes = [helper.make_node("Concat", names, ["c0"], axis=0)]
    nodes += [helper.make_node("Relu", [f"c{at}"], [f"c{at + 1}"]) for at in range(40)]
    path = save_graph(tmp_path / "m.onnx", nodes, {name: random(2, 3) for name in names})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.parameters == 240
        assert checkpoint.limits == [
            "the graph is too entangled to follow: tensors are told apart by shape"
        ]
