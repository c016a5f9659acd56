"""How well a function coder tells what was measured of models that it has not seen."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedder.function import PROPERTIES, Measured, Told

_FEWEST = 10
"""Models below which nothing is said of a kind of network."""


@dataclass(frozen=True, slots=True)
class PropertyScore:
    """How well one property is told.

    Args:
        name: One of `PROPERTIES`, told by R² = 1 − mean squared error / variance; or `task`, told
            by the share of models whose task came first.
        models: Of how many it is known.
        score: Over all of them.
        kinds: Kind of network → the same of its models, R² against the variance within the kind.
    """

    name: str
    models: int
    score: float
    kinds: dict[str, float]

    @property
    def worst_kind(self) -> str:
        """The kind of network of which it is told least well, or empty."""
        return min(self.kinds, key=self.kinds.__getitem__, default="")


def property_scores(
    kinds: Sequence[str], known: Sequence[Measured], told: Told
) -> list[PropertyScore]:
    """Return a score for each property that is known of some models, and for the task.

    Args:
        kinds: Of each model, its kind of network.
        known: What was measured of each.
        told: What was said of each.

    Example:
        >>> from types import SimpleNamespace as Known
        >>> known = [Known(values=(x / 20, *4 * [float("nan")]), task="a") for x in range(20)]
        >>> values = np.array([one.values for one in known]) + 0.1
        >>> told = Told(np.zeros((20, 128), np.float32), values, ["a", "b"] * 10)
        >>> for found in property_scores(["mlp"] * 20, known, told):
        ...     print(found.name, found.models, round(found.score, 2))
        test_accuracy 20 0.88
        task 20 0.5
    """
    kind = np.array(kinds)
    measured = np.array([one.values for one in known], np.float64)
    found = []
    for name, truth, said in zip(PROPERTIES, measured.T, told.values.T, strict=True):
        there = np.isfinite(truth)
        if there.any():
            found.append(_score(name, kind[there], truth[there], said[there]))
    right = np.array([one.task == t for one, t in zip(known, told.tasks, strict=True)], np.float64)
    return [*found, _score("task", kind, right, None)]


def _score(
    name: str,
    kind: NDArray[np.str_],
    truth: NDArray[np.float64],
    said: NDArray[np.float64] | None,
) -> PropertyScore:
    """Return R² of what was said, or without it the mean of what is true."""

    def measure(chosen: NDArray[np.bool_]) -> float:
        if said is None:
            return float(truth[chosen].mean())
        error = float(np.mean((truth[chosen] - said[chosen]) ** 2))
        return 1 - error / max(float(np.var(truth[chosen])), 1e-12)

    every = np.ones(len(truth), bool)
    chosen = {str(one): kind == one for one in np.unique(kind)}
    told = {one: measure(part) for one, part in chosen.items() if part.sum() >= _FEWEST}
    return PropertyScore(name, len(truth), measure(every), told)
