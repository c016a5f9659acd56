"""The architecture of a TFLite model, from its graph.

Channels lie last in everything that is computed, and in the order of the reader's tensors in what
is described. Where values are stored on a lattice, as in quantised models, one step of it holds for
all channels, so that none may be scaled.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import replace

from embedder.architecture import Architecture
from embedder.checkpoint import Checkpoint
from embedder.errors import ArchitectureError
from embedder.followed import Constant, Label, Value
from embedder.tflite_axes import AxisRules
from embedder.tflite_values import Known, Model, Node
from embedder.units import Gauge

_ACTIVATIONS = {
    **{"RELU": "relu", "LEAKY_RELU": "leaky_relu", "TANH": "tanh", "SIN": "sin"},
    **{"LOGISTIC": "sigmoid", "HARD_SWISH": "hardswish", "GELU": "gelu", "ELU": "elu"},
    **{
        op: op.lower()
        for op in (
            *("RELU6", "RELU_N1_TO_1", "RELU_0_TO_1", "SOFTMAX", "LOG_SOFTMAX", "EXP", "LOG"),
            *("SQRT", "RSQRT", "SQUARE", "ABS", "SIGN", "COS", "FLOOR", "CEIL", "ROUND"),
            *("L2_NORMALIZATION", "LOGICAL_NOT"),
        )
    },
}
_FUSED = {1: "relu", 2: "relu_n1_to_1", 3: "relu6", 4: "tanh", 5: "sign_bit"}
_HOLDS_ACTIVATION = {
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "TRANSPOSE_CONV": "TransposeConvOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "ADD": "AddOptions",
    "SUB": "SubOptions",
    "MUL": "MulOptions",
    "DIV": "DivOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "CONCATENATION": "ConcatenationOptions",
    "L2_NORMALIZATION": "L2NormOptions",
}
_SAME = frozenset({"DEQUANTIZE", "QUANTIZE", "DENSIFY", "CAST", "NEG", "FAKE_QUANT"})
_POOLS = frozenset({"AVERAGE_POOL_2D", "MAX_POOL_2D"})
_SUMS = frozenset({"ADD", "SUB", "ADD_N", "MAXIMUM", "MINIMUM", "SELECT", "SELECT_V2"})
_PRODUCTS = frozenset(
    {"MUL", "DIV", "POW", "FLOOR_DIV", "FLOOR_MOD", "SQUARED_DIFFERENCE", "LOGICAL_AND"}
    | {"LOGICAL_OR", "EQUAL", "NOT_EQUAL", "GREATER", "GREATER_EQUAL", "LESS", "LESS_EQUAL"}
)
_KEPT = frozenset(
    {"ARG_MAX", "ARG_MIN", "TOPK_V2", "GATHER_ND", "ONE_HOT", "CUMSUM", "WHERE", "REVERSE_V2"}
    | {"DEPTH_TO_SPACE", "SPACE_TO_DEPTH", "PACK", "UNPACK", "NON_MAX_SUPPRESSION_V4"}
    | {"NON_MAX_SUPPRESSION_V5", "CUSTOM:TransformTensorBilinear", "CUSTOM:TransformLandmarks"}
    | {"CUSTOM:Landmarks2TransformMatrix", "CUSTOM:TFLite_Detection_PostProcess"}
)
"""Operations after which units are not followed."""

# What the flatbuffers package raises when an offset in the file leads nowhere.
_STUMBLES = (struct.error, IndexError, ValueError, TypeError, OverflowError, AttributeError)


def describe_tflite(checkpoint: Checkpoint) -> Architecture:
    """Return what a TFLite model is made of.

    Args:
        checkpoint: The open model. Its tensors are not read, but for those of a few values.

    Raises:
        ArchitectureError: An operator cannot be followed; it is named. Or the file is damaged
            where only its operators' options are.
    """
    try:
        model = Model(checkpoint)
        outputs = _Walk(model, 0).run()
        for value in outputs:
            if isinstance(value, Value):
                model.tracer.keep(value)
    except ArchitectureError:
        raise
    except _STUMBLES as error:
        raise ArchitectureError(
            f"the graph cannot be read ({error}); get the file again"
        ) from error
    return _finished(model)


def _finished(model: Model) -> Architecture:
    """Return the description, and how much of the model it explains."""
    built = model.tracer.finish("graph")
    if all(group.gauge == Gauge.NAMED for group in built.groups.values()):
        raise ArchitectureError("the graph has no hidden units that could be followed")
    counted = model.counted()
    left = sorted(set(counted) - set(built.axes))
    share = sum(counted.get(name, 0) for name in built.axes) / max(sum(counted.values()), 1)
    return replace(built, confidence=share, unexplained=tuple(left))


class _Walk(AxisRules):
    """Goes through the operators of a graph and tells a tracer what they do."""

    def rules(self) -> dict[str, Callable[[Node], Known]]:
        """Return operation → rule."""
        return {
            **self.axis_rules(),
            **dict.fromkeys(_ACTIVATIONS, self.activation),
            **dict.fromkeys(_SAME, self.same),
            **dict.fromkeys(_POOLS, self.pool),
            **dict.fromkeys(_SUMS, self.sum),
            **dict.fromkeys(_PRODUCTS, self.product),
            **dict.fromkeys(_KEPT, self.kept),
            **dict.fromkeys(("SHAPE", "RANK"), self.nothing),
            "CONV_2D": self.convolution,
            "TRANSPOSE_CONV": self.transposed_convolution,
            "CUSTOM:Convolution2DTransposeBias": self.convolution,
            "DEPTHWISE_CONV_2D": self.depthwise,
            "FULLY_CONNECTED": self.dense,
            "BATCH_MATMUL": self.matmul,
            "PRELU": self.slope,
            "VAR_HANDLE": self.handle,
            "READ_VARIABLE": self.read_state,
            "ASSIGN_VARIABLE": self.write_state,
            "CALL_ONCE": self.call_once,
            "IF": self.choice,
        }

    def run(self) -> list[Known]:
        """Walk the graph; return what it gives."""
        if self.place in self.model.walked:
            raise ArchitectureError("a part of the graph is called twice")
        self.model.walked.add(self.place)
        rules = self.rules()
        for node in self.nodes():
            try:
                found = self.follow(node, rules)
            except ArchitectureError as error:
                raise ArchitectureError(f"{self.words(node)}: {error}") from error
            if isinstance(found, Value) and node.op != "IF":  # whose parts use what it is given
                known = (self.input(node, at) for at in range(len(node.inputs)))
                self.tracer.use(one.name for one in known if isinstance(one, Constant))
            for number in node.outputs:
                if isinstance(found, Value) and len(node.outputs) > 1:
                    found = replace(found, shape=self.size(number))
                if isinstance(found, Value) and self.is_quantised(number):
                    self.tracer.fix(found)
                self.known[number] = found
        return [self.at(number) for number in self.ends(outputs=True)]

    def words(self, node: Node) -> str:
        """Return what to call a node in an error."""
        return f"{node.op} {self.name(node)}".strip()

    def follow(self, node: Node, rules: Mapping[str, Callable[[Node], Known]]) -> Known:
        """Return what a node gives."""
        rule = rules.get(node.op)
        if rule is None:
            inputs = self.terms(node)
            labelled = any(isinstance(known, Value) and known.labels for known in inputs)
            if labelled or any(map(_is_weight, inputs)):
                raise ArchitectureError("the operation cannot be followed")
            return self.nothing(node)
        found = rule(node)
        fused = 0
        if node.op in _HOLDS_ACTIVATION:
            table = _HOLDS_ACTIVATION[node.op]
            fused = self.model.option(node, table, "FusedActivationFunction")
        if fused and isinstance(found, Value):
            return self.tracer.activate(found, _FUSED.get(fused, "unknown"))
        return found

    # -------------------------------------------------------------- layers

    def convolution(self, node: Node) -> Known:
        """Follow a convolution whose kernel lies as out × space × in."""
        return self.convolved(node, self.value(node))

    def transposed_convolution(self, node: Node) -> Known:
        """Follow a transposed convolution, which reads the size of its output first."""
        return self.convolved(node, self.value(node, 2), bias_at=3)

    def convolved(self, node: Node, value: Value, *, bias_at: int = 2) -> Known:
        """Follow a convolution of a value."""
        weight, bias = self.constant(node, 1), self.constant(node, bias_at)
        if weight is None or (bias is None and self.input(node, bias_at) is not None):
            return self.kept(node)
        into = weight.shape[-1]
        if len(weight.shape) != 4 or (value.shape and value.shape[-1] != into):
            return self.kept(node)  # in groups
        self.tracer.keep(value, [place for place in value.labels if place != -1])
        units, step = self.tracer.linear(value, weight, read=3, written=0, at=-1, bias=bias)
        return Value({-1: Label(units)}, self.shape(node), step)

    def depthwise(self, node: Node) -> Known:
        """Follow a depthwise convolution with one kernel, 1 × space × units, for each unit."""
        value, weight, bias = self.value(node), self.constant(node, 1), self.constant(node, 2)
        label = value.labels.get(-1)
        if weight is None or label is None or len(weight.shape) != 4:
            return self.kept(node)
        if not label.whole or weight.shape[3] != self.tracer.size(label):
            return self.kept(node)
        if bias is None and self.input(node, 2) is not None:
            return self.kept(node)
        self.tracer.keep(value, [place for place in value.labels if place != -1])
        order = (3, 0, 1, 2)
        turned = Constant(
            weight.name,
            tuple(weight.shape[axis] for axis in order),
            tuple(weight.stored[axis] for axis in order),
        )
        units, step = self.tracer.unitwise(value, turned, at=-1, bias=bias)
        return Value({-1: Label(units)}, self.shape(node), step)

    def dense(self, node: Node) -> Known:
        """Follow a matrix, out × in, over the last axis of a value or over all but the first."""
        if self.model.option(node, "FullyConnectedOptions", "WeightsFormat"):
            raise ArchitectureError("its weights are stored shuffled")
        value, weight, bias = self.value(node), self.constant(node, 1), self.constant(node, 2)
        if weight is None or len(weight.shape) != 2:
            return self.kept(node)
        if bias is None and self.input(node, 2) is not None:
            return self.kept(node)
        if value.shape is None or value.shape[-1] != weight.shape[1]:
            value = self.reshaped(value, (None, weight.shape[1]))
        units, step = self.tracer.linear(value, weight, read=1, written=0, at=-1, bias=bias)
        shape = self.shape(node)
        others = {place: label for place, label in value.labels.items() if place != -1}
        if bias is not None:
            self.tracer.fix(Value(others))
        if others and (shape is None or value.shape is None or len(shape) != len(value.shape)):
            self.tracer.keep(Value(others))
            others = {}
        return Value({**others, -1: Label(units)}, shape, step)

    def matmul(self, node: Node) -> Known:
        """Follow a product with a matrix of the model, in × out; other products keep units."""
        value, weight = self.value(node), self.constant(node, 1)
        if weight is None or len(weight.shape) != 2 or isinstance(self.input(node, 0), Constant):
            return self.kept(node)
        adjoint = [self.model.option(node, "BatchMatMulOptions", f) for f in ("AdjX", "AdjY")]
        if adjoint[0]:
            return self.kept(node)
        read, written = (1, 0) if adjoint[1] else (0, 1)
        units, step = self.tracer.linear(value, weight, read=read, written=written, at=-1)
        labels = {place: label for place, label in value.labels.items() if place != -1}
        return Value({**labels, -1: Label(units)}, self.shape(node), step)

    # -------------------------------------------------------------- each element

    def activation(self, node: Node) -> Known:
        """Follow a function of each element, or one over units that knows no order."""
        return self.tracer.activate(self.value(node), _ACTIVATIONS[node.op])

    def slope(self, node: Node) -> Known:
        """Follow a leaky ReLU with a slope for each unit."""
        slopes = self.constant(node, 1)
        if slopes is None:
            return self.kept(node)
        found = self.tracer.activate(self.value(node), "prelu")
        self.tracer.along(found, slopes, power=0)
        return found

    def same(self, node: Node) -> Known:
        """Follow what changes no unit."""
        found = self.input(node, 0)
        return replace(found, fresh=None) if isinstance(found, Value) else found or Value()

    def sum(self, node: Node) -> Known:
        """Follow what lets a common scale through: sums, maxima, choices."""
        terms = self.terms(node)
        values = [term for term in terms if isinstance(term, Value)]
        if node.op.startswith("SELECT"):
            self.tracer.fix(self.value(node))
        found = Value(self.tracer.joined(values), self.shape(node))
        if not node.op.startswith(("ADD", "SUB")):
            self.tracer.fix(found, scale=False)
        for term in terms:
            if isinstance(term, Constant):
                self.tracer.along(found, term, power=1)
        return found

    def product(self, node: Node) -> Known:
        """Follow a product, or what is like it: scales of units that meet are lost."""
        terms = self.terms(node)
        values = [term for term in terms if isinstance(term, Value)]
        by_units = isinstance(terms[-1], Value) and bool(terms[-1].labels)
        linear = node.op == "MUL" or (node.op == "DIV" and not by_units)
        if not linear or sum(bool(value.labels) for value in values) > 1:
            for value in values:
                self.tracer.fix(value)
        found = Value(self.tracer.joined(values, product=True), self.shape(node))
        for term in terms:
            if isinstance(term, Constant):
                self.tracer.along(found, term, power=0)
        return found

    # -------------------------------------------------------------- states and choices

    def handle(self, node: Node) -> Known:
        """Note which state a value stands for."""
        name = self.model.option(node, "VarHandleOptions", "SharedName") or b""
        self.handles.update(dict.fromkeys(node.outputs, name))
        return Value()

    def state(self, node: Node, size: int | None) -> Label | None:
        """Return the units on the last axis of a state that is kept between calls."""
        name = self.handles.get(node.inputs[0], b"") if node.inputs else b""
        if not name or size is None:
            return None
        states = self.model.states
        if name not in states:
            states[name] = Label(self.tracer.new_units(size))
        label = states[name]
        if self.tracer.size(label) != size:
            raise ArchitectureError(f"a state of {self.tracer.size(label)} units has {size}")
        return label

    def read_state(self, node: Node) -> Known:
        """Follow what is read from a state."""
        shape = self.shape(node)
        label = self.state(node, shape[-1] if shape else None)
        return Value({} if label is None else {-1: label}, shape)

    def write_state(self, node: Node) -> Known:
        """Follow what is put into a state: its units are those that are read from it."""
        found, shape = self.input(node, 1), getattr(self.input(node, 1), "shape", None)
        label = self.state(node, shape[-1] if shape else None)
        value = found if isinstance(found, Value) else Value()
        written = value.labels.get(-1)
        if label is None:
            self.tracer.keep(value)
        elif isinstance(found, Constant) and self.model.is_zero(found.name):
            pass  # a state of zeros is the same for all units
        elif written is None or not written.whole:
            self.tracer.keep(Value({**value.labels, 0: label}))
        else:
            self.tracer.keep(value, [place for place in value.labels if place != -1])
            self.tracer.join(written.units, label.units)
        return Value()

    def call_once(self, node: Node) -> Known:
        """Follow what sets the states at the start."""
        _Walk(
            self.model, int(self.model.option(node, "CallOnceOptions", "InitSubgraphIndex"))
        ).run()
        return Value()

    def choice(self, node: Node) -> Known:
        """Follow one of two graphs: what they give has the same units."""
        self.tracer.keep(self.value(node))
        given = [self.input(node, place) or Value() for place in range(1, len(node.inputs))]
        found: list[Value] = []
        for field in ("ThenSubgraphIndex", "ElseSubgraphIndex"):
            walk = _Walk(self.model, int(self.model.option(node, "IfOptions", field)))
            walk.known.update(zip(walk.ends(outputs=False), given, strict=False))
            for known in walk.run():
                found.append(known if isinstance(known, Value) else Value(shape=known.shape))
        if len(node.outputs) != 1:
            for value in found:
                self.tracer.keep(value)
            return self.nothing(node)
        return Value(self.tracer.joined(found), self.shape(node))


def _is_weight(known: Known | None) -> bool:
    return isinstance(known, Constant) and sum(size > 1 for size in known.shape) > 1
