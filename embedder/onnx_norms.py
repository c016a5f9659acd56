"""Rules for norms in an ONNX graph, those that are one node and those that are many."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from embedder.followed import Constant, Value
from embedder.onnx_lattice import LatticeRules
from embedder.onnx_values import Known, attribute_of, name_of

if TYPE_CHECKING:
    import onnx

SAME = frozenset({"Identity", "Cast", "Dropout"})
"""Operations that change nothing."""


@dataclass(frozen=True, slots=True)
class _Normed:
    """What a norm without gain gives: of which value, over its last axis."""

    kind: str
    source: str
    epsilon: float


class NormRules(LatticeRules):
    """Follows norms: over examples, over units, or over the pixels of each."""

    def norm_rules(self) -> dict[str, Callable[[Any], Known]]:
        """Return operation → rule."""
        return {
            "BatchNormalization": self.batch_norm,
            "LayerNormalization": self.layer_norm,
            "InstanceNormalization": self.instance_norm,
            "RMSNormalization": self.root_mean_square_norm,
        }

    def batch_norm(self, node: "onnx.NodeProto") -> Known:
        """Follow a batch norm."""
        value, found = self.value(node), self.constants(node, 1, 2, 3, 4)
        vectors = dict(zip(("gain", "offset", "mean", "variance"), found, strict=False))
        if len(vectors) != 4 or value.shape is None:
            return self.kept(node)
        return self.tracer.norm(
            value,
            "batch",
            vectors,
            at=1 - len(value.shape),
            alone=self.readers[node.input[0]] == 1,
            epsilon=attribute_of(node, "epsilon", 1e-5),
        )

    def layer_norm(self, node: "onnx.NodeProto") -> Known:
        """Follow a layer norm over the last axis."""
        return self.norm_over_units(node, "layer")

    def root_mean_square_norm(self, node: "onnx.NodeProto") -> Known:
        """Follow a norm over the last axis that subtracts no mean."""
        return self.norm_over_units(node, "rms")

    def norm_over_units(self, node: "onnx.NodeProto", kind: str) -> Known:
        """Follow a norm over the last axis that is one node."""
        value, axes = self.value(node), attribute_of(node, "axis", -1)
        last = axes in (-1, len(value.shape or ()) - 1)
        vectors = dict(zip(("gain", "offset"), self.constants(node, 1, 2), strict=False))
        if not last or len(vectors) != len(node.input) - 1:
            return self.kept(node)
        epsilon = attribute_of(node, "epsilon", 1e-5)
        return self.tracer.norm(value, kind, vectors, at=-1, alone=False, epsilon=epsilon)

    def instance_norm(self, node: "onnx.NodeProto") -> Known:
        """Follow a norm over the pixels of each channel."""
        value, vectors = self.value(node), self.constants(node, 1, 2)
        if value.shape is None or len(vectors) != 2:
            return self.kept(node)
        self.tracer.fix(value)
        label = value.labels.get(1 - len(value.shape))
        if label is not None:
            for vector in vectors:
                self.tracer.vector(vector, label, power=0)
        return replace(value, fresh=None)

    def norm_of_many(self, node: "onnx.NodeProto") -> Value | None:
        """Return what the last of many nodes gives that make up a norm; None if it is none.

        It is the one that multiplies with the gain. An offset that is added then is noted as if it
        were a bias of the norm.
        """
        gains = [name for name in node.input if isinstance(self.values.get(name), Constant)]
        others = [name for name in node.input if name not in gains]
        if node.op_type != "Mul" or len(gains) != 1 or len(others) != 1:
            return None
        gain, found = self.values[gains[0]], self.normed(others[0])
        if found is None or not isinstance(gain, Constant) or not gain.name:
            return None
        value = self.values.get(found.source, Value())
        label = value.labels.get(-1) if isinstance(value, Value) else None
        if not isinstance(value, Value) or label is None or gain.stored[-1:] == (None,):
            return None
        if [size for size in gain.shape if size > 1] != [self.tracer.places(value, -1)]:
            return None
        inside = self.nodes_between(others[0], found.source)
        read = Counter(given for name in inside for given in self.makers[name].input)
        read.update(node.input)
        # What something else reads, too, is not only a part of the norm.
        self.in_norms |= {name for name in inside if read[name] == self.readers[name]}
        self.in_norms.update(node.output)
        vectors = {"gain": gain}
        return self.tracer.norm(
            value, found.kind, vectors, at=-1, alone=False, epsilon=found.epsilon
        )

    def nodes_between(self, name: str, source: str) -> set[str]:
        """Return the values on the way from one to another, without the first."""
        found: set[str] = set()
        left = [name]
        while left:
            name = left.pop()
            if name != source and name not in found and name in self.makers:
                found.add(name)
                left.extend(self.makers[name].input)
        return found

    def normed(self, name: str) -> _Normed | None:
        """Say what was normed over its last axis to give a value; None if nothing was."""
        ratio = self.maker(name)
        if ratio is None or len(ratio.input) != 2:
            return None
        for top, below in (ratio.input, ratio.input[::-1]):
            deviation = below if ratio.op_type == "Div" else self.inverse(below)
            if ratio.op_type not in ("Div", "Mul") or deviation is None:
                continue
            epsilon = self.epsilon_of(deviation, top)
            if epsilon is not None:
                centred = self.maker(top)
                whole = self.without_mean(centred)
                kind = "rms" if whole is None else "layer"
                return _Normed(kind, whole or self.plain_name(top), epsilon)
            if ratio.op_type == "Div":
                break
        return None

    def inverse(self, name: str) -> str | None:
        """Return what a value is one divided by; None if it is not."""
        node = self.maker(name)
        if node is not None and node.op_type == "Reciprocal":
            return str(node.input[0])
        if node is not None and node.op_type == "Div" and self.scalar(node.input[0]) == 1:
            return str(node.input[1])
        return None

    def epsilon_of(self, deviation: str, top: str) -> float | None:
        """Return what is added to the mean square of a value whose root is given; None if none."""
        root = self.maker(deviation)
        added = self.maker(root.input[0]) if root is not None and root.op_type == "Sqrt" else None
        if added is None or added.op_type != "Add":
            return None
        for mean, number in (added.input, added.input[::-1]):
            square, epsilon = self.maker(self.mean_of(mean) or ""), self.scalar(number)
            if square is not None and epsilon is not None and self.squares(square, top):
                return epsilon
        return None

    def squares(self, node: "onnx.NodeProto", name: str) -> bool:
        """Say whether a node gives the square of a value."""
        inputs = [self.plain_name(given) for given in node.input]
        if node.op_type == "Mul":
            return set(inputs) == {self.plain_name(name)}
        two = node.op_type == "Pow" and self.scalar(node.input[1]) == 2
        return two and inputs[0] == self.plain_name(name)

    def mean_of(self, name: str) -> str | None:
        """Return what a value is the mean of, over its last axis; None if it is not."""
        node = self.maker(name)
        if node is None or node.op_type != "ReduceMean" or not attribute_of(node, "keepdims", 1):
            return None
        axes = attribute_of(node, "axes", ()) or self.numbers(name_of(node, 1)) or ()
        known = self.values.get(node.input[0])
        length = len(known.shape or ()) if known is not None else 0
        return node.input[0] if tuple(map(int, axes)) in ((-1,), (length - 1,)) else None

    def without_mean(self, node: "onnx.NodeProto | None") -> str | None:
        """Return what a node takes the mean over the last axis from; None if it does not."""
        if node is None or node.op_type != "Sub":
            return None
        whole, mean = node.input
        found = self.mean_of(mean)
        same = found is not None and self.plain_name(found) == self.plain_name(whole)
        return self.plain_name(whole) if same else None

    def plain_name(self, name: str) -> str:
        """Return the name of a value before nodes that change nothing."""
        seen: set[str] = set()  # a graph that was damaged may go in a circle
        while name not in seen and (node := self.makers.get(name)) is not None:
            if node.op_type not in SAME or not node.input:
                break
            seen.add(name)
            name = node.input[0]
        return name

    def maker(self, name: str) -> "onnx.NodeProto | None":
        """Return the node that gives a value, if one does, before those that change nothing."""
        return self.makers.get(self.plain_name(name))
