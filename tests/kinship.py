"""Models in memory for the tests of the evidence, and one call that compares two."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from embedder.checkpoint import Checkpoint, tensor_of
from embedder.fingerprint import Fingerprint, take_fingerprint
from lineage.direction import Direction, direction_of
from lineage.measure import Measurement, measure
from lineage.relation import decide
from lineage.verdict import Verdict

Weights = Mapping[str, NDArray[np.floating]]


def opened(weights: Weights) -> Checkpoint:
    """Return a model over arrays in memory."""
    tensors = tuple(
        tensor_of(name, np.ascontiguousarray(values)) for name, values in weights.items()
    )
    return Checkpoint("here", "live", tensors)


def printed(weights: Weights) -> Fingerprint:
    """Return the fingerprint of arrays in memory."""
    return take_fingerprint(opened(weights))


def measured(first: Weights, second: Weights, *, exact: bool = True) -> Measurement:
    """Measure two models, from their values or from fingerprints alone."""
    one, other = opened(first), opened(second)
    prints = take_fingerprint(one), take_fingerprint(other)
    return measure(*prints, (one, other) if exact else None)


def judged(first: Weights, second: Weights, *, exact: bool = True) -> tuple[Verdict, Direction]:
    """Return relation and direction of two models, alone in the world."""
    found = measured(first, second, exact=exact)
    prints = printed(first), printed(second)
    verdict = decide(*prints, found)
    return verdict, direction_of(*prints, verdict, found)


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Return normal values of a shape."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def network(
    seed: int, widths: tuple[int, ...] = (48, 40, 32, 10)
) -> dict[str, NDArray[np.float32]]:
    """Return weights and biases of a perceptron, all layers different.

    The values have heavy tails, as trained ones do: normal ones would look like a random start.
    """
    rng = np.random.default_rng(seed)
    weights: dict[str, NDArray[np.float32]] = {}
    for place, (inputs, outputs) in enumerate(pairwise(widths)):
        weights[f"{place}.weight"] = rng.laplace(0, 1, (outputs, inputs)).astype(np.float32)
        weights[f"{place}.bias"] = rng.normal(0, 1, outputs).astype(np.float32)
    return weights


def stepped(weights: Weights, size: float, seed: int) -> dict[str, NDArray[np.float32]]:
    """Return the weights after a random step of a given relative size in every tensor."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, values in weights.items():
        step = rng.normal(size=values.shape)
        step *= size * np.linalg.norm(values.astype(np.float64)) / np.linalg.norm(step)
        result[name] = (values + step).astype(np.float32)
    return result
