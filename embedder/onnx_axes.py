"""Rules for the nodes of an ONNX graph that move, merge, cut or sum over axes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from embedder.followed import Constant, Label, Value
from embedder.onnx_values import GraphValues, Known, attribute_of, name_of
from embedder.reshaping import moved, reshaped

if TYPE_CHECKING:
    import onnx

_LINEAR_SUMS = frozenset({"ReduceSum", "ReduceMean"})
_REDUCTIONS = _LINEAR_SUMS | {
    f"Reduce{what}" for what in ("Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSumExp")
}


class AxisRules(GraphValues):
    """Follows units through changes of the axes that they lie on."""

    def axis_rules(self) -> dict[str, Callable[[Any], Known]]:
        """Return operation → rule."""
        return {
            **dict.fromkeys(_REDUCTIONS, self.reduce),
            **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), self.reshape),
            **dict.fromkeys(("Split", "Slice", "Pad", "Resize", "Upsample"), self.cut),
            **dict.fromkeys(("Expand", "Tile"), self.cut),
            "Gather": self.gather,
            "Transpose": self.transpose,
            "Concat": self.concat,
        }

    def gather(self, node: "onnx.NodeProto") -> Known:
        """Follow a look-up in a table, or places taken from an axis."""
        table, places = self.input(node, 0), self.input(node, 1)
        axis = attribute_of(node, "axis", 0)
        if isinstance(table, Constant):
            if isinstance(places, Constant):
                return Value(shape=self.shape(node))
            if axis != 0 or len(table.shape) != 2:
                return self.kept(node)
            return Value({-1: Label(self.tracer.embedding(table))}, self.shape(node))
        value, shape = self.value(node), self.shape(node)
        if value.shape is None or shape is None:
            return self.kept(node)
        at = axis - len(value.shape) if axis >= 0 else axis
        self.tracer.keep(value, [at])
        shift = len(shape) - len(value.shape)
        labels = {p if p > at else p - shift: u for p, u in value.labels.items() if p != at}
        return Value(labels, shape)

    def transpose(self, node: "onnx.NodeProto") -> Known:
        """Follow axes that are put in another order."""
        found = self.input(node, 0)
        order = next((tuple(a.ints) for a in node.attribute if a.name == "perm"), None)
        if isinstance(found, Constant):
            order = order or tuple(range(len(found.shape)))[::-1]
            return Constant(
                found.name,
                tuple(found.shape[place] for place in order),
                tuple(found.stored[place] for place in order),
                found.scalar,
            )
        value = self.value(node)
        if order is None:
            order = tuple(range(len(value.shape or ())))[::-1]
        return moved(value, order) if order else self.kept(node)

    def reshape(self, node: "onnx.NodeProto") -> Known:
        """Follow axes that are merged, split, put in or taken out."""
        found, shape = self.input(node, 0), self.shape(node)
        if isinstance(found, Constant):
            return _viewed(found, shape)
        value = self.value(node)
        if shape is None:
            return self.kept(node)
        if node.op_type in ("Squeeze", "Unsqueeze"):
            return self.with_single_axes(node, value, shape)
        sizes = {place: self.tracer.size(label) for place, label in value.labels.items()}
        result, lost = reshaped(value, sizes, shape)
        self.tracer.keep(value, lost)
        return result

    def with_single_axes(
        self, node: "onnx.NodeProto", value: Value, shape: tuple[int | None, ...]
    ) -> Known:
        """Follow axes of length one that are put in or taken out."""
        axes = attribute_of(node, "axes", ()) or tuple(map(int, self.numbers(node.input[-1]) or ()))
        longer = shape if node.op_type == "Unsqueeze" else value.shape
        if longer is None or not axes:
            return self.kept(node)
        single = {axis % len(longer) for axis in axes}
        left = [axis - len(longer) for axis in range(len(longer)) if axis not in single]
        # `left` are the axes of the longer shape that the shorter one has, in order.
        pairs = {axis - len(left): place for axis, place in enumerate(left)}
        if node.op_type == "Squeeze":
            pairs = {place: axis for axis, place in pairs.items()}
        self.tracer.keep(value, [place for place in value.labels if place not in pairs])
        labels = {pairs[p]: label for p, label in value.labels.items() if p in pairs}
        return Value(labels, shape)

    def concat(self, node: "onnx.NodeProto") -> Known:
        """Follow values that are put beside each other; on their own axis units are kept."""
        terms = [self.input(node, place) for place in range(len(node.input))]
        if all(isinstance(term, Constant) for term in terms):
            return Value(shape=self.shape(node))
        values = [self.value(node, place) for place in range(len(terms))]
        shape = self.shape(node) or values[0].shape
        if shape is None:
            return self.kept(node)
        axis = attribute_of(node, "axis", 0)
        at = axis - len(shape) if axis >= 0 else axis
        self.tracer.keep_all(values, at)
        others = [value.without([at], value.shape) for value in values]
        return self.joined(node, others)

    def cut(self, node: "onnx.NodeProto") -> Known:
        """Follow an axis that is cut or made longer: units on an axis that changed are kept."""
        found, shape = self.input(node, 0), self.shape(node)
        if isinstance(found, Constant):
            return Value(shape=shape)
        value = self.value(node)
        if value.shape is None or shape is None or len(shape) != len(value.shape):
            return self.kept(node)
        changed = self.tracer.keep_changed(value, shape, ordered=self.keeps_order(node))
        zero = attribute_of(node, "value", 0.0) == 0 and self.is_zero(node, 2)
        if node.op_type == "Pad" and not zero:
            self.tracer.fix(value)
        return value.without(changed, shape)

    def keeps_order(self, node: "onnx.NodeProto") -> bool:
        """Say whether places that are left certainly stand as they did."""
        if node.op_type == "Slice":
            return self.runs_forward(node)
        if node.op_type == "Pad":
            given = attribute_of(node, "pads", ()) or self.numbers(name_of(node, 1))
            return given is not None and min(given, default=0) >= 0
        return True

    def reduce(self, node: "onnx.NodeProto") -> Known:
        """Follow a sum, mean or maximum over some axes."""
        value, shape = self.value(node), self.shape(node)
        if value.shape is None:
            return self.kept(node)
        axes = attribute_of(node, "axes", ()) or tuple(
            map(int, self.numbers(name_of(node, 1)) or ())
        )
        if not axes and self.input(node, 1) is not None:
            return self.kept(node)
        length = len(value.shape)
        gone = {axis % length - length for axis in axes} or set(range(-length, 0))
        self.tracer.fix(Value({p: u for p, u in value.labels.items() if p in gone}))
        if node.op_type not in _LINEAR_SUMS:
            self.tracer.fix(value, scale=node.op_type not in ("ReduceMax", "ReduceMin"))
        labels = {
            place
            + (0 if attribute_of(node, "keepdims", 1) else sum(g > place for g in gone)): label
            for place, label in value.labels.items()
            if place not in gone
        }
        return Value(labels, shape)


def _viewed(constant: Constant, shape: tuple[int | None, ...] | None) -> Known:
    """Return a view of a constant in which axes of length one were put in or taken out."""
    if shape is None or None in shape:
        return Value(shape=shape)
    sizes = tuple(size or 0 for size in shape)
    left = [place for place, size in enumerate(constant.shape) if size != 1]
    if [constant.shape[place] for place in left] != [size for size in sizes if size != 1]:
        return Value(shape=shape)
    stored = iter(constant.stored[place] for place in left)
    return Constant(
        constant.name,
        sizes,
        tuple(None if size == 1 else next(stored) for size in sizes),
        constant.scalar,
    )
