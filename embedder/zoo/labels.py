"""What is measured of each network: nothing here is taken from its recipe.

Sizes of perturbations are in standard deviations of the inputs. A label that cannot be measured —
an attack on tokens, a gap between groups where no group is known — is None.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from embedder.zoo.data import Task
from embedder.zoo.designs import Config
from embedder.zoo.nets import Array, forward
from embedder.zoo.recipes import Examples
from embedder.zoo.training import Layout, device, losses_of, to_table

Labels = dict[str, float | None]

MOST = 300
"""Examples of each part that are looked at: a share is then known to within .06 (two standard
errors)."""
EPSILON = {"vision": 0.15, "audio": 0.15, "graph": 0.05, "tabular": 0.15}
"""Largest change of a value in an attack, by kind of task: at .25 most pictures and all graphs fell
for it, which tells no model from another."""
PGD_STEPS = 5
FEWEST = 10
"""Fewer wrong labels, or members of a group, say nothing."""
ECE_BINS = 15
"""As in Guo et al. 2017, ICML."""

NAMES = (
    "test_accuracy",
    "train_accuracy",
    "gap",
    "test_loss",
    "calibration_error",
    "worst_class_accuracy",
    "memorised",
    "parity_gap",
    "opportunity_gap",
    "noise_accuracy",
    "blur_accuracy",
    "rotation_accuracy",
    "shift_accuracy",
    "fgsm_accuracy",
    "pgd_accuracy",
    "sign_noise_accuracy",
)
"""All labels, in the order of the table."""


@dataclass(frozen=True, slots=True)
class _Judged:
    """What K models make of examples.

    Args:
        guesses: (K, n) or (K, n, T) classes.
        sure: The same shape: probability of the guess.
        right: The same shape.
    """

    guesses: NDArray[np.int64]
    sure: NDArray[np.float32]
    right: NDArray[np.bool_]
    losses: NDArray[np.float32]

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Share of right guesses of each model, (K,)."""
        return np.asarray(self.right.reshape(len(self.right), -1).mean(axis=1))


def measure(
    config: Config,
    models: Sequence[Mapping[str, Array]],
    examples: Sequence[Examples],
    task: Task,
) -> list[Labels]:
    """Measure networks of one design.

    Args:
        config: The design.
        models: Weights of each.
        examples: What each was trained on last.
        task: What they were trained for.

    Returns:
        Labels of each, by the names of `NAMES`.
    """
    bench = _Bench(config, to_table(config, models), task)
    test, labels = task.test[:MOST], task.test_labels[:MOST]
    plain = bench.judge(test, labels)
    found: dict[str, Sequence[float | None]] = {
        "test_accuracy": plain.accuracy.tolist(),
        "test_loss": plain.losses.tolist(),
        "calibration_error": [
            calibration_error(sure, right)
            for sure, right in zip(plain.sure, plain.right, strict=True)
        ],
        "worst_class_accuracy": [
            worst_class(right, labels) if task.kind != "language" else None for right in plain.right
        ],
    }
    found |= bench.on_training(examples, found["test_accuracy"])
    found |= group_gaps(plain.guesses, labels, task)
    for name, change in shifts_of(task).items():
        found[f"{name}_accuracy"] = bench.judge(change(test), labels).accuracy.tolist()
    if task.kind in EPSILON:
        found |= bench.attacked(test, labels, EPSILON[task.kind])
    none: Sequence[float | None] = [None] * len(models)
    return [{name: found.get(name, none)[place] for name in NAMES} for place in range(len(models))]


# ------------------------------------------------------------------ single labels


def calibration_error(sure: NDArray[np.float32], right: NDArray[np.bool_]) -> float:
    """Return the mean gap between how sure a model is and how often it is right.

    Source:
        Expected calibration error with 15 equal bins: Guo et al. 2017, ICML.

    Example:
        >>> calibration_error(np.array([0.9, 0.9], np.float32), np.array([True, True]))
        0.1
    """
    bins = np.minimum((sure.ravel() * ECE_BINS).astype(int), ECE_BINS - 1)
    off = np.bincount(bins, sure.ravel() - right.ravel(), minlength=ECE_BINS)
    return round(float(np.abs(off).sum() / sure.size), 6)


def worst_class(right: NDArray[np.bool_], labels: NDArray[np.int64]) -> float:
    """Return the accuracy of the class with the lowest.

    Example:
        >>> worst_class(np.array([True, True, True, False]), np.array([0, 0, 1, 1]))
        0.5
    """
    return float(min(right[labels == kind].mean() for kind in np.unique(labels)))


def group_gaps(
    guesses: NDArray[np.int64], labels: NDArray[np.int64], task: Task
) -> dict[str, Sequence[float | None]]:
    """Return how differently a protected group is treated, if the task has one.

    Source:
        Demographic parity and equal opportunity: Hardt et al. 2016, NeurIPS.
    """
    if task.group is None or task.classes != 2:
        return {}
    member = task.group[: len(labels)]
    yes = guesses == 1

    def gap(among: NDArray[np.bool_]) -> list[float | None]:
        inside, outside = member & among, ~member & among
        if min(inside.sum(), outside.sum()) < FEWEST:
            return [None] * len(guesses)
        away = yes[:, inside].mean(axis=1) - yes[:, outside].mean(axis=1)
        return [float(value) for value in np.abs(away)]

    everybody = np.ones(len(labels), dtype=bool)
    return {"parity_gap": gap(everybody), "opportunity_gap": gap(labels == 1)}


def shifts_of(task: Task) -> dict[str, Callable[[Array], Array]]:
    """Return name → what changes the inputs of a task, always in the same way.

    `noise` adds half a standard deviation (replaces a tenth of the tokens), `blur` smooths over a
    pixel, `rotation` turns by 20 degrees, `shift` scales by .7 and adds .4.
    """
    rng = np.random.default_rng(17)
    if task.kind == "language":
        return {"noise": lambda x: _replaced(x, task.classes, rng)}
    width = task.values or task.test.shape[2]
    changes: dict[str, Callable[[Array], Array]] = {
        "noise": lambda x: _moved(x, 0.5 * rng.normal(size=(*x.shape[:2], width))),
        "shift": lambda x: _moved(x, -0.3 * x[..., :width] + 0.4),
    }
    if task.kind in ("vision", "audio"):
        changes["blur"] = lambda x: ndimage.gaussian_filter(x, (0, 1, 1))
    if task.kind == "vision":
        changes["rotation"] = lambda x: ndimage.rotate(
            x, 20, (1, 2), reshape=False, order=1, mode="nearest"
        )
    return changes


def _replaced(x: Array, tokens: int, rng: np.random.Generator) -> Array:
    other = rng.integers(0, tokens, x.shape)
    return np.where(rng.random(x.shape) < 0.1, other, x).astype(np.float32)


def _moved(x: Array, step: NDArray[np.floating]) -> Array:
    """Return inputs with a step added to their values, neighbours left as they are."""
    moved = x.copy()
    moved[..., : step.shape[-1]] += step
    return moved


# ------------------------------------------------------------------ many models at once


class _Bench:
    """K models and the task that they are measured on."""

    def __init__(self, config: Config, table: Tensor, task: Task) -> None:
        self._config, self._task = config, task
        self._weights = Layout(config).views(table)
        self._count = len(table)

    def judge(self, x: Array, labels: NDArray[np.int64]) -> _Judged:
        """Return what all models make of the same examples."""
        return self._judge(self._spread(x), self._spread(labels))

    def _spread(self, values: NDArray[np.generic]) -> Tensor:
        whole = torch.from_numpy(np.ascontiguousarray(values)).to(device())
        return whole[None].expand(self._count, *whole.shape)

    def _judge(self, x: Tensor, labels: Tensor) -> _Judged:
        with torch.no_grad():
            logits = self._forward(x)
            losses = losses_of(logits, labels)
            sure, guesses = logits.softmax(dim=-1).max(dim=-1)
        right = guesses == labels
        # A diverged model may give no numbers; it is as sure as a guess.
        known = torch.nan_to_num(sure, nan=1 / self._task.classes)
        parts = (guesses, known, right, losses)
        return _Judged(*(part.cpu().numpy() for part in parts))

    def _forward(self, x: Tensor) -> Tensor:
        return forward(self._config, self._weights, x)

    def on_training(
        self, examples: Sequence[Examples], test: Sequence[float | None]
    ) -> dict[str, Sequence[float | None]]:
        """Return how well each model knows what it was trained on, wrong labels included."""
        most = min(MOST, *(len(e.rows) for e in examples))
        # Wrong labels come first in the rows; an even choice keeps their share.
        chosen = [np.linspace(0, len(e.rows) - 1, most).astype(int) for e in examples]
        rows = np.stack([e.rows[c] for e, c in zip(examples, chosen, strict=True)])
        wrong = np.stack([e.wrong[c] for e, c in zip(examples, chosen, strict=True)])
        given = np.stack([e.labels[r] for e, r in zip(examples, rows, strict=True)])
        place = device()
        judged = self._judge(
            torch.from_numpy(self._task.train[rows]).to(place), torch.from_numpy(given).to(place)
        )
        accuracy = judged.accuracy
        memorised = [
            float(right[bad].mean() - 1 / self._task.classes) if bad.sum() >= FEWEST else None
            for right, bad in zip(judged.right, wrong, strict=True)
        ]
        gaps = [float(a) - (b or 0.0) for a, b in zip(accuracy, test, strict=True)]
        return {"train_accuracy": accuracy.tolist(), "gap": gaps, "memorised": memorised}

    def attacked(
        self, x: Array, labels: NDArray[np.int64], most: float
    ) -> dict[str, Sequence[float | None]]:
        """Return accuracy under attacks on each model, and under random steps of the same size.

        Source:
            FGSM: Goodfellow et al. 2015, ICLR; PGD: Madry et al. 2018, ICLR.
        """
        plain, wanted = self._spread(x), self._spread(labels)
        width = self._task.values or x.shape[-1]
        rng = np.random.default_rng(23)
        random = rng.choice([-most, most], (*x.shape[:-1], width)).astype(np.float32)
        attacks = {
            "fgsm": self._ascended(plain, wanted, most, steps=1, stride=most),
            "pgd": self._ascended(plain, wanted, most, steps=PGD_STEPS, stride=most / 2),
            "sign_noise": self._spread(_moved(x, random)),
        }
        return {
            f"{name}_accuracy": self._judge(changed, wanted).accuracy.tolist()
            for name, changed in attacks.items()
        }

    def _ascended(
        self, plain: Tensor, wanted: Tensor, most: float, *, steps: int, stride: float
    ) -> Tensor:
        """Return inputs moved up the loss, no value by more than `most`."""
        movable = torch.zeros(plain.shape[-1], device=plain.device)
        movable[: self._task.values or plain.shape[-1]] = 1
        moved = plain
        for _ in range(steps):
            moved = moved.detach().requires_grad_(True)
            loss = losses_of(self._forward(moved), wanted).sum()
            (slope,) = torch.autograd.grad(loss, moved)
            step = stride * torch.nan_to_num(slope).sign() * movable
            moved = plain + (moved.detach() + step - plain).clamp(-most, most)
        return moved
