"""The graphs of a TFLite model while they are walked, and what every rule asks of them.

The reader has opened the file before and held each count in it against the size of the file; what
the reader does not look at, options and outputs, is asked for here one number at a time.
"""

import math
import mmap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from embedder.checkpoint import BLOCK_VALUES, Checkpoint, Tensor, is_parameter
from embedder.errors import ArchitectureError
from embedder.followed import Constant, Label, Value
from embedder.tracing import Tracer

_CUSTOM = 32
_INTEGERS = frozenset({3, 7, 9, 17})  # U8, I16, I8, INT4
_LARGEST_READ = 64
"""Values in a constant that holds axes, sizes or a scalar."""

Known = Value | Constant
Shape = tuple[int | None, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One operator.

    Args:
        op: Its name.
        inputs: Numbers of the tensors that it reads; −1 for one that is not given.
        outputs: Numbers of those that it writes.
        record: Where its options are.
    """

    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    record: Any


class Values:
    """What is known of the values of one subgraph, by their numbers."""

    def __init__(self, model: "Model", place: int) -> None:
        self.model, self.place, self.tracer = model, place, model.tracer
        if not 0 <= place < model.root.SubgraphsLength():
            raise ArchitectureError(f"there is no part of the graph with the number {place}")
        self.graph = model.root.Subgraphs(place)
        self.known: dict[int, Known] = {}
        self.handles: dict[int, bytes] = {}

    def nodes(self) -> list[Node]:
        """Return the operators in their order."""
        found = []
        for place in range(self.graph.OperatorsLength()):
            record = self.graph.Operators(place)
            numbers = (record.InputsAsNumpy(), record.OutputsAsNumpy())
            inputs, outputs = (tuple(map(int, n)) if hasattr(n, "size") else () for n in numbers)
            found.append(Node(self.model.codes[record.OpcodeIndex()], inputs, outputs, record))
        return found

    def ends(self, *, outputs: bool) -> list[int]:
        """Return the numbers of what the subgraph is given, or of what it gives."""
        graph = self.graph
        found = graph.OutputsAsNumpy() if outputs else graph.InputsAsNumpy()
        numbers = [int(number) for number in found] if hasattr(found, "size") else []
        if not all(0 <= number < graph.TensorsLength() for number in numbers):
            raise ArchitectureError("the graph gives or takes values that are not there")
        return numbers

    def at(self, number: int) -> Known:
        """Return what is known of a value."""
        if number not in self.known:
            record = self.graph.Tensors(number)
            is_constant = record.Buffer() and self.model.has_data(record.Buffer())
            constant = self.model.constant(_name_of(record)) if is_constant else None
            self.known[number] = constant or Value(shape=self.size(number))
        return self.known[number]

    def size(self, number: int) -> Shape | None:
        """Return the shape of a value; a scalar's is told like one that is not known."""
        record = self.graph.Tensors(number)
        shape = [int(record.Shape(axis)) for axis in range(record.ShapeLength())]
        if record.ShapeSignatureLength() == len(shape):
            shape = [int(record.ShapeSignature(axis)) for axis in range(len(shape))]
        return tuple(None if length < 0 else length for length in shape) or None

    def is_quantised(self, number: int) -> bool:
        """Say whether a value lies on a lattice that is the same for all units."""
        record = self.graph.Tensors(number)
        scaled = record.Quantization() is not None and record.Quantization().ScaleLength() > 0
        return scaled and record.Type() in _INTEGERS

    def input(self, node: Node, place: int) -> Known | None:
        """Return an input of a node; None if it has none there."""
        if place >= len(node.inputs) or node.inputs[place] < 0:
            return None
        return self.at(node.inputs[place])

    def terms(self, node: Node) -> list[Known | None]:
        """Return all inputs of a node."""
        return [self.input(node, place) for place in range(len(node.inputs))]

    def value(self, node: Node, place: int = 0) -> Value:
        """Return an input as a value; a constant is one without labels."""
        found = self.input(node, place)
        return found if isinstance(found, Value) else Value(shape=getattr(found, "shape", None))

    def constant(self, node: Node, place: int) -> Constant | None:
        """Return an input that is a tensor of the model; None if it is none."""
        found = self.input(node, place)
        if not isinstance(found, Constant):
            return None
        if 0 in found.shape:
            raise ArchitectureError(f"{found.name} has no values, its shape is {found.shape}")
        return found

    def numbers(self, node: Node, place: int) -> list[int] | None:
        """Return a small constant of whole numbers, such as axes; None if it is none."""
        found = self.input(node, place)
        return self.model.numbers(found.name) if isinstance(found, Constant) else None

    def name(self, node: Node) -> str:
        """Return the name of what a node gives first."""
        return _name_of(self.graph.Tensors(node.outputs[0])) if node.outputs else ""

    def shape(self, node: Node) -> Shape | None:
        """Return the shape of a node's first output."""
        return self.size(node.outputs[0]) if node.outputs else None

    def kept(self, node: Node) -> Known:
        """Give a meaning to all units that a node reads, and none to what it gives."""
        for place in range(len(node.inputs)):
            self.tracer.keep(self.value(node, place))
        return Value(shape=self.shape(node))

    def nothing(self, node: Node) -> Known:
        """Return what does not depend on any unit."""
        return Value(shape=self.shape(node))


class Model:
    """A TFLite file whose graphs are walked, and the tensors that its reader found."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.schema = import_module("tflite")
        with checkpoint.files[0].open("rb") as opened:
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self.root = self.schema.Model.GetRootAsModel(content, 0)
        often = Counter(tensor.name for tensor in checkpoint.tensors)
        self.tensors: dict[str, Tensor] = {tensor.name: tensor for tensor in checkpoint.tensors}
        self.unclear = {name for name, number in often.items() if number > 1}
        self.tracer = Tracer(shapes={name: t.shape for name, t in self.tensors.items()})
        self.states: dict[bytes, Label] = {}
        self.walked: set[int] = set()
        self._names = {number: name for name, number in vars(self.schema.BuiltinOperator).items()}
        self.codes = [self._code(place) for place in range(self.root.OperatorCodesLength())]

    def _code(self, place: int) -> str:
        code = self.root.OperatorCodes(place)
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        if number == _CUSTOM:
            return f"CUSTOM:{(code.CustomCode() or b'').decode('utf-8', 'replace')}"
        return str(self._names.get(number, f"#{number}"))

    def option(self, node: Node, table: str, field: str) -> Any:
        """Return an option of an operator; 0 where the file does not set it."""
        record, kinds = node.record, self.schema.BuiltinOptions
        if record.BuiltinOptions() is None or record.BuiltinOptionsType() != getattr(kinds, table):
            return 0
        options = getattr(self.schema, table)()
        found = record.BuiltinOptions()
        options.Init(found.Bytes, found.Pos)
        return getattr(options, field)()

    def has_data(self, buffer: int) -> bool:
        """Say whether a buffer holds values."""
        if buffer >= self.root.BuffersLength():
            return False
        record = self.root.Buffers(buffer)
        return bool(record.DataLength()) or record.Offset() > 1

    def constant(self, name: str) -> Constant | None:
        """Return a tensor of the model; None if there is none, or several that are called so."""
        tensor = self.tensors.get(name)
        if tensor is None or name in self.unclear:
            return None
        scalar = float(tensor.read().ravel()[0]) if tensor.size == 1 else None
        return Constant(name, tensor.shape, tuple(range(len(tensor.shape))), scalar)

    def numbers(self, name: str) -> list[int] | None:
        """Return the values of a small constant; None if it is large."""
        tensor = self.tensors[name]
        if tensor.size > _LARGEST_READ:
            return None
        return [int(number) for number in tensor.read().ravel()]

    def is_zero(self, name: str) -> bool:
        """Say whether a tensor that is not large holds nothing but zeros."""
        tensor = self.tensors[name]
        return tensor.size <= BLOCK_VALUES and not tensor.read().any()

    def counted(self) -> Mapping[str, int]:
        """Return the tensors that a description should explain, with their sizes."""
        return {
            name: math.prod(tensor.shape)
            for name, tensor in self.tensors.items()
            if is_parameter(tensor) and tensor.size > 1
        }


def _name_of(record: Any) -> str:
    """Return the name of a tensor as the reader gives it."""
    return (record.Name() or b"").decode("utf-8", "surrogateescape")
