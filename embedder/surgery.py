"""What people do to weights after training: each operation as a pure function of arrays.

Functions of one tensor can be applied while a model streams by; functions of a whole model take
and return a mapping of names to arrays and copy only what they change. Training uses them for
positives, the zoo for descendants, the demonstration for its family.

All merges follow the formulas of their authors; `lineage` names them back.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Weights = Mapping[str, Array]


# ------------------------------------------------------------------ one tensor


def noised(values: Array, share: float, rng: np.random.Generator) -> Array:
    """Return the values with Gaussian noise of a given share of their norm.

    Example:
        >>> x = np.ones(1000, np.float32)
        >>> y = noised(x, 0.1, np.random.default_rng(0))
        >>> round(float(np.linalg.norm(y - x) / np.linalg.norm(x)), 3)
        0.1
    """
    step = rng.normal(size=values.shape)
    length = np.linalg.norm(step)
    if length == 0:
        return values.copy()
    scale = share * float(np.linalg.norm(values.astype(np.float64))) / length
    return (values + scale * step).astype(np.float32)


def quantised(values: Array, bits: int = 8, *, group: int = 0) -> Array:
    """Return the values rounded to a symmetric lattice, as float32.

    Args:
        values: Any shape; the first axis is that of the output channels.
        bits: Bits of a stored integer; 2^bits − 1 levels.
        group: Neighbouring values that share a scale; 0 for a whole channel.

    Source:
        Round to nearest, as GPTQ and llama.cpp start from (Frantar et al. 2023, ICLR).
    """
    levels = 2 ** (bits - 1) - 1
    runs = values.reshape(-1, group) if group else values.reshape(len(values), -1)
    step = np.abs(runs).max(axis=1, keepdims=True) / levels
    step = np.where(step > 0, step, 1)
    return (np.round(runs / step) * step).astype(np.float32).reshape(values.shape)


def pruned(values: Array, share: float) -> Array:
    """Return the values with the smallest share of them set to zero (Han et al. 2015, NeurIPS).

    Example:
        >>> pruned(np.array([[1.0, -3.0, 2.0, 0.5]], np.float32), 0.5)
        array([[ 0., -3.,  2.,  0.]], dtype=float32)
    """
    limit = np.quantile(np.abs(values), share)
    return np.where(np.abs(values) < limit, np.float32(0), values)


def pruned_two_of_four(values: Array) -> Array:
    """Return the values with the two smallest of every four neighbours set to zero.

    Source:
        The pattern that sparse tensor cores run: Mishra et al. 2021, arXiv 2104.08378.
    """
    runs = values.reshape(-1, 4)
    order = np.argsort(np.abs(runs), axis=1)
    kept = runs.copy()
    np.put_along_axis(kept, order[:, :2], 0, axis=1)
    return kept.reshape(values.shape)


def low_rank_update(values: Array, rank: int, share: float, rng: np.random.Generator) -> Array:
    """Return a matrix plus a random product of a rank, of a given share of its norm.

    Source:
        LoRA: Hu et al. 2022, ICLR.
    """
    rows, columns = values.shape
    product = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))
    scale = share * float(np.linalg.norm(values)) / float(np.linalg.norm(product))
    return (values + scale * product).astype(np.float32)


def extended(values: Array, places: int, rng: np.random.Generator, axis: int = 0) -> Array:
    """Return the values with new places at the end of an axis, drawn like the others."""
    shape = list(values.shape)
    shape[axis] = places
    new = rng.normal(values.mean(), values.std(), shape).astype(np.float32)
    return np.concatenate([values, new], axis=axis)


# ------------------------------------------------------------------ merges of one tensor


def merged_linear(parents: Sequence[Array], shares: Sequence[float]) -> Array:
    """Return the weighted sum of several tensors (model soups: Wortsman et al. 2022, ICML)."""
    total = sum(
        share * parent.astype(np.float64) for share, parent in zip(shares, parents, strict=True)
    )
    return np.asarray(total, dtype=np.float32)


def merged_slerp(first: Array, second: Array, t: float) -> Array:
    """Return the point at t on the arc from one tensor to another (Shoemake 1985, SIGGRAPH).

    Nearly parallel tensors are joined by a straight line, where the arc's formula divides by zero.
    """
    a, b = first.astype(np.float64), second.astype(np.float64)
    cosine = np.sum(a * b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-300)
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(angle) < 1e-6:
        return np.asarray((1 - t) * a + t * b, dtype=np.float32)
    joined = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return np.asarray(joined, dtype=np.float32)


def merged_task_arithmetic(
    base: Array, children: Sequence[Array], factors: Sequence[float]
) -> Array:
    """Return a base plus multiples of its children's steps (Ilharco et al. 2023, ICLR)."""
    start = base.astype(np.float64)
    steps = (f * (child - start) for f, child in zip(factors, children, strict=True))
    return np.asarray(start + sum(steps), dtype=np.float32)


def merged_ties(
    base: Array, children: Sequence[Array], *, density: float = 0.2, factor: float = 1.0
) -> Array:
    """Return a base plus its children's steps, trimmed, and averaged where their signs agree.

    Args:
        base: The common ancestor.
        children: Its fine-tunes.
        density: Share of each step's values that is kept, the largest.
        factor: λ, the multiple of the merged step.

    Source:
        Yadav et al. 2023, NeurIPS: trim, elect a sign by total size, average those that agree.
    """
    start = base.astype(np.float64)
    steps = []
    for child in children:
        step = child - start
        limit = np.quantile(np.abs(step), 1 - density)
        steps.append(np.where(np.abs(step) >= limit, step, 0.0))
    stacked = np.stack(steps)
    elected = np.sign(stacked.sum(axis=0))
    agreeing = (np.sign(stacked) == elected) & (stacked != 0)
    number = np.maximum(agreeing.sum(axis=0), 1)
    merged = np.where(agreeing, stacked, 0).sum(axis=0) / number
    return np.asarray(start + factor * merged, dtype=np.float32)


def merged_dare(
    base: Array,
    children: Sequence[Array],
    factors: Sequence[float],
    *,
    drop: float,
    rng: np.random.Generator,
) -> Array:
    """Return a base plus its children's steps, values dropped at random and the rest scaled up.

    Args:
        base: The common ancestor.
        children: Its fine-tunes.
        factors: Multiple of each step.
        drop: Probability with which a value of a step is dropped.
        rng: Draws which.

    Source:
        Yu et al. 2024, ICML.
    """
    start = base.astype(np.float64)
    total = start.copy()
    for factor, child in zip(factors, children, strict=True):
        kept = rng.random(base.shape) >= drop
        total += factor * kept * (child - start) / (1 - drop)
    return np.asarray(total, dtype=np.float32)


# ------------------------------------------------------------------ a stack of blocks


def with_layers(weights: Weights, stack: str, layers: Sequence[int]) -> dict[str, Array]:
    """Return a model whose repeated blocks are the given ones, in this order.

    Leaving some out drops layers; naming some twice scales the depth up (SOLAR: Kim et al. 2024).

    Args:
        weights: Name → values; blocks are named `{stack}.{number}.…`.
        stack: What stands before the number.
        layers: Numbers of the old blocks, in the order of the new ones.

    Raises:
        KeyError: There is no such block.

    Example:
        >>> w = {"h.0.w": np.zeros(1, np.float32), "h.1.w": np.ones(1, np.float32)}
        >>> sorted(with_layers(w, "h", [0, 1, 1]))
        ['h.0.w', 'h.1.w', 'h.2.w']
    """
    mark = f"{stack}."
    blocks: dict[int, dict[str, Array]] = {}
    result: dict[str, Array] = {}
    for name, values in weights.items():
        number, dot, rest = name.removeprefix(mark).partition(".")
        if name.startswith(mark) and dot and number.isdigit():
            blocks.setdefault(int(number), {})[rest] = values
        else:
            result[name] = values
    for place, layer in enumerate(layers):
        for rest, values in blocks[layer].items():
            result[f"{mark}{place}.{rest}"] = values
    return result
