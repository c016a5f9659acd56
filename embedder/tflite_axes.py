"""Rules for the operators of a TFLite graph that move, merge, cut or sum over axes."""

from collections.abc import Callable

from embedder.followed import Constant, Label, Value
from embedder.reshaping import moved, reshaped
from embedder.tflite_values import Known, Node, Shape, Values

_LINEAR_SUMS = frozenset({"MEAN", "SUM"})
_REDUCTIONS = _LINEAR_SUMS | {"REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD"}
_CUTS = frozenset(
    {"PAD", "PADV2", "MIRROR_PAD", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "TILE"}
    | {"SLICE", "STRIDED_SLICE", "SPLIT", "SPLIT_V", "BROADCAST_TO"}
    | {"SPACE_TO_BATCH_ND", "BATCH_TO_SPACE_ND"}
)


class AxisRules(Values):
    """Follows units through changes of the axes that they lie on."""

    def axis_rules(self) -> dict[str, Callable[[Node], Known]]:
        """Return operation → rule."""
        return {
            **dict.fromkeys(_REDUCTIONS, self.reduce),
            **dict.fromkeys(_CUTS, self.cut),
            **dict.fromkeys(("RESHAPE", "SQUEEZE", "EXPAND_DIMS"), self.reshape),
            **dict.fromkeys(("GATHER", "EMBEDDING_LOOKUP"), self.look_up),
            "TRANSPOSE": self.transpose,
            "CONCATENATION": self.concat,
        }

    def pool(self, node: Node) -> Known:
        """Follow pooling over space."""
        value = self.value(node)
        self.tracer.keep(value, [place for place in value.labels if place != -1])
        if node.op == "MAX_POOL_2D":
            self.tracer.fix(value, scale=False)
        labels = {place: label for place, label in value.labels.items() if place == -1}
        return Value(labels, self.shape(node))

    def reshape(self, node: Node) -> Known:
        """Follow axes that are merged, split, put in or taken out."""
        shape = self.shape(node)
        if shape is None:
            return self.kept(node)
        return self.reshaped(self.value(node), shape)

    def reshaped(self, value: Value, shape: Shape) -> Value:
        """Return a value in another shape; units that cannot be followed are kept."""
        sizes = {place: self.tracer.size(label) for place, label in value.labels.items()}
        found, lost = reshaped(value, sizes, shape)
        self.tracer.keep(value, lost)
        return found

    def transpose(self, node: Node) -> Known:
        """Follow axes that are put in another order."""
        value, order = self.value(node), self.numbers(node, 1)
        return moved(value, order) if order else self.kept(node)

    def look_up(self, node: Node) -> Known:
        """Follow a look-up in a table; other places that are taken from an axis are kept."""
        at = 1 if node.op == "EMBEDDING_LOOKUP" else 0
        table, places = self.constant(node, at), self.input(node, 1 - at)
        options = [self.model.option(node, "GatherOptions", f) for f in ("Axis", "BatchDims")]
        if table is None or len(table.shape) != 2 or isinstance(places, Constant) or any(options):
            return self.kept(node)
        return Value({-1: Label(self.tracer.embedding(table))}, self.shape(node))

    def concat(self, node: Node) -> Known:
        """Follow values that are put beside each other; on their own axis units are kept."""
        values = [self.value(node, place) for place in range(len(node.inputs))]
        shape = self.shape(node)
        if shape is None:
            return self.kept(node)
        axis = int(self.model.option(node, "ConcatenationOptions", "Axis"))
        at = axis - len(shape) if axis >= 0 else axis
        self.tracer.keep_all(values, at)
        others = [value.without([at], value.shape) for value in values]
        return Value(self.tracer.joined(others), shape)

    def cut(self, node: Node) -> Known:
        """Follow an axis that is cut or made longer: units on an axis that changed are kept."""
        at = 1 if node.op == "SPLIT" else 0
        value, shape = self.value(node, at), self.shape(node)
        if value.shape is None or shape is None or len(shape) != len(value.shape):
            return self.kept(node)
        changed = self.tracer.keep_changed(value, shape, ordered=self.keeps_order(node))
        if node.op == "PADV2":
            self.tracer.fix(value)
        return value.without(changed, shape)

    def keeps_order(self, node: Node) -> bool:
        """Say whether places that are left certainly stand as they did."""
        if node.op == "STRIDED_SLICE":
            steps = self.numbers(node, 3)
            masks = ("NewAxisMask", "ShrinkAxisMask", "EllipsisMask")
            moves = any(self.model.option(node, "StridedSliceOptions", mask) for mask in masks)
            return steps is not None and min(steps, default=1) > 0 and not moves
        if "PAD" in node.op:
            widths = self.numbers(node, 1)
            return widths is not None and min(widths, default=0) >= 0
        return True

    def reduce(self, node: Node) -> Known:
        """Follow a sum, mean or maximum over some axes."""
        value, shape, axes = self.value(node), self.shape(node), self.numbers(node, 1)
        if value.shape is None or axes is None:
            return self.kept(node)
        length = len(value.shape)
        gone = {axis % length - length for axis in axes}
        self.tracer.fix(Value({p: u for p, u in value.labels.items() if p in gone}))
        if node.op not in _LINEAR_SUMS:
            self.tracer.fix(value, scale=node.op == "REDUCE_PROD")
        stays = self.model.option(node, "ReducerOptions", "KeepDims")
        labels = {
            place + (0 if stays else sum(g > place for g in gone)): label
            for place, label in value.labels.items()
            if place not in gone
        }
        return Value(labels, shape)
