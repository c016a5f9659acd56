"""Random ONNX graphs: whatever is described computes the same."""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from embedder.architecture import Architecture, Builder
from embedder.errors import ArchitectureError
from embedder.onnx_tracing import describe_onnx_model
from embedder.rotation import rotated
from embedder.symmetry import flipped, folded, permuted, rescaled
from onnx_runner import outputs_of, with_weights

pytest.importorskip("onnxruntime")

Shape = tuple[int, ...]
Weights = dict[str, NDArray[np.floating]]
SYMMETRIES: dict[str, Callable[[Weights, Architecture, np.random.Generator], Weights]] = {
    "permuted": permuted,
    "rescaled": rescaled,
    "flipped": flipped,
    "folded": lambda weights, architecture, rng: folded(weights, architecture),
    "rotated": rotated,
}


class Maker:
    """Puts nodes together at random; each value's shape is known."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: Weights = {}
        self.integers: dict[str, NDArray[np.int64]] = {}
        self.values: list[tuple[str, Shape]] = [("x", (2, 3, 4, 5))]
        self.kinds: list[Callable[[str, Shape], None]] = [
            *[self.convolution, self.convolution, self.function, self.function, self.add] * 2,
            *[self.multiply, self.constant, self.batch_norm, self.layer_norm, self.matmul],
            *[self.matmul, self.depthwise, self.transpose, self.reshape, self.concat, self.slice],
            *[self.reduce, self.pool, self.softmax, self.gather, self.pad, self.split],
            *[self.single, self.instance_norm, self.slope, self.gru, self.meet, self.norm_of_many],
            *[self.attention, self.attention, self.attention, self.gated],
        ]
        for _ in range(int(self.rng.integers(4, 14))):
            # The newest values are read most, so that graphs are deep.
            place = -1 - min(int(self.rng.geometric(0.6)) - 1, len(self.values) - 1)
            kind = self.kinds[int(self.rng.integers(len(self.kinds)))]
            kind(*self.values[place])
        name, shape = self.values[-1]
        self.node("Reshape", [name, self.integer([1, math.prod(shape)])], (1, math.prod(shape)))
        self.matmul(*self.values[-1])

    def node(self, op: str, inputs: list[str], *shapes: Shape, **attributes: Any) -> None:
        outputs = [f"v{len(self.values) + place}" for place in range(len(shapes))]
        self.nodes.append(helper.make_node(op, inputs, outputs, **attributes))
        self.values += zip(outputs, shapes, strict=True)

    def weight(self, *shape: int, positive: bool = False) -> str:
        alike = [] if positive else [n for n, w in self.constants.items() if w.shape == shape]
        if alike and self.rng.integers(6) == 0:
            return str(self.rng.choice(alike))  # one tensor in two places
        name = f"w{len(self.constants)}"
        found = self.rng.normal(size=shape) / np.sqrt(max(math.prod(shape[1:]), 1))
        self.constants[name] = (np.exp(found) if positive else found).astype(np.float32)
        return name

    def integer(self, numbers: list[int]) -> str:
        name = f"i{len(self.integers)}"
        self.integers[name] = np.array(numbers, np.int64)
        return name

    def among(self, *choices: int) -> int:
        return int(self.rng.choice(choices))

    def convolution(self, x: str, shape: Shape) -> None:
        if len(shape) == 4:
            out, turned = self.among(4, 6), bool(self.rng.integers(4) == 0)
            size = (shape[1], out, 1, 1) if turned else (out, shape[1], 3, 3)
            inputs = [x, self.weight(*size)] + [self.weight(out)] * int(self.rng.integers(2))
            op = "ConvTranspose" if turned else "Conv"
            self.node(op, inputs, (shape[0], out, *shape[2:]), pads=[0 if turned else 1] * 4)

    def depthwise(self, x: str, shape: Shape) -> None:
        if len(shape) == 4:
            inputs = [x, self.weight(shape[1], 1, 3, 3), self.weight(shape[1])]
            self.node("Conv", inputs, shape, group=shape[1], pads=[1] * 4)

    def function(self, x: str, shape: Shape) -> None:
        ops = ["Relu", "Relu", "LeakyRelu", "Tanh", "Erf", "Sigmoid", "HardSwish", "Neg", "Abs"]
        self.node(str(self.rng.choice(ops)), [x], shape)

    def other(self, shape: Shape) -> str:
        """Return a value of a shape, or one that is broadcast to it."""
        found = [
            name
            for name, size in self.values
            if len(size) == len(shape)
            and all(a in (1, b) for a, b in zip(size, shape, strict=True))
        ]
        return str(self.rng.choice(found))

    def add(self, x: str, shape: Shape) -> None:
        self.node(str(self.rng.choice(["Add", "Add", "Sub", "Max"])), [x, self.other(shape)], shape)

    def multiply(self, x: str, shape: Shape) -> None:
        self.node("Mul", [x, self.other(shape)], shape)

    def constant(self, x: str, shape: Shape) -> None:
        size = tuple(length if self.rng.integers(2) else 1 for length in shape)
        size = size[int(self.rng.integers(len(size))) :]
        op = str(self.rng.choice(["Add", "Sub", "Mul", "Div", "Min"]))
        inputs = [x, self.weight(*size, positive=op == "Div")]
        self.node(op, inputs[:: -1 if op == "Sub" and self.rng.integers(2) else 1], shape)

    def batch_norm(self, x: str, shape: Shape) -> None:
        if len(shape) > 1:
            vectors = [self.weight(shape[1], positive=place == 3) for place in range(4)]
            self.node("BatchNormalization", [x, *vectors], shape)

    def instance_norm(self, x: str, shape: Shape) -> None:
        if len(shape) > 2 and math.prod(shape[2:]) > 1:
            vectors = [self.weight(shape[1]) for _ in range(2)]
            self.node("InstanceNormalization", [x, *vectors], shape)

    def layer_norm(self, x: str, shape: Shape) -> None:
        vectors = [self.weight(shape[-1]) for _ in range(2)]
        self.node("LayerNormalization", [x, *vectors], shape)

    def slope(self, x: str, shape: Shape) -> None:
        if len(shape) > 1:
            size = (shape[1], *[1] * (len(shape) - 2))
            self.node("PRelu", [x, self.weight(*size, positive=True)], shape)

    def matmul(self, x: str, shape: Shape) -> None:
        out = self.among(4, 6)
        self.node("MatMul", [x, self.weight(shape[-1], out)], (*shape[:-1], out))

    def transpose(self, x: str, shape: Shape) -> None:
        order = [int(place) for place in self.rng.permutation(len(shape))]
        self.node("Transpose", [x], tuple(shape[place] for place in order), perm=order)

    def reshape(self, x: str, shape: Shape) -> None:
        place = int(self.rng.integers(len(shape)))
        merged = (*shape[:place], math.prod(shape[place : place + 2]), *shape[place + 2 :])
        split = shape
        if shape[place] % 2 == 0 and len(shape) < 4:
            split = (*shape[:place], 2, shape[place] // 2, *shape[place + 1 :])
        new = merged if self.rng.integers(2) else split
        self.node("Reshape", [x, self.integer(list(new))], new)

    def single(self, x: str, shape: Shape) -> None:
        place = int(self.rng.integers(len(shape)))
        if shape[place] == 1 and len(shape) > 1:
            left = (*shape[:place], *shape[place + 1 :])
            self.node("Squeeze", [x, self.integer([place])], left)
        elif len(shape) < 4:
            self.node("Unsqueeze", [x, self.integer([place])], (*shape[:place], 1, *shape[place:]))

    def concat(self, x: str, shape: Shape) -> None:
        axis = int(self.rng.integers(len(shape)))
        longer = (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])
        alike = [name for name, size in self.values if size == shape]
        self.node("Concat", [x, str(self.rng.choice(alike))], longer, axis=axis)

    def split(self, x: str, shape: Shape) -> None:
        axis = int(self.rng.integers(len(shape)))
        if shape[axis] % 2 == 0:
            half = (*shape[:axis], shape[axis] // 2, *shape[axis + 1 :])
            self.node("Split", [x], half, half, axis=axis)

    def slice(self, x: str, shape: Shape) -> None:
        axis = int(self.rng.integers(len(shape)))
        back = bool(self.rng.integers(2))
        bounds = [[-1], [-99], [axis], [-1]] if back else [[shape[axis] // 2], [99], [axis], [1]]
        left = shape[axis] if back else shape[axis] - shape[axis] // 2
        inputs = [x, *[self.integer(numbers) for numbers in bounds]]
        self.node("Slice", inputs, (*shape[:axis], left, *shape[axis + 1 :]))

    def gather(self, x: str, shape: Shape) -> None:
        axis = int(self.rng.integers(len(shape)))
        places = self.integer([0, shape[axis] - 1])
        self.node("Gather", [x, places], (*shape[:axis], 2, *shape[axis + 1 :]), axis=axis)

    def pad(self, x: str, shape: Shape) -> None:
        axis = int(self.rng.integers(len(shape)))
        pads = [0] * (2 * len(shape))
        pads[axis] = 1
        inputs = [x, self.integer(pads)] + [self.weight(1)] * int(self.rng.integers(2))
        self.node("Pad", inputs, (*shape[:axis], shape[axis] + 1, *shape[axis + 1 :]))

    def reduce(self, x: str, shape: Shape) -> None:
        axis, op = int(self.rng.integers(len(shape))), str(self.rng.choice(["Mean", "Max", "L2"]))
        keep = len(shape) == 1 or bool(self.rng.integers(2))
        left = (*shape[:axis], *[1] * keep, *shape[axis + 1 :])
        self.node(f"Reduce{op}", [x], left, axes=[axis], keepdims=int(keep))

    def pool(self, x: str, shape: Shape) -> None:
        if len(shape) == 4 and min(shape[2:]) > 1:
            op = str(self.rng.choice(["MaxPool", "AveragePool"]))
            size = (*shape[:2], shape[2] - 1, shape[3] - 1)
            self.node(op, [x], size, kernel_shape=[2, 2])

    def softmax(self, x: str, shape: Shape) -> None:
        self.node("Softmax", [x], shape, axis=int(self.rng.integers(len(shape))))

    def newest(self, count: int = 1) -> str:
        """Return the name of the newest value, or of an earlier one."""
        return self.values[-count][0]

    def disturb(self) -> None:
        """Do something at random to the newest value, or nothing."""
        name, shape = self.values[-1]
        if self.rng.integers(8) == 0:
            kinds = [self.function, self.constant, self.multiply, self.add, self.softmax]
            kinds[int(self.rng.integers(len(kinds)))](name, shape)

    def flat(self, x: str, shape: Shape) -> tuple[str, tuple[int, int, int]]:
        """Return a value as examples × places × units."""
        if len(shape) == 3:
            return x, (shape[0], shape[1], shape[2])
        new = (shape[0], math.prod(shape[1:-1]), shape[-1])
        self.node("Reshape", [x, self.integer(list(new))], new)
        return self.newest(), new

    def affine(self, x: str, shape: Shape, out: int) -> None:
        self.node("MatMul", [x, self.weight(shape[-1], out)], (*shape[:-1], out))
        if self.rng.integers(2):
            self.node("Add", [self.newest(), self.weight(out)], (*shape[:-1], out))

    def cut(self, heads: int, *, turned: bool = False) -> None:
        """Cut the newest value into heads and channels."""
        name, (batch, length, width) = self.values[-1]
        new = [batch, length, heads, width // heads]
        self.node("Reshape", [name, self.integer(new)], tuple(new))
        order = [0, 2, 3, 1] if turned else [0, 2, 1, 3]
        left = tuple(new[place] for place in order)
        self.node("Transpose", [self.newest()], left, perm=order)
        self.disturb()

    def parts(self, x: str, shape: Shape, heads: int, channels: int) -> list[tuple[str, Shape]]:
        """Return query, key and value, from maps of their own or from a joint one."""
        found, width, kind = [], heads * channels, int(self.rng.integers(4))
        if kind < 2:
            for _ in range(3):
                self.affine(x, shape, width)
                self.disturb()
                found.append(self.values[-1])
            return found
        self.affine(x, shape, 3 * width)
        self.disturb()
        if kind == 2:
            self.node("Split", [self.newest()], *[(*shape[:-1], width)] * 3, axis=-1)
        else:
            by_head = [heads, 3, channels], [heads, 1, channels]
            stacked = [3, heads, channels], [1, heads, channels]
            whole, part = by_head if self.rng.integers(2) else stacked
            new = [*shape[:-1], *whole]
            self.node("Reshape", [self.newest(), self.integer(new)], tuple(new))
            cut = (*shape[:-1], *part)
            self.node("Split", [self.newest()], *[cut] * 3, axis=2 + whole.index(3))
            flat = [*shape[:-1], width]
            for _ in range(3):
                self.node("Reshape", [self.newest(3), self.integer(flat)], tuple(flat))
        found = self.values[-3:]
        swapped = self.rng.permutation(3) if self.rng.integers(4) == 0 else range(3)
        return [found[place] for place in swapped]

    def attention(self, x: str, shape: Shape) -> None:
        """Add heads that see each other, or what is nearly that."""
        x, whole = self.flat(x, shape) if len(shape) > 1 else (x, (0, 0, 0))
        if not whole[0] or whole[1] > 12:
            return
        heads, channels = self.among(2, 4), self.among(2, 3)
        given = self.parts(x, whole, heads, channels)
        cut = []
        for place, part in enumerate(given):
            self.values.append(part)
            self.cut(heads, turned=place == 1)
            cut.append(self.values[-1])
        (query, _), (key, _), (seen, size) = cut
        self.node("MatMul", [query, key], (whole[0], heads, whole[1], whole[1]))
        self.disturb()
        self.node("Softmax", [self.newest()], self.values[-1][1], axis=-1)
        self.node("MatMul", [self.newest(), seen], size)
        self.disturb()
        order = (whole[0], whole[1], heads, channels)
        self.node("Transpose", [self.newest()], order, perm=[0, 2, 1, 3])
        flat = [whole[0], whole[1], heads * channels]
        self.node("Reshape", [self.newest(), self.integer(flat)], tuple(flat))
        self.disturb()
        self.affine(*self.values[-1], whole[2])
        self.node("Add", [self.newest(), x], whole)

    def gated(self, x: str, shape: Shape) -> None:
        """Add the product of an activated map and a plain one, or what is nearly that."""
        self.node("MatMul", [x, self.weight(shape[-1], 5)], (*shape[:-1], 5))
        gate, size = self.values[-1]
        self.node("Sigmoid", [gate], size)
        self.node("Mul", [gate, self.newest()], size)
        self.disturb()
        gate = self.newest()
        self.node("MatMul", [x, self.weight(shape[-1], 5)], size)
        self.disturb()
        self.node("Mul", [gate, self.newest()], size)
        self.disturb()
        self.node("MatMul", [self.newest(), self.weight(5, shape[-1])], shape)

    def meet(self, x: str, shape: Shape) -> None:
        """Multiply two values of any origin."""
        if len(shape) > 1:
            other = str(self.rng.choice([name for name, size in self.values if size == shape]))
            order = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
            turned = tuple(shape[place] for place in order)
            self.node("Transpose", [other], turned, perm=order)
            self.node("MatMul", [x, self.newest()], (*shape[:-1], shape[-2]))

    def norm_of_many(self, x: str, shape: Shape) -> None:
        """Add a norm that is made of several nodes, or what is nearly that."""
        single = (*shape[:-1], 1)
        if self.rng.integers(2):
            self.node("ReduceMean", [x], single, axes=[-1])
            self.node("Sub", [x, self.newest()], shape)
            x = self.newest()
        self.disturb()
        self.node("Mul", [x, self.newest() if self.values[-1][1] == shape else x], shape)
        self.node("ReduceMean", [self.newest()], single, axes=[-1])
        self.constants["epsilon"] = np.full(1, 1e-5, np.float32)
        self.node("Add", [self.newest(), "epsilon"], single)
        self.node("Sqrt", [self.newest()], single)
        self.node("Div", [x, self.newest()], shape)
        self.disturb()
        self.node("Mul", [self.newest(), self.weight(shape[-1])], shape)
        if self.rng.integers(2):
            self.node("Add", [self.newest(), self.weight(shape[-1])], shape)

    def gru(self, x: str, shape: Shape) -> None:
        if len(shape) == 3:
            weights = [self.weight(1, 12, shape[2]), self.weight(1, 12, 4)]
            self.node("GRU", [x, *weights], (shape[0], 1, shape[1], 4), hidden_size=4)

    def model(self) -> onnx.ModelProto:
        """Return the graph as a model that gives its last value."""
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, self.values[0][1])
        y = helper.make_tensor_value_info(self.values[-1][0], TensorProto.FLOAT, None)
        tensors = [
            numpy_helper.from_array(values, name)
            for name, values in {**self.constants, **self.integers}.items()
        ]
        graph = helper.make_graph(self.nodes, "graph", [x], [y], tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def run(model: onnx.ModelProto) -> NDArray[np.float64]:
    x = np.random.default_rng(9).normal(size=(2, 3, 4, 5)).astype(np.float32)
    return np.asarray(outputs_of(model, {"x": x})[0], dtype=np.float64)


def change_of(made: Maker, symmetry: str) -> float:
    """Return the change of the output by its size, or by what a last place of weights changes."""
    model = made.model()
    found = describe_onnx_model(model)
    rng = np.random.default_rng(1)
    before = run(model)
    after = run(with_weights(model, SYMMETRIES[symmetry](made.constants, found, rng)))
    last = {
        name: (values * (1 + 1e-6 * rng.normal(size=values.shape))).astype(np.float32)
        for name, values in made.constants.items()
    }
    noise = float(np.abs(run(with_weights(model, last)) - before).max())
    least = max(float(np.abs(before).max()) * 1e-5, noise, 1e-30)  # the output may be zero
    return float(np.abs(after - before).max()) / least


@given(st.integers(0, 10**6), st.sampled_from(list(SYMMETRIES)))
@settings(deadline=None, max_examples=80)
def test_whatever_is_built_computes_the_same(seed: int, symmetry: str) -> None:
    try:
        change = change_of(Maker(seed), symmetry)
    except ArchitectureError as error:
        assume("no hidden units" not in str(error))
        raise
    # A wrong description changes an output by its own size: more than a thousand times as much.
    assert not change > 10


def damage(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Change an operation, an input, an attribute or a tensor at random."""
    nodes, kind = model.graph.node, int(rng.integers(5))
    node = nodes[int(rng.integers(len(nodes)))]
    if kind == 0:
        node.op_type = nodes[int(rng.integers(len(nodes)))].op_type
    elif kind == 1 and node.input:
        del node.input[int(rng.integers(len(node.input)))]
    elif kind == 2 and node.attribute:
        del node.attribute[int(rng.integers(len(node.attribute)))]
    elif kind == 3:
        tensors = model.graph.initializer
        tensor = tensors[int(rng.integers(len(tensors)))]
        shape = tuple(int(size) for size in rng.integers(0, 5, int(rng.integers(5))))
        tensor.CopyFrom(numpy_helper.from_array(np.zeros(shape, np.float32), tensor.name))
    else:
        node.input.append(str(rng.choice([name for other in nodes for name in other.input])))


@given(st.integers(0, 10**6), st.integers(1, 3))
@settings(deadline=None, max_examples=100)
def test_a_damaged_graph_is_described_or_refused(seed: int, times: int) -> None:
    model = Maker(seed).model()
    rng = np.random.default_rng(seed)
    for _ in range(times):
        damage(model, rng)
    found = Builder("nothing").build()
    with suppress(ArchitectureError):
        found = describe_onnx_model(model)
    found.check({tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer})


def test_a_slice_that_runs_backwards_over_nothing_does_not_end_the_process() -> None:
    made = Maker(0)
    made.nodes, made.values = [], [("x", (2, 0))]
    numbers = [made.integer([number]) for number in (-1, -99, 1, -1)]
    made.node("Slice", ["x", *numbers], (2, 0))
    made.matmul("x", (2, 3))
    with pytest.raises(ArchitectureError, match="no hidden units"):
        describe_onnx_model(made.model())
