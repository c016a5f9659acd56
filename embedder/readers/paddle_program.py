"""The program beside a Paddle parameter file: which operation uses which parameter.

Two forms exist: a protobuf message (`.pdmodel`, Paddle 2) and a JSON file (Paddle 3). Both are
brought to one list of operations whose inputs stand in one order.

Source:
    paddle/fluid/framework/framework.proto for the message, the design notes of PIR serialisation
    in PaddlePaddle/docs for the JSON file.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from embedder.checkpoint import Kind
from embedder.errors import MalformedError
from embedder.readers.dataflow import (
    NEW,
    Layout,
    Node,
    Role,
    plain_role,
    reshaped,
    swapped_last,
    transposed,
)
from embedder.readers.protobuf import BYTES, FIXED32, VARINT, Range, fields, signed, varints

# Slots of an operation in the order that PIR gives its inputs, each with what it does: W, E, A, M,
# B, N, S, Q, I and . as in `onnx_graph.LAYERS`; T kernel of a transposed convolution; R and L right
# and left operand of a product; K the parameters of recurrent layers, in one list.
SLOTS: dict[str, dict[str, str]] = {
    **{
        op: {"Input": ".", "Filter": "W", "Bias": "B"}
        for op in ("conv2d", "depthwise_conv2d", "conv3d", "conv2d_fusion", "fused_conv2d_add_act")
    },
    **{
        op: {"Input": ".", "Filter": "T", "OutputSize": "I", "Bias": "B"}
        for op in ("conv2d_transpose", "depthwise_conv2d_transpose", "conv3d_transpose")
    },
    **{op: {"X": "L", "Y": "R"} for op in ("matmul_v2", "matmul", "mul", "bmm")},
    "fc": {"Input": ".", "W": "R", "Bias": "B"},
    "batch_norm": {"X": ".", "Mean": "S", "Variance": "S", "Scale": "N", "Bias": "N"},
    "sync_batch_norm": {"X": ".", "Mean": "S", "Variance": "S", "Scale": "N", "Bias": "N"},
    "layer_norm": {"X": ".", "Scale": "N", "Bias": "N"},
    "instance_norm": {"X": ".", "Scale": "N", "Bias": "N"},
    "group_norm": {"X": ".", "Scale": "N", "Bias": "N"},
    "rms_norm": {"x": ".", "bias": "B", "residual": ".", "norm_weight": "N", "norm_bias": "N"},
    "lookup_table_v2": {"Ids": "I", "W": "E"},
    "lookup_table": {"Ids": "I", "W": "E"},
    "prelu": {"X": ".", "Alpha": "N"},
    "rnn": {"Input": ".", "PreState": "I", "WeightList": "K"},
    "elementwise_add": {"X": "A", "Y": "A"},
    "elementwise_sub": {"X": "A", "Y": "A"},
    "elementwise_mul": {"X": "M", "Y": "M"},
    "elementwise_div": {"X": "A", "Y": "M"},
    "quantize_linear": {"X": ".", "Scale": "Q", "ZeroPoint": "Q"},
    "dequantize_linear": {"X": ".", "Scale": "Q", "ZeroPoint": "Q"},
    "reshape2": {"X": ".", "Shape": "I"},
}
"""Operation → slot → what it does."""

_SAME_OPERATION = {
    "add": "elementwise_add",
    "subtract": "elementwise_sub",
    "multiply": "elementwise_mul",
    "divide": "elementwise_div",
    "batch_norm_": "batch_norm",
    "sync_batch_norm_": "sync_batch_norm",
    "embedding": "lookup_table_v2",
    "reshape": "reshape2",
    "transpose": "transpose2",
    "squeeze": "squeeze2",
    "unsqueeze": "unsqueeze2",
    "flatten": "flatten_contiguous_range",
}
"""Name in PIR → name in the older programs."""

_KEEPS_AXES = frozenset(
    {
        "assign",
        "cast",
        "concat",
        "slice",
        "scale",
        "quantize_linear",
        "dequantize_linear",
        "share_data",
        "combine",
    }
)
_RESHAPING = frozenset({"reshape2", "squeeze2", "unsqueeze2", "flatten_contiguous_range"})
_ELEMENTWISE = frozenset({"elementwise_add", "elementwise_sub", "elementwise_mul"})
_TENSOR = 7  # VarType.LOD_TENSOR
_MOST_OPERATIONS = 200_000


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One operation of a program.

    Args:
        op: Its type, as programs of Paddle 2 name it.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        letters: What it does with each input.
        attributes: Its numbers and lists of numbers.
        output_shape: Shape of its first output, −1 where it is not known before.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    letters: str
    attributes: dict[str, Any]
    output_shape: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Program:
    """The parameters of a model, by name, and what is done with them."""

    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)


def read_message(content: bytes, location: object) -> Program:
    """Return the program in a protobuf message.

    Raises:
        MalformedError: It is none.
    """
    program = Program()
    shapes: dict[str, tuple[int, ...]] = {}
    for block in _inside(content, (0, len(content)), 1, location):
        for span in _inside(content, block, 3, location):
            _read_variable(content, span, location, program, shapes)
        for span in _inside(content, block, 4, location):
            if len(program.operations) >= _MOST_OPERATIONS:
                raise MalformedError(location, f"has more than {_MOST_OPERATIONS:,} operations")
            program.operations.append(_read_operation(content, span, location, shapes))
    return program


def _inside(content: bytes, span: Range, wanted: int, location: object) -> Iterator[Range]:
    for number, wire, value, _, stop in fields(content, span, location):
        if number == wanted and wire == BYTES:
            yield value, stop


def _text(content: bytes, span: Range, wanted: int, location: object) -> str:
    found = list(_inside(content, span, wanted, location))
    return content[slice(*found[-1])].decode("utf-8", "surrogateescape") if found else ""


def _read_variable(
    content: bytes,
    span: Range,
    location: object,
    program: Program,
    shapes: dict[str, tuple[int, ...]],
) -> None:
    name = _text(content, span, 1, location)
    numbers = {
        number: value
        for number, wire, value, _, _ in fields(content, span, location)
        if wire == VARINT
    }
    for kind in _inside(content, span, 2, location):
        is_tensor = any(
            number == 1 and value == _TENSOR
            for number, _, value, _, _ in fields(content, kind, location)
        )
        for described in _inside(content, kind, 3, location):
            for tensor in _inside(content, described, 1, location):
                shapes[name] = dims_of(content, tensor, location)
                if numbers.get(3) and is_tensor:
                    program.parameters[name] = shapes[name]


def dims_of(content: bytes, span: Range, location: object) -> tuple[int, ...]:
    """Return the shape in a TensorDesc message.

    Raises:
        MalformedError: It is none.
    """
    found: list[int] = []
    for number, wire, value, _, stop in fields(content, span, location):
        if number == 2 and wire == VARINT:
            found.append(signed(value))
        elif number == 2 and wire == BYTES:
            found += [signed(length) for length in varints(content, (value, stop), location)]
        if len(found) > 64:
            raise MalformedError(location, "holds a tensor of more than 64 axes")
    return tuple(found)


def _read_operation(
    content: bytes, span: Range, location: object, shapes: dict[str, tuple[int, ...]]
) -> Operation:
    op = _text(content, span, 3, location)
    slots = SLOTS.get(op, {})
    inputs: list[str] = []
    letters = ""
    for given in _inside(content, span, 1, location):
        letter = slots.get(_text(content, given, 1, location), ".")
        for name in _inside(content, given, 2, location):
            inputs.append(content[slice(*name)].decode("utf-8", "surrogateescape"))
            letters += letter
    outputs = tuple(
        content[slice(*name)].decode("utf-8", "surrogateescape")
        for given in _inside(content, span, 2, location)
        for name in _inside(content, given, 2, location)
    )
    attributes = dict(
        _read_attribute(content, given, location) for given in _inside(content, span, 4, location)
    )
    # Some operations give a copy of the shape first: the output whose shape is known counts.
    shape = next((shapes[name] for name in outputs if shapes.get(name)), ())
    return Operation(op, tuple(inputs), outputs, letters, attributes, shape)


def _read_attribute(content: bytes, span: Range, location: object) -> tuple[str, Any]:
    name, found = "", None
    many: list[int] = []
    for number, wire, value, _, stop in fields(content, span, location):
        if number == 1 and wire == BYTES:
            name = content[value:stop].decode("utf-8", "surrogateescape")
        elif number in (3, 10, 13) and wire == VARINT:
            found = signed(value)
        elif number == 4 and wire == FIXED32:
            found = struct.unpack("<f", struct.pack("<I", value))[0]
        elif number in (6, 15) and wire == VARINT:
            many.append(signed(value))
        elif number in (6, 15) and wire == BYTES:
            many += [signed(each) for each in varints(content, (value, stop), location)]
    return name, tuple(many) if many else found


def read_json(content: bytes, location: object) -> Program:
    """Return the program in a JSON file of Paddle 3.

    Raises:
        MalformedError: It is none.
    """
    program = Program()
    try:
        found = json.loads(content)
        for region in found["program"]["regions"]:
            for block in region["blocks"]:
                for operation in block["ops"]:
                    _read_json_operation(operation, program)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise MalformedError(location, f"is not a Paddle program ({error!r})") from error
    return program


def _read_json_operation(found: dict[str, Any], program: Program) -> None:
    if found["#"] == "p":
        output, name = found["O"], str(found["A"][3])
        program.parameters[name] = _json_shape(output)
        program.operations.append(
            Operation("parameter", (name,), (_json_name(output),), ".", {}, ())
        )
        return
    op = str(found["#"]).partition(".")[2]
    op = _SAME_OPERATION.get(op, op)
    outputs = found["O"] if isinstance(found["O"], list) else [found["O"]]
    attributes = {}
    for attribute in found.get("A", ()):
        value = attribute["AT"].get("D")
        if isinstance(value, list):
            value = tuple(each.get("D") if isinstance(each, dict) else each for each in value)
        attributes[str(attribute["N"])] = value
    program.operations.append(
        Operation(
            op,
            tuple(_json_name(given) for given in found["I"]),
            tuple(_json_name(output) for output in outputs),
            "".join(SLOTS.get(op, {}).values()),
            attributes,
            _json_shape(outputs[0]) if outputs else (),
        )
    )


def _json_name(value: dict[str, Any]) -> str:
    """Return the number of a value as a name; numbers are one number space of their own."""
    return f"%{int(value['%'])}"


def _json_shape(value: dict[str, Any]) -> tuple[int, ...]:
    kind = value.get("TT") or {}
    described = kind.get("D")
    if not isinstance(described, list) or len(described) < 2 or not isinstance(described[1], list):
        return ()
    return tuple(int(length) for length in described[1])


class Rules:
    """Knows how operations treat the axes of parameters."""

    def is_argument(self, node: Node, place: int) -> bool:
        """Whether an input is a shape, an index or a scale."""
        return _letter(node, place) in ("I", "Q")

    def through(self, node: Node, place: int, layout: Layout, shape: tuple[int, ...]) -> Layout:
        """Return how the axes of a parameter of a shape lie behind a node."""
        operation: Operation = node.source
        if layout is None or node.op in _KEEPS_AXES or node.op == "parameter":
            return layout
        if node.op == "transpose2":
            order = operation.attributes.get("axis") or operation.attributes.get("perm") or ()
            return transposed(layout, order)
        if node.op in _RESHAPING:
            return reshaped(layout, shape, operation.output_shape)
        if node.op in _ELEMENTWISE:
            return (NEW,) * (len(operation.output_shape) - len(layout)) + layout
        return None


def role_in(node: Node, place: int, shape: tuple[int, ...], layout: Layout) -> Role | None:
    """Return what a node does with a parameter of a shape; None if the node does not tell."""
    letter = _letter(node, place)
    axes = len(shape) if layout is None else len(layout)
    attributes = node.source.attributes
    if letter == "K":
        return Role(Kind.WEIGHT if len(shape) > 1 else Kind.BIAS)
    if letter not in ("W", "T", "R", "L"):
        return plain_role(letter, shape)
    order: tuple[int, ...] = ()
    if letter == "T" and axes >= 2 and attributes.get("groups", 1) in (1, None):
        order = (1, 0, *range(2, axes))
    turned = _is_turned(attributes, "y" if letter == "R" else "x")
    if (letter == "R" and not turned) or (letter == "L" and turned):
        order = swapped_last(axes)
    return Role(Kind.WEIGHT, order)


def _is_turned(attributes: dict[str, Any], operand: str) -> bool:
    names = (f"trans_{operand}", f"transpose_{operand}", f"transpose_{operand.upper()}")
    return any(bool(attributes.get(name)) for name in names)


def _letter(node: Node, place: int) -> str:
    letters: str = node.source.letters
    return letters[place] if place < len(letters) else "."
