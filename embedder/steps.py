"""The steps of a forward pass, and which tensors each uses."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

GATES = {"elman": 1, "gru": 3, "lstm": 4}
"""Kind of a recurrent cell → how many gates are stacked."""


class Op(StrEnum):
    """What a step does."""

    LINEAR = "linear"
    """Matrix or convolution, added to what its target holds already."""
    UNITWISE = "unitwise"
    """One kernel for each unit, into a group that is tied to the source: depthwise convolution."""
    EMBEDDING = "embedding"
    """Rows looked up by token or position."""
    NORM = "norm"
    """Gain and offset for each unit, after statistics over a batch or over the units."""
    RECURRENT = "recurrent"
    """Gates fed by a source and by the target's own past."""
    GATED = "gated"
    """The product of an activated and a plain linear map of one source."""
    ATTENTION = "attention"
    """Heads that read a source and are added to a target."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the forward pass.

    Args:
        op: What it does.
        source: Group that is read.
        target: Group that is written.
        tensors: Role → name: `weight`, `bias`, `gain`, `offset`, `mean`, `variance`, `recurrent`,
            `gate`, `up`, `query`, `key`, `value`, `output`, and the same with `_bias`.
        inside: Group of heads of an attention, or of the hidden units of a gated map.
        kind: Which norm (`batch`, `layer`, `rms`), which cell (`elman`, `gru`, `lstm`).
        rotary: Whether queries and keys are turned by their position, two channels at a time.
        turned: Whether axis 0 of the weights is that of the source, as GPT-2 stores them.
        interleaved: Whether the two channels are neighbours; else half a head lies between them.
        fixed: Whether the channels of queries and keys have a basis of their own: a norm that has a
            gain for each, or positions that turn some of them alone.
        by_head: Whether the joint weights hold query, key and value of each head in turn; else all
            queries come first.
        epsilon: What a norm adds to the variance.
    """

    op: Op
    source: str
    target: str
    tensors: Mapping[str, str]
    inside: str = ""
    kind: str = ""
    rotary: bool = False
    turned: bool = False
    interleaved: bool = False
    fixed: bool = False
    by_head: bool = False
    epsilon: float = 1e-5
