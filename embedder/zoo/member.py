"""One network of the zoo: its weights, how it was made, and from whom."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from embedder.zoo.designs import Config
from embedder.zoo.nets import Array
from embedder.zoo.recipes import Examples, Recipe


@dataclass(slots=True, eq=False)
class Member:
    """One network and its descent.

    Args:
        id: Unique in the zoo.
        config: Its design.
        weights: Name → values.
        recipe: How it was trained last.
        examples: On what.
        role: `base`, `checkpoint`, `child`, `copy`, `student`, `control` or `stranger`.
        operation: What was done to the parent; `train` for a base.
        relation: The word of the manual for what it is to its first parent; empty for a base.
        parents: Identifiers, the nearest first.
        teacher: Whose answers it learned, if it did.
        family: Identifier of the base that it descends from.
        group: The recipe that it descends from; other seeds of a recipe share it.
        start_seed: Of the random start that it descends from.
        start_law: How that start was drawn.
        start_scale: How large it was drawn.
        generation: Steps from the base.
        drift: ‖Y − X‖ / ‖X‖ over matrices and kernels that it shares with its first parent, a head
            that was drawn anew left out.
        diverged: Whether its training did.
        factor: In a control set, what differs from the reference.
    """

    id: str
    config: Config
    weights: dict[str, Array]
    recipe: Recipe
    examples: Examples
    role: str
    operation: str
    family: str
    group: str
    start_seed: int
    start_law: str = "uniform"
    start_scale: float = 1.0
    relation: str = ""
    parents: tuple[str, ...] = ()
    teacher: str = ""
    generation: int = 0
    drift: float | None = None
    diverged: bool = False
    factor: str = ""
    labels: dict[str, float | None] = field(default_factory=dict)


def drift_between(
    parent: Mapping[str, Array], child: Mapping[str, Array], *, but: Sequence[str] = ()
) -> float | None:
    """Return ‖Y − X‖ / ‖X‖ over the matrices and kernels that both have; None if none is shared.

    Args:
        parent: Name → values.
        child: Name → values.
        but: Names that are left out, such as those of a head that was drawn anew.

    Example:
        >>> x, y = {"w": np.full((2, 2), 2, np.float32)}, {"w": np.full((2, 2), 3, np.float32)}
        >>> drift_between(x, y)
        0.5
    """
    names = [
        name
        for name, x in parent.items()
        if x.ndim > 1 and name not in but and name in child and child[name].shape == x.shape
    ]
    if not names:
        return None
    x = np.concatenate([parent[name].ravel() for name in names]).astype(np.float64)
    y = np.concatenate([child[name].ravel() for name in names]).astype(np.float64)
    length = float(np.linalg.norm(x))
    return float(np.linalg.norm(y - x) / length) if length else None
