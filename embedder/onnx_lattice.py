"""Rules for the nodes of an ONNX graph that put values on a lattice, or take them from one."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from embedder.followed import Constant, Label, Value
from embedder.onnx_axes import AxisRules
from embedder.onnx_values import Known

if TYPE_CHECKING:
    import onnx

_BYTES = (2, 3)  # UINT8, INT8


class LatticeRules(AxisRules):
    """Follows units of quantised models.

    One step of the lattice holds for all units, so that none may be scaled. A weight that is stored
    so is described as the reader gives it: with its scale.
    """

    def lattice_rules(self) -> dict[str, Callable[[Any], Known]]:
        """Return operation → rule."""
        return {
            "QuantizeLinear": self.quantise,
            "DequantizeLinear": self.quantise,
            "DynamicQuantizeLinear": self.quantise,
        }

    def quantise(self, node: "onnx.NodeProto") -> Known:
        """Follow values onto a lattice or from one; with a step for each unit, units are kept."""
        found, step = self.input(node, 0), self.input(node, 1)
        if isinstance(found, Constant):
            return found
        value = self.value(node)
        self.tracer.fix(value)
        if step is not None and (step.shape is None or any(size != 1 for size in step.shape)):
            return self.kept(node)
        return replace(value, fresh=None)

    def scaled(self, node: "onnx.NodeProto") -> Constant | None:
        """Return the bytes that a node multiplies with their scale; None if it does not."""
        terms = self.terms(node)
        constants = [term for term in terms if isinstance(term, Constant)]
        if node.op_type != "Mul" or len(constants) != 2 or len(terms) != 2:
            return None
        stored = [one for one in constants if self.is_bytes(one.name)]
        return stored[0] if len(stored) == 1 else None

    def stepped(self, node: "onnx.NodeProto") -> Value | None:
        """Return a bias that is divided by a step found on the way; None if this is none.

        What it holds are units of their own, until they are added to others.
        """
        bias, step = self.input(node, 0), self.input(node, 1)
        if node.op_type != "Div" or not isinstance(bias, Constant) or not isinstance(step, Value):
            return None
        long = [place for place, size in enumerate(bias.shape) if size > 1]
        if len(long) != 1 or step.shape is None or any(size != 1 for size in step.shape):
            return None
        units = self.tracer.new_units(bias.shape[long[0]])
        found = Value({long[0] - len(bias.shape): Label(units)}, self.shape(node))
        self.tracer.along(found, bias, power=0)
        self.tracer.fix(found)
        return found

    def is_bytes(self, name: str) -> bool:
        """Say whether a tensor holds small whole numbers, as quantised weights are stored."""
        return name in self.protos and self.protos[name].data_type in _BYTES


def is_first_only(node: "onnx.NodeProto") -> bool:
    """Say whether units lie in the first output alone; the others are a scale and a zero point."""
    return node.op_type == "DynamicQuantizeLinear"
