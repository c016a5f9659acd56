"""Which networks there are: designs, tasks, sizes of the zoo, and how recipes are drawn.

The zoo is cut into jobs. A job is a few recipes of one design, several networks of each, and all
their descendants, so that it needs no other job and can be made again alone.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from embedder.zoo.data import WINDOW
from embedder.zoo.designs import Config
from embedder.zoo.recipes import Recipe
from embedder.zoo.sources import ALPHABET

FOLDS = 10
"""Parts into which recipes are dealt; all models of a recipe are in one."""


@dataclass(frozen=True, slots=True)
class Population:
    """A design and what its networks learn.

    Args:
        name: Unique.
        config: The design.
        task: What it learns.
        other: Another task with inputs of the same shape, for training on.
        other_classes: Its number of classes.
        steps: Usual number of batches.
        rate: Usual step size of Adam.
        most: Most training examples.
    """

    name: str
    config: Config
    task: str
    other: str
    other_classes: int
    steps: int
    rate: float
    most: int


@dataclass(frozen=True, slots=True)
class Job:
    """A part of the zoo that is made at one go, and is one shard.

    Args:
        name: Unique; models are named after it.
        kind: `family`, `controls` or `strangers`.
        population: What its networks are.
        recipes: Number of recipes; of strangers, number of networks.
        seed: Of everything in it.
    """

    name: str
    kind: str
    population: Population
    recipes: int
    seed: int


@dataclass(frozen=True, slots=True)
class Size:
    """How large a zoo is.

    Args:
        rounds: How often each population occurs, with recipes of its own.
        recipes: In each job.
        references: Recipes in each job of control sets.
        strangers: Number of strangers.
        calibration: How many of them may be used for calibration; the rest is only for tests.
    """

    rounds: int = 0
    recipes: int = 0
    references: int = 0
    strangers: int = 0
    calibration: int = 0


SIZES: Mapping[str, Size] = {
    "sample": Size(rounds=1, recipes=3, references=1),
    "slice": Size(rounds=1, recipes=8, references=3),
    "full": Size(rounds=3, recipes=16, references=8),
    "strangers": Size(strangers=16_000, calibration=5_500),
}
"""Name → size."""

_STRANGERS_AT_ONCE = 250

# ------------------------------------------------------------------ populations

_INPUTS = {"wine": 13, "cancer": 30, "adult": 40, "compas": 16, "german": 58}
_CLASSES = {"wine": 3, "sounds": 6}
_OTHER = {
    "digits": "mnist8",
    "mnist8": "textures8",
    "textures8": "digits",
    "mnist14": "textures14",
    "sounds": "sounds-low",
    "wine": "wine/0",
    "cancer": "cancer/1",
    "adult": "adult/0",
    "compas": "compas/4",
    "german": "german/0",
    "library-code": "library-prose",
    "library-prose": "library-code",
    "digits-grid": "mnist-grid",
    "digits-nearest": "mnist-nearest",
    "mnist-grid": "digits-grid",
}
_MOST = {"wine": 110, "cancer": 350, "german": 600}


def _population(name: str, config: Config, task: str, steps: int, rate: float) -> Population:
    other = _OTHER[task]
    classes = 2 if "/" in other else config.classes
    return Population(name, config, task, other, classes, steps, rate, _MOST.get(task, 1200))


def _mlps() -> list[Population]:
    layouts = ((32,), (48, 24), (32, 32, 16))
    found = []
    for number, activation in enumerate(("relu", "tanh", "gelu")):
        for place, widths in enumerate(layouts):
            task = ("digits", "mnist8", "textures8")[(number + place) % 3]
            config = Config("mlp", 64, 10, widths, activation)
            name = f"mlp-{task}-{len(widths)}-{activation}"
            found.append(_population(name, config, task, 300, 3e-3))
    pairs = [("wine", "relu"), ("cancer", "tanh"), ("adult", "relu"), ("adult", "gelu")]
    pairs += [("compas", "relu"), ("compas", "tanh"), ("german", "relu")]
    for number, (task, activation) in enumerate(pairs):
        widths = ((24,), (32, 16))[number % 2]
        config = Config("mlp", _INPUTS[task], _CLASSES.get(task, 2), widths, activation)
        found.append(_population(f"mlp-{task}-{activation}", config, task, 250, 5e-3))
    return found


def _cnns() -> list[Population]:
    plain = [("digits", "relu", ""), ("mnist8", "relu", "batch"), ("textures8", "tanh", "")]
    plain += [("mnist14", "relu", ""), ("sounds", "relu", "batch"), ("digits", "gelu", "batch")]
    found = []
    for task, activation, norm in plain:
        config = Config("cnn", 1, _CLASSES.get(task, 10), (12, 16, 16), activation, norm)
        name = f"cnn-{task}-{activation}{'-norm' if norm else ''}"
        found.append(_population(name, config, task, 250, 8e-3))
    residual = [("digits", "relu", "batch"), ("mnist8", "relu", ""), ("textures8", "gelu", "batch")]
    residual += [("sounds", "relu", "batch")]
    for task, activation, norm in residual:
        config = Config("cnn", 1, _CLASSES.get(task, 10), (10, 10), activation, norm, residual=True)
        name = f"cnn-residual-{task}-{activation}{'-norm' if norm else ''}"
        found.append(_population(name, config, task, 200, 8e-3))
    return found


def _rnns() -> list[Population]:
    designs = [("digits", 8, "elman"), ("mnist8", 8, "gru"), ("sounds", 8, "gru")]
    designs += [("sounds", 8, "elman"), ("textures8", 8, "gru"), ("mnist14", 14, "gru")]
    designs += [("digits", 8, "gru")]
    found = []
    for task, inputs, cell in designs:
        config = Config("rnn", inputs, _CLASSES.get(task, 10), (24,), "tanh", cell=cell)
        found.append(_population(f"rnn-{task}-{cell}", config, task, 300, 1e-2))
    return found


def _transformers() -> list[Population]:
    designs = [("digits", 16, 2, "layer"), ("mnist8", 16, 2, "rms"), ("textures8", 16, 2, "layer")]
    designs += [("sounds", 16, 0, "rms")]
    found = []
    for task, places, patch, norm in designs:
        config = Config(
            "transformer",
            patch * patch or 8,
            _CLASSES.get(task, 10),
            (24, 24),
            "silu" if norm == "rms" else "gelu",
            norm,
            heads=2,
            places=places,
            patch=patch,
        )
        found.append(_population(f"transformer-{task}-{norm}", config, task, 200, 6e-3))
    for task, norm in [
        ("library-code", "layer"),
        ("library-code", "rms"),
        ("library-prose", "rms"),
    ]:
        size = len(ALPHABET)
        config = Config(
            "transformer",
            size,
            size,
            (24, 24),
            "silu" if norm == "rms" else "gelu",
            norm,
            heads=2,
            places=WINDOW,
            causal=True,
        )
        found.append(_population(f"transformer-{task}-{norm}", config, task, 200, 1e-2))
    return found


def _gnns() -> list[Population]:
    designs = [("digits-grid", 6, "gcn"), ("digits-nearest", 3, "sage"), ("digits-grid", 6, "sage")]
    designs += [("mnist-grid", 6, "sage"), ("digits-nearest", 3, "gcn")]
    found = []
    for task, inputs, cell in designs:
        config = Config("gnn", inputs, 10, (24, 24), "relu", cell=cell)
        found.append(_population(f"gnn-{task}-{cell}", config, task, 300, 1e-2))
    return found


def populations() -> list[Population]:
    """Return all populations, kinds mixed, so that any beginning of the list has all of them.

    Example:
        >>> {population.config.kind for population in populations()[:5]} == {
        ...     "mlp", "cnn", "rnn", "transformer", "gnn"}
        True
    """
    lists = [_mlps(), _cnns(), _rnns(), _transformers(), _gnns()]
    longest = max(map(len, lists))
    return [members[place] for place in range(longest) for members in lists if place < len(members)]


# ------------------------------------------------------------------ jobs


def jobs_of(size: Size, seed: int) -> list[Job]:
    """Return the jobs of a zoo, in the order in which they are made.

    Args:
        size: Of the zoo.
        seed: Of the zoo; that of each job follows from it and from its name.

    Example:
        >>> len(jobs_of(SIZES["strangers"], 0))
        64
    """
    found = []
    everyone = populations()
    for turn in range(size.rounds):
        for number, population in enumerate(everyone):
            name = f"f{turn}{number:02d}"
            found.append(Job(name, "family", population, size.recipes, _seed(seed, name)))
        if size.references and turn == 0:
            for number, population in enumerate(everyone[:5]):
                name = f"c{number:02d}"
                found.append(Job(name, "controls", population, size.references, _seed(seed, name)))
    left, number = size.strangers, 0
    while left > 0:
        count = min(left, _STRANGERS_AT_ONCE)
        name = f"s{number:03d}"
        found.append(Job(name, "strangers", everyone[0], count, _seed(seed, name)))
        left, number = left - count, number + 1
    return found


def _seed(seed: int, name: str) -> int:
    """Return a seed that a name and the zoo's seed decide, below 2³²."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def fold_of(recipe_group: str) -> int:
    """Return the part, 0 … 9, that all models of a recipe belong to.

    Example:
        >>> fold_of("f000/r1") == fold_of("f000/r1")
        True
    """
    return int.from_bytes(hashlib.sha256(recipe_group.encode()).digest()[:4], "big") % FOLDS


# ------------------------------------------------------------------ recipes


def new_seed(rng: np.random.Generator) -> int:
    """Return a seed below 2³¹."""
    return int(rng.integers(0, 2**31))


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def draw_recipe(population: Population, steps: int, rng: np.random.Generator) -> Recipe:
    """Return a random recipe of a population, as various as the anchors of the design ask.

    One in thirty takes steps that are thirty times too large, so that some diverge.
    """
    sgd = rng.random() < 0.3
    rate = population.rate * _log_uniform(rng, 0.3, 3.0) * (10 if sgd else 1)
    if rng.random() < 1 / 30:
        rate *= 30
    often = rng.random(6)
    return Recipe(
        population.task,
        new_seed(rng),
        steps,
        optimiser="sgd" if sgd else "adam",
        rate=rate,
        decay=_log_uniform(rng, 1e-3, 0.3) if often[0] < 0.5 else 0.0,
        dropout=float(rng.uniform(0.1, 0.4)) if often[1] < 0.25 else 0.0,
        augment=float(rng.uniform(0.3, 1)) if often[2] < 0.3 else 0.0,
        size=round(_log_uniform(rng, 60, population.most)),
        label_noise=float(rng.uniform(0.05, 0.4)) if often[3] < 0.5 else 0.0,
        imbalance=_log_uniform(rng, 0.05, 0.5) if often[4] < 0.4 else 1.0,
    )


def draw_further(population: Population, task: str, steps: int, rng: np.random.Generator) -> Recipe:
    """Return a random recipe for training on: steps from tiny to as large as from a start."""
    return Recipe(
        task,
        new_seed(rng),
        steps,
        rate=population.rate * _log_uniform(rng, 0.03, 6.0),
        decay=_log_uniform(rng, 1e-3, 0.1) if rng.random() < 0.3 else 0.0,
        size=round(_log_uniform(rng, 60, min(population.most, 600))),
        label_noise=float(rng.uniform(0.05, 0.3)) if rng.random() < 0.2 else 0.0,
    )


def one_factor_apart(recipe: Recipe, rng: np.random.Generator) -> dict[str, Recipe]:
    """Return recipes that differ from a plain one in one thing alone, by its name.

    `start` is the same recipe, for another random start.
    """
    return {
        "reference": recipe,
        "start": recipe,
        "data": replace(recipe, seed=new_seed(rng)),
        "data-size": replace(recipe, size=recipe.size // 2),
        "decay": replace(recipe, decay=0.2),
        "dropout": replace(recipe, dropout=0.3),
        "optimiser": replace(recipe, optimiser="sgd", rate=recipe.rate * 10),
        "rate": replace(recipe, rate=recipe.rate * 2),
        "label-noise": replace(recipe, label_noise=0.3),
        "imbalance": replace(recipe, imbalance=0.1),
        "augmentation": replace(recipe, augment=0.8),
    }
