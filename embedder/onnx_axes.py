"""Rules for the nodes of an ONNX graph that move, merge, cut or sum over axes."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from embedder.followed import Constant, Label, Value
from embedder.onnx_values import GraphValues, Known, attribute_of, is_float, name_of
from embedder.reshaping import cut_last, moved, reshaped

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
        index = self.numbers(name_of(node, 1)) if len(shape) < len(value.shape) else None
        part = self.part(value, at, int(index[0]), 1) if index else None
        self.tracer.keep(value if part is None else Value(), [at])
        shift = len(shape) - len(value.shape)
        labels = {p if p > at else p - shift: u for p, u in value.labels.items() if p != at}
        return Value(labels, shape, trail=None if part is None else part.trail)

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
        if lost == [-1] and (cut := self.heads_of(value, shape)):
            return replace(result, labels={**result.labels, **cut})
        self.tracer.keep(value, lost)
        return result

    def heads_of(self, value: Value, shape: tuple[int | None, ...]) -> dict[int, Label]:
        """Return the axes of heads that one linear map is cut into; none if it is not."""
        cut, units = cut_last(value.shape or (), shape), value.single
        if units is None or not cut or None in cut or value.labels[-1] != Label(units):
            return {}
        first, second = cut[0] or 0, cut[1] or 0
        if len(cut) == 2:
            return {-2: self.tracer.cut(units, first)}
        if len(cut) > 3 or 3 not in (first, second):
            return {}
        by_head = first != 3
        thirds = self.tracer.thirds(units, by_head=by_head)
        heads = self.tracer.cut(units, first if by_head else second)
        return {-3: heads, -2: thirds} if by_head else {-3: thirds, -2: heads}

    def part(self, value: Value, at: int, first: int, length: int) -> Value | None:
        """Return the queries, keys or values that some places of an axis hold; None if none.

        They lie along an axis of their own, on the last one, or on that of each head's channels.
        """
        units, label = value.single, value.labels.get(at)
        if units is None or value.trail is None or value.shape is None or not length:
            return None
        size = list(value.shape)[at] or 0
        whole = at == -1 and label == Label(units)
        by_head = at == -1 and label is None and self.tracer.channels_of(units) == size
        is_joint = whole or by_head or self.tracer.is_thirds(label, units)
        if not is_joint or size != 3 * length or first % length:
            return None
        part = self.tracer.part(units, first % size // length, by_head=by_head)
        labels = {place: other for place, other in value.labels.items() if place != at}
        labels |= {at: Label(part)} if whole else {}
        return Value(labels, trail=replace(value.trail, maps=(part,)))

    def parts(self, node: "onnx.NodeProto", value: Value) -> Value | None:
        """Return the queries, keys or values that a node cuts out, all of them if it splits."""
        start = self.start(node)
        if start is None or value.shape is None:
            return None
        axis, first = start
        at, found = axis - len(value.shape) if axis >= 0 else axis, []
        for name in node.output:
            shape = self.sizes.get(name) or ()
            length = list(shape)[at] or 0 if len(shape) == len(value.shape) else 0
            part = self.part(value, at, first, length)
            if part is None:
                return None
            found.append(replace(part, shape=shape))
            first += length
        self.apart.update(zip(node.output, found, strict=True))
        return found[0]

    def start(self, node: "onnx.NodeProto") -> tuple[int, int] | None:
        """Return the axis that a node cuts, and where it begins; None if it takes no whole run."""
        if node.op_type == "Split":
            return attribute_of(node, "axis", 0), 0
        if node.op_type != "Slice":
            return None
        starts = list(attribute_of(node, "starts", ()) or self.numbers(name_of(node, 1)) or ())
        axes = list(attribute_of(node, "axes", ()) or self.numbers(name_of(node, 3)) or ())
        steps = self.numbers(name_of(node, 4)) if name_of(node, 4) else [1.0]
        single = len(starts) == len(axes) == 1 and steps == [1]
        return (int(axes[0]), int(starts[0])) if single else None

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
        terms = self.terms(node)
        if all(isinstance(term, Constant) for term in terms):
            return Value(shape=self.shape(node))
        values = [self.laid(term) for term in terms]
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
        found = self.input(node, 0)
        if isinstance(found, Constant) and not self.is_table(found):
            return Value(shape=self.shape(node))
        value = self.laid(found)
        shape = self.shape_of_cut(node, value)
        if node.op_type == "Expand" and shape is not None and value.shape is not None:
            more = len(shape) - len(value.shape)
            value = replace(value, shape=(1,) * more + value.shape)
        if value.shape is None or shape is None or len(shape) != len(value.shape):
            self.tracer.keep(value)
            return self.kept(node)
        if parts := self.parts(node, value):
            return parts
        changed = self.tracer.keep_changed(value, shape, ordered=self.keeps_order(node))
        zero = attribute_of(node, "value", 0.0) == 0 and self.is_zero(node, 2)
        if node.op_type == "Pad" and not zero:
            self.tracer.fix(value)
        return value.without(changed, shape)

    def shape_of_cut(self, node: "onnx.NodeProto", value: Value) -> tuple[int | None, ...] | None:
        """Return the shape of what a node cuts; axes that it leaves alone are as they were."""
        shape, axes = self.shape(node), self.numbers(name_of(node, 3)) or ()
        if shape is None or value.shape is None or len(shape) != len(value.shape):
            return shape
        if node.op_type != "Slice" or not axes:
            return shape
        cut = {int(axis) % len(shape) for axis in axes}
        pairs = enumerate(zip(shape, value.shape, strict=True))
        return tuple(after if place in cut else before for place, (after, before) in pairs)

    def is_table(self, constant: Constant) -> bool:
        """Say whether a constant holds a row of real numbers for each of several places, or one."""
        proto, shape = self.protos.get(constant.name), constant.shape
        if proto is None or not is_float(proto) or not shape or None in constant.stored[-2:]:
            return False
        return shape[-1] > 1 == math.prod(shape[:-2])

    def has_rows(self, term: Known | None) -> bool:
        """Say whether a term is a table of several rows, as of positions."""
        return isinstance(term, Constant) and self.is_table(term) and (1, *term.shape)[-2] > 1

    def laid(self, term: Known | None) -> Value:
        """Return a value, or a table of the model as units that lie on its last axis."""
        if not isinstance(term, Constant) or not self.is_table(term):
            return term if isinstance(term, Value) else Value(shape=getattr(term, "shape", None))
        return Value({-1: self.tracer.table(term)}, term.shape)

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
