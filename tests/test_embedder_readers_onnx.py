"""ONNX: the contract, kinds and order of axes from the graph, data files, hostile files."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from embedder.checkpoint import Checkpoint, Kind, Tensor
from embedder.errors import (
    MalformedError,
    MissingPartError,
    RefusedError,
    TruncatedError,
    UnsupportedError,
)
from embedder.opening import open_checkpoint
from embedder.readers import onnx_file
from embedder.readers.onnx import open_onnx
from embedder.readers.protobuf import encode_varint
from reader_contract import ReaderContract, Weights, assembled

Array = NDArray[np.generic]
RNG = np.random.default_rng(11)


def save_graph(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, Array],
    *,
    inputs: Sequence[str] = ("x",),
    outputs: Sequence[str] = ("y",),
    functions: Sequence[onnx.FunctionProto] = (),
) -> Path:
    """Write a model of float inputs and outputs whose shapes are left open."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    domains += [helper.make_opsetid(function.domain, 1) for function in functions[:1]]
    model = helper.make_model(graph, opset_imports=domains, functions=functions, ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def random(*shape: int) -> NDArray[np.float32]:
    return RNG.normal(size=shape).astype(np.float32)


def run(path: Path, x: Array, output: str = "y") -> NDArray[np.float32]:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    # As written: fused operations round the input to 8 bits.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (found,) = session.run([output], {session.get_inputs()[0].name: x})
    return np.asarray(found)


def tensor_named(checkpoint: Checkpoint, name: str) -> Tensor:
    return next(tensor for tensor in checkpoint.tensors if tensor.name == name)


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


STORED = {
    "FLOAT16": np.float16,
    "DOUBLE": np.float64,
    "BFLOAT16": None,
    "FLOAT8E4M3FN": None,
    "FLOAT8E5M2": None,
}


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "listed"])
def test_every_float_type_gives_its_values(tmp_path: Path, name: str, raw: bool) -> None:
    values = np.array([[1.5, -2.0, 0.0], [0.25, 3.0, -0.5]])
    kind = TensorProto.DataType.Value(name)
    stored = values.astype(helper.tensor_dtype_to_np_dtype(kind))
    proto = helper.make_tensor("w", kind, [2, 3], stored.tobytes() if raw else stored, raw=raw)
    graph = helper.make_graph([], "g", [], [], [proto])
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with open_checkpoint(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensors[0].read(), values)


@pytest.mark.parametrize("name", ["INT4", "UINT4"])
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "listed"])
def test_four_bit_integers_in_odd_number_give_their_values(
    tmp_path: Path, name: str, raw: bool
) -> None:
    values = np.array([[1, 7, 3], [0, 5, 2], [6, 4, 1]])
    if name == "INT4":
        values = values - 4
    kind = TensorProto.DataType.Value(name)
    packed = numpy_helper.from_array(
        values.astype(helper.tensor_dtype_to_np_dtype(kind)), "w"
    ).raw_data
    proto = (
        helper.make_tensor("w", kind, [3, 3], packed, raw=True)
        if raw
        else helper.make_tensor("w", kind, [3, 3], values)
    )
    graph = helper.make_graph([], "g", [], [], [proto])
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with open_checkpoint(path) as checkpoint:
        tensor = checkpoint.tensors[0]
        np.testing.assert_array_equal(tensor.read(), values)
        np.testing.assert_array_equal(assembled(tensor, 1), values)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float16", "int64", "uint64", "float64"])
def test_listed_numbers_left_in_the_file_are_read(tmp_path: Path, dtype: str) -> None:
    values = np.array([[0, 1, 100], [7, 3, 90]] * 200, dtype)
    values[::3] = np.asarray(values[::3].astype(np.int64) * (1 if dtype[0] == "u" else -1), dtype)
    kind = helper.np_dtype_to_tensor_dtype(values.dtype)
    proto = helper.make_tensor("w", kind, values.shape, values)
    assert not proto.raw_data
    graph = helper.make_graph([], "g", [], [], [proto])
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with open_onnx(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensors[0].read(), values.astype(np.float64))


def test_a_graph_of_millions_of_empty_nodes_is_refused(tmp_path: Path) -> None:
    # 4 MB that would become 200 MB of objects.
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x0a\x3a" + _length(b"\x0a\x00" * 2_000_001))
    with pytest.raises(UnsupportedError, match="its graph is too large: more than 2,000,000"):
        open_checkpoint(path)


def test_millions_of_empty_attributes_in_small_nodes_are_refused(tmp_path: Path) -> None:
    node = b"\x0a" + _length(b"\x2a\x00" * 900)
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x0a\x3a" + _length(node * 10_000))
    with pytest.raises(UnsupportedError, match="its graph is too large"):
        open_checkpoint(path)


def test_sparse_initialisers_are_expanded(tmp_path: Path) -> None:
    dense = np.zeros((4, 6), np.float32)
    dense[1, 2], dense[3, 0], dense[3, 5] = 1.5, -2.0, 3.0
    places = np.flatnonzero(dense)
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(dense.reshape(-1)[places], "w"),
        numpy_helper.from_array(places, "w_places"),
        [4, 6],
    )
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        sparse_initializer=[sparse],
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with open_checkpoint(path) as checkpoint:
        tensor = tensor_named(checkpoint, "w")
        np.testing.assert_array_equal(tensor.canonical(), dense.T)
        np.testing.assert_array_equal(assembled(tensor, 4), dense)


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


def external(path: Path, location: str, **entries: str) -> Path:
    """Write a model whose one weight lies in another file."""
    proto = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 6])
    proto.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        proto.external_data.add(key=key, value=value)
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [], [], [proto])
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


@pytest.mark.parametrize(
    "location",
    ["../secret", "/etc/passwd", "a/../../secret", "C:\\secret", "..\\secret", "a\0b", ""],
)
def test_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(96))
    with pytest.raises(RefusedError, match="outside the model's folder; nothing was read"):
        open_checkpoint(external(tmp_path / "model" / "m.onnx", location))


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(96))
    path = external(tmp_path / "model" / "m.onnx", "link")
    (path.parent / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(RefusedError, match="'link', which is outside"):
        open_checkpoint(path)


def test_a_hubs_cache_that_links_model_and_data_to_one_folder_is_read(tmp_path: Path) -> None:
    blob = external(tmp_path / "blobs" / "1", "m.data")
    (tmp_path / "blobs" / "2").write_bytes(np.arange(24, dtype=np.float32).tobytes())
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "m.onnx").symlink_to(blob)
    (snapshot / "m.data").symlink_to(tmp_path / "blobs" / "2")
    with open_checkpoint(snapshot / "m.onnx") as checkpoint:
        assert tensor_named(checkpoint, "w").read()[3, 5] == 23


def test_a_pipe_in_place_of_the_data_is_not_waited_for(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", "pipe")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MissingPartError, match="'pipe', which is not there"):
        open_checkpoint(path)


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", "weights.bin")
    with pytest.raises(MissingPartError, match=r"'w' lies in 'weights\.bin', which is not there"):
        open_checkpoint(path)


def test_without_a_data_file_the_rest_is_read_if_allowed(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", "weights.bin")
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer.append(numpy_helper.from_array(random(3, 4), "here"))
    path.write_bytes(model.SerializeToString())
    with open_checkpoint(path, allow_partial=True) as checkpoint:
        assert [tensor.name for tensor in checkpoint.tensors] == ["here"]
        assert checkpoint.limits == [
            "the data file 'weights.bin' is missing: its tensors are left out"
        ]


def test_a_data_file_that_is_too_short_is_named(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", "weights.bin", offset="64")
    (tmp_path / "weights.bin").write_bytes(bytes(100))
    with pytest.raises(TruncatedError, match=r"tensor 'w' ends at byte 160 and the file has 100"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"length": "95"}, "takes 96 bytes and has 95"),
        ({"offset": "-8"}, "the offset '-8'; a number"),
        ({"offset": "9" * 50}, "the offset '9999"),
        ({"length": "x"}, "the length 'x'; a number"),
    ],
)
def test_impossible_places_in_a_data_file_are_refused(
    tmp_path: Path, entries: dict[str, str], problem: str
) -> None:
    path = external(tmp_path / "m.onnx", "weights.bin", **entries)
    (tmp_path / "weights.bin").write_bytes(bytes(200))
    with pytest.raises(MalformedError, match=problem):
        open_checkpoint(path)


def test_external_data_is_streamed_and_never_loaded(tmp_path: Path) -> None:
    # 1 TB that is not on the disk: only a reader that reads what is asked for can open it.
    path = tmp_path / "m.onnx"
    proto = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 19, 1 << 19])
    proto.data_location = TensorProto.EXTERNAL
    proto.external_data.add(key="location", value="huge.bin")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [], [], [proto])
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with (tmp_path / "huge.bin").open("wb") as file:
        file.truncate(1 << 40)
    with open_checkpoint(path) as checkpoint:
        block = next(tensor_named(checkpoint, "w").blocks())
        assert 0 < block.values.size <= 1 << 23
        assert not block.values.any()


def test_a_shape_of_a_quintillion_elements_is_refused_without_allocating(tmp_path: Path) -> None:
    proto = TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[10**9, 10**9], raw_data=b"1234"
    )
    graph = helper.make_graph([], "g", [], [], [proto])
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(MalformedError, match=r"takes 4,000,000,000,000,000,000 bytes and has 4"):
        open_checkpoint(path)


def test_a_sparse_tensor_too_large_to_expand_is_refused(tmp_path: Path) -> None:
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(random(1), "w"), numpy_helper.from_array(np.array([0]), "p"), [1]
    )
    sparse.dims[:] = [10**9, 10**9]
    graph = helper.make_graph([], "g", [], [], sparse_initializer=[sparse])
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(UnsupportedError, match="'w' has the shape"):
        open_checkpoint(path)


def test_a_type_that_is_not_known_is_named(tmp_path: Path) -> None:
    proto = TensorProto(name="w", data_type=TensorProto.INT2, dims=[4], raw_data=b"1")
    graph = helper.make_graph([], "g", [], [], [proto])
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(UnsupportedError, match=f"'w' has the type number {TensorProto.INT2}"):
        open_checkpoint(path)


def test_graphs_in_graphs_without_end_are_refused(tmp_path: Path) -> None:
    # Longer than what is lifted, so that the walk over the file goes into every one.
    padding = "x" * onnx_file._ENTERED_BYTES
    inner = helper.make_graph([], padding, [], [])
    graph = inner.SerializeToString()
    for _ in range(200):
        attribute = b"\x32" + _length(graph)  # AttributeProto.g
        node = b"\x2a" + _length(attribute)  # NodeProto.attribute
        graph = b"\x0a" + _length(node)  # GraphProto.node
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x0a\x3a" + _length(graph))
    with pytest.raises(MalformedError, match="more than 100 deep"):
        open_checkpoint(path)


def _length(content: bytes) -> bytes:
    return encode_varint(len(content)) + content


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
