"""The values of an ONNX graph while it is walked, and what every rule asks of them."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from embedder.errors import ArchitectureError
from embedder.followed import Constant, Value
from embedder.tracing import Tracer

if TYPE_CHECKING:
    import onnx

_LARGEST_READ = 64
"""Values in a constant that holds axes, sizes or a scalar."""

Known = Value | Constant


class GraphValues:
    """What is known of each value of a graph, by its name."""

    def __init__(self, graph: "onnx.GraphProto") -> None:
        self.graph = graph
        self.values: dict[str, Known] = {}
        self.apart: dict[str, Value] = {}  # outputs that differ from the first one of their node
        self.touched: dict[str, set[int]] = {}  # value → units that its node treats one by one
        self.in_norms: set[str] = set()  # values inside norms of several nodes, and what these give
        self.uniform: set[str] = set()  # values that are equal everywhere
        self.sizes: dict[str, tuple[int | None, ...]] = {}
        self.protos: dict[str, onnx.TensorProto] = {}
        parts = list(parts_of(graph))
        for part in parts:
            for info in (*part.input, *part.value_info, *part.output):
                kind = info.type.tensor_type
                if kind.HasField("shape"):
                    self.sizes[info.name] = tuple(
                        d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim
                    )
            self.protos.update({tensor.name: tensor for tensor in part.initializer})
            for node in part.node:
                found = next((a.t for a in node.attribute if a.HasField("t")), None)
                if node.op_type == "Constant" and found is not None:
                    self.protos[node.output[0]] = found
        _check_names(parts)
        shapes = {name: tuple(proto.dims) for name, proto in self.protos.items()}
        for name, shape in shapes.items():
            self.values[name] = Constant(name, shape, tuple(range(len(shape))), self.scalar(name))
        self.makers = {name: node for part in parts for node in part.node for name in node.output}
        self.readers = Counter(name for part in parts for n in part.node for name in n.input)
        self.readers.update(info.name for part in parts for info in part.output)
        self.tracer = Tracer(shapes=shapes)

    def scalar(self, name: str) -> float | None:
        """Return the one value of a constant, None if it has several or is not a float."""
        found = self.numbers(name)
        return float(found[0]) if found is not None and len(found) == 1 else None

    def numbers(self, name: str) -> list[float] | None:
        """Return the values of a small constant; None if it is large or none."""
        from onnx import numpy_helper

        proto = self.protos.get(name)
        known = self.values.get(name)
        if proto is None and isinstance(known, Constant) and known.name:
            proto = self.protos.get(known.name)
        if proto is None or math.prod(proto.dims) > _LARGEST_READ:
            return None
        if proto.data_location == proto.EXTERNAL:
            return None  # no file but this one is opened
        try:
            return [float(number) for number in numpy_helper.to_array(proto).ravel()]
        except (ValueError, TypeError):
            return None  # its bytes were left in the file

    def input(self, node: "onnx.NodeProto", place: int) -> Known | None:
        """Return an input of a node; None if it has none there."""
        if place >= len(node.input) or not node.input[place]:
            return None
        name = node.input[place]
        return self.values.get(name, Value(shape=self.sizes.get(name)))

    def terms(self, node: "onnx.NodeProto") -> list[Known | None]:
        """Return all inputs of a node."""
        return [self.input(node, place) for place in range(len(node.input))]

    def value(self, node: "onnx.NodeProto", place: int = 0) -> Value:
        """Return an input as a value; a constant is one without labels."""
        found = self.input(node, place)
        return found if isinstance(found, Value) else Value(shape=getattr(found, "shape", None))

    def constants(self, node: "onnx.NodeProto", *places: int) -> list[Constant]:
        """Return inputs that are tensors of the model; fewer if one is none of these."""
        found = [self.input(node, place) for place in places]
        constants = [known for known in found if isinstance(known, Constant)]
        for known in constants:
            if 0 in known.shape:
                raise ArchitectureError(f"{known.name} has no values, its shape is {known.shape}")
        return constants

    def shape(self, node: "onnx.NodeProto") -> tuple[int | None, ...] | None:
        """Return the shape of a node's first output."""
        return self.sizes.get(node.output[0]) if node.output else None

    def is_zero(self, node: "onnx.NodeProto", place: int) -> bool:
        """Say whether an input is zero, or not there."""
        found = self.input(node, place)
        return found is None or (isinstance(found, Constant) and found.scalar == 0)

    def joined(
        self, node: "onnx.NodeProto", values: Sequence[Value], *, product: bool = False
    ) -> Value:
        """Return what values give whose axes meet from the end: units that meet are one."""
        return Value(self.tracer.joined(values, product=product), self.shape(node))

    def runs_forward(self, node: "onnx.NodeProto") -> bool:
        """Say whether a slice certainly takes places in their order."""
        steps = self.numbers(name_of(node, 4)) if name_of(node, 4) else []
        return steps is not None and min(steps, default=1) > 0

    def kept(self, node: "onnx.NodeProto") -> Known:
        """Give a meaning to all units that a node reads, and none to what it gives."""
        for place in range(len(node.input)):
            self.tracer.keep(self.value(node, place))
        return Value(shape=self.shape(node))

    def nothing(self, node: "onnx.NodeProto") -> Known:
        """Return what does not depend on any unit."""
        return Value(shape=self.shape(node))


def parts_of(graph: "onnx.GraphProto") -> Iterator["onnx.GraphProto"]:
    """Yield a graph and all graphs that its nodes hold."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from parts_of(attribute.g)


def _check_names(parts: Sequence["onnx.GraphProto"]) -> None:
    """Make sure that a name means one value: two branches may use it for two."""
    names: Counter[str] = Counter()
    for part in parts:
        names.update(tensor.name for tensor in part.initializer)
        names.update(name for node in part.node for name in node.output if name)
    twice = next((name for name, number in names.items() if number > 1), "")
    if twice and len(parts) > 1:
        raise ArchitectureError(f"{twice}: two parts of the graph have a value of this name")


def name_of(node: "onnx.NodeProto", place: int) -> str:
    """Return the name of an input of a node, empty if it has none there."""
    return str(node.input[place]) if place < len(node.input) else ""


def attribute_of(node: "onnx.NodeProto", name: str, default: Any) -> Any:
    """Return an attribute of a node: a number or a tuple of numbers, like the default."""
    for attribute in node.attribute:
        if attribute.name == name:
            if isinstance(default, tuple):
                return tuple(attribute.ints)
            return attribute.f if isinstance(default, float) else attribute.i
    return default


def is_float(proto: "onnx.TensorProto") -> bool:
    """Say whether a tensor holds real numbers."""
    return proto.data_type in (1, 10, 11, 16)  # FLOAT, FLOAT16, DOUBLE, BFLOAT16
