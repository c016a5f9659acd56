"""Descendants that no training makes: quantised, pruned, merged, reordered and the like."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from embedder import rotation, surgery, symmetry
from embedder.architecture import Gauge
from embedder.zoo.designs import Config
from embedder.zoo.member import Member
from embedder.zoo.nets import Array, architecture_of

Changed = tuple[Config, dict[str, Array]]


@dataclass(frozen=True, slots=True)
class Operation:
    """Something that is done to one network.

    Args:
        name: What is recorded.
        relation: The word for the child.
        change: Returns the child's design and weights, or None if this design does not allow it.
        keeps: Whether the function, and so every distance after alignment, stays as it is.
    """

    name: str
    relation: str
    change: Callable[[Member, np.random.Generator], Changed | None]
    keeps: bool = False


def _each_matrix(
    done: Callable[[Array], Array], member: Member, rng: np.random.Generator
) -> Changed:
    """Do the same to each matrix, kernel and table; draw nothing."""
    weights = {n: done(x) if x.ndim > 1 else x.copy() for n, x in member.weights.items()}
    return member.config, weights


def _noised(member: Member, rng: np.random.Generator) -> Changed:
    share = float(np.exp(rng.uniform(np.log(0.01), np.log(0.1))))
    return _each_matrix(lambda x: surgery.noised(x, share, rng), member, rng)


def _half(member: Member, rng: np.random.Generator) -> Changed:
    weights = {
        name: np.clip(values, -65504, 65504).astype(np.float16).astype(np.float32)
        for name, values in member.weights.items()
    }
    return member.config, weights


def _as_float32(weights: Mapping[str, np.ndarray]) -> dict[str, Array]:
    return {name: np.ascontiguousarray(x, dtype=np.float32) for name, x in weights.items()}


def _permuted(member: Member, rng: np.random.Generator) -> Changed:
    made = architecture_of(member.config)
    return member.config, _as_float32(symmetry.permuted(member.weights, made, rng))


def _rescaled(member: Member, rng: np.random.Generator) -> Changed | None:
    made = architecture_of(member.config)
    if not any(group.gauge is Gauge.SCALE for group in made.groups.values()):
        return None
    changed = symmetry.rescaled(member.weights, made, rng)
    return member.config, _as_float32(symmetry.permuted(changed, made, rng))


def _flipped(member: Member, rng: np.random.Generator) -> Changed | None:
    made = architecture_of(member.config)
    if not any(group.gauge is Gauge.SIGN for group in made.groups.values()):
        return None
    return member.config, _as_float32(symmetry.flipped(member.weights, made, rng))


def _rotated(member: Member, rng: np.random.Generator) -> Changed | None:
    if member.config.kind != "transformer":
        return None
    made = architecture_of(member.config)
    return member.config, _as_float32(rotation.rotated(member.weights, made, rng))


def _extended(member: Member, rng: np.random.Generator) -> Changed:
    """Add two classes; their biases begin at 0."""
    config = replace(member.config, classes=member.config.classes + 2)
    weights = dict(member.weights)
    for name in head_of(member.config):
        values = weights[name]
        if values.ndim > 1:
            weights[name] = surgery.extended(values, 2, rng)
        else:
            weights[name] = np.concatenate([values, np.zeros(2, np.float32)])
    return config, weights


def _without_block(member: Member, rng: np.random.Generator) -> Changed | None:
    return _with_blocks(member, [0])


def _with_block_twice(member: Member, rng: np.random.Generator) -> Changed | None:
    return _with_blocks(member, [0, 1, 1])


def _with_blocks(member: Member, blocks: list[int]) -> Changed | None:
    config = member.config
    stacked = config.kind == "transformer" or config.residual
    if not stacked or len(config.widths) != 2:
        return None
    width = config.widths[0]
    changed = replace(config, widths=(width,) * len(blocks))
    return changed, surgery.with_layers(member.weights, "blocks", blocks)


def head_of(config: Config) -> tuple[str, ...]:
    """Return the names of the last layer's tensors.

    Example:
        >>> head_of(Config("mlp", 4, 3, (8,)))
        ('2.weight', '2.bias')
    """
    return tuple(architecture_of(config).steps[-1].tensors.values())


OPERATIONS = (
    Operation("int8", "quantised", partial(_each_matrix, surgery.quantised)),
    Operation("rotate", "same-weights", _rotated, keeps=True),
    Operation("permute", "same-weights", _permuted, keeps=True),
    Operation("prune-50", "pruned", partial(_each_matrix, partial(surgery.pruned, share=0.5))),
    Operation("drop-block", "layer-edit", _without_block),
    Operation("noise", "perturbed", _noised),
    Operation("rescale", "same-weights", _rescaled, keeps=True),
    Operation("half", "same-weights", _half),
    Operation("int4", "quantised", partial(_each_matrix, partial(surgery.quantised, bits=4))),
    Operation("repeat-block", "layer-edit", _with_block_twice),
    Operation("extend", "extended", _extended),
    Operation("prune-30", "pruned", partial(_each_matrix, partial(surgery.pruned, share=0.3))),
    Operation("flip", "same-weights", _flipped, keeps=True),
    Operation("prune-70", "pruned", partial(_each_matrix, partial(surgery.pruned, share=0.7))),
)
"""What is done to one network, in the order in which turns are taken."""

# ------------------------------------------------------------------ merges

MERGES = ("linear", "slerp", "task", "ties", "dare")


def merged(
    kind: str, base: Member, children: Sequence[Member], rng: np.random.Generator
) -> dict[str, Array]:
    """Return a merge of two children of one base, by the formulas of `embedder.surgery`.

    Args:
        kind: One of `MERGES`.
        base: The common parent.
        children: Two of its fine-tunes.
        rng: Draws the shares.
    """
    share = float(rng.uniform(0.3, 0.7))
    first, second = children
    found = {}
    for name, start in base.weights.items():
        pair = (first.weights[name], second.weights[name])
        if kind == "linear":
            found[name] = surgery.merged_linear(pair, (1 - share, share))
        elif kind == "slerp":
            found[name] = surgery.merged_slerp(*pair, share)
        elif kind == "task":
            found[name] = surgery.merged_task_arithmetic(start, pair, (1 - share, share))
        elif kind == "ties":
            found[name] = surgery.merged_ties(start, pair, density=0.5)
        else:
            found[name] = surgery.merged_dare(start, pair, (0.5, 0.5), drop=share, rng=rng)
    return found
