"""The graph of an ONNX model: its constants, who uses them, and how their axes lie there."""

import math
from collections import ChainMap, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embedder.checkpoint import Kind, Tensor
from embedder.readers.dataflow import (
    ABSENT,
    NEW,
    Dataflow,
    Layout,
    Node,
    Role,
    plain_role,
    reshaped,
    swapped_last,
    transposed,
)
from embedder.readers.onnx_file import text

if TYPE_CHECKING:
    import onnx

Scope = ChainMap[str, int]

# What a layer does with its inputs, one letter for each place:
#   W weight that lies as out × in × space    R right operand of a product, in × out
#   L recurrent kernels, in × gates
#   T kernel of a transposed convolution      G, H right and left operand of Gemm
#   E rows that are looked up                 B offset          N gain or offset of a norm
#   S running statistic                       Q scale or zero point
#   A added or subtracted                     M multiplied or divided
#   I anything that is not trained            . an input that says nothing
LAYERS = {
    "Conv": ".WB",
    "FusedConv": ".WB",
    "NhwcFusedConv": ".WB",
    "ConvTranspose": ".TB",
    "ConvInteger": ".W.Q",
    "QLinearConv": ".QQWQQQQB",
    "DeformConv": ".W.B",
    "Gemm": "HGB",
    "FusedGemm": "HGB",
    "GemmFloat8": "HGBQQQ",
    "MatMul": "WR",
    "FusedMatMul": "WR",
    "FusedMatMulActivation": "WR",
    "TransposeMatMul": "WR",
    "MatMulInteger": "WRQQ",
    "MatMulInteger16": "WR",
    "MatMulIntegerToFloat": "WRQQQQB",
    "DynamicQuantizeMatMul": ".RQQB",
    "QLinearMatMul": "WQQRQQQQ",
    "QGemm": ".QQGQQBQQ",
    "MatMulNBits": ".WQQIB",
    "MatMulBnb4": ".WQ",
    "Einsum": "WWWW",
    "Gather": "EI",
    "GatherND": "EI",
    "GatherElements": "EI",
    "GatherBlockQuantized": "EIQQ",
    "EmbedLayerNormalization": "IIEEENN",
    "QEmbedLayerNormalization": "IIEEENNIQQQQQQQQQQ",
    "Attention": ".RB",
    "QAttention": ".RBQQIQQ",
    "MultiHeadAttention": "...B",
    "DecoderMaskedMultiHeadAttention": ".........B",
    "PackedAttention": ".RB",
    "LongformerAttention": ".RB.RB",
    "LSTM": ".WWB.IIB",
    "GRU": ".WWB.I",
    "RNN": ".WWB.I",
    "DynamicQuantizeLSTM": ".LLB.IIBQQQQ",
    "MoE": "..WBWBWB",
    "BatchNormalization": ".NNSS",
    "InstanceNormalization": ".NN",
    "LayerNormalization": ".NN",
    "RMSNormalization": ".N",
    "SimplifiedLayerNormalization": ".N",
    "SkipLayerNormalization": "..NNB",
    "SkipSimplifiedLayerNormalization": "..NB",
    "GroupNormalization": ".NN",
    "GroupNorm": ".NN",
    "SkipGroupNorm": ".NN..B",
    "BiasGelu": ".B",
    "FastGelu": ".B",
    "BiasAdd": ".B.",
    "BiasSplitGelu": ".B",
    "PRelu": ".N",
    "Add": "AA",
    "Sub": "AA",
    "Mul": "MM",
    "Div": "AM",
    "QuantizeLinear": ".QQ",
    "DequantizeLinear": ".QQ",
    "QLinearAdd": "AQQAQQQQ",
    "QLinearMul": "MQQMQQQQ",
    "QLinearSigmoid": ".QQQQ",
    "QLinearLeakyRelu": ".QQQQ",
    "QLinearGlobalAveragePool": ".QQQQ",
    "QLinearAveragePool": ".QQQQ",
    "Reshape": ".I",
    "Expand": ".I",
    "Tile": ".I",
    "Slice": ".IIII",
    "Squeeze": ".I",
    "Unsqueeze": ".I",
    "Split": ".I",
    "Pad": ".III",
    "Resize": ".III",
    "Upsample": ".I",
    "TopK": ".I",
    "Range": "III",
    "OneHot": "III",
    "Clip": ".II",
    "Pow": ".I",
    "ConstantOfShape": "I",
    "ReduceSum": ".I",
    "ReduceMean": ".I",
    "ReduceMax": ".I",
    "Where": "I",
    "If": "I",
    "Loop": "II",
}

_SAME = frozenset(
    {
        "Identity",
        "Cast",
        "CastLike",
        "QuantizeLinear",
        "DequantizeLinear",
        "Dropout",
        "Concat",
        "Slice",
        "Split",
        "Pad",
        "Clip",
        "Relu",
        "Neg",
        "Abs",
        "Sqrt",
        "Exp",
        "Log",
        "Reciprocal",
        "Round",
        "Floor",
        "Tanh",
        "Sigmoid",
        "Sign",
        "Softplus",
    }
)
"""Operations that leave the axes of their first input, or of all they join, where they are."""

_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min"})
_MOST_EVALUATED = 1 << 22  # values of a scale, a shape; more is never computed here
_DEEPEST_EVALUATION = 16


@dataclass(eq=False)
class Graph:
    """All constants and nodes of a model, with those of its subgraphs and functions."""

    flow: Dataflow = field(default_factory=Dataflow)
    protos: dict[int, tuple[str, Any]] = field(default_factory=dict)
    """Value → name and what holds it: a TensorProto, a SparseTensorProto or an array."""
    _functions: dict[tuple[str, str, str], Any] = field(default_factory=dict)
    _signatures: dict[tuple[str, str, str], tuple[list[int], list[int]]] = field(
        default_factory=dict
    )
    _waiting: deque[tuple[Any, Scope]] = field(default_factory=deque)

    def add_constant(self, scope: Scope, name: Any, proto: Any) -> None:
        """Add a tensor under the name it has in a scope."""
        value = scope.maps[0].setdefault(name, self.flow.new_value())
        self.flow.constants.add(value)
        self.protos[value] = (text(name), proto)

    def add_function_call(self, node: "onnx.NodeProto", scope: Scope) -> bool:
        """Join a call of one of the model's own functions to its body; False if it is none."""
        key = (node.domain, node.op_type, node.overload)
        if key not in self._functions:
            return False
        if key not in self._signatures:
            function = self._functions[key]
            inner: Scope = ChainMap()
            inputs = [self._declare(inner, name) for name in function.input]
            for body_node in function.node:
                for name in body_node.output:
                    self._declare(inner, name)
            outputs = [self._declare(inner, name) for name in function.output]
            self._signatures[key] = (inputs, outputs)
            # The body is read later: functions that call each other need no recursion then.
            self._waiting.append((function.node, inner))
        inputs, outputs = self._signatures[key]
        for name, inside in zip(node.input, inputs, strict=False):
            if name:
                self.flow.link(self._find(scope, name), inside)
        for name, inside in zip(node.output, outputs, strict=False):
            if name:
                self.flow.link(inside, self._find(scope, name))
        return True

    def add_model(self, model: "onnx.ModelProto") -> None:
        """Add everything that a model holds."""
        for function in model.functions:
            self._functions[function.domain, function.name, function.overload] = function
        self.add_graph(model.graph, ChainMap())
        while self._waiting:
            nodes, scope = self._waiting.popleft()
            self._add_nodes(nodes, scope)
        self.flow.find_static()

    def add_graph(self, graph: "onnx.GraphProto", scope: Scope) -> Scope:
        """Add a graph inside a scope and return the scope of its own names."""
        inner = scope.new_child()
        for tensor in graph.initializer:
            self.add_constant(inner, tensor.name, tensor)
        for sparse in graph.sparse_initializer:
            self.add_constant(inner, sparse.values.name, sparse)
        for given in graph.input:
            self._declare(inner, given.name)
        for node in graph.node:
            for name in node.output:
                self._declare(inner, name)
        self._add_nodes(graph.node, inner)
        return inner

    def _declare(self, scope: Scope, name: str) -> int:
        found = scope.maps[0].get(name)
        if found is None:
            found = scope.maps[0][name] = self.flow.new_value()
        return found

    def _find(self, scope: Scope, name: str) -> int:
        found = scope.get(name)
        return self._declare(scope, name) if found is None else found

    def _add_nodes(self, nodes: Any, scope: Scope) -> None:
        for node in nodes:
            if node.op_type == "Constant" and not node.input and node.output:
                self._add_constant_node(node, scope)
                continue
            graphs = [(a.name, a.g) for a in node.attribute if a.HasField("g")]
            if not graphs and self.add_function_call(node, scope):
                continue
            inputs = tuple(self._find(scope, name) if name else ABSENT for name in node.input)
            outputs = tuple(self._find(scope, name) for name in node.output if name)
            bodies = [self.add_graph(graph, scope) for _, graph in graphs]
            for (_, graph), body in zip(graphs, bodies, strict=True):
                self._join_body(node.op_type, graph, body, inputs, outputs)
            self.flow.add(Node(op_name(node), inputs, () if graphs else outputs, node))

    def _join_body(
        self,
        op: str,
        graph: "onnx.GraphProto",
        body: Scope,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
    ) -> None:
        """Say which values inside a branch or a loop are which outside."""
        results = [self._find(body, given.name) for given in graph.output]
        if op == "Loop":
            results = results[1:]  # the first is whether to go on
        for result, output in zip(results, outputs, strict=False):
            self.flow.link(result, output)
        if op in ("Loop", "Scan"):
            for value, given in zip(inputs, graph.input, strict=False):
                inside = self._declare(body, given.name)
                if value != ABSENT:
                    self.flow.link(value, inside)
                # What goes in changes from round to round, so that it is never constant.
                self.flow.link(self.flow.new_value(), inside)

    def _add_constant_node(self, node: "onnx.NodeProto", scope: Scope) -> None:
        for attribute in node.attribute:
            found: Any = None
            if attribute.HasField("t"):
                found = attribute.t
            elif attribute.HasField("sparse_tensor"):
                found = attribute.sparse_tensor
            elif attribute.name in ("value_float", "value_floats"):
                many = attribute.name.endswith("s")
                found = np.array(attribute.floats if many else attribute.f, np.float32)
            elif attribute.name in ("value_int", "value_ints"):
                many = attribute.name.endswith("s")
                found = np.array(attribute.ints if many else attribute.i, np.int64)
            if found is not None:
                self.add_constant(scope, node.output[0], found)


def op_name(node: "onnx.NodeProto") -> str:
    """Return a node's type, with its domain where that is neither ONNX's nor ONNX Runtime's."""
    known = node.domain in ("", "ai.onnx", "com.microsoft")
    return node.op_type if known else f"{node.domain}:{node.op_type}"


def attribute_of(node: Node, name: str, default: Any) -> Any:
    """Return an attribute of a node: a number or a tuple of numbers, like the default."""
    for attribute in node.source.attribute:
        if attribute.name == name:
            if isinstance(default, tuple):
                return tuple(attribute.ints)
            return attribute.f if isinstance(default, float) else attribute.i
    return default


def role_in(node: Node, place: int, shape: tuple[int, ...], layout: Layout) -> Role | None:
    """Return what a node does with a constant of a shape; None if the node does not tell."""
    letters = LAYERS.get(node.op, "")
    letter = letters[place] if place < len(letters) else "."
    if letter in "WRTGHL":
        axes = len(shape) if layout is None else len(layout)
        return Role(Kind.WEIGHT, _order(letter, node, axes))
    return plain_role(letter, shape)


def _order(letter: str, node: Node, axes: int) -> tuple[int, ...]:
    """Return the order of axes that makes out × in × space of a weight, empty if it lies so."""
    if letter == "T":
        # in × out/group × space; with groups the two cannot be told apart by a swap.
        alone = attribute_of(node, "group", 1) == 1
        return (1, 0, *range(2, axes)) if axes >= 2 and alone else ()
    turned = {
        "R": not attribute_of(node, "transB", 0),  # only FusedMatMul has it
        "G": not attribute_of(node, "transB", 0),
        "H": bool(attribute_of(node, "transA", 0)),
        "L": True,
    }
    return swapped_last(axes) if turned.get(letter) else ()


@dataclass(eq=False)
class Evaluator:
    """Computes small constants (scales, and shapes that axes are brought to); knows the nodes."""

    graph: Graph
    constants: dict[int, Tensor]
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def value(self, number: int, depth: int = 0) -> NDArray[Any] | None:
        """Return what is computed from constants, None if it is not or is too large."""
        constant = self.constants.get(number)
        if constant is not None:
            return constant.read() if constant.size <= _MOST_EVALUATED else None
        node = self.graph.flow.producers.get(number)
        if node is None or depth > _DEEPEST_EVALUATION or not self.graph.flow.is_static(node):
            return None
        if node.op not in ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Mul", "Div"):
            return None
        inputs = [self.value(value, depth + 1) for value in node.inputs if value != ABSENT]
        if not inputs or any(found is None for found in inputs):
            return None
        return self._apply(node, [found for found in inputs if found is not None])

    def _apply(self, node: Node, inputs: list[NDArray[Any]]) -> NDArray[Any] | None:
        with np.errstate(all="ignore"):
            try:
                if node.op in ("Mul", "Div"):
                    work = np.multiply if node.op == "Mul" else np.divide
                    return np.asarray(work(inputs[0], inputs[1]))
                if node.op in ("Identity", "Cast"):
                    return inputs[0]
                layout = self.through(node, 0, tuple(range(inputs[0].ndim)), inputs[0].shape)
            except (ValueError, IndexError):
                return None
        if layout is None:
            return None
        return inputs[0].reshape([1 if axis == NEW else inputs[0].shape[axis] for axis in layout])

    def is_argument(self, node: Node, place: int) -> bool:
        """Whether an input is a scale, a shape or the like, and not what is computed with."""
        letters = LAYERS.get(node.op, "")
        return place < len(letters) and letters[place] in "QI"

    def through(self, node: Node, place: int, layout: Layout, shape: tuple[int, ...]) -> Layout:
        """Return how the axes of a constant of a shape lie behind a node."""
        if layout is None:
            return None
        if node.op in _SAME:
            return layout
        if node.op in _ELEMENTWISE:
            return self._broadcast(node, place, layout)
        if place:
            return None
        if node.op == "Transpose":
            order = attribute_of(node, "perm", tuple(range(len(layout)))[::-1])
            return transposed(layout, order)
        if node.op in ("Squeeze", "Unsqueeze"):
            return self._squeeze(node, layout, shape)
        if node.op in ("Reshape", "Flatten"):
            return self._reshape(node, layout, shape)
        return None

    def _broadcast(self, node: Node, place: int, layout: tuple[int, ...]) -> Layout:
        axes = 0
        for at, other in enumerate(node.inputs):
            if at == place or other == ABSENT:
                continue
            found = self.constants.get(other, self.value(other))
            if found is None:
                return None
            axes = max(axes, len(found.shape))
        return (NEW,) * max(0, axes - len(layout)) + layout

    def _numbers(self, node: Node, place: int) -> tuple[int, ...] | None:
        if place >= len(node.inputs):
            return None
        found = self.value(node.inputs[place])
        return None if found is None else tuple(int(number) for number in found.reshape(-1))

    def _squeeze(self, node: Node, layout: tuple[int, ...], shape: tuple[int, ...]) -> Layout:
        axes = self._numbers(node, 1) or attribute_of(node, "axes", ())
        if node.op == "Squeeze":
            lengths = [1 if axis == NEW else shape[axis] for axis in layout]
            places = {axis % max(len(layout), 1) for axis in axes} or {
                place for place, length in enumerate(lengths) if length == 1
            }
            if any(lengths[place] != 1 for place in places):
                return None
            return tuple(axis for place, axis in enumerate(layout) if place not in places)
        total = len(layout) + len(axes)
        new = {axis % total for axis in axes} if total else set()
        rest = iter(layout)
        if len(new) != len(axes):
            return None
        return tuple(NEW if place in new else next(rest) for place in range(total))

    def _reshape(self, node: Node, layout: tuple[int, ...], shape: tuple[int, ...]) -> Layout:
        """Follow a reshape that only adds or drops axes of length 1."""
        lengths = [1 if axis == NEW else shape[axis] for axis in layout]
        if node.op == "Flatten":
            at = attribute_of(node, "axis", 1)
            target: tuple[int, ...] = (math.prod(lengths[:at]), -1)
        else:
            target = self._numbers(node, 1) or ()
        if len(target) > 64 or any(length < -1 for length in target):
            return None
        wanted = [
            lengths[place] if length == 0 and place < len(lengths) else length
            for place, length in enumerate(target)
        ]
        if wanted.count(-1) == 1:
            given = -math.prod(wanted)
            wanted[wanted.index(-1)] = math.prod(lengths) // given if given > 0 else -1
        return reshaped(layout, shape, wanted)
