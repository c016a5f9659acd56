"""How well the hidden units of two models pair off: slower than comparing codes, and surer.

The code of a model is a mean, in which pairs of units that have nothing to do with each other add
noise. Here each unit is given one partner of its own, by the assignment problem. Units of strangers
find partners too, the nearer the more there are to choose from and the more alike their data made
them; so what a candidate shows is held against what the other candidates of the same query show.

Source: matching neurons to compare networks, Ainsworth et al. 2023 (Git Re-Basin), ICLR; here on
codes that need no common order, and across all layers of a part at once. Median and median absolute
deviation as mean and deviation that a few relatives do not move: Hampel 1974, JASA 69.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from embedder.identity import CHANNEL_PARTS, KERNEL_PARTS, STREAMS, IdentityCoder, Tokens, unit_rows
from embedder.unit_codes import WIDTH

MOST = 512
"""Units of a part that are matched; the assignment of so many takes about 20 ms."""

COUNT = 100
"""Of the bases whose codes are nearest, so many are matched: the right one is among ten of them in
90 % at a drift of .6 to 1, among a hundred in all (folds 6 and 7, an encoder of folds 0 to 5)."""

_LEAST = 1e-3
"""Added to a deviation, so that candidates that show all the same show nothing."""

_TURNS = {part: part for part in KERNEL_PARTS} | dict(
    zip(CHANNEL_PARTS, ("first read", "last reach"), strict=True)
)
"""Part whose units are matched one by one → part whose weighing of directions it takes. What the
channels of a stream hold comes from the inputs, and what they do goes to the outputs."""

MATCHED = (*_TURNS, STREAMS)


def turned(parts: Mapping[str, Tokens], coder: IdentityCoder) -> dict[str, Tokens]:
    """Return the codes of units as the coder weighs their directions, of unit length.

    What streams begin with has no units: it becomes one row, its second moment against the mean's,
    which weighing has made that of the identity.
    """
    found = {}
    for part, weighed in _TURNS.items():
        codes = unit_rows(parts[part].codes @ coder.arrays[f"{weighed}/turn"])
        # Of too many, the same ones are taken in whatever order they come.
        chosen = np.argsort(-codes[:, 0])[:MOST] if len(codes) > MOST else slice(None)
        found[part] = Tokens(codes[chosen].astype(np.float32), parts[part].even[chosen])
    streams = parts[STREAMS].codes @ coder.arrays[f"{STREAMS}/turn"]
    moment = streams.T @ streams / max(float(np.sum(streams**2)), 1e-12) - np.eye(WIDTH) / WIDTH
    row = unit_rows(moment.reshape(1, -1)).astype(np.float32)
    there = int(len(streams) > 0)
    found[STREAMS] = Tokens(row[:there], np.zeros(there, bool))
    return found


def agreement(first: Mapping[str, Tokens], second: Mapping[str, Tokens]) -> NDArray[np.float64]:
    """Return how well the units of two models pair off in each part, (8,).

    It is the mean cosine of partners, NaN for a part that one of them lacks.

    Args:
        first: What `turned` returns.
        second: The same of the other model.

    Example:
        >>> from embedder.identity import untrained
        >>> units = np.eye(64, dtype=np.float32)
        >>> none = Tokens(np.zeros((0, 64), np.float32), np.zeros(0, bool))
        >>> parts = {part: none for part in MATCHED}
        >>> parts["heads"] = Tokens(units[:4], np.zeros(4, bool))
        >>> agreement(parts, {**parts, "heads": Tokens(units[3::-1], np.zeros(4, bool))})
        array([nan, nan, nan, nan,  1., nan, nan, nan])
    """
    found = np.full(len(MATCHED), np.nan)
    for place, part in enumerate(MATCHED):
        ours, theirs = first[part], second[part]
        if len(ours.even) and len(theirs.even):
            cosines = _cosines(ours, theirs)
            rows, columns = linear_sum_assignment(-cosines)
            found[place] = float(np.mean(cosines[rows, columns]))
    return found


def evidence(agreements: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how much each candidate stands out among those of one query, (candidates,).

    It is the sum over parts of the squared robust z-score, where that is positive: parts that
    training has moved say nothing, and do not hide one that it left alone.

    Args:
        agreements: (candidates, 8), what `agreement` returns for each.

    Example:
        >>> part = np.array([0.5, 0.3, 0.4, 0.4, 0.4])[:, None]
        >>> int(evidence(np.hstack([part, np.full((5, 7), np.nan)])).argmax())
        0
    """
    there = ~np.isnan(agreements)
    total = np.zeros(len(agreements))
    for part, known in zip(agreements.T, there.T, strict=True):
        if known.any():
            middle = np.median(part[known])
            spread = 1.4826 * np.median(np.abs(part[known] - middle)) + _LEAST
            total[known] += np.maximum((part[known] - middle) / spread, 0) ** 2
    return total


def _cosines(ours: Tokens, theirs: Tokens) -> NDArray[np.float32]:
    """Return the cosines of all units; their size where both stand for their negatives too."""
    cosines = ours.codes @ theirs.codes.T
    both = ours.even[:, None] & theirs.even[None, :]
    return np.where(both, np.abs(cosines), cosines)


def reranked(
    scores: NDArray[np.float32],
    queries: Sequence[Mapping[str, Tokens]],
    gallery: Sequence[Mapping[str, Tokens]],
    count: int = COUNT,
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
        shown = evidence(np.array([agreement(query, gallery[other]) for other in best]))
        found[place, best] = 2 + shown + scores[place, best]
    return found
