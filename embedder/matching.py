"""How well the hidden units of two models pair off: slower than comparing codes, and surer.

The code of a model is a mean, in which pairs of units that have nothing to do with each other add
noise. Here each unit is given one partner of its own, by the assignment problem, so that relatives
stand out among the few that a search by codes has found.

Source: matching neurons to compare networks, Ainsworth et al. 2023 (Git Re-Basin), ICLR; here on
codes that need no common order, and across all layers of a part at once.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from embedder.identity import KERNEL_PARTS, IdentityCoder, Tokens, unit_rows

MOST = 512
"""Units of a part that are matched; the assignment of so many takes about 20 ms."""


def turned(parts: Mapping[str, Tokens], coder: IdentityCoder) -> dict[str, Tokens]:
    """Return the codes of units as the coder weighs their directions, of unit length."""
    found = {}
    for part in KERNEL_PARTS:
        codes = parts[part].codes[:MOST] @ coder.arrays[f"{part}/turn"]
        found[part] = Tokens(unit_rows(codes).astype(np.float32), parts[part].even[:MOST])
    return found


def agreement(first: Mapping[str, Tokens], second: Mapping[str, Tokens]) -> float:
    """Return how well the units of two models pair off, 0 to 1.

    It is the mean over parts of the mean squared cosine of partners, each part weighted by the
    root of its number of pairs, as means of more pairs are surer. Squares count a few units that
    stayed as they were above many that are a little alike.

    Args:
        first: What `turned` returns.
        second: The same of the other model.

    Example:
        >>> from embedder.identity import untrained
        >>> units = np.eye(64, dtype=np.float32)
        >>> none = Tokens(np.zeros((0, 64), np.float32), np.zeros(0, bool))
        >>> parts = {part: none for part in KERNEL_PARTS}
        >>> parts["heads"] = Tokens(units[:4], np.zeros(4, bool))
        >>> agreement(parts, {**parts, "heads": Tokens(units[3::-1], np.zeros(4, bool))})
        1.0
    """
    total = weights = 0.0
    for part in KERNEL_PARTS:
        ours, theirs = first[part], second[part]
        if len(ours.even) and len(theirs.even):
            cosines = _cosines(ours, theirs)
            weight = float(np.sqrt(min(cosines.shape)))
            rows, columns = linear_sum_assignment(-cosines)
            total += weight * float(np.mean(np.maximum(cosines[rows, columns], 0) ** 2))
            weights += weight
    return total / weights if weights else 0.0


def _cosines(ours: Tokens, theirs: Tokens) -> NDArray[np.float32]:
    """Return the cosines of all units; their size where both stand for their negatives too."""
    cosines = ours.codes @ theirs.codes.T
    both = ours.even[:, None] & theirs.even[None, :]
    return np.where(both, np.abs(cosines), cosines)


def reranked(
    scores: NDArray[np.float32],
    queries: Sequence[Mapping[str, Tokens]],
    gallery: Sequence[Mapping[str, Tokens]],
    count: int = 10,
) -> NDArray[np.float32]:
    """Return scores in which the best of each query are ordered by how their units pair off.

    Args:
        scores: (queries, gallery) cosines of codes.
        queries: What `turned` returns for each.
        gallery: The same.
        count: How many of the best are matched; they stay before all others.
    """
    found = scores.copy()
    for place, query in enumerate(queries):
        best = np.argsort(-scores[place])[:count]
        found[place, best] = [1 + agreement(query, gallery[other]) for other in best]
    return found
