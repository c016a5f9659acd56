"""How one network is trained, and on which examples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedder.zoo.data import Task

Whole = NDArray[np.int64]

VARIANTS = 5
"""Copies of an example to draw from: as it is, and changed in four ways."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides how one network is trained, besides its design and its start.

    Args:
        task: Name of the task.
        seed: Of the data: which examples, which labels are wrong, in which order.
        steps: Number of batches.
        batch: Examples in each.
        optimiser: `adam` or `sgd` (with momentum 0.9).
        rate: Step size at the beginning; it falls linearly to a tenth.
        decay: Decoupled weight decay of matrices and kernels.
        dropout: Share of hidden activations that are set to zero.
        augment: Share of examples that are shifted (pictures, sounds) or jittered (columns).
        size: Number of training examples.
        label_noise: Share of labels that are replaced by another class.
        imbalance: How rare the last class is, as a share of the first.
    """

    task: str
    seed: int
    steps: int = 300
    batch: int = 32
    optimiser: str = "adam"
    rate: float = 3e-3
    decay: float = 0.0
    dropout: float = 0.0
    augment: float = 0.0
    size: int = 400
    label_noise: float = 0.0
    imbalance: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """What one network is trained on.

    Args:
        rows: (size,) places in the task's training part.
        labels: Labels as they are given to the network, for the whole training part.
        wrong: (size,) which of the rows have another label than the true one.
        order: (steps, batch) places in `rows`.
        variants: (steps, batch) which copy of each.
    """

    rows: Whole
    labels: Whole
    wrong: NDArray[np.bool_]
    order: Whole
    variants: Whole


def draw_examples(recipe: Recipe, task: Task) -> Examples:
    """Return what a recipe trains on; its seed decides everything.

    A language model has neither wrong labels, nor rare classes, nor changed copies.

    Example:
        >>> from embedder.zoo.data import task_named
        >>> recipe = Recipe("textures8", 1, size=100, label_noise=0.2)
        >>> examples = draw_examples(recipe, task_named("textures8"))
        >>> len(examples.rows), int(examples.wrong.sum())
        (100, 20)
    """
    rng = np.random.default_rng(recipe.seed)
    order = rng.permutation(len(task.train))
    labels = task.train_labels
    if task.kind != "language" and recipe.imbalance < 1:
        # The first class is always kept, the last with the given share, those between in steps.
        kept = recipe.imbalance ** (np.arange(task.classes) / max(task.classes - 1, 1))
        order = order[rng.random(len(order)) < kept[labels[order]]]
    rows = order[: recipe.size]
    wrong = np.zeros(len(rows), dtype=bool)
    if task.kind != "language" and recipe.label_noise > 0:
        wrong[: round(recipe.label_noise * len(rows))] = True
        labels = labels.copy()
        turned = rows[wrong]
        # Adding 1 … classes − 1 never gives the true label back.
        step = rng.integers(1, task.classes, len(turned))
        labels[turned] = (labels[turned] + step) % task.classes
    shape = (recipe.steps, recipe.batch)
    places = rng.integers(0, len(rows), shape)
    changed = rng.random(shape) < (0 if task.kind == "language" else recipe.augment)
    variants = rng.integers(1, VARIANTS, shape) * changed
    return Examples(rows, labels, wrong, places, variants)


def variants_of(task: Task) -> NDArray[np.float32]:
    """Return the changed copies of the training part, (5, n, …), the first as it is.

    Pictures and sounds are shifted by a place in each direction, columns and nodes jittered by a
    fifth of their standard deviation. A language model gets no other copies: (1, n, …).
    """
    x = task.train
    if task.kind == "language":
        return x[None]
    if task.kind in ("vision", "audio"):
        moved = [np.roll(x, step, axis) for axis in (1, 2) for step in (1, -1)]
        return np.stack([x, *moved])
    rng = np.random.default_rng(5)
    width = task.values or x.shape[2]
    copies = np.repeat(x[None], VARIANTS, axis=0)
    copies[1:, ..., :width] += 0.2 * rng.normal(size=(VARIANTS - 1, *x.shape[:2], width))
    return copies.astype(np.float32)


def same_length(recipes: Sequence[Recipe]) -> bool:
    """Say whether recipes can be trained together: one task, number of steps and batch size."""
    return len({(recipe.task, recipe.steps, recipe.batch) for recipe in recipes}) == 1
