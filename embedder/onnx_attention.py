"""Rules for products of values in an ONNX graph, and the trail of what may be an attention."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from embedder.followed import Constant, Trail, Value
from embedder.onnx_norms import SAME, NormRules
from embedder.onnx_values import Known

if TYPE_CHECKING:
    import onnx

ACTIVATIONS = {
    **{"Relu": "relu", "LeakyRelu": "leaky_relu", "Tanh": "tanh", "Erf": "erf", "Sin": "sin"},
    **{"Sigmoid": "sigmoid", "Gelu": "gelu", "Softplus": "softplus", "Swish": "silu"},
    **{
        op: op.lower()
        for op in (
            *("HardSigmoid", "HardSwish", "Elu", "Selu", "Celu", "Mish", "Softsign", "Clip"),
            *("Exp", "Log", "Sqrt", "Reciprocal", "Floor", "Ceil", "Round", "Abs", "Sign", "Cos"),
            *("Softmax", "LogSoftmax", "Not", "IsNaN", "IsInf"),
        )
    },
}
NEAR = SAME | {"Neg"}
"""Operations that let units be, but for a sign."""

_MOVES = NEAR | frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"})
_MOVES |= frozenset({"QuantizeLinear", "DequantizeLinear", "Expand", "Tile"})
"""Operations that leave the channels of heads as they are, but for rounding."""
_TURNS = frozenset({"Add", "Sub", "Mul", "Div", "Slice", "Split", "Concat", "Pow", "Sqrt"})
_TURNS |= frozenset({"ReduceMean", "Reciprocal", "LayerNormalization", "RMSNormalization"})
_TURNS |= ACTIVATIONS.keys()
"""Operations by which queries and keys are turned by their position, normed or activated."""
_TURNING = NEAR | frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Shape"})
_TURNING |= frozenset({"MatMul", "Gemm", "Gather", "RMSNormalization"})
"""Operations for which it is the same whether units are rotated before or after."""
_SCORED = frozenset({"Where", "Max", "Min"})
"""Further operations on scores."""


class AttentionRules(NormRules):
    """Follows values that are multiplied with each other."""

    def trail(self, node: "onnx.NodeProto") -> Trail | None:
        """Return the trail of what a node gives, if its inputs have one and it can be followed."""
        terms = self.terms(node)
        values = [term for term in terms if isinstance(term, Value)]
        trails = [value.trail for value in values if value.trail is not None]
        if len({trail.maps for trail in trails}) != 1:
            return None
        trail, op = min(trails, key=lambda trail: trail.plain), node.op_type
        if len(trail.maps) == 2 and not trail.gated:
            return trail if op in _MOVES | _TURNS | _SCORED else None
        if self.leaves_channels(node, trail):
            return trail
        if trail.single is None or op not in _TURNS:
            return None
        added = op in ("Add", "Sub") and len(trails) < len(values)
        return None if added else Trail(trail.maps, plain=False)

    def use_trails(self, node: "onnx.NodeProto", result: Value) -> None:
        """Note where the trails of a node's inputs lead; asking for a shape leads nowhere."""
        for place in range(len(node.input)):
            value = self.value(node, place)
            if value.trail is not None and node.op_type not in ("Shape", "Size"):
                self.tracer.use_trail(value.trail, result)

    def touched_by(self, node: "onnx.NodeProto") -> set[int]:
        """Return the units that a node treats one by one: rotated ones would not stay rotated."""
        values = [self.value(node, place) for place in range(len(node.input))]
        return {
            label.units
            for value in values
            if value.labels and not self.turns_along(node, value)
            for label in value.labels.values()
        }

    def turns_along(self, node: "onnx.NodeProto", value: Value) -> bool:
        """Say whether a value that was rotated over its units gives a rotated result."""
        if node.op_type not in ("Add", "Sub"):
            return node.op_type in _TURNING
        others = self.terms(node)
        return all(_lies_along(other, place) for other in others for place in value.labels)

    def leaves_channels(self, node: "onnx.NodeProto", trail: Trail) -> bool:
        """Say whether a node moves channels, scales them alike or adds the bias of their map."""
        terms = self.terms(node)
        constants = [term for term in terms if isinstance(term, Constant)]
        if node.op_type in ("Mul", "Div"):
            factors = [t for t in terms if isinstance(t, Constant) or (t and t.trail is None)]
            divided = node.op_type == "Mul" or terms[-1] in factors
            single = all(math.prod(s or 0 for s in f.shape or (0,)) == 1 for f in factors)
            return divided and single and len(factors) == 1
        if node.op_type == "Add" and len(constants) == 1:
            bias = "" if trail.single is None else self.tracer.bias_of(trail.single)
            return constants[0].scalar == 0 or constants[0].name == bias
        return node.op_type in _MOVES

    def meeting(self, node: "onnx.NodeProto") -> Value:
        """Follow a product of two values: units on the last two axes are kept, heads meet."""
        one, other = (self.value(node, place) for place in range(2))
        for value in (one, other):
            self.tracer.keep(value, (-1, -2) if len(value.shape or (0, 0)) > 1 else None)
            self.tracer.fix(value)
        one, other = (value.without((-1, -2), value.shape) for value in (one, other))
        found = self.joined(node, (self.tracer.grouped(one, other), other), product=True)
        return replace(found, trail=self.trail_of_product(node))

    def trail_of_product(self, node: "onnx.NodeProto") -> Trail | None:
        """Return the trail of what heads score, or see; None if it is neither."""
        one, other = (self.value(node, place) for place in range(2))
        if one.trail is None or other.trail is None or not (one.shape and other.shape):
            return None
        channels = self.tracer.channels_of(other.trail.maps[0])
        scored = one.trail.single is not None
        met = (one.shape[-1], other.shape[-2]) if scored else other.shape[-1:]
        return one.trail.meeting(other.trail) if set(met) == {channels} else None

    def trail_of_gates(self, values: Sequence[Value]) -> Trail | None:
        """Return the trail of values that are multiplied, if they are a gate and a plain map."""
        trails = [value.trail for value in values if value.trail is not None]
        return trails[0].opening(trails[1]) if len(trails) == len(values) == 2 else None


def _lies_along(term: Known | None, place: int) -> bool:
    """Say whether a term of a sum has units of its own, or numbers for each, on an axis."""
    if isinstance(term, Value):
        return place in term.labels
    if term is None or term.scalar == 0:
        return term is not None
    return len(term.shape) >= -place and term.shape[place] > 1
