"""How well the hidden units of two models pair off: slower than comparing codes, and surer.

The code of a model is a mean, in which pairs of units that have nothing to do with each other add
noise. Here each unit is given one partner of its own, by the assignment problem. Units of strangers
find partners too, the nearer the more there are to choose from and the more alike their data made
them; so what a candidate shows is held against what the other candidates of the same query show.

Source: matching neurons to compare networks, Ainsworth et al. 2023 (Git Re-Basin), ICLR; here on
codes that need no common order, and across all layers of a part at once. Median and median absolute
deviation as mean and deviation that a few relatives do not move: Hampel 1974, JASA 69.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from embedder.identity import CHANNEL_PARTS, KERNEL_PARTS, STREAMS, IdentityCoder, Tokens, unit_rows
from embedder.unit_codes import WIDTH

MOST = 512
"""Units of a part of the model that is asked about that are matched."""

KEPT = 64
"""Units of a part that a catalogue keeps of a model, 65 bytes each. To give each of them a partner
takes .2 ms among as many strangers and .4 ms among `MOST`; of 128 it would be .6 and .9."""

COUNT = 100
"""Of the bases whose codes are nearest, so many are matched: the right one is among ten of them in
90 % at a drift of .6 to 1, among a hundred in all (folds 6 and 7, an encoder of folds 0 to 5)."""

_READ = ("first read", "deep read", "channels read")
"""Parts that tell partners by what they read; the last may be missing, or rotated."""

FEWEST = 24
"""Pairs of units that can tell kin from strangers."""

MARGIN = 0.3
"""Margin above which two models are no strangers: of 36,679 pairs of other starts in a zoo none
lies above .276, and of 1,589 children to a drift of .3 all but three do
(`benchmarks/results/alignment.json`). It was chosen on folds 6 and 7, with an encoder of folds 0 to
5, where the largest was .25."""

_LEAST_APART = 0.05
"""Distance of units within a model by which margins are measured at least: nearer ones are
duplicates, which tell nothing."""

_LEAST = 1e-3
"""Added to a deviation, so that candidates that show all the same show nothing."""

_LOOKED_AT, _WEIGHT = 12, 100
"""Of so many candidates that stand out most the margin is looked at too, and how much it weighs, up
to `MARGIN`: above it tells kin from strangers, and not which of several kin is nearer. On folds 6
and 7, with an encoder of folds 0 to 5, .981 of the bases at a drift of .6 to 1 come first and .864
at 1 to 2 (worst kinds .90 and .77); with margins that count in full .977 and .864 (.90 and .77)."""

_TURNS = {part: part for part in KERNEL_PARTS} | dict(
    zip(CHANNEL_PARTS, ("first read", "last reach"), strict=True)
)
"""Part whose units are matched one by one → part whose weighing of directions it takes. What the
channels of a stream hold comes from the inputs, and what they do goes to the outputs."""

MATCHED = (*_TURNS, STREAMS)
_WIDTHS = {**dict.fromkeys(_TURNS, WIDTH), STREAMS: WIDTH**2}
"""Part → numbers of one row of it."""


def turned(parts: Mapping[str, Tokens], coder: IdentityCoder) -> dict[str, Tokens]:
    """Return the codes of units as the coder weighs their directions, of unit length.

    What streams begin with has no units: it becomes one row, its second moment against the mean's,
    which weighing has made that of the identity.
    """
    found = {}
    for part, weighed in _TURNS.items():
        codes = unit_rows(parts[part].codes @ coder.arrays[f"{weighed}/turn"])
        found[part] = _some(Tokens(codes.astype(np.float32), parts[part].even), MOST)
    streams = parts[STREAMS].codes @ coder.arrays[f"{STREAMS}/turn"]
    moment = streams.T @ streams / max(float(np.sum(streams**2)), 1e-12) - np.eye(WIDTH) / WIDTH
    row = unit_rows(moment.reshape(1, -1)).astype(np.float32)
    there = int(len(streams) > 0)
    found[STREAMS] = Tokens(row[:there], np.zeros(there, bool))
    return found


def _some(tokens: Tokens, count: int) -> Tokens:
    """Return so many units at most, the same ones in whatever order and sign they come."""
    if len(tokens.even) <= count:
        return tokens
    height = np.where(tokens.even, np.abs(tokens.codes[:, 0]), tokens.codes[:, 0])
    chosen = np.argsort(-height)[:count]
    return Tokens(tokens.codes[chosen], tokens.even[chosen])


def of_pieces(pieces: Iterable[Mapping[str, Tokens]]) -> dict[str, Tokens]:
    """Return as one what `turned` returns for the pieces of a large model; streams come in one."""
    found: dict[str, Tokens] = {}
    for piece in pieces:
        for part, tokens in piece.items():
            before = found.get(part, tokens)
            if before is not tokens:
                codes = np.concatenate([before.codes, tokens.codes])
                tokens = _some(Tokens(codes, np.concatenate([before.even, tokens.even])), MOST)
            found[part] = tokens
    return found


def packed(units: Mapping[str, Tokens]) -> bytes:
    """Return units as a catalogue keeps them, `KEPT` of a part at most.

    That is how many each part of `MATCHED` has, in 16 bits each, then which of them stand for
    their negatives too, in a byte each, then their numbers, in a byte each of what the largest
    number of its row is 127.

    Args:
        units: What `turned` returns.
    """
    kept = [_some(units[part], KEPT) for part in MATCHED]
    counts = np.array([len(tokens.even) for tokens in kept], "<u2")
    even = np.concatenate([tokens.even for tokens in kept]).astype(np.uint8)
    rows = []
    for tokens in kept:
        largest = np.abs(tokens.codes).max(axis=1, keepdims=True, initial=1e-12)
        rows.append(np.rint(tokens.codes * (127 / largest)).astype(np.int8).tobytes())
    return b"".join([counts.tobytes(), even.tobytes(), *rows])


def unpacked(body: bytes) -> dict[str, Tokens]:
    """Return units from what `packed` made of them.

    Raises:
        ValueError: It made something else.

    Example:
        >>> units = {part: Tokens(np.eye(2, 64, dtype=np.float32), np.zeros(2, bool))
        ...          for part in MATCHED[:-1]}
        >>> units[STREAMS] = Tokens(np.zeros((0, 4096), np.float32), np.zeros(0, bool))
        >>> float(agreement(units, unpacked(packed(units)))[0])
        1.0
    """
    counts, begin = [], 2 * len(MATCHED)
    if len(body) >= begin:
        counts = np.frombuffer(body, "<u2", len(MATCHED)).tolist()
    start = begin + sum(counts)
    sizes = [count * _WIDTHS[part] for part, count in zip(MATCHED, counts, strict=False)]
    if not counts or len(body) != start + sum(sizes):
        raise ValueError("holds no units of this version")
    even = np.frombuffer(body, np.uint8, sum(counts), begin) != 0
    found = {}
    for part, count, size in zip(MATCHED, counts, sizes, strict=True):
        rows = np.frombuffer(body, np.int8, size, start).reshape(count, _WIDTHS[part])
        found[part] = Tokens(unit_rows(rows.astype(np.float32)), even[:count])
        start, even = start + size, even[count:]
    return found


def counts_of(units: Mapping[str, Tokens]) -> tuple[int, ...]:
    """Return how many units of each part of `MATCHED` a catalogue keeps of a model."""
    return tuple(min(len(units[part].even), KEPT) for part in MATCHED)


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
    from scipy.optimize import linear_sum_assignment  # half a second, for who matches units

    found = np.full(len(MATCHED), np.nan)
    for place, part in enumerate(MATCHED):
        ours, theirs = first[part], second[part]
        if len(ours.even) and len(theirs.even):
            cosines = _cosines(ours, theirs)
            rows, columns = linear_sum_assignment(-cosines)
            found[place] = float(np.mean(cosines[rows, columns]))
    return found


def margin(first: Mapping[str, Tokens], second: Mapping[str, Tokens]) -> float:
    """Return how much nearer units of two models are to their partners than to any other unit.

    It is 1 for a copy and about 0 for strangers: their units find partners too, but others are as
    near. That needs no comparison with other models, and no law of chance.

    Partners are told by what units read, which stays longer than what they do: a new head changes
    all of that. The cosine with the partner less the largest with another is averaged over units,
    from whichever side it is smaller, and measured by what it is within the two models, where each
    unit is its own partner: units that data made alike cannot stand out far. The channels of
    streams count or, as these may have been rotated, do not; signs are as they are, or left open.
    0 where there are fewer than `FEWEST` pairs.

    Args:
        first: What `turned` returns.
        second: The same of the other model.

    Example:
        >>> units = Tokens(np.eye(64, dtype=np.float32)[:24], np.zeros(24, bool))
        >>> one = dict.fromkeys(MATCHED, Tokens(units.codes[:0], units.even[:0]))
        >>> one["deep read"] = units
        >>> other = {**one, "deep read": Tokens(units.codes[::-1], units.even)}
        >>> margin(one, other)
        1.0
    """
    return max(_margin(first, second, signless, standing_apart) for signless in (False, True))


def margin_of_kin(first: Mapping[str, Tokens], second: Mapping[str, Tokens]) -> float:
    """Return the margin of two models, or 0 if it is not above `MARGIN`.

    No partner stands out further than the nearest unit does from the second nearest. That takes no
    assignment and tells most strangers; scipy, which makes assignments, takes a quarter of a second
    to import.

    Args:
        first: What `turned` returns.
        second: The same of the other model.
    """
    most = max(_margin(first, second, signless, _nearest_apart) for signless in (False, True))
    told = margin(first, second) if most > MARGIN else 0.0
    return told if told > MARGIN else 0.0


def _margin(
    first: Mapping[str, Tokens],
    second: Mapping[str, Tokens],
    signless: bool,
    apart: Callable[[NDArray[np.floating]], NDArray[np.float64]],
) -> float:
    """Return the margin with signs as they are, or left open, by how far partners stand apart."""

    def cosines(one: Tokens, other: Tokens) -> NDArray[np.float32]:
        found = _cosines(one, other)
        return np.abs(found) if signless else found

    between, within, count = np.zeros(2), np.zeros(2), 0
    found = []
    for part in _READ:
        ours, theirs = first[part], second[part]
        pairs = min(len(ours.even), len(theirs.even))
        if pairs > 1:
            between += pairs * apart(cosines(ours, theirs))
            within += [pairs * _apart_within(cosines(side, side)) for side in (ours, theirs)]
            count += pairs
        if count >= FEWEST:
            found.append(float(between.min() / max(within.mean(), _LEAST_APART * count)))
    return max(found, default=0.0)


def standing_apart(cosines: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return by how much partners are nearer than all others, on average from each side, (2,).

    Args:
        cosines: (units of one model, units of the other), two at least on both sides.
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(-cosines)
    own = cosines[rows, columns]
    others = cosines.copy()
    others[rows, columns] = -1
    nearest = others.max(axis=1)[rows], others.max(axis=0)[columns]
    return np.array([np.mean(own - other, dtype=np.float64) for other in nearest])


def _nearest_apart(cosines: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return what `standing_apart` cannot exceed: how far the nearest are from the next nearest."""
    pairs = min(cosines.shape)
    found = []
    for rows in (cosines, cosines.T):
        second, first = np.partition(rows, -2, axis=1)[:, -2:].T
        found.append(np.sort(first - second)[-pairs:].mean(dtype=np.float64))
    return np.array(found)


def _apart_within(cosines: NDArray[np.float32]) -> float:
    """Return how far units of one model are from the nearest other, on average."""
    others = cosines.copy()
    np.fill_diagonal(others, -1)
    return float(1 - others.max(axis=1).mean(dtype=np.float64))


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


def standing_out(
    query: Mapping[str, Tokens],
    others: Sequence[Mapping[str, Tokens]],
    cosines: NDArray[np.floating],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return how much each of some models stands out among them, and its margin, (others,) both.

    Margins are those of the twelve that stand out most; up to `MARGIN` they count in how much they
    do. Of others the margin is 0.

    Args:
        query: What `turned` returns for the model that is asked about.
        others: The same of those it is compared with.
        cosines: (others,) of the codes of models: they decide where units say nothing.
    """
    shown = evidence(np.array([agreement(query, other) for other in others]))
    margins = np.zeros(len(others))
    for place in np.argsort(-shown)[:_LOOKED_AT]:
        margins[place] = margin(query, others[place])
    return shown + _WEIGHT * np.clip(margins, 0, MARGIN) + cosines, margins


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
        shown, _ = standing_out(query, [gallery[other] for other in best], scores[place, best])
        found[place, best] = 2 + shown  # a cosine is at most 1
    return found
