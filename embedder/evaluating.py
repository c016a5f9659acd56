"""How well codes find the parent of a model among many, scored the same way for every method.

Each query was made from a base: trained on, pruned, quantised, extended or more than one of these,
and may have been reordered and rescaled. All bases of the zoo, of all designs, are the gallery. A
query is answered right if its own base scores higher than every other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from embedder.families import Relative
from embedder.identity import unit_rows

BINS = (0.0, 0.3, 0.6, 1.0, 2.0)
"""Limits of relative drift between which recall is told apart."""

Scores = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Cell:
    """Recall within one group of queries.

    Args:
        group: Kind of network, or `all`.
        low: Least drift.
        high: Drift below which it lies.
        queries: How many.
        first: Share whose base came first.
        apart: The same without the bases that were trained apart from the random start of the right
            one: weights alone do not always tell these from it.
        ten: Share whose base was among the first ten.
        twins: Share of those with twins whose base scored above all other seeds of its recipe.
    """

    group: str
    low: float
    high: float
    queries: int
    first: float
    apart: float
    ten: float
    twins: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Queries, and the bases among which their own has to be found.

    Args:
        queries: Models that are asked about.
        gallery: All bases.
        right: (queries,) place of each query's base in the gallery.
    """

    queries: Sequence[Relative]
    gallery: Sequence[Relative]
    right: NDArray[np.intp]


def task_of(relatives: Sequence[Relative], tests: Sequence[bool]) -> Task:
    """Return the queries among some models, and all bases as the gallery.

    Args:
        relatives: All models.
        tests: Which of them may be asked about.
    """
    gallery = [relative for relative in relatives if relative.is_base]
    place = {relative.row["id"]: number for number, relative in enumerate(gallery)}
    queries = [
        relative
        for relative, test in zip(relatives, tests, strict=True)
        if test and relative.is_query and relative.row["family"] in place
    ]
    right = np.array([place[relative.row["family"]] for relative in queries], np.intp)
    return Task(queries, gallery, right)


def score(task: Task, scores: Scores, groups: Sequence[str] | None = None) -> list[Cell]:
    """Return recall by group and drift.

    Args:
        task: What was asked.
        scores: (queries, gallery), larger for nearer; NaN counts as the farthest.
        groups: Of each query; its kind of network by default.
    """
    scores = np.nan_to_num(scores, nan=-np.inf)
    own = scores[np.arange(len(task.queries)), task.right]
    # A tie is no answer: whoever scores as high counts as before.
    before = scores >= own[:, None]
    ranks = before.sum(axis=1)
    apart = (before & ~shares_start(task)).sum(axis=1)
    beaten = _twins_beaten(task, scores, own)
    drift = np.array([query.drift for query in task.queries])
    group = np.array(groups or [query.row["kind"] for query in task.queries])
    cells = []
    for name in (*sorted(set(group)), "all"):
        for low, high in pairwise(BINS):
            chosen = (drift >= low) & (drift < high) & ((group == name) | (name == "all"))
            if chosen.any():
                told = beaten[chosen]
                told = told[~np.isnan(told)]
                cells.append(
                    Cell(
                        name,
                        low,
                        high,
                        int(chosen.sum()),
                        float((ranks[chosen] == 1).mean()),
                        float((apart[chosen] == 1).mean()),
                        float((ranks[chosen] <= 10).mean()),
                        float(told.mean()) if len(told) else None,
                    )
                )
    return cells


def shares_start(task: Task) -> NDArray[np.bool_]:
    """Return which other bases share the random start of each query's own, (queries, gallery)."""
    starts = np.array([base.member.start for base in task.gallery])
    shared = (starts == starts[task.right][:, None]) & (starts != "")
    shared[np.arange(len(task.right)), task.right] = False
    return np.asarray(shared)


def _twins_beaten(task: Task, scores: Scores, own: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return for each query whether its base scores above the base's twins; NaN without twins."""
    recipes: dict[str, list[int]] = {}
    for place, base in enumerate(task.gallery):
        recipes.setdefault(base.row["recipe_group"], []).append(place)
    beaten = np.full(len(task.queries), np.nan)
    for number, right in enumerate(task.right):
        twins = recipes[task.gallery[right].row["recipe_group"]]
        others = [place for place in twins if place != right]
        if others:
            beaten[number] = float(own[number] > scores[number, others].max())
    return beaten


def cosines(codes: NDArray[np.float32], gallery: NDArray[np.float32]) -> Scores:
    """Return the cosine of each row with each row of the gallery."""
    return np.asarray(unit_rows(codes) @ unit_rows(gallery).T, np.float32)
