"""The architecture of a live torch module, from the graph that `torch.fx` makes of it.

Nothing is computed: the module is walked through with symbols. What depends on its inputs cannot
be walked through so; such a module is described by its names and shapes.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from embedder.architecture import Architecture
from embedder.errors import ArchitectureError
from embedder.followed import Constant, Label, Value
from embedder.tracing import Tracer
from embedder.units import Gauge

_ACTIVATIONS: dict[object, str] = {
    **dict.fromkeys((nn.ReLU, torch.relu, functional.relu, "relu", torch.relu_, "relu_"), "relu"),
    **dict.fromkeys((nn.LeakyReLU, functional.leaky_relu), "leaky_relu"),
    **dict.fromkeys((nn.Tanh, torch.tanh, functional.tanh, "tanh"), "tanh"),
    **dict.fromkeys((nn.GELU, functional.gelu), "gelu"),
    **dict.fromkeys((nn.SiLU, functional.silu), "silu"),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, functional.sigmoid, "sigmoid"), "sigmoid"),
    **dict.fromkeys((nn.Softplus, functional.softplus), "softplus"),
    **dict.fromkeys((nn.ReLU6, functional.relu6), "relu6"),
    **dict.fromkeys((nn.Hardswish, functional.hardswish), "hardswish"),
    **dict.fromkeys((nn.Hardsigmoid, functional.hardsigmoid), "hardsigmoid"),
    **dict.fromkeys((nn.ELU, functional.elu), "elu"),
    **dict.fromkeys((nn.Mish, functional.mish), "mish"),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax), "softmax"),
    **dict.fromkeys((functional.softmax, torch.softmax, "softmax"), "softmax"),
    **dict.fromkeys((functional.log_softmax, torch.log_softmax, "log_softmax"), "softmax"),
    **dict.fromkeys((torch.sin, "sin"), "sin"),
}
_SAME: frozenset[object] = frozenset(
    {nn.Identity, nn.Dropout, nn.Dropout2d, functional.dropout, "contiguous"}
)
_MEANS: frozenset[object] = frozenset(
    {nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d}
    | {functional.avg_pool2d, functional.adaptive_avg_pool2d}
)
_MAXIMA: frozenset[object] = frozenset(
    {nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool2d, functional.max_pool1d}
    | {functional.max_pool2d}
)
_SUMS: frozenset[object] = frozenset(
    {operator.add, operator.iadd, torch.add, "add", "add_", operator.sub, torch.sub, "sub"}
)
_PRODUCTS: frozenset[object] = frozenset({operator.mul, operator.imul, torch.mul, "mul", "mul_"})
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Known = Value | Constant | None


def describe_module(module: nn.Module) -> Architecture:
    """Return what a live module is made of.

    Args:
        module: Any module that can be walked through with symbols.

    Raises:
        ArchitectureError: It cannot, or an operation in it cannot be followed; that is named.

    Example:
        >>> found = describe_module(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
        >>> [(group.size, group.gauge.value) for group in found.groups.values()]
        [(3, 'named'), (4, 'sign'), (2, 'named')]
    """
    try:
        graph = fx.Tracer().trace(module)
    except Exception as error:  # a module's own code runs here and may raise anything
        raise ArchitectureError(f"the module cannot be walked through: {error}") from error
    return _Walk(module).run(graph)


class _Walk:
    """Goes through the nodes of a graph and tells a tracer what they do."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.first: dict[str, str] = {}  # tied tensors go by the first of their names
        names: dict[int, str] = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            self.first[name] = names.setdefault(id(tensor), name)
            self.shapes.setdefault(self.first[name], tuple(tensor.shape))
        self.tracer = Tracer(shapes=self.shapes)
        self.values: dict[fx.Node, Known] = {}

    def run(self, graph: fx.Graph) -> Architecture:
        """Walk the graph and return what was found."""
        for node in graph.nodes:
            self.tracer.use(self.read_by(node))
            try:
                self.values[node] = self.follow(node)
            except ArchitectureError as error:
                raise ArchitectureError(f"{node.name}: {error}") from error
        built = self.tracer.finish("graph")
        if all(group.gauge == Gauge.NAMED for group in built.groups.values()):
            raise ArchitectureError("the module has no hidden units that could be followed")
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        left = [name for name, size in sizes.items() if size > 1 and name not in built.axes]
        share = sum(sizes[n] for n in built.axes) / sum(sizes[n] for n in (*built.axes, *left))
        return replace(built, confidence=share, unexplained=tuple(sorted(left)))

    def read_by(self, node: fx.Node) -> Iterator[str]:
        """Yield the names of the tensors that a node reads."""
        if node.op == "call_module":
            called = self.module.get_submodule(str(node.target))
            for name in called.state_dict():
                yield self.first[f"{node.target}.{name}"]
        for source in node.all_input_nodes:
            known = self.values.get(source)
            if isinstance(known, Constant):
                yield known.name

    def follow(self, node: fx.Node) -> Known:
        """Return what a node gives."""
        if node.op == "placeholder":
            return Value()
        if node.op == "get_attr":
            return self.constant(str(node.target))
        if node.op == "output":
            for value in self.inputs(node):
                self.tracer.keep(value)
            return None
        if node.op == "call_module":
            return self.call_module(node)
        return self.call(node, node.target)

    def inputs(self, node: fx.Node) -> list[Value]:
        """Return the values that a node reads."""
        found = [self.values.get(source) for source in node.all_input_nodes]
        return [value for value in found if isinstance(value, Value)]

    def value(self, node: fx.Node) -> Value:
        """Return the first value that a node reads."""
        return next(iter(self.inputs(node)), Value())

    def constant(self, name: str) -> Constant | None:
        """Return a tensor of the module; None if there is none."""
        if name not in self.first:
            return None
        shape = self.shapes[self.first[name]]
        return Constant(self.first[name], shape, tuple(range(len(shape))))

    # -------------------------------------------------------------- modules

    def call_module(self, node: fx.Node) -> Known:
        """Follow a module of torch."""
        name = str(node.target)
        called = self.module.get_submodule(name)
        weight, bias = self.constant(f"{name}.weight"), self.constant(f"{name}.bias")
        value = self.value(node)
        if isinstance(called, _BATCH_NORMS):
            return self.batch_norm(node, name, called.eps)
        if isinstance(called, nn.Flatten):
            return self.flatten(value, called.start_dim, called.end_dim)
        if weight is not None:
            return self.layer(node, called, weight, bias)
        return self.call(node, type(called))

    def layer(
        self, node: fx.Node, called: nn.Module, weight: Constant, bias: Constant | None
    ) -> Known:
        """Follow a module that holds a weight."""
        value = self.value(node)
        if isinstance(called, nn.Linear):
            return self.linear(value, weight, bias)
        if isinstance(called, _CONVOLUTIONS):
            return self.convolution(value, weight, bias, called.groups)
        if isinstance(called, nn.LayerNorm) and len(weight.shape) == 1:
            vectors = {"gain": weight} | ({} if bias is None else {"offset": bias})
            epsilon = called.eps
            return self.tracer.norm(value, "layer", vectors, at=-1, alone=False, epsilon=epsilon)
        if isinstance(called, nn.PReLU):
            found = self.tracer.activate(value, "prelu")
            if weight.shape[0] > 1:
                for label in value.labels.values():
                    self.tracer.vector(weight, label, power=0)
            return found
        if isinstance(called, nn.Embedding):
            return Value({-1: Label(self.tracer.embedding(weight))})
        return self.call(node, type(called))

    def linear(self, value: Value, weight: Constant, bias: Constant | None) -> Value:
        """Follow a matrix over the last axis."""
        others = {place: label for place, label in value.labels.items() if place != -1}
        if bias is not None:
            self.tracer.fix(Value(others))
        units, step = self.tracer.linear(value, weight, read=1, written=0, at=-1, bias=bias)
        return Value({**others, -1: Label(units)}, fresh=step)

    def convolution(
        self, value: Value, weight: Constant, bias: Constant | None, groups: int
    ) -> Value:
        """Follow a convolution, or a depthwise one."""
        at = 1 - len(weight.shape)
        self.tracer.keep(value, [place for place in value.labels if place != at])
        if groups == 1:
            units, step = self.tracer.linear(value, weight, read=1, written=0, at=at, bias=bias)
        elif groups == weight.shape[0] and weight.shape[1] == 1 and at in value.labels:
            units, step = self.tracer.unitwise(value, weight, at=at, bias=bias)
        else:
            self.tracer.keep(value)
            return Value()
        return Value({at: Label(units)}, (None,) * len(weight.shape), step)

    def batch_norm(self, node: fx.Node, name: str, epsilon: float) -> Value:
        """Follow a batch norm over the one axis that is known to hold units."""
        value = self.value(node)
        words = {"gain": "weight", "offset": "bias", "mean": "running_mean"}
        words["variance"] = "running_var"
        found = {role: self.constant(f"{name}.{word}") for role, word in words.items()}
        vectors = {role: vector for role, vector in found.items() if vector is not None}
        if len(value.labels) != 1 or not {"gain", "mean"} <= set(vectors):
            self.tracer.keep(value)
            return Value(shape=value.shape)
        alone = len(node.all_input_nodes[0].users) == 1
        (at,) = value.labels
        return self.tracer.norm(value, "batch", vectors, at=at, alone=alone, epsilon=epsilon)

    # -------------------------------------------------------------- functions and methods

    def call(self, node: fx.Node, target: Any) -> Known:
        """Follow a function, a method or a module without weights."""
        values = self.inputs(node)
        value = next(iter(values), Value())
        rules: Sequence[tuple[Mapping[Any, str] | frozenset[object], Callable[[], Known]]] = (
            (_ACTIVATIONS, lambda: self.tracer.activate(value, _ACTIVATIONS[target])),
            (_SAME, lambda: replace(value, fresh=None)),
            (_MEANS, lambda: self.pooled(value)),
            (_MAXIMA, lambda: self.pooled(value, maximum=True)),
            (_SUMS, lambda: self.sum(node, values)),
            (_PRODUCTS, lambda: self.product(node, values)),
            (frozenset({torch.flatten, "flatten"}), lambda: self.flattened(node, value)),
            (frozenset({"view", "reshape"}), lambda: self.viewed(node, value)),
            (frozenset({"mean", torch.mean}), lambda: self.mean(node, value)),
            (frozenset({"size", getattr, operator.getitem}), lambda: self.size(node, value)),
        )
        for known, rule in rules:
            if target in known:
                return rule()
        if any(found.labels for found in values):
            raise ArchitectureError(f"{getattr(target, '__name__', target)} cannot be followed")
        return Value()

    def pooled(self, value: Value, *, maximum: bool = False) -> Value:
        """Follow a mean or a maximum over space."""
        at = None if value.shape is None else -len(value.shape) + 1
        self.tracer.keep(value, [place for place in value.labels if place != at])
        if maximum:
            self.tracer.fix(value, scale=False)
        labels = {place: label for place, label in value.labels.items() if place == at}
        return Value(labels, value.shape)

    def joined(self, values: Sequence[Value]) -> Value:
        """Return what values give that meet element by element: units that meet are one."""
        labels: dict[int, Label] = {}
        for place in sorted({place for value in values for place in value.labels}):
            found = [value.labels.get(place) for value in values]
            there = [label for label in found if label is not None]
            alike = {(label.before, label.inner) for label in there}
            if len(there) < len(values) or len(alike) > 1:
                self.tracer.keep_all(values, place)
            else:
                for label in there[1:]:
                    self.tracer.join(there[0].units, label.units)
            labels[place] = there[0]
        shape = next((value.shape for value in values if value.shape is not None), None)
        return Value(labels, shape)

    def sum(self, node: fx.Node, values: Sequence[Value]) -> Value:
        """Follow a sum, of values, of tensors of the module, of numbers."""
        found = self.joined(values)
        self.with_others(node, found, power=1)
        if any(isinstance(term, int | float) for term in node.args):
            self.tracer.fix(found)
        return found

    def product(self, node: fx.Node, values: Sequence[Value]) -> Value:
        """Follow a product; scales of units that meet are lost, also those of a square."""
        factors = [term for term in node.args if isinstance(term, fx.Node)]
        if sum(isinstance(self.values.get(term), Value) for term in factors) > 1:
            for value in values:
                self.tracer.fix(value)
        found = self.joined(values)
        self.with_others(node, found, power=0)
        return found

    def with_others(self, node: fx.Node, found: Value, *, power: int) -> None:
        """Note tensors of the module that meet a value, and numbers that were computed."""
        for source in node.all_input_nodes:
            known = self.values.get(source)
            if isinstance(known, Constant):
                self.tracer.along(found, known, power=power)
            elif known is None and source.op == "get_attr":
                self.tracer.keep(found)  # a tensor that is not stored with the weights
            elif known is None and power:
                self.tracer.fix(found)

    def flatten(self, value: Value, start: int, end: int) -> Value:
        """Return a value some of whose axes were merged: all but the first can be followed."""
        at = None if value.shape is None else 1 - len(value.shape)
        if (start, end) != (1, -1) or at is None or set(value.labels) - {at}:
            self.tracer.keep(value)
            return Value()
        label = value.labels.get(at)
        labels = {} if label is None else {-1: replace(label, inner=None)}
        return Value(labels, (None, None))

    def flattened(self, node: fx.Node, value: Value) -> Value:
        """Follow `flatten`."""
        start = self.argument(node, 1, "start_dim", 0)
        return self.flatten(value, start, self.argument(node, 2, "end_dim", -1))

    def viewed(self, node: fx.Node, value: Value) -> Value:
        """Follow `view` and `reshape` to examples × the rest."""
        rest = len(node.args) == 3 and node.args[2] == -1 and isinstance(node.args[1], fx.Node)
        return self.flatten(value, 1 if rest else 0, -1)

    def mean(self, node: fx.Node, value: Value) -> Value:
        """Follow a mean over space."""
        axes = self.argument(node, 1, "dim", None)
        axes = (axes,) if isinstance(axes, int) else axes
        length = len(value.shape or ())
        if not axes or not length:
            self.tracer.keep(value)
            return Value()
        gone = {int(axis) % length - length for axis in axes}
        self.tracer.keep(value, gone)
        left = {place: label for place, label in value.labels.items() if place not in gone}
        if self.argument(node, 2, "keepdim", False):
            return Value(left, value.shape)
        labels = {p + sum(axis > p for axis in gone): label for p, label in left.items()}
        return Value(labels, (None,) * (length - len(gone)))

    def size(self, node: fx.Node, value: Value) -> Known:
        """Follow what asks for a shape; parts of a value and its other faces are not followed."""
        asks = node.target == "size" or (node.target is getattr and node.args[1] == "shape")
        if asks or not self.inputs(node):
            return None
        self.tracer.keep(value)
        return Value()

    @staticmethod
    def argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
        """Return an argument of a call."""
        return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)
