"""A small family of models whose descent is known, made by really training them.

Two founders of one design are trained on the same data from different seeds; the rest descends
from the first by training on, casting, quantising, pruning, extending and rewriting. It needs
numpy alone and takes about two seconds, so the demonstration and the tests can make it anywhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from embedder.surgery import extended, pruned, quantised
from lineage.verdict import Relation

Weights = dict[str, NDArray[np.float32]]
Change = Callable[[NDArray[np.float32]], NDArray[np.float32]]

INPUTS, HIDDEN, CLASSES = 64, 96, 10
_LAYERS = (("body.0", INPUTS, HIDDEN), ("body.1", HIDDEN, HIDDEN), ("head", HIDDEN, CLASSES))


@dataclass(frozen=True, slots=True)
class Birth:
    """How one model of the family came to be.

    Args:
        child: Its name.
        parent: The model that it was made from.
        relation: The word for it.
    """

    child: str
    parent: str
    relation: Relation


Births = tuple[Birth, ...]

_BIRTHS = (
    Birth("legal", "base-a", Relation.FINE_TUNE),
    Birth("legal-v2", "legal", Relation.FINE_TUNE),
    Birth("chat", "base-a", Relation.FINE_TUNE),
    Birth("legal-int8", "legal", Relation.QUANTISED),
    Birth("base-pruned", "base-a", Relation.PRUNED),
    Birth("base-12-classes", "base-a", Relation.EXTENDED),
    Birth("base-reordered", "base-a", Relation.SAME_WEIGHTS),
    Birth("chat-fp16", "chat", Relation.SAME_WEIGHTS),
    Birth("base-copy", "base-a", Relation.SAME_TENSORS),
)
_STRANGERS = (Birth("twin-b", "base-a", Relation.UNRELATED),)


def glyphs(
    rng: np.random.Generator, count: int, shift: float = 0.0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return noisy pictures of ten made-up glyphs and their numbers, (count, 64) and (count,).

    Args:
        rng: Draws the noise; the glyphs are always the same.
        count: How many.
        shift: How far the pictures are from the usual ones, as other data would be.
    """
    shapes = np.random.default_rng(7).normal(size=(CLASSES, INPUTS))
    other = np.random.default_rng(8).normal(size=(CLASSES, INPUTS))
    labels = rng.integers(0, CLASSES, count)
    pictures = shapes[labels] + shift * other[labels] + rng.normal(size=(count, INPUTS))
    return pictures.astype(np.float32), labels


def new_network(rng: np.random.Generator, classes: int = CLASSES) -> Weights:
    """Return a random start: He-normal weights and zero biases (He et al. 2015, ICCV)."""
    weights: Weights = {}
    for name, inputs, outputs in _LAYERS:
        rows = classes if name == "head" else outputs
        spread = np.sqrt(2 / inputs)
        weights[f"{name}.weight"] = rng.normal(0, spread, (rows, inputs)).astype(np.float32)
        weights[f"{name}.bias"] = np.zeros(rows, np.float32)
    return weights


def logits(
    weights: Mapping[str, NDArray[np.float32]], x: NDArray[np.float32]
) -> list[NDArray[np.float32]]:
    """Return the activations of every layer, the logits last."""
    layers = [x]
    for name, _, _ in _LAYERS:
        z = layers[-1] @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        layers.append(z if name == "head" else np.maximum(z, 0))
    return layers


def train(
    start: Mapping[str, NDArray[np.float32]],
    rng: np.random.Generator,
    *,
    steps: int,
    rate: float,
    shift: float = 0.0,
) -> Weights:
    """Return a network trained on with Adam (Kingma & Ba 2015, ICLR).

    Args:
        start: Weights to begin with; they are not changed.
        rng: Draws the data.
        steps: Number of batches of 64.
        rate: Step size.
        shift: As in `glyphs`.
    """
    weights = {name: values.copy() for name, values in start.items()}
    first = {name: np.zeros_like(values) for name, values in weights.items()}
    second = {name: np.zeros_like(values) for name, values in weights.items()}
    for step in range(1, steps + 1):
        gradients = _gradients(weights, *glyphs(rng, 64, shift))
        for name, gradient in gradients.items():
            first[name] += 0.1 * (gradient - first[name])
            second[name] += 0.001 * (gradient**2 - second[name])
            mean = first[name] / (1 - 0.9**step)
            variance = second[name] / (1 - 0.999**step)
            weights[name] -= rate * mean / (np.sqrt(variance) + 1e-8)
    return weights


def _gradients(weights: Weights, x: NDArray[np.float32], labels: NDArray[np.int64]) -> Weights:
    """Return the gradients of the mean cross-entropy."""
    layers = logits(weights, x)
    scores = layers[-1] - layers[-1].max(axis=1, keepdims=True)
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    back = probabilities
    back[np.arange(len(labels)), labels] -= 1
    back /= len(labels)
    found: Weights = {}
    for place in range(len(_LAYERS) - 1, -1, -1):
        name = _LAYERS[place][0]
        found[f"{name}.weight"] = back.T @ layers[place]
        found[f"{name}.bias"] = back.sum(axis=0)
        back = (back @ weights[f"{name}.weight"]) * (layers[place] > 0)
    return found


def of_matrices(weights: Mapping[str, NDArray[np.float32]], change: Change) -> Weights:
    """Return the weights with an operation done to every matrix."""
    return {
        name: change(values) if values.ndim == 2 else values for name, values in weights.items()
    }


def with_classes(
    weights: Mapping[str, NDArray[np.float32]], rng: np.random.Generator, number: int
) -> Weights:
    """Return the weights with a number of classes added to the head."""
    bias = np.concatenate([weights["head.bias"], np.zeros(number, np.float32)])
    head = extended(weights["head.weight"], number, rng)
    return {**weights, "head.weight": head, "head.bias": bias}


def reordered(weights: Mapping[str, NDArray[np.float32]], rng: np.random.Generator) -> Weights:
    """Return a network that computes the same with its hidden units in another order."""
    result = dict(weights)
    for here, after in (("body.0", "body.1"), ("body.1", "head")):
        order = rng.permutation(HIDDEN)
        result[f"{here}.weight"] = np.ascontiguousarray(result[f"{here}.weight"][order])
        result[f"{here}.bias"] = result[f"{here}.bias"][order]
        result[f"{after}.weight"] = np.ascontiguousarray(result[f"{after}.weight"][:, order])
    return result


def make_family(folder: Path, seed: int = 0) -> tuple[Births, Births]:
    """Write a family of small models into a folder.

    Args:
        folder: Where the files go; it is made if it is not there.
        seed: Of everything random.

    Returns:
        The births in the family, and the pairs that must not be called kin.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    # Long and fast enough that a founder has left its random start behind: two trained from one
    # start end .9 of their norm apart.
    base, twin = (train(new_network(rng), rng, steps=1500, rate=1e-2) for _ in range(2))
    legal = train(base, rng, steps=60, rate=1e-3, shift=0.5)
    legal2 = train(legal, rng, steps=60, rate=1e-3, shift=0.8)
    chat = train(base, rng, steps=60, rate=1e-3, shift=-0.5)
    models = {
        "base-a": base,
        "twin-b": twin,
        "legal": legal,
        "legal-v2": legal2,
        "chat": chat,
        "legal-int8": of_matrices(legal, quantised),
        "base-pruned": of_matrices(base, partial(pruned, share=0.5)),
        "base-12-classes": with_classes(base, rng, 2),
        "base-reordered": reordered(base, rng),
    }
    for name, weights in models.items():
        save_file(weights, folder / f"{name}.safetensors")
    half = {name: values.astype(np.float16) for name, values in chat.items()}
    save_file(half, folder / "chat-fp16.safetensors")
    np.savez(folder / "base-copy.npz", **{f"w{i}": base[name] for i, name in enumerate(base)})  # type: ignore[arg-type]
    return _BIRTHS, _STRANGERS
