"""Training of the function encoder: near where families are, and telling of what was measured.

The codes of a batch are pulled together within families and apart between them, other seeds of one
recipe in the same batch (`embedder.training.contrastive_loss`), and heads read from the same codes
what was measured of each network. How much each head counts is learned with it: a property that
cannot be told well weighs less (Kendall, Gal, Cipolla 2018, CVPR). Simple models come first:
p ∝ exp(−complexity / c), c growing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch_geometric.data import Data

from embedder.encoder import Encoder, EncoderConfig
from embedder.encoder_input import batch_of, graph_data
from embedder.families import Relative
from embedder.function import PROPERTIES, FunctionCoder, Heads
from embedder.graph import WeightGraph
from embedder.training import by_recipe, contrastive_loss, numbers_of, spread_at, two_of


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One network to train on.

    Args:
        family: Models of one family descend from one trained ancestor.
        start: Models of different families that share a random start have the same, or empty.
        twins: Other seeds of one recipe have the same; drawn into the same batch.
        complexity: log10 of its parameters, plus one for each operation since its ancestor.
        graph: What `embedder.encoder_input.graph_data` returns.
        values: What was measured, in the order of `PROPERTIES`; NaN where it was not.
        task: What it was trained on last.
    """

    family: str
    start: str
    twins: str
    complexity: float
    graph: Data
    values: tuple[float, ...]
    task: str


def example_of(relative: Relative, graph: WeightGraph) -> Example:
    """Return a model of the zoo as training takes it."""
    member, row = relative.member, relative.row
    return Example(
        family=member.family,
        start=member.start,
        twins=member.twins,
        complexity=member.complexity,
        graph=graph_data(graph),
        values=tuple(float("nan") if row[name] is None else row[name] for name in PROPERTIES),
        task=row["task"],
    )


FUNCTION_STEPS = 3000
"""Batches of the shipped coder."""


@dataclass(frozen=True, slots=True)
class FunctionSettings:
    """How an encoder is trained.

    Args:
        seed: Decides all draws.
        steps: Batches.
        batch: Models in a batch, two of each family, at least.
        rate: Largest step size; it rises for a tenth of the steps and then falls along a cosine.
        decay: Weight decay.
        contrastive: Weight of the contrastive loss beside the heads. Measured on recipes held back
            (500 steps without messages): 0 tells accuracy with an R² of .66, .1 too, .3 with .58.
        curriculum: Whether simple models come first.
    """

    seed: int = 0
    steps: int = FUNCTION_STEPS
    batch: int = 64
    rate: float = 3e-3
    decay: float = 1e-2
    contrastive: float = 0.1
    curriculum: bool = True


def train_function(
    examples: Sequence[Example],
    config: EncoderConfig,
    settings: FunctionSettings,
    progress: Callable[[int, float], None] | None = None,
) -> FunctionCoder:
    """Return an encoder and heads, trained on these models.

    The same examples, configuration and settings give the same result on one thread.

    Args:
        examples: Models of many families.
        config: What the encoder is made of.
        settings: How it is trained.
        progress: Called with the step and the loss.

    Raises:
        ValueError: There are fewer than two families with two members each.
    """
    by_recipe(examples)  # raises, before anything is made, where there are too few
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        encoder, heads = Encoder(config).train(), _heads_for(examples)
        encoder.standardise([example.graph for example in examples])
        trained = [*encoder.parameters(), *heads.parameters()]
        optimiser = torch.optim.AdamW(trained, lr=settings.rate, weight_decay=settings.decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: _rate(step / max(settings.steps, 1))
        )
        for step, batch in enumerate(draws(examples, settings)):
            codes, pooling = encoder(batch_of([example.graph for example in batch]))
            loss = heads.loss(codes, batch) + pooling
            families = [example.family for example in batch]
            if settings.contrastive and len(set(families)) < len(families):
                start = numbers_of([example.start for example in batch])
                near = contrastive_loss(codes, numbers_of(families), start)
                loss = loss + settings.contrastive * near
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            schedule.step()
            if progress is not None:
                progress(step, float(loss.detach()))
    return FunctionCoder(encoder.eval(), heads.eval())


def _heads_for(examples: Sequence[Example]) -> Heads:
    """Return untrained heads that know the tasks and the scale of each property."""
    measured = np.array([example.values for example in examples])
    known = [column[np.isfinite(column)] for column in measured.T]
    means = [column.mean() if len(column) else 0.0 for column in known]
    spreads = [max(float(column.std()), 1e-6) if len(column) else 1.0 for column in known]
    tasks = sorted({example.task for example in examples})
    return Heads(
        tasks,
        torch.tensor(means, dtype=torch.float32),
        torch.tensor(spreads, dtype=torch.float32),
    )


def _rate(progress: float) -> float:
    """Return the share of the largest step size: up for a tenth of the steps, then a cosine."""
    rising = min(progress / 0.1 + 0.01, 1.0)
    return rising * (1 + float(np.cos(np.pi * progress))) / 2


def draws(examples: Sequence[Example], settings: FunctionSettings) -> Iterator[list[Example]]:
    """Yield batches: twins of one recipe together, two members of each family where there are."""
    rng = np.random.default_rng(settings.seed)
    groups = by_recipe(examples)
    waiting: list[int] = []
    for step in range(settings.steps):
        spread = spread_at(step / settings.steps, curriculum=settings.curriculum)
        batch: list[Example] = []
        while len(batch) < settings.batch:
            # Every recipe comes once before any comes again, unless a batch takes more than all.
            waiting = waiting or [int(place) for place in rng.permutation(len(groups))]
            for family in groups[waiting.pop()]:
                batch += two_of(family, spread, rng)
        yield batch
