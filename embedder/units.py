"""Units that several tensors of a model share, and what may be done to them.

A group of units has a gauge: the changes of its units, over all tensors that hold them, that leave
the model's function as it is. An axis of a tensor says how its places follow from the units.
"""

from dataclasses import dataclass
from enum import StrEnum


class Gauge(StrEnum):
    """What may be done to the units of a group without changing what the model computes."""

    NAMED = "named"
    """Nothing: inputs, outputs and tokens have a meaning."""
    ORDER = "order"
    """Any order: GELU, SiLU, attention heads, a residual stream under gains."""
    SIGN = "sign"
    """Any order, and each unit's sign: tanh and other odd functions, if no maximum follows."""
    SCALE = "scale"
    """Any order, and a positive scale for each unit: ReLU, leaky ReLU, nothing at all."""
    TURN = "turn"
    """Any rotation: a residual stream under root-mean-square norms without gains."""


GAUGE_OF_ACTIVATION = {
    "relu": Gauge.SCALE,
    "leaky_relu": Gauge.SCALE,
    "prelu": Gauge.SCALE,
    "linear": Gauge.SCALE,
    "tanh": Gauge.SIGN,
    "sin": Gauge.SIGN,
    "gelu": Gauge.ORDER,
    "silu": Gauge.ORDER,
    "sigmoid": Gauge.ORDER,
    "softplus": Gauge.ORDER,
}


@dataclass(frozen=True, slots=True)
class Group:
    """Units that several tensors share.

    Args:
        name: Unique in the architecture.
        size: Number of units.
        gauge: What they allow.
        activation: What is applied to them.
        tied: Group whose order they have, though each may have scales of its own: the channels
            before a depthwise convolution.
    """

    name: str
    size: int
    gauge: Gauge
    activation: str = "linear"
    tied: str = ""


@dataclass(frozen=True, slots=True)
class Axis:
    """How the places of one axis of a tensor follow from the units of a group.

    Place (a · size + unit) · inner + b belongs to `unit`, for a below `before` and b below `inner`:
    `before` counts stacked gates or query, key and value; `inner` a head's channels or the pixels
    of a flattened map.

    Args:
        group: Name of the group.
        before: Repeats of the whole group along the axis.
        inner: Neighbouring places of one unit.
        power: Values are multiplied by λ to this power when a unit is scaled by λ: 1 for weights
            that feed it, −1 for those that it feeds, 0 where a norm takes the scale out again.
        tied_power: The same for the scale of the unit that this one is tied to.
    """

    group: str
    before: int = 1
    inner: int = 1
    power: int = 0
    tied_power: int = 0
