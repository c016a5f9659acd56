"""The scales of quantised ONNX tensors, found in the graph.

A quantised weight is an integer tensor; its scale is another constant, tied to it by the nodes
between them and by nothing else. Four ties are known: `DequantizeLinear`; a cast followed by a
product; an operation that takes both; and an integer product whose result is multiplied by the
scales of both of its operands.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.checkpoint import Tensor, tensor_of
from embedder.encoding import Affine, Encoding, Nibbles, Plain, Values
from embedder.readers.dataflow import ABSENT, NEW, Layout, Node, Use
from embedder.readers.onnx_graph import Evaluator, attribute_of

DIRECT: dict[str, dict[int, tuple[int, int, int]]] = {
    "QLinearConv": {3: (4, 5, 0)},
    "QLinearMatMul": {0: (1, 2, -2), 3: (4, 5, -1)},
    "QGemm": {3: (4, 5, -1)},
    "QAttention": {1: (4, 7, -1)},
    "DynamicQuantizeMatMul": {1: (2, 3, -1)},
    "MatMulIntegerToFloat": {0: (2, 4, -2), 1: (3, 5, -1)},
    "DynamicQuantizeLSTM": {1: (8, 9, 0), 2: (10, 11, 0)},
    "QEmbedLayerNormalization": {
        2: (8, 13, -1),
        3: (9, 14, -1),
        4: (10, 15, -1),
        5: (11, 16, -1),
        6: (12, 17, -1),
    },
}
"""Operation → place of a quantised input → places of its scale and zero point, and the axis that
they run along if there are several."""

_BIASES = {"QLinearConv": {8: (1, 4)}, "QGemm": {6: (1, 4)}}
"""Operation → place of a 32-bit offset → places of the two scales whose product is its scale."""

_INTEGER_PRODUCTS = {"MatMulInteger": -1, "ConvInteger": 0}
"""Operation → the axis of its weight that a scale for each output runs along."""

_BETWEEN = frozenset(
    {"Cast", "Add", "Sub", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity"}
)
"""What may stand between an integer product and the product with its scales."""

_MOST_NODES_BETWEEN = 64
_INTEGERS = frozenset({"U8", "I8", "U16", "I16", "I32", "UINT4", "INT4"})


@dataclass(frozen=True, slots=True, eq=False)
class Blockwise:
    """Numbers with a scale for each block of neighbours, read along with them.

    The scales of a large model take hundreds of megabytes, so they stay in the file too.

    Args:
        numbers: How the stored numbers are encoded.
        shape: Shape of the tensor in stored order.
        scale: The scales, with as many axes; each holds for `block[axis]` places of an axis.
        block: How many places share a scale, for each axis.
        zero: Zero points, laid out as the scales are; `middle` where there are none.
        middle: The zero point of all.
    """

    numbers: Encoding
    shape: tuple[int, ...]
    scale: Tensor
    block: tuple[int, ...]
    zero: Tensor | None = None
    middle: float = 0.0

    @property
    def name(self) -> str:
        """The stored type and the word scaled."""
        return f"{self.numbers.name} scaled"

    @property
    def quantised(self) -> bool:
        """Always: the values lie on a lattice."""
        return True

    @property
    def unit_values(self) -> int:
        """As the stored numbers."""
        return self.numbers.unit_values

    @property
    def unit_bytes(self) -> int:
        """As the stored numbers."""
        return self.numbers.unit_bytes

    def decode(self, raw: bytes | memoryview, first: int) -> Values:
        """Return scale · (stored − zero) for values `first` and on."""
        numbers = np.array(self.numbers.decode(raw, first), np.float32)
        size = int(np.prod(self.shape, dtype=np.int64))
        # A unit of two may reach beyond the last value: what stands there is of no matter.
        places = np.minimum(np.arange(first, first + numbers.size), size - 1)
        places = np.stack(np.unravel_index(places, self.shape)) // np.array(self.block)[:, None]
        zero = self.middle if self.zero is None else _at(self.zero, places)
        return (numbers - zero) * _at(self.scale, places)


def _at(tensor: Tensor, places: NDArray[np.intp]) -> Values:
    """Return a tensor's values at some places, reading only the rows that they lie in."""
    low, high = int(places[0].min()), int(places[0].max()) + 1
    row = tensor.size // tensor.shape[0]
    unit, width = tensor.encoding.unit_values, tensor.encoding.unit_bytes
    first, last = low * row // unit, -(-high * row // unit)
    values = tensor.encoding.decode(tensor.storage.read(first * width, last * width), first * unit)
    flat = np.ravel_multi_index(
        tuple(places - np.array([low] + [0] * (len(tensor.shape) - 1))[:, None]),
        (high - low, *tensor.shape[1:]),
    )
    return np.asarray(values[flat + low * row - first * unit])


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """A tensor as it is once its scales are applied."""

    encoding: Encoding
    shape: tuple[int, ...]


@dataclass(eq=False)
class Scales:
    """Finds the scales of quantised constants.

    Args:
        evaluator: Computes what the scales are.
    """

    evaluator: Evaluator
    found: set[int] = field(default_factory=set)
    """The constants that turned out to be scales."""

    def of(self, tensor: Tensor, uses: list[Use]) -> Scaling | None:
        """Return how a constant is scaled where it is used, None if the graph does not say."""
        if tensor.encoding.name not in _INTEGERS and not tensor.encoding.name.startswith("F8"):
            return None
        for use in uses:
            tie = self._tie(use)
            if tie is not None:
                return tie(tensor, use)
        return self._multiplied(tensor, uses)

    def _tie(self, use: Use) -> Callable[[Tensor, Use], Scaling | None] | None:
        """Return what finds the scale where a node takes a quantised value at a place."""
        op, place = use.node.op, use.place
        if op == "DequantizeLinear" and place == 0:
            return self._dequantised
        if place in DIRECT.get(op, {}):
            return self._direct
        if place in _BIASES.get(op, {}):
            return self._bias
        if op in _INTEGER_PRODUCTS and place == 1:
            return self._product
        if op == "MatMulNBits" and place == 1:
            return self._nbits
        if op == "GatherBlockQuantized" and place == 0:
            return self._looked_up
        return None

    def _multiplied(self, tensor: Tensor, uses: list[Use]) -> Scaling | None:
        """Find a cast to float, perhaps a difference, and a product with a constant."""
        if tensor.encoding.name == "I32":
            return None  # shapes and positions are computed with so
        was_cast = False
        zero: NDArray[Any] | None = None
        for use in uses:
            was_cast = was_cast or use.node.op == "Cast"
            if not was_cast or use.last:
                continue
            if use.node.op == "Sub" and use.place == 0:
                zero = self._value(use.node, 1)
                self._note(use.node, 1)
            if use.node.op == "Mul":
                scale = self._value(use.node, 1 - use.place)
                self._note(use.node, 1 - use.place)
                return None if scale is None else self._spread(tensor, use.layout, scale, zero)
        return None

    def _value(self, node: Node, place: int) -> NDArray[Any] | None:
        """Return the constant that a node has at a place."""
        if place >= len(node.inputs) or node.inputs[place] == ABSENT:
            return None
        return self.evaluator.value(node.inputs[place])

    def _note(self, node: Node, *places: int) -> None:
        self.found.update(
            node.inputs[place]
            for place in places
            if place < len(node.inputs) and node.inputs[place] in self.evaluator.constants
        )

    def _dequantised(self, tensor: Tensor, use: Use) -> Scaling | None:
        scale, zero = self._value(use.node, 1), self._value(use.node, 2)
        axis = attribute_of(use.node, "axis", 1)
        if scale is not None and scale.ndim > 1:
            return self._blocks(tensor, use, 1, 2, axis)
        return self._along(tensor, use.layout, axis, scale, zero)

    def _looked_up(self, tensor: Tensor, use: Use) -> Scaling | None:
        return self._blocks(tensor, use, 2, 3, attribute_of(use.node, "quantize_axis", 1))

    def _direct(self, tensor: Tensor, use: Use) -> Scaling | None:
        scale_place, zero_place, axis = DIRECT[use.node.op][use.place]
        scale, zero = self._value(use.node, scale_place), self._value(use.node, zero_place)
        if use.node.op == "QGemm" and attribute_of(use.node, "transB", 0):
            axis = 0
        if scale is not None and scale.ndim == 2 and len(tensor.shape) == 3:
            # DynamicQuantizeLSTM with a scale for each direction and gate.
            spread = None if zero is None else zero.reshape(len(zero), 1, -1)
            return self._spread(tensor, use.layout, scale.reshape(len(scale), 1, -1), spread)
        return self._along(tensor, use.layout, axis, scale, zero)

    def _bias(self, tensor: Tensor, use: Use) -> Scaling | None:
        one, other = (self._value(use.node, place) for place in _BIASES[use.node.op][use.place])
        if one is None or other is None:
            return None
        return self._along(tensor, use.layout, 0, (one * other).reshape(-1), None)

    def _product(self, tensor: Tensor, use: Use) -> Scaling | None:
        scale = self._scale_behind(use.node)
        if scale is None:
            return None
        axis = _INTEGER_PRODUCTS[use.node.op]
        return self._along(tensor, use.layout, axis, scale, self._value(use.node, 3))

    def _scale_behind(self, node: Node) -> NDArray[Any] | None:
        """Return the constant part of what the result of an integer product is multiplied by."""
        flow = self.evaluator.graph.flow
        of_input = self._scales_of_input(node)
        waiting = deque(node.outputs[:1])
        for _ in range(_MOST_NODES_BETWEEN):
            if not waiting:
                return None
            for consumer, place in flow.consumers.get(waiting.popleft(), ()):
                if consumer.op in _BETWEEN:
                    waiting.extend(consumer.outputs[:1])
                if consumer.op != "Mul" or len(consumer.inputs) != 2:
                    continue
                factors = self._factors(consumer.inputs[1 - place])
                others = [factor for factor in factors if factor not in of_input]
                found = [self.evaluator.value(other) for other in others]
                known = [values for values in found if values is not None]
                if known:
                    self.found.update(set(others) & set(self.evaluator.constants))
                    return np.asarray(np.prod(np.broadcast_arrays(*known), axis=0))
                if len(others) < len(factors):  # by the input's scale only; the other follows
                    waiting.extend(consumer.outputs[:1])
        return None

    def _scales_of_input(self, node: Node) -> tuple[int, ...]:
        """Return the scale that the other operand of an integer product was quantised with."""
        quantiser = self.evaluator.graph.flow.producers.get(node.inputs[0])
        if quantiser is None or quantiser.op not in ("QuantizeLinear", "DynamicQuantizeLinear"):
            return ()
        is_static = quantiser.op == "QuantizeLinear"
        return quantiser.inputs[1:2] if is_static else quantiser.outputs[1:2]

    def _factors(self, value: int) -> list[int]:
        """Return the values that a value is the product of."""
        flow = self.evaluator.graph.flow
        found, waiting = [], deque([value])
        for _ in range(_MOST_NODES_BETWEEN):
            if not waiting:
                break
            value = waiting.popleft()
            producer = flow.producers.get(value)
            if value not in flow.static and producer is not None and producer.op == "Mul":
                waiting.extend(producer.inputs)
            elif (
                value not in flow.static
                and producer is not None
                and producer.op in _BETWEEN - {"Add", "Sub"}
            ):
                waiting.extend(producer.inputs[:1])
            else:
                found.append(value)
        return found

    def _along(
        self,
        tensor: Tensor,
        layout: Layout,
        axis: int,
        scale: NDArray[Any] | None,
        zero: NDArray[Any] | None,
    ) -> Scaling | None:
        """Apply scales that run along one axis of the value as a node sees it."""
        if scale is None or not scale.size:
            return None
        count = max(scale.size, 1 if zero is None else zero.size)
        if count == 1:
            return self._affine(tensor, scale, zero, 0)
        if layout is None or not layout or scale.size not in (1, count):
            return None
        stored = layout[axis % len(layout)]
        if stored == NEW or tensor.shape[stored] != count:
            return None
        return self._affine(tensor, scale, zero, stored)

    def _spread(
        self,
        tensor: Tensor,
        layout: Layout,
        scale: NDArray[Any],
        zero: NDArray[Any] | None,
    ) -> Scaling | None:
        """Apply scales that are spread over the value as numpy does it."""
        if scale.size == 1 and (zero is None or zero.size == 1):
            return self._affine(tensor, scale, zero, 0)
        if layout is None or scale.ndim > len(layout):
            return None
        wide = (1,) * (len(layout) - scale.ndim) + scale.shape
        runs = [axis for axis, length in enumerate(wide) if length > 1]
        if len(runs) == 1:
            return self._along(tensor, layout, runs[0], scale, zero)
        fits = len(wide) == len(tensor.shape) and all(
            length in (1, whole) for length, whole in zip(wide, tensor.shape, strict=True)
        )
        if layout != tuple(range(len(tensor.shape))) or not fits:
            return None
        block = tuple(
            whole if length == 1 else 1 for length, whole in zip(wide, tensor.shape, strict=True)
        )
        scales = tensor_of("scale", scale.reshape(wide).astype(np.float32))
        zeros = None
        if zero is not None:
            if zero.size not in (1, scale.size):
                return None
            spread = np.broadcast_to(zero.reshape(-1), (scale.size,)).reshape(wide)
            zeros = tensor_of("zero", spread.astype(np.float32))
        encoding = Blockwise(tensor.encoding, tensor.shape, scales, block, zeros)
        return Scaling(encoding, tensor.shape)

    def _affine(
        self, tensor: Tensor, scale: NDArray[Any], zero: NDArray[Any] | None, axis: int
    ) -> Scaling | None:
        scales = scale.reshape(-1).astype(np.float32)
        zeros = np.zeros(1, np.float32) if zero is None else zero.reshape(-1).astype(np.float32)
        if zeros.size not in (1, scales.size) and scales.size != 1:
            return None
        encoding = tensor.encoding
        affine = Affine(encoding.name, tensor.shape, scales, zeros, axis)
        if isinstance(encoding, Nibbles):
            packed = Nibbles(f"{encoding.name} scaled", encoding.levels, affine)
            return Scaling(packed, tensor.shape)
        return Scaling(affine, tensor.shape)

    def _blocks(
        self, tensor: Tensor, use: Use, scale_place: int, zero_place: int, axis: int
    ) -> Scaling | None:
        """Apply a scale for each block along one axis, as DequantizeLinear has it."""
        constants = self.evaluator.constants
        node, axes = use.node, len(tensor.shape)
        scale = constants.get(node.inputs[scale_place])
        size = attribute_of(node, "block_size", 0)
        if scale is None or size <= 0 or use.layout != tuple(range(axes)) or not tensor.size:
            return None
        axis %= axes
        block = tuple(size if place == axis else 1 for place in range(axes))
        wanted = tuple(-(-length // run) for length, run in zip(tensor.shape, block, strict=True))
        zero = constants.get(node.inputs[zero_place]) if zero_place < len(node.inputs) else None
        if scale.shape != wanted or (zero is not None and zero.shape != wanted):
            return None
        self._note(node, scale_place, zero_place)
        encoding = Blockwise(tensor.encoding, tensor.shape, scale, block, zero)
        return Scaling(encoding, tensor.shape)

    def _nbits(self, tensor: Tensor, use: Use) -> Scaling | None:
        """Apply the scales of MatMulNBits: blocks along each row of a packed matrix."""
        node, constants = use.node, self.evaluator.constants
        rows, row = attribute_of(node, "N", 0), attribute_of(node, "K", 0)
        bits, size = attribute_of(node, "bits", 4), attribute_of(node, "block_size", 0)
        reordered = len(node.inputs) > 4 and node.inputs[4] != ABSENT
        if bits not in (4, 8) or min(rows, row, size) < 1 or row % size or reordered:
            return None
        blocks = row // size
        scale = constants.get(node.inputs[2])
        if scale is None or scale.size != rows * blocks or tensor.size * 8 != rows * row * bits:
            return None
        levels = np.arange(16, dtype=np.float32)
        numbers: Encoding = Nibbles("UINT4", levels) if bits == 4 else Plain("U8")
        zero = self._packed_zeros(node, rows, blocks, numbers)
        self._note(node, 2, 3)
        encoding = Blockwise(
            numbers,
            (rows, row),
            _reshaped(scale, (rows, blocks)),
            (1, size),
            zero,
            float(1 << bits - 1),
        )
        return Scaling(encoding, (rows, row))

    def _packed_zeros(self, node: Node, rows: int, blocks: int, numbers: Encoding) -> Tensor | None:
        zero = self.evaluator.constants.get(node.inputs[3]) if len(node.inputs) > 3 else None
        if zero is None:
            return None
        if zero.size == rows * blocks and zero.encoding.name != "U8":
            return _reshaped(zero, (rows, blocks))
        # Each row begins with a byte of its own.
        width = -(-blocks // numbers.unit_values) * numbers.unit_values
        if zero.storage.size_bytes * numbers.unit_values != rows * width:
            return None
        return Tensor(zero.name, (rows, width), numbers, zero.storage)


def _reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return Tensor(tensor.name, shape, tensor.encoding, tensor.storage)
