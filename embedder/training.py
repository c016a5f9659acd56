"""Training of the identity coder on families of models.

Three steps, each a start for the next. The directions of a code in which all models vary are where
training moves units, so they are weighed down by the inverse root of their covariance (whitening).
A projection keeps what tells families apart in the presence of what changes within them (Fisher
1936, Annals of Eugenics 7). Then all is trained together so that relatives are near and strangers
far (supervised contrastive loss: Khosla et al. 2020, NeurIPS), other seeds of one recipe in the
same batch. Models that share a random start and nothing else stand in neither role.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from torch import Tensor, nn

from embedder.anchors import WIDTH
from embedder.identity import (
    DIMENSION,
    FEATURES,
    PAIR_PARTS,
    PARTS,
    STREAMS,
    IdentityCoder,
    Tokens,
    untrained,
)

WHITENING = 0.5
"""Power of the inverse covariance; .5 makes all directions alike. Measured: at a drift of 1 to 2
.25 finds .43 of the parents of a small MLP by its first layer, .5 finds .79."""
_FLOOR = 1e-3
"""Share of the largest variance that is added to all, so that absent directions stay quiet."""
_TEMPERATURE = 0.07
STEPS = 400
"""Batches after which the loss falls no more: two minutes on one core for 3,000 networks."""


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One model to train on.

    Args:
        family: Models of one family descend from one trained ancestor.
        start: Models of different families that share a random start have the same, or empty.
        twins: Other seeds of one recipe have the same; drawn into the same batch.
        complexity: log10 of its parameters, plus one for each operation since its ancestor.
        tokens: What `embedder.identity.tokens_of` returns.
    """

    family: str
    start: str
    twins: str
    complexity: float
    tokens: Mapping[str, Tokens]


@dataclass(frozen=True, slots=True)
class Settings:
    """How the coder is trained.

    Args:
        seed: Decides all draws.
        steps: Batches of the contrastive part; 0 leaves it out.
        families: Families in a batch, two members of each.
        rate: Step size at the beginning; it falls to zero along half a cosine.
        decay: Weight decay of all that is trained.
        dropout: Share of units that are left out of a mean in training.
        noise: Largest length of what is added to a code of unit length, drawn as codes vary.
        missing: Share of models that lose a part, as if their head had been replaced.
        curriculum: Whether simple models come first: p ∝ exp(−complexity / c), c growing.
    """

    seed: int = 0
    steps: int = STEPS
    families: int = 128
    rate: float = 3e-3
    decay: float = 1e-3
    dropout: float = 0.2
    noise: float = 0.7
    missing: float = 0.2
    curriculum: bool = True


@dataclass(eq=False)
class _Batch:
    """Units of several models, one after another, for each part."""

    size: int
    codes: dict[str, Tensor]
    even: dict[str, Tensor]
    model: dict[str, Tensor]


def batch_of(members: Sequence[Member]) -> _Batch:
    """Return the units of several models in one piece."""
    codes, even, model = {}, {}, {}
    for part in PARTS:
        tokens = [member.tokens[part] for member in members]
        counts = np.array([len(t.even) for t in tokens])
        codes[part] = torch.from_numpy(np.concatenate([t.codes for t in tokens]).astype(np.float32))
        even[part] = torch.from_numpy(np.concatenate([t.even for t in tokens]))
        model[part] = torch.from_numpy(np.repeat(np.arange(len(members)), counts))
    return _Batch(len(members), codes, even, model)


class IdentityNetwork(nn.Module):
    """The coder as a differentiable function; the same formulas as `IdentityCoder`."""

    def __init__(self, coder: IdentityCoder) -> None:
        super().__init__()
        self.arrays = nn.ParameterDict(
            {
                name.replace("/", "|"): nn.Parameter(torch.from_numpy(values.copy()))
                for name, values in coder.arrays.items()
            }
        )

    def array(self, name: str) -> Tensor:
        """Return what is trained under a name of `IdentityCoder.arrays`."""
        found: Tensor = self.arrays[name.replace("/", "|")]
        return found

    def coder(self) -> IdentityCoder:
        """Return what was trained so far."""
        return IdentityCoder(
            {
                name.replace("|", "/"): values.detach().numpy().astype(np.float32).copy()
                for name, values in self.arrays.items()
            }
        )

    def forward(self, batch: _Batch, settings: Settings | None = None) -> Tensor:
        """Return the codes of a batch, (models, 256) of unit length.

        With settings, units are left out, moved and parts lost at random, as training wants it.
        """
        means = [self.mean(batch, part, settings) for part in PARTS]
        return nn.functional.normalize(torch.cat(means, dim=1) @ self.array("projection").T, dim=1)

    def mean(self, batch: _Batch, part: str, settings: Settings | None = None) -> Tensor:
        """Return what a part adds to the codes of a batch, (models, 256)."""
        if settings is not None:
            batch = self._disturbed(batch, part, settings)
        sums, counts = self._sums(batch, part)
        there = counts > 0
        means = sums / counts.clamp(min=1)[:, None] - self.array(f"{part}/centre")
        means = nn.functional.normalize(means, dim=1) * self.array(f"{part}/weight")
        return means * there[:, None]

    def _disturbed(self, batch: _Batch, part: str, settings: Settings) -> _Batch:
        """Return one part of a batch, its units fewer and moved at random."""
        codes, even, model = batch.codes[part], batch.even[part], batch.model[part]
        lost = torch.rand(batch.size) < settings.missing / len(PARTS)
        kept = (torch.rand(len(codes)) >= settings.dropout) & ~lost[model]
        codes, even, model = codes[kept], even[kept], model[kept]
        # Training moves codes in the directions in which they vary: differences of two of them
        # have that covariance. Each model moves by a length of its own.
        other = torch.randint(max(len(codes), 1), (2, len(codes)))
        step = (codes[other[0]] - codes[other[1]]) / np.sqrt(2)
        strength = settings.noise * torch.rand(batch.size)[model, None]
        return _Batch(
            batch.size,
            {part: codes + strength * step},
            {part: even},
            {part: model},
        )

    def _sums(self, batch: _Batch, part: str) -> tuple[Tensor, Tensor]:
        """Return the features of each model's units, added up, and how many units there are."""
        codes, even, model = batch.codes[part], batch.even[part], batch.model[part]
        turned = codes @ self.array(f"{part}/turn")
        frequencies = self.array(f"{part}/frequencies")
        if part == STREAMS:
            once, again = (turned @ frequencies).chunk(2, dim=1)
            found = once * again
        elif part in PAIR_PARTS:
            read, reach = (
                nn.functional.normalize(half, dim=1)
                for half in (turned[:, :WIDTH], turned[:, WIDTH:])
            )
            found = (read @ frequencies[:WIDTH]) * (reach @ frequencies[WIDTH:])
        else:
            phase = nn.functional.normalize(turned, dim=1) @ frequencies
            found = torch.cat([phase.cos(), phase.sin() * ~even[:, None]], dim=1)
        sums = torch.zeros(batch.size, FEATURES).index_add(0, model, found)
        counts = torch.zeros(batch.size).index_add(0, model, torch.ones(len(model)))
        return sums, counts

    @torch.no_grad()
    def centre(self, batches: Sequence[_Batch]) -> None:
        """Set the centre of each part to the mean over models."""
        for part in PARTS:
            total, number = torch.zeros(FEATURES), 0.0
            for batch in batches:
                sums, counts = self._sums(batch, part)
                there = counts > 0
                total += (sums[there] / counts[there][:, None]).sum(dim=0)
                number += float(there.sum())
            self.array(f"{part}/centre").copy_(total / max(number, 1.0))


def whitened(members: Sequence[Member], coder: IdentityCoder, power: float) -> IdentityCoder:
    """Return the coder with each part's turn set to the inverse covariance to a power."""
    arrays = dict(coder.arrays)
    for part in PARTS:
        codes = np.concatenate([m.tokens[part].codes for m in members]).astype(np.float64)
        if len(codes) < WIDTH:
            continue
        width = codes.shape[1]
        turn = np.zeros((width, width))
        for start in range(0, width, WIDTH):
            half = slice(start, start + WIDTH)
            turn[half, half] = _inverse_power(codes[:, half].T @ codes[:, half] / len(codes), power)
        arrays[f"{part}/turn"] = turn.astype(np.float32)
    return IdentityCoder(arrays)


def _inverse_power(covariance: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(covariance)
    values = values + _FLOOR * values[-1]
    return np.asarray((vectors * (values / values[-1]) ** -power) @ vectors.T)


def discriminating(
    means: NDArray[np.float32], families: Sequence[str], ridge: float = 0.1
) -> NDArray[np.float32]:
    """Return the projection that keeps most of what differs between families, (256, features).

    Args:
        means: (models, features).
        families: Of each model.
        ridge: Share of the mean variance that is added within families.
    """
    wide = means.astype(np.float64)
    number = {family: place for place, family in enumerate(sorted(set(families)))}
    label = np.array([number[family] for family in families])
    counts = np.bincount(label)
    centres = np.zeros((len(counts), wide.shape[1]))
    np.add.at(centres, label, wide)
    inside = wide - (centres / counts[:, None])[label]
    within = inside.T @ inside / max(len(wide) - len(counts), 1)
    total = np.cov(wide.T)
    within += ridge * np.trace(total) / len(total) * np.eye(len(total))
    values, vectors = eigh(total, within, subset_by_index=(len(total) - DIMENSION, len(total) - 1))
    # Directions count by how well they tell families: 1 − 1/λ is the share between families.
    scale = np.sqrt(np.maximum(values - 1, 0))
    return np.asarray((vectors * scale).T[::-1], np.float32)


def contrastive_loss(codes: Tensor, family: Tensor, start: Tensor) -> Tensor:
    """Return the supervised contrastive loss of a batch.

    Args:
        codes: (models, d) of unit length.
        family: (models,) numbers.
        start: (models,) numbers, −1 for none: pairs that share a start and not the family count
            neither way.
    """
    same = family[:, None] == family[None, :]
    shared = (start[:, None] == start[None, :]) & (start[:, None] >= 0) & ~same
    itself = torch.eye(len(codes), dtype=torch.bool)
    scores = (codes @ codes.T / _TEMPERATURE).masked_fill(itself | shared, -torch.inf)
    log_share = scores - scores.logsumexp(dim=1, keepdim=True)
    positive = same & ~itself
    kept = positive.any(dim=1)
    total = log_share.masked_fill(~positive, 0).sum(dim=1)[kept]
    return -(total / positive.sum(dim=1)[kept]).mean()


def train_identity(
    members: Sequence[Member],
    settings: Settings,
    progress: Callable[[int, float], None] | None = None,
) -> IdentityCoder:
    """Return a coder trained on these models.

    Args:
        members: Models of many families, with at least two members in most.
        settings: How.
        progress: Called with the step and the loss.

    Raises:
        ValueError: There are fewer than two families with two members each.
    """
    by_recipe(members)  # before anything is computed: are there enough families?
    torch.manual_seed(settings.seed)
    network = IdentityNetwork(whitened(members, untrained(), WHITENING))
    batches = [batch_of(members[i : i + 256]) for i in range(0, len(members), 256)]
    network.centre(batches)
    with torch.no_grad():
        means = np.concatenate(
            [torch.cat([network.mean(b, part) for part in PARTS], dim=1).numpy() for b in batches]
        )
        projection = discriminating(means, [member.family for member in members])
        network.array("projection").copy_(torch.from_numpy(projection / np.abs(projection).max()))
    if settings.steps:
        _descend(network, members, settings, progress)
    return network.coder()


def _descend(
    network: IdentityNetwork,
    members: Sequence[Member],
    settings: Settings,
    progress: Callable[[int, float], None] | None,
) -> None:
    """Train all together on batches of families."""
    fixed = {f"{part}|centre" for part in PARTS}
    trained = [values for name, values in network.arrays.items() if name not in fixed]
    optimiser = torch.optim.AdamW(trained, lr=settings.rate, weight_decay=settings.decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
    for step, batch in enumerate(_draws(members, settings)):
        loss = contrastive_loss(
            network(batch_of(batch), settings),
            numbers_of([member.family for member in batch]),
            numbers_of([member.start for member in batch]),
        )
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(step, float(loss.detach()))


def numbers_of(names: Sequence[str]) -> Tensor:
    """Return a number for each name, −1 for an empty one."""
    known = {name: place for place, name in enumerate(sorted(set(names) - {""}))}
    return torch.tensor([known.get(name, -1) for name in names])


def _draws(members: Sequence[Member], settings: Settings) -> Iterator[list[Member]]:
    """Yield batches: twins of one recipe together, two members of each family."""
    rng = np.random.default_rng(settings.seed)
    groups = by_recipe(members, least=2)
    for step in range(settings.steps):
        spread = spread_at(step / settings.steps, curriculum=settings.curriculum)
        batch: list[Member] = []
        for place in rng.permutation(len(groups)):
            for family in groups[place]:
                batch += two_of(family, spread, rng)
            if len(batch) >= 2 * settings.families:
                break
        yield batch


class Trainee(Protocol):
    """What is known of a model that is trained on, whatever is shown of it."""

    @property
    def family(self) -> str:
        """Models of one family descend from one trained ancestor."""

    @property
    def twins(self) -> str:
        """Other seeds of one recipe have the same."""

    @property
    def complexity(self) -> float:
        """How hard it is to tell."""


AnyTrainee = TypeVar("AnyTrainee", bound=Trainee)


def by_recipe(trainees: Sequence[AnyTrainee], *, least: int = 1) -> list[list[list[AnyTrainee]]]:
    """Return the families of each recipe, those with few members left out.

    Args:
        trainees: Models of many families.
        least: Members that a family needs.

    Raises:
        ValueError: There are fewer than two families with two members each.
    """
    families: dict[str, list[AnyTrainee]] = {}
    for trainee in trainees:
        families.setdefault(trainee.family, []).append(trainee)
    if sum(len(known) > 1 for known in families.values()) < 2:
        raise ValueError("training needs at least two families with two members each")
    recipes: dict[str, list[list[AnyTrainee]]] = {}
    for family, known in families.items():
        if len(known) >= least:
            recipes.setdefault(known[0].twins or family, []).append(known)
    return list(recipes.values())


def spread_at(progress: float, *, curriculum: bool) -> float:
    """Return c of the curriculum, from .5 as training begins to 4.5; without one all are alike."""
    return 0.5 + 4 * progress if curriculum else float("inf")


def two_of(
    family: Sequence[AnyTrainee], spread: float, rng: np.random.Generator
) -> list[AnyTrainee]:
    """Return two members of a family, or the only one, with p ∝ exp(−complexity / spread)."""
    complexity = np.array([trainee.complexity for trainee in family])
    chances = np.exp(-(complexity - complexity.min()) / spread)
    number = min(len(family), 2)
    chosen = rng.choice(len(family), number, replace=False, p=chances / chances.sum())
    return [family[place] for place in chosen]
