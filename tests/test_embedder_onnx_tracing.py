"""ONNX graphs: described units may be changed, and ONNX Runtime computes the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from benchmarks.corpus.listed import is_there, listed, path_of
from embedder.architecture import Architecture
from embedder.describing import describe
from embedder.errors import ArchitectureError
from embedder.onnx_tracing import describe_onnx
from embedder.opening import open_checkpoint
from embedder.symmetry import flipped, folded, permuted, rescaled
from onnx_runner import outputs_of

pytest.importorskip("onnxruntime")

Weights = dict[str, NDArray[np.floating]]
Feeds = dict[str, NDArray[np.generic]]
SYMMETRIES: dict[str, Callable[[Weights, Architecture, np.random.Generator], Weights]] = {
    "permuted": permuted,
    "rescaled": rescaled,
    "flipped": flipped,
    "folded": lambda weights, architecture, rng: folded(weights, architecture),
}
node = helper.make_node


@dataclass(frozen=True)
class Graph:
    """Nodes from x to y, the shapes of the constants, and what the units allow."""

    nodes: Sequence[NodeProto]
    constants: dict[str, tuple[int, ...]]
    inputs: tuple[int | str, ...]
    gauges: str
    integers: dict[str, list[int]] | None = None

    def save(self, path: Path) -> Path:
        """Write the graph with random weights, the same each time; variances are positive."""
        rng = np.random.default_rng(7)
        tensors = [
            numpy_helper.from_array(
                (rng.normal(size=shape) * 0.5).astype(np.float32)
                if "var" not in name
                else np.exp(rng.normal(size=shape)).astype(np.float32),
                name,
            )
            for name, shape in self.constants.items()
        ]
        for name, values in (self.integers or {}).items():
            tensors.append(numpy_helper.from_array(np.array(values, np.int64), name))
        kind = TensorProto.INT64 if "token" in self.nodes[0].input[-1] else TensorProto.FLOAT
        x = helper.make_tensor_value_info(
            "tokens" if kind == TensorProto.INT64 else "x", kind, self.inputs
        )
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "graph", [x], [y], tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
        path.write_bytes(model.SerializeToString())
        return path


def batch_norm(x: str, y: str) -> NodeProto:
    return node("BatchNormalization", [x, "g", "o", "mean", "var"], [y])


def vectors(size: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(("g", "o", "mean", "var"), (size,))


def branch(name: str) -> onnx.GraphProto:
    """Return a graph with two matrices of its own and one that both branches read."""
    rng = np.random.default_rng(ord(name[-1]))
    made = [
        numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), f"{name}.{letter}")
        for letter, shape in (("w", (4, 5)), ("v", (5, 6)))
    ]
    nodes = [
        node("MatMul", ["x", f"{name}.w"], [f"{name}.a"]),
        node("Relu", [f"{name}.a"], [f"{name}.b"]),
        node("MatMul", [f"{name}.b", f"{name}.v"], [f"{name}.c"]),
        node("MatMul", ["x", "shared"], [f"{name}.d"]),
        node("Add", [f"{name}.c", f"{name}.d"], [f"{name}.e"]),
        node("Relu", [f"{name}.e"], [f"{name}.y"]),
    ]
    y = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, (2, 6))
    return helper.make_graph(nodes, name, [], [y], made)


LSTM = {"w": (2, 16, 5), "r": (2, 16, 4), "b": (2, 32)}
GRAPHS = {
    "gemm": Graph(
        [
            node("Gemm", ["x", "w", "b"], ["h"], transB=1),
            node("Relu", ["h"], ["r"]),
            node("MatMul", ["r", "v"], ["m"]),
            node("Add", ["m", "c"], ["a"]),
            node("Tanh", ["a"], ["t"]),
            node("Gemm", ["t", "u"], ["y"]),
        ],
        {"w": (6, 4), "b": (6,), "v": (6, 5), "c": (5,), "u": (5, 3)},
        ("n", 4),
        "named scale sign named",
    ),
    "residual with batch norm": Graph(
        [
            node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            batch_norm("c", "n"),
            node("Relu", ["n"], ["r"]),
            node("Conv", ["r", "v", "b"], ["d"]),
            node("Relu", ["d"], ["e"]),
            node("Conv", ["e", "u"], ["f"]),
            node("Add", ["r", "f"], ["s"]),
            node("MaxPool", ["s"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
            node("GlobalAveragePool", ["p"], ["q"]),
            node("Flatten", ["q"], ["l"]),
            node("Gemm", ["l", "h"], ["y"]),
        ],
        {
            **{"w": (6, 3, 3, 3), "v": (8, 6, 1, 1), "b": (8,), "u": (6, 8, 1, 1)},
            **{"h": (6, 2), **vectors(6)},
        },
        (2, 3, 4, 4),
        "named scale scale named",
    ),
    "flattened, channels first and last": Graph(
        [
            node("Conv", ["x", "w", "b"], ["c"]),
            node("LeakyRelu", ["c"], ["r"]),
            node("Transpose", ["r"], ["t"], perm=[0, 2, 3, 1]),
            node("Reshape", ["t", "wide"], ["f"]),
            node("Gemm", ["f", "v"], ["g"]),
            node("Reshape", ["r", "wide"], ["e"]),
            node("Gemm", ["e", "u"], ["h"]),
            node("Sub", ["g", "h"], ["y"]),
        ],
        {"w": (6, 3, 2, 2), "b": (6,), "v": (24, 5), "u": (24, 5)},
        ("n", 3, 3, 3),
        "named scale named",
        {"wide": [-1, 24]},
    ),
    "depthwise": Graph(
        [
            node("Conv", ["x", "w", "b"], ["c"]),
            node("Relu", ["c"], ["r"]),
            node("Conv", ["r", "d", "e"], ["f"], group=6, pads=[1, 1, 1, 1]),
            node("PRelu", ["f", "s"], ["p"]),
            node("Conv", ["p", "v"], ["y"]),
        ],
        {
            "w": (6, 3, 1, 1),
            "b": (6,),
            "d": (6, 1, 3, 3),
            "e": (6,),
            "s": (6, 1, 1),
            "v": (4, 6, 1, 1),
        },
        (2, 3, 3, 3),
        "named scale scale named",
    ),
    "sum around a depthwise convolution": Graph(
        [
            node("Conv", ["x", "w", "b"], ["c"]),
            node("Conv", ["c", "d", "e"], ["f"], group=6, pads=[1, 1, 1, 1]),
            node("Add", ["c", "f"], ["s"]),
            node("Relu", ["s"], ["r"]),
            node("ConvTranspose", ["r", "v"], ["y"]),
        ],
        {"w": (6, 3, 1, 1), "b": (6,), "d": (6, 1, 3, 3), "e": (6,), "v": (6, 4, 2, 2)},
        (2, 3, 3, 3),
        "named scale named",
    ),
    "squeeze and excite, swish": Graph(
        [
            node("Conv", ["x", "w", "b"], ["c"]),
            node("Sigmoid", ["c"], ["s"]),
            node("Mul", ["c", "s"], ["h"]),
            node("ReduceMean", ["h"], ["q"], axes=[2, 3]),
            node("Conv", ["q", "v"], ["d"]),
            node("Relu", ["d"], ["r"]),
            node("Conv", ["r", "u"], ["e"]),
            node("HardSigmoid", ["e"], ["g"]),
            node("Mul", ["h", "g"], ["m"]),
            node("Conv", ["m", "l"], ["y"]),
        ],
        {"w": (6, 3, 1, 1), "b": (6,), "v": (4, 6, 1, 1), "u": (6, 4, 1, 1), "l": (2, 6, 1, 1)},
        (2, 3, 3, 3),
        "named order scale named",
    ),
    "lstm in both directions": Graph(
        [
            node("LSTM", ["x", "w", "r", "b"], ["h"], hidden_size=4, direction="bidirectional"),
            node("Transpose", ["h"], ["t"], perm=[0, 2, 1, 3]),
            node("Reshape", ["t", "wide"], ["f"]),
            node("MatMul", ["f", "v"], ["y"]),
        ],
        {**LSTM, "v": (8, 3)},
        (3, 2, 5),
        "named order named",
        {"wide": [0, 0, -1]},
    ),
    "gru": Graph(
        [
            node("GRU", ["x", "w", "r"], ["h", "last"], hidden_size=4),
            node("Squeeze", ["last", "zero"], ["s"]),
            node("Gemm", ["s", "v"], ["y"]),
        ],
        {"w": (1, 12, 5), "r": (1, 12, 4), "v": (4, 3)},
        (3, 2, 5),
        "named order named",
        {"zero": [0]},
    ),
    "layer norms": Graph(
        [
            node("MatMul", ["x", "w"], ["h"]),
            node("LayerNormalization", ["h", "g", "o"], ["n"]),
            node("MatMul", ["n", "v"], ["m"]),
            node("ReduceMean", ["m"], ["a"], axes=[-1]),
            node("Sub", ["m", "a"], ["d"]),
            node("Mul", ["d", "d"], ["q"]),
            node("ReduceMean", ["q"], ["z"], axes=[-1]),
            node("Sqrt", ["z"], ["s"]),
            node("Div", ["d", "s"], ["i"]),
            node("Mul", ["i", "p"], ["k"]),
            node("Add", ["k", "q2"], ["l"]),
            node("MatMul", ["l", "u"], ["y"]),
        ],
        {"w": (4, 6), "g": (6,), "o": (6,), "v": (6, 5), "p": (5,), "q2": (5,), "u": (5, 3)},
        (2, 3, 4),
        "named order scale order named",
    ),
    "attention": Graph(
        [
            node("Gather", ["table", "tokens"], ["x"]),
            node("MatMul", ["x", "q"], ["a"]),
            node("MatMul", ["x", "k"], ["b"]),
            node("Transpose", ["b"], ["t"], perm=[0, 2, 1]),
            node("MatMul", ["a", "t"], ["c"]),
            node("Softmax", ["c"], ["s"]),
            node("MatMul", ["x", "v"], ["d"]),
            node("MatMul", ["s", "d"], ["e"]),
            node("MatMul", ["e", "o"], ["f"]),
            node("Add", ["x", "f"], ["z"]),
            node("MatMul", ["z", "w"], ["h"]),
            node("Erf", ["h"], ["g"]),
            node("MatMul", ["g", "u"], ["m"]),
            node("Add", ["z", "m"], ["r"]),
            node("MatMul", ["r", "last"], ["y"]),
        ],
        {
            **{"table": (7, 6), "q": (6, 4), "k": (6, 4), "v": (6, 4), "o": (4, 6)},
            **{"w": (6, 8), "u": (8, 6), "last": (6, 7)},
        },
        (2, 3),
        "named scale named named named named sign named",
    ),
    "what is put together or taken apart": Graph(
        [
            node("Conv", ["x", "w"], ["c"]),
            node("Conv", ["x", "v"], ["d"]),
            node("Relu", ["d"], ["r"]),
            node("Concat", ["c", "x"], ["j"], axis=1),
            node("Slice", ["r", "end", "start", "one", "back"], ["l"]),
            node("Conv", ["l", "u"], ["f"]),
            node("Conv", ["j", "t"], ["g"]),
            node("Add", ["f", "g"], ["s"]),
            node("Relu", ["s"], ["e"]),
            node("Conv", ["e", "z"], ["y"]),
        ],
        {
            **{"w": (6, 3, 1, 1), "v": (5, 3, 1, 1), "u": (4, 5, 1, 1), "t": (4, 9, 1, 1)},
            "z": (2, 4, 1, 1),
        },
        (2, 3, 3, 3),
        "named named named named named named scale named",
        {"end": [-1], "start": [-9], "one": [1], "back": [-1]},
    ),
    "one of two branches": Graph(
        [
            node("ReduceSum", ["x"], ["s"], keepdims=0),
            node("Cast", ["s"], ["which"], to=TensorProto.BOOL),
            node("If", ["which"], ["h"], then_branch=branch("then"), else_branch=branch("else")),
            node("Gemm", ["h", "u"], ["y"]),
        ],
        {"shared": (4, 6), "u": (6, 3)},
        (2, 4),
        "named named named scale scale scale named",
    ),
    "one matrix twice": Graph(
        [
            node("MatMul", ["x", "w"], ["a"]),
            node("Relu", ["a"], ["b"]),
            node("MatMul", ["b", "w"], ["c"]),
            node("Relu", ["c"], ["d"]),
            node("MatMul", ["d", "v"], ["e"]),
            node("Tanh", ["e"], ["f"]),
            node("MatMul", ["f", "u"], ["y"]),
        ],
        {"w": (4, 4), "v": (4, 5), "u": (5, 2)},
        (2, 4),
        "named sign named",
    ),
}


def feeds_of(model: onnx.ModelProto, free: int = 64) -> Feeds:
    """Return random inputs; sizes that are open are 1 for the first axis, else `free`."""
    constants = {tensor.name for tensor in model.graph.initializer}
    rng, feeds = np.random.default_rng(3), {}
    for given in model.graph.input:
        if given.name not in constants:
            kind = given.type.tensor_type
            sizes = [d.dim_value or (1 if p == 0 else free) for p, d in enumerate(kind.shape.dim)]
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            real = np.issubdtype(dtype, np.floating)
            found = rng.normal(size=sizes) if real else rng.integers(0, 2, sizes)
            feeds[given.name] = found.astype(dtype)
    return feeds


def stored(graph: onnx.GraphProto) -> dict[str, TensorProto]:
    """Return the constants of a graph, and of those that its nodes hold, by their names."""
    found = {tensor.name: tensor for tensor in graph.initializer}
    for made in graph.node:
        for attribute in made.attribute:
            if made.op_type == "Constant" and attribute.name == "value":
                found[made.output[0]] = attribute.t
            if attribute.HasField("g"):
                found |= stored(attribute.g)
    return found


def change_of(path: Path, found: Architecture, symmetry: str, feeds: Feeds) -> float:
    """Return the largest change of an output by the largest output."""
    model = onnx.load(path)
    before = outputs_of(model, feeds)
    tensors = stored(model.graph)
    weights = {name: numpy_helper.to_array(tensors[name]) for name in found.axes}
    changed = SYMMETRIES[symmetry](weights, found, np.random.default_rng(1))
    for name, values in changed.items():
        tensors[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))
    after = outputs_of(model, feeds)
    return max(
        float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(after, before, strict=True)
    )


@pytest.mark.parametrize("name", list(GRAPHS))
def test_the_function_is_kept_under_all_that_is_described(name: str, tmp_path: Path) -> None:
    graph = GRAPHS[name]
    path = graph.save(tmp_path / "m.onnx")
    found = describe_onnx(path)
    kinds = [group.gauge.value for group in found.groups.values()]
    assert sorted(kinds) == sorted(graph.gauges.split())
    feeds = feeds_of(onnx.load(path))
    for symmetry in SYMMETRIES:
        assert change_of(path, found, symmetry, feeds) < 1e-5


def test_a_checkpoint_is_described_from_its_graph(tmp_path: Path) -> None:
    path = GRAPHS["gemm"].save(tmp_path / "m.onnx")
    with open_checkpoint(path) as checkpoint:
        found = describe(checkpoint)
    assert (found.family, found.confidence, found.unexplained) == ("graph", 1, ())
    assert [step.turned for step in found.steps] == [False, True, True]
    # What a node adds behind a product is its bias as much as what stands in one.
    assert [step.tensors.get("bias") for step in found.steps] == ["b", "c", None]


def refused(nodes: Sequence[NodeProto], constants: dict[str, tuple[int, ...]]) -> Graph:
    return Graph(nodes, constants, (2, 4), "")


@pytest.mark.parametrize(
    ("graph", "problem"),
    [
        (
            refused(
                [node("MatMul", ["x", "w"], ["h"]), node("Det", ["h"], ["y"], name="second")],
                {"w": (4, 4)},
            ),
            "Det second: the operation Det cannot be followed",
        ),
        (
            refused([node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])], {"w": (4, 4)}),
            "no hidden units",
        ),
        (refused([node("Relu", ["x"], ["y"])], {}), "no layer"),
        (
            refused(
                [
                    node("ReduceSum", ["x"], ["s"], keepdims=0),
                    node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
                    node("If", ["c"], ["y"], then_branch=branch("a"), else_branch=branch("a")),
                ],
                {"shared": (4, 6)},
            ),
            "a.w: two parts of the graph have a value of this name",
        ),
        (
            refused([node("MatMul", ["x", "w"], ["y"], name="m")], {"w": (4, 0)}),
            "MatMul m: w has no values",
        ),
        (
            refused(
                [
                    node("MatMul", ["x", "w"], ["h"], name="a"),
                    node("MatMul", ["h", "v"], ["y"], name="b"),
                ],
                {"w": (4, 6), "v": (5, 3)},
            ),
            "MatMul b: 6 places of units meet 5",
        ),
    ],
)
def test_what_cannot_be_followed_is_named(graph: Graph, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match=problem):
        describe_onnx(graph.save(tmp_path / "m.onnx"))


def test_no_other_file_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("beside").write_bytes(b"")
    model = onnx.load(GRAPHS["gemm"].save(tmp_path / "m.onnx"))
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="beside")
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    assert len(describe_onnx(path).axes) == 5


FOLLOWED = (
    "silero/6.2.3/sequence aecmos/B mtcnn/opencv/pnet mtcnn/opencv/rnet mtcnn/opencv/onet "
    "blazeface-onnx/back basicpitch/onnx ppocr/v6-tiny-det nudenet/3.0.8"
)
UNFOLLOWED = {
    "magika/v1": "no hidden units that could be followed",
}


def real(name: str) -> Path:
    (found,) = [model for model in listed() if model.id == name]
    if not is_there(found):
        pytest.skip("not fetched")
    return path_of(found)


@pytest.mark.corpus
@pytest.mark.parametrize("name", FOLLOWED.split())
def test_real_models_compute_the_same(name: str) -> None:
    path = real(name)
    found = describe_onnx(path)
    feeds = feeds_of(onnx.load(path))
    for symmetry in ("permuted", "rescaled"):
        # Measured: at most 8e-6, and a last place of the input changes as much.
        assert change_of(path, found, symmetry, feeds) < 1e-4


@pytest.mark.corpus
@pytest.mark.parametrize("symmetry", ["permuted", "rescaled"])
def test_a_real_model_with_branches_computes_the_same(symmetry: str) -> None:
    path = real("silero/6.2.3/half")
    feeds = feeds_of(onnx.load(path), free=576)
    feeds["state"] = np.zeros((2, 1, 128), np.float32)
    # Measured over 15 models with branches: at most 1.3e-5, in float32.
    assert change_of(path, describe_onnx(path), symmetry, feeds) < 1e-4


@pytest.mark.corpus
@pytest.mark.parametrize(("name", "problem"), UNFOLLOWED.items())
def test_real_models_that_cannot_be_followed_say_why(name: str, problem: str) -> None:
    path = real(name)
    with pytest.raises(ArchitectureError, match=problem):
        describe_onnx(path)
