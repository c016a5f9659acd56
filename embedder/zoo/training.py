"""Training of many networks of one design at once, each by its own recipe.

All values of a network lie in one row of a table, so an optimiser is a handful of operations on the
whole table. What is drawn for a network comes from its own seeds; only the activations that
dropout removes come from a generator for the group. On one kind of machine and with the same number
of threads, a group gives the same bits each time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from embedder.errors import ArchitectureError
from embedder.zoo.data import Task
from embedder.zoo.designs import Config
from embedder.zoo.nets import BUFFERS, Array, forward, roles_of, shapes_of
from embedder.zoo.recipes import Examples, Recipe, draw_examples, same_length, variants_of

MOMENTUM, FIRST, SECOND = 0.9, 0.9, 0.999
"""Of stochastic descent; of Adam (Kingma & Ba 2015, ICLR)."""
LARGEST = 1e3
"""A weight beyond it is called diverged: the largest of those that learned was below 30."""


def device() -> torch.device:
    """Return the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor of a design lies in a row of the table.

    Args:
        config: The design.
        frozen: Names that training does not move, besides running statistics.
    """

    config: Config
    frozen: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        """Values of one network."""
        return sum(int(np.prod(shape)) for shape in shapes_of(self.config).values())

    def views(self, table: Tensor) -> dict[str, Tensor]:
        """Return name → (K, …) of a table (K, size), without copying."""
        found, start = {}, 0
        for name, shape in shapes_of(self.config).items():
            stop = start + int(np.prod(shape))
            found[name] = table[:, start:stop].view(-1, *shape)
            start = stop
        return found

    def moves(self, name: str) -> bool:
        """Say whether training moves a tensor."""
        return name not in self.frozen and roles_of(self.config)[name] not in BUFFERS

    def decays(self, name: str) -> bool:
        """Say whether weight decay pulls at a tensor: at matrices, kernels and tables."""
        return self.moves(name) and len(shapes_of(self.config)[name]) > 1

    def mask(self, chosen: Callable[[str], bool]) -> Tensor:
        """Return (size,) with 1 where the tensor is chosen and 0 elsewhere."""
        parts = [
            torch.full((int(np.prod(shape)),), float(chosen(name)))
            for name, shape in shapes_of(self.config).items()
        ]
        return torch.cat(parts)


def to_table(config: Config, models: Sequence[Mapping[str, Array]]) -> Tensor:
    """Return the weights of K models as a table (K, size).

    Raises:
        ArchitectureError: A model does not have the design's tensors.
    """
    shapes = shapes_of(config)
    for model in models:
        for name, shape in shapes.items():
            if name not in model or model[name].shape != shape:
                raise ArchitectureError(f"{name}: the design needs it with shape {shape}")
    rows = [np.concatenate([model[name].ravel() for name in shapes]) for model in models]
    return torch.from_numpy(np.stack(rows).astype(np.float32)).to(device())


def from_table(config: Config, table: Tensor) -> list[dict[str, Array]]:
    """Return the weights of each model of a table; the inverse of `to_table`."""
    views = Layout(config).views(table.detach().cpu())
    arrays = {name: view.numpy() for name, view in views.items()}
    return [
        {name: array[place].copy() for name, array in arrays.items()}
        for place in range(table.shape[0])
    ]


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What became of a group.

    Args:
        models: Weights of each.
        examples: What each was trained on.
        diverged: (K,) whose loss or gradient was no number, or whose weights grew beyond bounds;
            they are kept as they were before that.
        snapshots: Step → weights of each after it.
    """

    models: list[dict[str, Array]]
    examples: list[Examples]
    diverged: NDArray[np.bool_]
    snapshots: dict[int, list[dict[str, Array]]]


def train(
    config: Config,
    starts: Sequence[Mapping[str, Array]],
    recipes: Sequence[Recipe],
    task: Task,
    *,
    frozen: frozenset[str] = frozenset(),
    rank: int = 0,
    teacher: NDArray[np.float32] | None = None,
    snapshots: Sequence[int] = (),
) -> Trained:
    """Train networks of one design together.

    Args:
        config: The design.
        starts: Weights that each begins with.
        recipes: How each is trained; all of one task, number of steps and batch size.
        task: That task.
        frozen: Names of tensors that stay as they are.
        rank: Trains a low-rank step of each matrix in place of all values, and adds it at the end
            (LoRA: Hu et al. 2022, ICLR); 0 trains everything.
        teacher: (K, n, classes) probabilities to learn instead of labels (Hinton et al. 2015).
        snapshots: Steps after which weights are kept.

    Raises:
        ValueError: The recipes cannot be trained together.
        ArchitectureError: A start does not fit the design.
    """
    if len(starts) != len(recipes) or not same_length(recipes):
        raise ValueError("recipes of a group need one task, number of steps and batch size")
    examples = [draw_examples(recipe, task) for recipe in recipes]
    group = _Group(config, to_table(config, starts), recipes, frozen, rank)
    batches = _Batches(task, examples, teacher)
    kept = {}
    for step in range(recipes[0].steps):
        group.descend(step, *batches.at(step))
        if step + 1 in snapshots:
            kept[step + 1] = from_table(config, group.merged())
    table = group.merged()
    diverged = ~group.alive.cpu().numpy() | (table.abs().amax(1) > LARGEST).cpu().numpy()
    return Trained(from_table(config, table), examples, diverged, kept)


class _Batches:
    """What each network of a group sees at each step."""

    def __init__(
        self, task: Task, examples: Sequence[Examples], teacher: NDArray[np.float32] | None
    ) -> None:
        place = device()
        self._pool = torch.from_numpy(variants_of(task)).to(place)
        self._labels = torch.from_numpy(np.stack([e.labels for e in examples])).to(place)
        rows = np.stack([e.rows[e.order] for e in examples])  # (K, steps, batch)
        self._rows = torch.from_numpy(rows).to(place)
        self._variants = torch.from_numpy(np.stack([e.variants for e in examples])).to(place)
        self._teacher = None if teacher is None else torch.from_numpy(teacher).to(place)
        self._models = torch.arange(len(examples), device=place)[:, None]

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs (K, batch, …), and labels (K, batch, …) or the teacher's probabilities."""
        rows, variants = self._rows[:, step], self._variants[:, step]
        wanted = self._labels if self._teacher is None else self._teacher
        return self._pool[variants, rows], wanted[self._models, rows]


def losses_of(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean cross-entropy of each model, (K,).

    Args:
        logits: (K, …, classes).
        wanted: Classes (K, …), or probabilities (K, …, classes).
    """
    if wanted.is_floating_point():
        parts = -(wanted * logits.log_softmax(dim=-1)).sum(dim=-1)
    else:
        flat = logits.reshape(-1, logits.shape[-1])
        parts = functional.cross_entropy(flat, wanted.reshape(-1), reduction="none")
    return parts.reshape(logits.shape[0], -1).mean(dim=1)


class _Group:
    """The networks of a group and the state of their optimisers."""

    def __init__(
        self,
        config: Config,
        table: Tensor,
        recipes: Sequence[Recipe],
        frozen: frozenset[str],
        rank: int,
    ) -> None:
        self.config, self.recipes = config, recipes
        self.layout = Layout(config, frozen)
        self.base = table
        self.factors = _Factors(self.layout, recipes, rank, table) if rank else None
        self.values = self.factors.table if self.factors else table
        self.leaves = self._leaves()
        # Statistics lie apart: a change of the table in a forward pass would spoil the derivative.
        views = self.layout.views(table)
        roles = roles_of(config)
        self.statistics = {n: v.clone() for n, v in views.items() if roles[n] in BUFFERS}
        self.first, self.second = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self.alive = torch.ones(len(recipes), dtype=torch.bool, device=table.device)
        moves = self.layout.mask(self.layout.moves).to(table.device)
        decays = self.layout.mask(self.layout.decays).to(table.device)
        self.moves = torch.ones(self.values.shape[1], device=table.device) if rank else moves
        self.decays = torch.zeros_like(self.moves) if rank else decays
        self.rate, self.decay, self.dropout = (
            torch.tensor([getattr(recipe, name) for recipe in recipes], device=table.device)
            for name in ("rate", "decay", "dropout")
        )
        self.adam = torch.tensor([r.optimiser == "adam" for r in recipes], device=table.device)
        self.draws = torch.Generator(table.device)
        seeds = np.random.SeedSequence([recipe.seed for recipe in recipes])
        self.draws.manual_seed(int(seeds.generate_state(1)[0]))

    def _leaves(self) -> dict[str, Tensor]:
        """Return the tensors that are trained, as views of the table."""
        views = self.factors.views if self.factors else self.layout.views
        leaves = views(self.values)
        trained = {n: v for n, v in leaves.items() if self.factors or self.layout.moves(n)}
        return {name: view.requires_grad_(True) for name, view in trained.items()}

    def weights(self) -> dict[str, Tensor]:
        """Return name → (K, …) as the networks compute with them."""
        views = {**self.layout.views(self.base), **self.statistics}
        if self.factors is None:
            return {**views, **self.leaves}
        return self.factors.added(views, self.leaves)

    def merged(self) -> Tensor:
        """Return the weights as a table of their own."""
        with torch.no_grad():
            return torch.cat([w.flatten(1) for w in self.weights().values()], dim=1)

    def descend(self, step: int, x: Tensor, wanted: Tensor) -> None:
        """Take one step of each optimiser."""
        drop = self._drop if bool((self.dropout > 0).any()) else None
        logits = forward(self.config, self.weights(), x, training=True, drop=drop)
        losses = losses_of(logits, wanted)
        found = torch.autograd.grad(losses.sum(), list(self.leaves.values()))
        with torch.no_grad():
            gradient = self._joined(dict(zip(self.leaves, found, strict=True)))
            self.alive &= torch.isfinite(losses) & torch.isfinite(gradient.sum(dim=1))
            self._move(step, gradient)

    def _joined(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return gradients as a table, 0 where nothing is trained."""
        if self.factors:
            return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
        views = self.layout.views(self.values)
        parts = [gradients.get(name, torch.zeros_like(view)) for name, view in views.items()]
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def _drop(self, x: Tensor) -> Tensor:
        shape = (len(self.recipes), *(1,) * (x.dim() - 1))
        share = self.dropout.view(shape)
        kept = torch.rand(x.shape, generator=self.draws, device=x.device) >= share
        return x * kept / (1 - share)

    def _move(self, step: int, gradient: Tensor) -> None:
        """Adam and descent with momentum share their memory of gradients; they differ in scale."""
        alive, adam = self.alive[:, None], self.adam[:, None]
        gradient = torch.where(alive, gradient, 0)
        self.first.mul_(torch.where(adam, FIRST, MOMENTUM))
        self.first.add_(gradient * torch.where(adam, 1 - FIRST, 1.0))
        self.second.mul_(SECOND).addcmul_(gradient, gradient, value=1 - SECOND)
        spread = (self.second / (1 - SECOND ** (step + 1))).sqrt_().add_(1e-8)
        scaled = torch.where(adam, self.first / (1 - FIRST ** (step + 1)) / spread, self.first)
        left = 1 - 0.9 * step / self.recipes[0].steps
        rate = (self.rate * left * self.alive)[:, None] * self.moves
        self.values.sub_(rate * (scaled + self.decay[:, None] * self.decays * self.values))


class _Factors:
    """Two thin matrices for each weight matrix or kernel, whose product is its step."""

    def __init__(self, layout: Layout, recipes: Sequence[Recipe], rank: int, base: Tensor) -> None:
        self.rank = rank
        self._shapes = {
            name: (shape[0], int(np.prod(shape[1:])))
            for name, shape in shapes_of(layout.config).items()
            if layout.decays(name)
        }
        rows = []
        for recipe in recipes:
            rng = np.random.default_rng([recipe.seed, rank])
            parts = []
            for out, into in self._shapes.values():
                # As LoRA starts: one factor at random, the other zero.
                parts += [rng.normal(0, into**-0.5, rank * into), np.zeros(out * rank)]
            rows.append(np.concatenate(parts))
        self.table = torch.from_numpy(np.stack(rows).astype(np.float32)).to(base.device)

    def views(self, table: Tensor) -> dict[str, Tensor]:
        """Return name and factor → (K, …) of a table of factors."""
        found, start = {}, 0
        for name, (out, into) in self._shapes.items():
            middle, stop = start + self.rank * into, start + self.rank * (into + out)
            found[f"{name}/in"] = table[:, start:middle].view(-1, self.rank, into)
            found[f"{name}/out"] = table[:, middle:stop].view(-1, out, self.rank)
            start = stop
        return found

    def added(self, base: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the base with the products added."""
        added = dict(base)
        for name in self._shapes:
            product = torch.bmm(factors[f"{name}/out"], factors[f"{name}/in"])
            added[name] = base[name] + product.view(base[name].shape)
        return added
