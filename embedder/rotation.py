"""Rotations of residual streams, and other bases for the channels of heads.

Both leave a transformer's function as it is. Quantisers rotate streams so that no channel stands
out; who wants to hide where a model came from may do so too.

Sources: Ashkboos et al. 2024, ICLR, SliceGPT, and Ashkboos et al. 2024, NeurIPS, QuaRot (rotation
of a residual stream).
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from embedder.architecture import Architecture, Axis, Gauge, Op, Step
from embedder.errors import ArchitectureError
from embedder.symmetry import Values, Weights, axes_of, folded

Matrix = NDArray[np.float64]

_STRETCH = 0.25
"""Standard deviation of the logarithm by which the channels of a head are stretched at random: its
matrices multiply in float32."""


def rotated(
    weights: Weights, architecture: Architecture, rng: np.random.Generator
) -> dict[str, Values]:
    """Return the weights with residual streams and the channels of heads rotated at random.

    Norms are folded first. A residual stream turns where all that reads it in place are
    root-mean-square norms whose gains could be folded; others stay. Query and key of a head take
    a random matrix and its inverse, under rotary positions a rotation and a scale for each pair of
    channels; value and output take another one.

    Raises:
        ArchitectureError: The weights are not those described, or hold NaN.
    """
    result = folded(weights, architecture)
    for root in architecture.groups:
        if turns(result, architecture, root):
            rotation = _orthogonal(rng, architecture.groups[root].size)
            result = with_stream_turned(result, architecture, root, rotation)
    for step in architecture.steps:
        if step.op == Op.ATTENTION:
            keys, values = _random_bases(architecture, step, rng)
            result = with_bases(result, architecture, step, keys, values)
    return result


def turns(weights: Weights, architecture: Architecture, root: str) -> bool:
    """Say whether any rotation of a group's units, and of those tied to it, is a symmetry."""
    tied = {name for name in architecture.groups if architecture.root(name) == root}
    if root not in tied:
        return False
    groups = [architecture.groups[name] for name in tied]
    touching = [step for step in architecture.steps if {step.source, step.target} & tied]
    norms = [step for step in touching if step.op == Op.NORM]
    plain = all(group.activation == "linear" and group.gauge != Gauge.NAMED for group in groups)
    whole = all(
        axis.before == axis.inner == 1 for _, _, axis in axes_of(architecture) if axis.group in tied
    )
    known = {Op.LINEAR, Op.EMBEDDING, Op.GATED, Op.ATTENTION, Op.NORM}
    return (
        plain
        and whole
        and bool(norms)
        and all(step.op in known for step in touching)
        and all(_has_no_gain(weights, step) for step in norms)
    )


def _has_no_gain(weights: Weights, norm: Step) -> bool:
    """Say whether a norm is a root-mean-square norm that treats all units alike."""
    if norm.kind != "rms" or set(norm.tensors) - {"gain"}:
        return False
    gain = norm.tensors.get("gain")
    return gain is None or is_uniform(weights[gain])


def is_uniform(gain: Values) -> bool:
    """Say whether a norm multiplies all channels alike."""
    return bool(np.all(gain == gain.flat[0]))


def with_stream_turned(
    weights: Weights, architecture: Architecture, root: str, rotation: Matrix
) -> dict[str, Values]:
    """Return the weights with one residual stream turned; it keeps the function if it `turns`.

    Args:
        weights: Name → values.
        architecture: Says which axes hold the stream's channels.
        root: The stream.
        rotation: (channels, channels), from old channels to new ones.
    """
    result = dict(weights)
    for name, place, _ in axes_of_stream(architecture, root):
        turned = np.tensordot(rotation, result[name], axes=(1, place))
        result[name] = np.moveaxis(turned, 0, place).astype(result[name].dtype)
    return result


def axes_of_stream(architecture: Architecture, root: str) -> Iterator[tuple[str, int, Axis]]:
    """Yield each axis that turns with a stream: name of the tensor, place, axis.

    Gains do not turn: they are alike for all channels.
    """
    gains = {step.tensors.get("gain") for step in architecture.steps if step.op == Op.NORM}
    for name, place, axis in axes_of(architecture):
        if architecture.root(axis.group) == root and name not in gains:
            yield name, place, axis


def with_bases(
    weights: Weights, architecture: Architecture, step: Step, keys: Matrix, values: Matrix
) -> dict[str, Values]:
    """Return the weights with the channels of each head of an attention in another basis.

    Args:
        weights: Name → values.
        architecture: Says which axes hold the heads.
        step: The attention.
        keys: (key heads, channels, channels) that keys are multiplied by, and queries by the
            transposed inverse. Under rotary positions only `pairwise` ones keep the function, and
            none does where theirs is `fixed`.
        values: The same for values and outputs.
    """
    result = dict(weights)
    queries, outputs = _inverse_turned(keys), _inverse_turned(values)
    of_role = {"query": queries, "key": keys, "value": values, "output": outputs}
    # Stacked weights × heads × neighbours in a head: query heads that share a key share its basis.
    maps = {role: matrices[None, :, None] for role, matrices in of_role.items()}
    joint = np.stack([queries, keys, values])
    maps["joint"] = joint.swapaxes(0, 1)[None] if step.by_head else joint[:, :, None]
    for role, name in step.tensors.items():
        if role != "output_bias":
            place, axis = axis_of_heads(architecture, step, role)
            mixed = _mixed(result[name], place, axis, maps[role.removesuffix("_bias")])
            result[name] = mixed.astype(result[name].dtype)
    return result


def channels_of(architecture: Architecture, step: Step) -> int:
    """Return how many channels a head of an attention has."""
    if "key" in step.tensors:
        return axis_of_heads(architecture, step, "key")[1].inner
    return axis_of_heads(architecture, step, "joint")[1].inner // (3 if step.by_head else 1)


def axis_of_heads(architecture: Architecture, step: Step, role: str) -> tuple[int, Axis]:
    """Return where a tensor of an attention holds its heads.

    Raises:
        ArchitectureError: It holds none.
    """
    for place, axis in enumerate(architecture.axes[step.tensors[role]]):
        if axis is not None and axis.group == step.inside:
            return place, axis
    raise ArchitectureError(f"{step.tensors[role]}: no axis of it holds heads of {step.inside}")


def pairwise(factors: NDArray[np.complex128], channels: int, *, interleaved: bool) -> Matrix:
    """Return what commutes with rotary positions: a rotation and a scale for each pair.

    Args:
        factors: (..., pairs) complex numbers, what each pair of channels is multiplied by.
        channels: Channels of a head; an odd one stays.
        interleaved: Whether the two channels are neighbours; else half a head lies between them.

    Example:
        >>> pairwise(np.array([2j]), 2, interleaved=True)
        array([[ 0., -2.],
               [ 2.,  0.]])
    """
    first, second = pairs_of(channels, interleaved=interleaved)
    matrix = np.broadcast_to(np.eye(channels), (*factors.shape[:-1], channels, channels)).copy()
    matrix[..., first, first] = matrix[..., second, second] = factors.real
    matrix[..., first, second], matrix[..., second, first] = -factors.imag, factors.imag
    return matrix


def pairs_of(channels: int, *, interleaved: bool) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the first and the second channels that rotary positions turn together."""
    places = np.arange(channels - channels % 2)
    if interleaved:
        return places[0::2], places[1::2]
    return places[: len(places) // 2], places[len(places) // 2 :]


def _mixed(values: Values, place: int, axis: Axis, matrices: Matrix) -> Values:
    """Return values with a matrix applied to each head's channels along an axis.

    `matrices` is (before, heads, 1 or neighbours, channels, channels).
    """
    channels = matrices.shape[-1]
    front = np.moveaxis(values, place, 0)
    heads = front.reshape(axis.before, matrices.shape[1], axis.inner // channels, channels, -1)
    return np.moveaxis((matrices @ heads).reshape(front.shape), 0, place)


def _inverse_turned(matrices: Matrix) -> Matrix:
    return np.asarray(np.linalg.inv(matrices).transpose(0, 2, 1), dtype=np.float64)


# ------------------------------------------------------------------ at random


def _random_bases(
    architecture: Architecture, step: Step, rng: np.random.Generator
) -> tuple[Matrix, Matrix]:
    """Return a random basis for the keys of each head, and one for its values."""
    size = architecture.groups[step.inside].size
    channels = channels_of(architecture, step)

    def drawn() -> Matrix:
        if step.fixed:
            return np.eye(channels)
        if step.rotary:
            return _pairwise(rng, channels, interleaved=step.interleaved)
        return _general(rng, channels)

    keys = np.stack([drawn() for _ in range(size)])
    return keys, np.stack([_general(rng, channels) for _ in range(size)])


def _orthogonal(rng: np.random.Generator, size: int) -> Matrix:
    """Return a rotation or reflection, uniform (Mezzadri 2007, Notices of the AMS 54)."""
    q, r = np.linalg.qr(rng.normal(size=(size, size)))
    return np.asarray(q * np.sign(np.diag(r)), dtype=np.float64)


def _general(rng: np.random.Generator, size: int) -> Matrix:
    """Return an invertible matrix, well enough conditioned for float32."""
    stretch = np.exp(rng.normal(scale=_STRETCH, size=size))
    return (_orthogonal(rng, size) * stretch) @ _orthogonal(rng, size)


def _pairwise(rng: np.random.Generator, size: int, *, interleaved: bool) -> Matrix:
    """Return a random rotation and scale for each pair of channels."""
    angle = rng.uniform(0, 2 * math.pi, size // 2)
    stretch = np.exp(rng.normal(scale=_STRETCH, size=size // 2))
    factors = stretch * np.cos(angle) + 1j * (stretch * np.sin(angle))
    return pairwise(factors, size, interleaved=interleaved)
