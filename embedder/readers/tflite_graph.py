"""The operators of a TFLite model: what they do with constants, and how their axes lie."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.checkpoint import Kind
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

_LSTM = ".WWWWWWWWBBBBBBBWB"

# One letter for each input. W, A, M, E, B, N, S, Q, I and . mean what they mean in
# `onnx_graph.LAYERS`; besides, the kernels of convolutions, which TFLite stores space before
# channels:
#   O out, space, in      D 1, space, out (depthwise)      V space, in, out    Y space, out, in
#   R right operand of a product, in × out                 L left operand
LAYERS = {
    "CONV_2D": ".OB",
    "DEPTHWISE_CONV_2D": ".DB",
    "TRANSPOSE_CONV": "IO.B",
    "CUSTOM:Convolution2DTransposeBias": ".OB",
    "CONV_3D": ".VB",
    "CONV_3D_TRANSPOSE": "IY.B",
    "FULLY_CONNECTED": ".WB",
    "BATCH_MATMUL": "LR",
    "EMBEDDING_LOOKUP": "IE",
    "EMBEDDING_LOOKUP_SPARSE": "IIIIE",
    "HASHTABLE_LOOKUP": "IIE",
    "GATHER": "EI",
    "GATHER_ND": "EI",
    "LSTM": _LSTM + "IINNNN",
    "UNIDIRECTIONAL_SEQUENCE_LSTM": _LSTM + "IINNNN",
    "BIDIRECTIONAL_SEQUENCE_LSTM": _LSTM + _LSTM[1:] + "IIII.WWWWWWWW",
    "RNN": ".WWBI",
    "UNIDIRECTIONAL_SEQUENCE_RNN": ".WWBI",
    "BIDIRECTIONAL_SEQUENCE_RNN": ".WWBIWWBI.WW",
    "SVDF": ".WWBI",
    "PRELU": ".N",
    "ADD": "AA",
    "SUB": "AA",
    "MUL": "MM",
    "DIV": "AM",
    "RESHAPE": ".I",
    "TRANSPOSE": ".I",
    "PAD": ".I",
    "PADV2": ".II",
    "MIRROR_PAD": ".I",
    "SLICE": ".II",
    "STRIDED_SLICE": ".III",
    "SPLIT": "I.",
    "SPLIT_V": ".II",
    "TILE": ".I",
    "BROADCAST_TO": ".I",
    "EXPAND_DIMS": ".I",
    "MEAN": ".I",
    "SUM": ".I",
    "REDUCE_MAX": ".I",
    "REDUCE_MIN": ".I",
    "REDUCE_PROD": ".I",
    "ARG_MAX": ".I",
    "ARG_MIN": ".I",
    "TOPK_V2": ".I",
    "RESIZE_BILINEAR": ".I",
    "RESIZE_NEAREST_NEIGHBOR": ".I",
    "SPACE_TO_BATCH_ND": ".II",
    "BATCH_TO_SPACE_ND": ".II",
    "ONE_HOT": ".III",
    "FILL": "II",
    "RANGE": "III",
    "REVERSE_V2": ".I",
    "CUMSUM": ".I",
    "ASSIGN_VARIABLE": "II",
    "IF": "I",
}
_BASIC_LSTM = "..WBI"

_SAME = frozenset(
    {
        "DEQUANTIZE",
        "QUANTIZE",
        "DENSIFY",
        "CAST",
        "CONCATENATION",
        "SLICE",
        "STRIDED_SLICE",
        "SPLIT",
        "SPLIT_V",
        "PAD",
        "PADV2",
        "NEG",
        "ABS",
        "SQRT",
        "RSQRT",
        "EXP",
        "SQUARE",
    }
)
_ELEMENTWISE = frozenset({"ADD", "SUB", "MUL", "DIV", "POW", "MAXIMUM", "MINIMUM"})
_RESHAPING = frozenset({"RESHAPE", "SQUEEZE", "EXPAND_DIMS"})


@dataclass(frozen=True, slots=True, eq=False)
class Operator:
    """What is known of an operator besides its type.

    Args:
        output_shape: Shape of its first output.
        options: Those of its options that say how a weight lies, by name.
    """

    output_shape: tuple[int, ...]
    options: dict[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class Operators:
    """Knows how operators treat the axes of constants.

    Args:
        numbers: Returns a small constant of whole numbers, None if a value is none.
    """

    numbers: Callable[[int], NDArray[Any] | None]

    def is_argument(self, node: Node, place: int) -> bool:
        """Whether an input is a shape, an index or the like."""
        return _letter(node, place) == "I"

    def through(self, node: Node, place: int, layout: Layout, shape: tuple[int, ...]) -> Layout:
        """Return how the axes of a constant of a shape lie behind a node."""
        if layout is None or node.op in _SAME:
            return layout
        wanted: tuple[int, ...] = node.source.output_shape
        if node.op in _ELEMENTWISE:
            return (NEW,) * (len(wanted) - len(layout)) + layout
        if node.op in _RESHAPING:
            return reshaped(layout, shape, wanted)
        if node.op == "TRANSPOSE" and len(node.inputs) > 1:
            order = self.numbers(node.inputs[1])
            return None if order is None else transposed(layout, np.ravel(order).tolist())
        return None


def role_in(node: Node, place: int, shape: tuple[int, ...], layout: Layout) -> Role | None:
    """Return what a node does with a constant of a shape; None if the node does not tell."""
    letter = _letter(node, place)
    if letter not in "WLROVYD":
        return plain_role(letter, shape)
    axes = len(shape) if layout is None else len(layout)
    options: dict[str, int] = node.source.options
    between = tuple(range(1, axes - 1))
    order: tuple[int, ...] = ()
    if letter == "O" and axes > 2:
        order = (0, axes - 1, *between)
    elif letter == "D" and axes > 2:
        order = (axes - 1, 0, *between)
    elif letter == "V" and axes > 2:
        order = (axes - 1, axes - 2, 0, *between[:-1])
    elif letter == "Y" and axes > 2:
        order = (axes - 2, axes - 1, 0, *between[:-1])
    elif (letter == "R" and not options.get("adj_y")) or (letter == "L" and options.get("adj_x")):
        order = swapped_last(axes)
    return Role(Kind.WEIGHT, order)


def _letter(node: Node, place: int) -> str:
    letters = LAYERS.get(node.op, "")
    if node.op == "LSTM" and len(node.inputs) <= len(_BASIC_LSTM):
        letters = _BASIC_LSTM
    return letters[place] if place < len(letters) else "."
