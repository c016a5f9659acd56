"""Undo rotations of residual streams, and other bases of the channels of heads.

Both leave what a transformer computes as it is (`embedder.rotation`) and every weight another
number. Hidden units are in order by then, so what they write into a stream, and what the words and
positions do, has to agree up to the rotation; once that is undone, each head has to agree up to a
basis of its own.

Sources: Schönemann 1966, Psychometrika 31 (orthogonal Procrustes problem). A basis from both sides
of a head is our own.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedder.architecture import Architecture, Op, Step
from embedder.rotation import (
    Matrix,
    axes_of_stream,
    axis_of_heads,
    channels_of,
    is_uniform,
    pairs_of,
    pairwise,
    turns,
    with_bases,
    with_stream_turned,
)
from embedder.symmetry import Values, folded, multiplied

AS_IT_IS, TURNED = 0.5, 0.5
"""Weights were turned if their cosine as they are is below this share of what it is once they are
turned, and that is above the second number. Of 250 children of the zoo's transformers, to a drift
of .6, one attention or stream in a hundred that was not turned has a share below .97, and one that
was above .19. Of strangers one in twenty comes to a cosine of .33 in its heads, and .65 in its
streams; but hidden units have to be partners before anything is turned."""


@dataclass(frozen=True, slots=True, eq=False)
class Turning:
    """The second of two models, turned as the first is.

    Args:
        weights: Its weights.
        turned: Whether any were turned.
        plain: Which of the two, `first` or `second`, has streams that were not rotated; empty where
            that cannot be told.
    """

    weights: dict[str, Values]
    turned: bool = False
    plain: str = ""


def turned_back(
    ours: Mapping[str, Values], theirs: dict[str, Values], architecture: Architecture
) -> Turning:
    """Return the second model's weights turned as the first's are.

    What was not turned is left as it is: to turn it nonetheless would hide what training did.

    Args:
        ours: The weights of the first model, by the names of the second's, of the same shapes.
        theirs: Those of the second, whose hidden units and heads lie in the first's order.
        architecture: What the second's axes mean.
    """
    attentions = [step for step in architecture.steps if step.op is Op.ATTENTION]
    if not attentions or not _are_finite(theirs):
        return Turning(theirs)
    with np.errstate(over="ignore", invalid="ignore"):
        plain = folded(theirs, architecture)  # as whoever turned it did first
        streams = _streams_turned_back(ours, plain, architecture)
        found = before = _with_gains_of(ours, streams, architecture)
        for step in attentions:
            if all(name in ours for name in step.tensors.values()):
                found = _heads_turned_back(ours, found, architecture, step)
    rotated = streams is not plain
    if not (rotated or found is not before) or not _are_finite(found):
        return Turning(theirs)
    return Turning(found, True, _not_rotated(ours, theirs, architecture) if rotated else "")


def _not_rotated(
    ours: Mapping[str, Values], theirs: Mapping[str, Values], architecture: Architecture
) -> str:
    """Return which of two models was not rotated: the one that still has gains."""
    gains = [step.tensors.get("gain", "") for step in architecture.steps if step.kind == "rms"]
    known = [gain for gain in gains if gain in ours]
    folded_sides = [all(is_uniform(side[gain]) for gain in known) for side in (ours, theirs)]
    if folded_sides[0] == folded_sides[1]:
        return ""
    return "second" if folded_sides[0] else "first"


def _are_finite(weights: Mapping[str, Values]) -> bool:
    return all(bool(np.isfinite(values).all()) for values in weights.values())


def _with_gains_of(
    ours: Mapping[str, Values], theirs: dict[str, Values], architecture: Architecture
) -> dict[str, Values]:
    """Return the second's weights with the first's gains, where one side's were folded.

    Whoever turns a stream folds them first, into what reads it.
    """
    factors = {}
    for step in architecture.steps:
        gain = step.tensors.get("gain", "")
        if step.op is Op.NORM and step.target != step.source and gain in ours:
            known, other = ours[gain].astype(np.float64), theirs[gain].astype(np.float64)
            if is_uniform(known) != is_uniform(other):
                told = (known != 0) & (other != 0)
                factors[step.target] = np.where(told, known, 1) / np.where(told, other, 1)
    return multiplied(theirs, architecture, factors)


# ------------------------------------------------------------------ streams


def _streams_turned_back(
    ours: Mapping[str, Values], theirs: dict[str, Values], architecture: Architecture
) -> dict[str, Values]:
    """Return the second's weights, whose norms were folded, with its streams as the first's."""
    found = theirs
    for root in architecture.groups:
        if turns(theirs, architecture, root):
            rotation = _rotation(ours, theirs, architecture, root)
            if rotation is not None:
                found = with_stream_turned(found, architecture, root, rotation)
    return found


def _rotation(
    ours: Mapping[str, Values], theirs: Mapping[str, Values], architecture: Architecture, root: str
) -> Matrix | None:
    """Return the rotation from the second's stream to the first's; None where none was turned."""
    size = architecture.groups[root].size
    moment, energy = np.zeros((size, size)), np.zeros(2)
    for one, other in _written(ours, theirs, architecture, root):
        moment += one @ other.T
        energy += np.sum(one**2), np.sum(other**2)
    if not np.isfinite(moment).all() or not energy.all():
        return None
    left, agreed, right = np.linalg.svd(moment)
    lengths = float(np.sqrt(energy).prod())
    turned = _were_turned(float(np.trace(moment)) / lengths, float(agreed.sum()) / lengths)
    return left @ right if turned else None


def _were_turned(as_they_are: float, turned: float) -> bool:
    """Say by two cosines whether weights were turned."""
    return turned > TURNED and as_they_are < AS_IT_IS * turned


def _written(
    ours: Mapping[str, Values], theirs: Mapping[str, Values], architecture: Architecture, root: str
) -> Iterator[tuple[Matrix, Matrix]]:
    """Yield what is written into a stream from units in a known order, (channels, units) each.

    Heads have bases of their own, and what reads the stream does so through gains.
    """
    heads = {step.inside for step in architecture.steps if step.op is Op.ATTENTION}
    for name, place, axis in axes_of_stream(architecture, root):
        others = {other.group for other in architecture.axes[name] if other is not None}
        if name in ours and axis.group == root and not others & heads:
            one, other = (
                np.moveaxis(side[name], place, 0)
                .reshape(side[name].shape[place], -1)
                .astype(np.float64)
                for side in (ours, theirs)
            )
            yield one, other


# ------------------------------------------------------------------ heads


def _heads_turned_back(
    ours: Mapping[str, Values], theirs: dict[str, Values], architecture: Architecture, step: Step
) -> dict[str, Values]:
    """Return the second's weights with the channels of an attention's heads in the first's basis.

    Queries and keys, and values and outputs, are told apart: one of the two may be as it was.
    """
    known, other = (_sides(side, architecture, step) for side in (ours, theirs))
    pairs = (("key", "query", step.rotary), ("value", "output", False))
    bases = [
        None
        if step.fixed and one == "key"
        else _bases((known[one], other[one]), (known[two], other[two]), rotary, step.interleaved)
        for one, two, rotary in pairs
    ]
    if all(basis is None for basis in bases):
        return theirs
    heads, channels, _ = known["key"].shape
    same = np.broadcast_to(np.eye(channels), (heads, channels, channels))
    keys, values = (same if basis is None else basis for basis in bases)
    return with_bases(theirs, architecture, step, keys, values)


_JOINT = ("query", "key", "value")


def _sides(
    weights: Mapping[str, Values], architecture: Architecture, step: Step
) -> dict[str, Matrix]:
    """Return queries, keys, values and outputs, (key heads, channels, all that goes with them)."""
    channels = channels_of(architecture, step)
    size = architecture.groups[step.inside].size
    found: dict[str, list[Matrix]] = {}
    for role, name in step.tensors.items():
        if role == "output_bias":
            continue
        place, axis = axis_of_heads(architecture, step, role)
        front = np.moveaxis(weights[name], place, 0).astype(np.float64)
        parts = front.reshape(axis.before, size, axis.inner // channels, channels, -1)
        base = role.removesuffix("_bias")
        if base == "joint" and step.by_head:
            parts = parts.swapaxes(0, 2)
        for use, part in zip(_JOINT if base == "joint" else (base,), parts, strict=True):
            # Queries that share a key share its basis: they stand side by side.
            beside = part.transpose(0, 2, 1, 3).reshape(size, channels, -1)
            found.setdefault(use, []).append(beside)
    return {use: np.concatenate(parts, axis=2) for use, parts in found.items()}


def _bases(
    these: tuple[Matrix, Matrix], those: tuple[Matrix, Matrix], rotary: bool, interleaved: bool
) -> Matrix | None:
    """Return the basis B that the second's heads are given; None where theirs is the first's.

    B · K' = K and Bᵀ · Q = Q' tell it together, so that what is weak on one side is told by the
    other.

    Args:
        these: Keys, or values, of the first and of the second: K and K', (heads, channels, n).
        those: Queries, or outputs, which take the transposed inverse: Q and Q'.
        rotary: Whether only pairs of channels may be turned and stretched.
        interleaved: Which two are a pair.
    """
    channels = these[0].shape[1]
    with np.errstate(all="ignore"):  # heads that were cut off keep their basis
        if rotary:
            factors = _pair_factors(these, those, interleaved)
            bases = pairwise(factors, channels, interleaved=interleaved)
        else:
            bases = _whole_bases(these, those)
        back = _inverse(bases).transpose(0, 2, 1)
        scales = _balance(these[0], bases @ these[1], back @ those[1], those[0])
        bases, back = bases * scales, back / scales
    lost = ~(np.isfinite(bases) & np.isfinite(back)).all(axis=(1, 2))
    bases[lost] = back[lost] = np.eye(channels)
    turned = _cosine((these[0], bases @ these[1], those[0], back @ those[1]))
    return bases if _were_turned(_cosine((*these, *those)), turned) else None


def _whole_bases(these: tuple[Matrix, Matrix], those: tuple[Matrix, Matrix]) -> Matrix:
    """Return what is nearest to both, B · K'K'ᵀ + QQᵀ · B = KK'ᵀ + QQ'ᵀ, for each head."""
    from scipy.linalg import solve_sylvester

    found = np.full((*these[0].shape[:2], these[0].shape[1]), np.nan)
    for place, (keys, others, queries, asked) in enumerate(zip(*these, *those, strict=True)):
        sides = queries @ queries.T, others @ others.T, keys @ others.T + queries @ asked.T
        if all(np.isfinite(side).all() for side in sides):
            found[place] = solve_sylvester(*sides)
    return found


def _pair_factors(
    these: tuple[Matrix, Matrix], those: tuple[Matrix, Matrix], interleaved: bool
) -> NDArray[np.complex128]:
    """Return the same for pairs of channels as complex numbers, (heads, pairs)."""
    first, second = pairs_of(these[0].shape[1], interleaved=interleaved)
    keys, others, queries, asked = (
        side[:, first] + 1j * side[:, second] for side in (*these, *those)
    )
    agreed = np.sum(keys * others.conj(), axis=2) + np.sum(queries * asked.conj(), axis=2)
    own = np.sum(np.abs(others) ** 2, axis=2) + np.sum(np.abs(queries) ** 2, axis=2)
    return np.asarray(agreed / own, np.complex128)


def _balance(keys: Matrix, others: Matrix, asked: Matrix, queries: Matrix) -> Matrix:
    """Return what makes both sides of each head as much too long, or too short, as the other.

    Least squares makes the one too short, the more the further the two have drifted apart.
    """
    lengths = [np.linalg.norm(side, axis=(1, 2)) for side in (keys, others, asked, queries)]
    found = np.sqrt(lengths[0] / lengths[1] * lengths[2] / lengths[3])
    return np.asarray(np.where(np.isfinite(found) & (found > 0), found, 1))[:, None, None]


def _inverse(matrices: Matrix) -> Matrix:
    """Return the inverse of each matrix; of those that have none, what is not finite."""
    found = np.full(matrices.shape, np.nan)
    for place, matrix in enumerate(matrices):
        if np.isfinite(matrix).all():
            with suppress(np.linalg.LinAlgError):
                found[place] = np.linalg.inv(matrix)
    return found


def _cosine(sides: tuple[Matrix, Matrix, Matrix, Matrix]) -> float:
    """Return the cosine of what one model has with what the other has, of two pairs together."""
    one, other, more, others = sides
    product = np.sum(one * other) + np.sum(more * others)
    lengths = (np.sum(one**2) + np.sum(more**2)) * (np.sum(other**2) + np.sum(others**2))
    return float(product / max(np.sqrt(lengths), 1e-300))
