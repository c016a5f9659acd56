"""The architecture of an ONNX model, from its graph."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedder.architecture import Architecture
from embedder.errors import ArchitectureError, MalformedError, MissingExtraError
from embedder.followed import Constant, Label, Trail, Value
from embedder.onnx_attention import ACTIVATIONS, NEAR, AttentionRules
from embedder.onnx_lattice import is_first_only
from embedder.onnx_sizes import FREE, with_sizes
from embedder.onnx_values import Known, attribute_of, is_float
from embedder.readers.onnx_file import OnnxFile
from embedder.units import Gauge

if TYPE_CHECKING:
    import onnx

_MEANS = frozenset({"AveragePool", "GlobalAveragePool"})
_MAXIMA = frozenset({"MaxPool", "GlobalMaxPool"})
_SUMS = frozenset({"Add", "Sub", "Sum", "Max", "Min", "Mean", "Where"})
_PRODUCTS = frozenset({"Mul", "Div", "Pow", "Mod", "Greater", "Less", "Equal", "And", "Or"})
_PRODUCTS |= frozenset({"GreaterOrEqual", "LessOrEqual", "Xor", "PRelu"})
_SIZES = frozenset({"Shape", "Size"})
_CELLS = {"RNN": ("elman", 1), "GRU": ("gru", 3), "LSTM": ("lstm", 4)}
_KEPT = frozenset(
    {"ArgMax", "ArgMin", "TopK", "GatherND", "GatherElements", "ScatterND", "NonMaxSuppression"}
    | {"DepthToSpace", "SpaceToDepth", "NonZero", "OneHot", "CumSum", "Einsum", "EyeLike"}
    | {"DynamicQuantizeLSTM"}
)
"""Operations after which units are not followed."""


def describe_onnx(path: Path) -> Architecture:
    """Return what the model in an ONNX file is made of.

    Args:
        path: The file. Its large tensors are not read.

    Raises:
        ArchitectureError: A node cannot be followed; it is named.
        MissingExtraError: The package onnx is not installed.
        MalformedError: The file is no ONNX message.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("onnx", "formats", "reading ONNX files") from error
    failures = import_module("google.protobuf.message")  # without types, so not by `import`
    file = OnnxFile(path)
    try:
        model = onnx.ModelProto.FromString(file.graph_bytes())
    except failures.DecodeError as error:
        raise MalformedError(path, f"is no ONNX message: {error}", "get it again") from error
    finally:
        file.close()
    return describe_onnx_model(model)


def describe_onnx_model(model: "onnx.ModelProto") -> Architecture:
    """Return what an ONNX model in memory is made of; its large tensors may be empty.

    Raises:
        ArchitectureError: A node cannot be followed; it is named.
    """
    walk = _Walk(with_sizes(model).graph)
    found = walk.run()
    if not walk.tracer.cut_for_nothing:
        return found
    try:
        one, other = (_Walk(with_sizes(model, free=first).graph).run() for first in FREE)
    except ArchitectureError:
        return found
    return one if one == other else found


class _Walk(AttentionRules):
    """Goes through the nodes of a graph and tells a tracer what they do."""

    def rules(self) -> dict[str, Callable[[Any], Known]]:
        """Return operation → rule."""
        return {
            **self.axis_rules(),
            **self.lattice_rules(),
            **self.norm_rules(),
            **dict.fromkeys(ACTIVATIONS, self.activation),
            **dict.fromkeys(NEAR, self.same),
            **dict.fromkeys(_MEANS | _MAXIMA, self.pool),
            **dict.fromkeys(_SUMS, self.sum),
            **dict.fromkeys(_PRODUCTS, self.product),
            **dict.fromkeys(_CELLS, self.recurrent),
            **dict.fromkeys(_SIZES, self.nothing),
            **dict.fromkeys(_KEPT, self.kept),
            "Conv": self.convolution,
            "ConvTranspose": self.convolution,
            "ConvInteger": self.integer_convolution,
            "MatMulInteger": self.matmul,
            "Gemm": self.gemm,
            "MatMul": self.matmul,
        }

    def run(self) -> Architecture:
        """Walk the graph and return what was found."""
        self.walk(self.graph.node, self.rules())
        for info in self.graph.output:
            found = self.values.get(info.name, Value())
            if isinstance(found, Value):
                self.tracer.keep(found)
        for name, units in self.touched.items():
            self.tracer.held |= set() if name in self.in_norms else units
        return self.finish()

    def walk(
        self, nodes: Iterable["onnx.NodeProto"], rules: Mapping[str, Callable[[Any], Known]]
    ) -> None:
        """Follow nodes in their order."""
        for node in nodes:
            if node.op_type == "Constant":
                self.values.setdefault(node.output[0], Value())
                continue
            if node.op_type == "If":
                self.choose(node, rules)
                continue
            try:
                found = self.follow(node, rules)
            except ArchitectureError as error:
                raise ArchitectureError(f"{_words(node)}: {error}") from error
            except (ArithmeticError, LookupError, StopIteration, TypeError, ValueError) as error:
                raise ArchitectureError(f"{_words(node)}: its inputs do not fit it") from error
            if isinstance(found, Value):
                known = (self.values.get(name) for name in node.input)
                self.tracer.use(one.name for one in known if isinstance(one, Constant))
                found = replace(found, trail=found.trail or self.trail(node))
                self.use_trails(node, found)
                self.touched[node.output[0]] = self.touched_by(node)
            for place, name in enumerate(node.output):
                if place and is_first_only(node):
                    found = Value()
                if isinstance(found, Value) and len(node.output) > 1:
                    found = replace(found, shape=self.sizes.get(name), fresh=None)
                self.values[name] = self.apart.pop(name, found)

    def choose(self, node: "onnx.NodeProto", rules: Mapping[str, Callable[[Any], Known]]) -> None:
        """Follow both branches of a choice: what they give has the same units."""
        self.tracer.keep(self.value(node))
        branches = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        for branch in branches:
            self.walk(branch.node, rules)
        results = zip(*(branch.output for branch in branches), strict=False)
        for name, given in zip(node.output, results, strict=False):
            found = [self.values.get(info.name, Value()) for info in given]
            values = [Value(getattr(known, "labels", {}), known.shape) for known in found]
            for known in found:
                if isinstance(known, Value) and known.trail is not None:
                    self.tracer.use_trail(known.trail, Value())
            lengths = {None if value.shape is None else len(value.shape) for value in values}
            if len(lengths) == 1 and None not in lengths:
                self.values[name] = Value(self.tracer.joined(values), self.sizes.get(name))
            else:  # it is not known which axes of one are which of the other
                for value in values:
                    self.tracer.keep(value)
                self.values[name] = Value(shape=self.sizes.get(name))

    def finish(self) -> Architecture:
        """Return the description, and how much of the model it explains."""
        built = self.tracer.finish("graph")
        built.check({name: tuple(proto.dims) for name, proto in self.protos.items()})
        if all(group.gauge == Gauge.NAMED for group in built.groups.values()):
            raise ArchitectureError("the graph has no hidden units that could be followed")
        counted = {
            name: math.prod(proto.dims)
            for name, proto in self.protos.items()
            if math.prod(proto.dims) > 1
            and (is_float(proto) or (self.is_bytes(name) and len(proto.dims) > 1))
        }
        left = sorted(set(counted) - set(built.axes))
        share = sum(counted.get(name, 0) for name in built.axes) / max(sum(counted.values()), 1)
        return replace(built, confidence=share, unexplained=tuple(left))

    def follow(self, node: "onnx.NodeProto", rules: Mapping[str, Callable[[Any], Known]]) -> Known:
        """Return what a node gives."""
        inputs = [self.values.get(name, Value()) for name in node.input]
        labelled = any(isinstance(value, Value) and value.labels for value in inputs)
        rule = rules.get(node.op_type)
        if rule is not None and (node.domain in ("", "ai.onnx") or node.op_type in _KEPT):
            return rule(node)
        holds_graph = any(a.HasField("g") for a in node.attribute)
        quantised = any(word in node.op_type for word in ("Quantize", "Integer", "QLinear"))
        if labelled or holds_graph or quantised or any(map(_is_weight, inputs)):
            raise ArchitectureError(f"the operation {node.op_type} cannot be followed")
        if node.op_type == "ConstantOfShape":
            self.uniform.update(node.output)
        return Value(shape=self.shape(node))

    def convolution(self, node: "onnx.NodeProto") -> Known:
        """Follow a convolution, a depthwise one, or a transposed one."""
        biases = self.constants(node, 2)
        if len(node.input) > 2 and not biases:
            return self.kept(node)
        return self.convolved(node, next(iter(biases), None))

    def integer_convolution(self, node: "onnx.NodeProto") -> Known:
        """Follow a convolution of whole numbers, which has zero points where others have a bias."""
        return self.convolved(node, None)

    def convolved(self, node: "onnx.NodeProto", bias: Constant | None) -> Known:
        """Follow a convolution."""
        value, weights = self.value(node), self.constants(node, 1)
        if not weights:
            return self.kept(node)
        weight = weights[0]
        at, groups = 1 - len(weight.shape), attribute_of(node, "group", 1)
        turned = node.op_type == "ConvTranspose"
        self.tracer.keep(value, range(at + 1, 0))  # a kernel slides along these
        others = {place: other for place, other in value.labels.items() if place < at}
        label = value.labels.get(at)
        if bias is not None:
            self.tracer.fix(Value(others))
        if groups == 1:
            read, written = (0, 1) if turned else (1, 0)
            units, step = self.tracer.linear(
                value, weight, read=read, written=written, at=at, bias=bias
            )
        elif groups == weight.shape[0] and weight.shape[1] == 1 and label and label.whole:
            units, step = self.tracer.unitwise(value, weight, at=at, bias=bias)
        else:
            return self.kept(node)
        return Value({**others, at: Label(units)}, self.shape(node), step)

    def gemm(self, node: "onnx.NodeProto") -> Known:
        """Follow a matrix product with a bias."""
        value, weights, biases = self.value(node), self.constants(node, 1), self.constants(node, 2)
        turned = bool(attribute_of(node, "transB", 0))
        if not weights or attribute_of(node, "transA", 0) or (len(node.input) > 2 and not biases):
            return self.kept(node)
        read, written = (1, 0) if turned else (0, 1)
        units, step = self.tracer.linear(value, weights[0], read=read, written=written, at=-1)
        others = {place: label for place, label in value.labels.items() if place != -1}
        found = Value({**others, -1: Label(units)}, self.shape(node), step, Trail((units,)))
        if biases:
            self.tracer.along(found, biases[0], power=1)
            found = replace(found, fresh=None)
        return found

    def matmul(self, node: "onnx.NodeProto") -> Known:
        """Follow a product with a matrix of the model, or one of two values."""
        weights = self.constants(node, 1)
        if not weights and not self.constants(node, 0):
            return self.meeting(node)
        if not weights or len(weights[0].shape) != 2 or isinstance(self.input(node, 0), Constant):
            return self.kept(node)
        value = self.value(node)
        units, step = self.tracer.linear(value, weights[0], read=0, written=1, at=-1)
        labels = {place: label for place, label in value.labels.items() if place != -1}
        return Value({**labels, -1: Label(units)}, self.shape(node), step, Trail((units,)))

    def recurrent(self, node: "onnx.NodeProto") -> Known:
        """Follow recurrent cells; all directions share the order of their units."""
        kind, gates = _CELLS[node.op_type]
        weights = self.constants(node, 1, 2, 3)
        given = sum(bool(self.input(node, place)) for place in (1, 2, 3))
        if len(weights) != given or given < 2 or self.input(node, 7) is not None:
            return self.kept(node)
        if attribute_of(node, "layout", 0):
            return self.kept(node)
        value = self.value(node)
        self.tracer.keep(value, [place for place in value.labels if place != -1])
        units = self.tracer.recurrent(value, weights, kind=kind, gates=gates)
        found = Value({-1: Label(units)}, self.shape(node))
        for place in (5, 6):
            state = self.input(node, place)
            if isinstance(state, Constant):
                self.tracer.along(found, state, power=1)
            elif state is not None and node.input[place] not in self.uniform:
                self.tracer.keep(found)  # a state that the caller gives has an order
        self.tracer.fix(found, sign=any(a.name == "activations" for a in node.attribute))
        return found

    def activation(self, node: "onnx.NodeProto") -> Known:
        """Follow a function of each element, or one over units that knows no order."""
        return self.tracer.activate(self.value(node), ACTIVATIONS[node.op_type])

    def same(self, node: "onnx.NodeProto") -> Known:
        """Follow what changes no unit."""
        found = self.input(node, 0)
        # A norm behind it must not take a value for its own that others read before.
        return replace(found, fresh=None) if isinstance(found, Value) else found or Value()

    def pool(self, node: "onnx.NodeProto") -> Known:
        """Follow pooling over space."""
        value = self.value(node)
        if value.shape is None:
            return self.kept(node)
        space = range(2 - len(value.shape), 0)
        self.tracer.keep(value, space)
        if node.op_type in _MAXIMA:
            self.tracer.fix(value, scale=False)
        labels = {place: label for place, label in value.labels.items() if place not in space}
        return Value(labels, self.shape(node))

    def sum(self, node: "onnx.NodeProto") -> Known:
        """Follow what lets a common scale through: sums, maxima, choices."""
        terms = self.terms(node)
        if node.op_type == "Where":
            self.tracer.fix(self.value(node))
        values = [term for term in terms if isinstance(term, Value)]
        if not values:
            return Value(shape=self.shape(node))
        if node.op_type == "Add" and any(set(value.labels) == {-1} for value in values):
            terms = [self.laid(term) if self.has_rows(term) else term for term in terms]
            values = [term for term in terms if isinstance(term, Value)]
        found = self.joined(node, values)
        if node.op_type not in ("Add", "Sub", "Sum", "Mean"):
            self.tracer.fix(found, scale=False)
        alone = all(self.readers[name] == 1 for name in node.input)
        is_bias = node.op_type == "Add" and len(values) == 1 and alone
        added = replace(found, fresh=self.tracer.number_of(values[0]) if is_bias else None)
        for term in terms:
            if isinstance(term, Constant):
                self.tracer.along(added, term, power=1)
        return found

    def product(self, node: "onnx.NodeProto") -> Known:
        """Follow a product, or what is like it: scales of units that meet are lost."""
        terms = self.terms(node)
        values = [term for term in terms if isinstance(term, Value)]
        if not values:
            return self.scaled(node) or Value(shape=self.shape(node))
        if found := self.stepped(node) or self.norm_of_many(node):
            return found
        by_units = isinstance(terms[-1], Value) and bool(terms[-1].labels)
        linear = node.op_type == "Mul" or (node.op_type == "Div" and not by_units)
        if node.op_type == "PRelu":
            self.tracer.activate(values[0], "prelu")
        elif not linear or sum(bool(value.labels) for value in values) > 1:
            for value in values:
                self.tracer.fix(value)
        found = self.joined(node, values, product=True)
        if node.op_type == "Mul":
            found = replace(found, trail=self.trail_of_gates(values))
        for term in terms:
            if isinstance(term, Constant):
                self.tracer.along(found, term, power=0)
        return found


def _is_weight(known: Known) -> bool:
    return isinstance(known, Constant) and sum(size > 1 for size in known.shape) > 1


def _words(node: "onnx.NodeProto") -> str:
    """Return what to call a node in an error."""
    return f"{node.op_type} {node.name or next(iter(node.output), '')}".strip()
