"""Fit the law of chance on control pairs and write it into the package.

Trains networks of one design on the same data, one seed each: multilayer perceptrons under four
regimes, a convolutional network with batch norm, a GRU, and a character language model. Every two
of a family are a control pair. Run it from the repository's root:

    python -m benchmarks.controls

It takes about ten minutes on two cores and overwrites lineage/controls.json and
benchmarks/results/controls.json.
"""

import itertools
import json
import math
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.machine import described
from lineage.chance import shortest_axis

Weights = dict[str, NDArray[np.float32]]

ROOT = Path(__file__).parent.parent
SEEDS = 30
SEEDS_OF_LANGUAGE_MODEL = 14


@dataclass(frozen=True)
class Recipe:
    """How one family is trained."""

    build: Callable[[], nn.Module]
    steps: int
    rate: float
    decay: float
    optimiser: str


class Recurrent(nn.Module):
    """A GRU over the rows of a digit."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(8, 48, batch_first=True)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return ten logits a digit, (batch, 64) → (batch, 10)."""
        states, _ = self.cell(x.view(-1, 8, 8))
        logits: Tensor = self.head(states[:, -1])
        return logits


class LanguageModel(nn.Module):
    """A two-layer transformer over characters."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, width)
        self.position = nn.Embedding(48, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 128, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of the next character, (batch, time) → (batch, time, 128)."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(self.norm(x))
        return logits


def perceptron(width: int, activation: type[nn.Module]) -> Callable[[], nn.Module]:
    """Return a maker of perceptrons with two hidden layers."""
    return lambda: nn.Sequential(
        nn.Linear(64, width),
        activation(),
        nn.Linear(width, width),
        activation(),
        nn.Linear(width, 10),
    )


def convolutional() -> nn.Module:
    """Return a small convolutional network with batch norm."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


RECIPES = {
    "perceptron, AdamW": Recipe(perceptron(128, nn.ReLU), 600, 3e-3, 0.01, "adamw"),
    "perceptron, AdamW, decay 1": Recipe(perceptron(128, nn.ReLU), 600, 3e-3, 1.0, "adamw"),
    "perceptron, SGD": Recipe(perceptron(128, nn.ReLU), 600, 0.1, 5e-4, "sgd"),
    "narrow tanh perceptron, SGD": Recipe(perceptron(32, nn.Tanh), 800, 0.1, 5e-4, "sgd"),
    "convolutional, AdamW": Recipe(convolutional, 500, 3e-3, 0.01, "adamw"),
    "GRU, AdamW": Recipe(Recurrent, 500, 3e-3, 0.01, "adamw"),
}


def train(model: nn.Module, recipe: Recipe, seed: int) -> nn.Module:
    """Train a classifier of digits in place and return it."""
    digits = load_digits()
    x = torch.tensor(digits.data[:1500] / 16, dtype=torch.float32)
    y = torch.tensor(digits.target[:1500])
    order = torch.Generator().manual_seed(seed)
    optimiser: torch.optim.Optimizer = (
        torch.optim.AdamW(model.parameters(), recipe.rate, weight_decay=recipe.decay)
        if recipe.optimiser == "adamw"
        else torch.optim.SGD(
            model.parameters(), recipe.rate, momentum=0.9, weight_decay=recipe.decay
        )
    )
    for _ in range(recipe.steps):
        chosen = torch.randint(0, len(x), (64,), generator=order)
        loss = functional.cross_entropy(model(x[chosen]), y[chosen])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return model


def train_language_model(seed: int, steps: int = 250) -> nn.Module:
    """Train a language model on the standard library's sources and return it."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "".join(file.read_text(errors="ignore") for file in sorted(folder.glob("*.py"))[:60])
    tokens = torch.tensor([min(ord(character), 127) for character in text])
    model = LanguageModel()
    order = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - 49, (16,), generator=order)
        batch = torch.stack([tokens[start : start + 49] for start in starts])
        logits = model(batch[:, :-1]).reshape(-1, 128)
        loss = functional.cross_entropy(logits, batch[:, 1:].reshape(-1))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return model


def weights_of(model: nn.Module) -> Weights:
    """Return the tensors that count: those with two axes or more."""
    return {
        name: tensor.detach().numpy().copy()
        for name, tensor in model.state_dict().items()
        if tensor.ndim >= 2
    }


def families() -> dict[str, list[Weights]]:
    """Train every family and return its members' weights."""
    found: dict[str, list[Weights]] = {}
    for name, recipe in RECIPES.items():
        found[name] = []
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            found[name].append(weights_of(train(recipe.build(), recipe, seed + 777)))
        print(f"{name}: {SEEDS} trained", flush=True)
    found["language model, AdamW"] = []
    for seed in range(SEEDS_OF_LANGUAGE_MODEL):
        torch.manual_seed(seed)
        found["language model, AdamW"].append(weights_of(train_language_model(seed + 777)))
    return found


def cosine(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    """Return the cosine of two tensors after their means are taken off."""
    a, b = (part.astype(np.float64).reshape(-1) - float(part.mean()) for part in (x, y))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def controls_of(members: list[Weights]) -> list[tuple[float, float, float]]:
    """Return cosine, Σ w²/n and Σ w²/m of every pair of one family."""
    sizes = {name: tensor.size for name, tensor in members[0].items()}
    total = sum(sizes.values())
    by_values = sum((size / total) ** 2 / size for size in sizes.values())
    by_axes = sum(
        (size / total) ** 2 / shortest_axis(tuple(n for n in members[0][name].shape if n > 1))
        for name, size in sizes.items()
    )
    return [
        (
            sum(size / total * cosine(a[name], b[name]) for name, size in sizes.items()),
            by_values,
            by_axes,
        )
        for a, b in itertools.combinations(members, 2)
    ]


def fitted_kappa(pairs: list[tuple[float, float, float]], mean: float) -> float:
    """Return the κ with which these pairs' standardised cosines have a variance of 1."""
    low, high = 0.0, 2.0
    for _ in range(60):
        kappa = (low + high) / 2
        variance = np.mean([(c - mean) ** 2 / (v + kappa**2 * m) for c, v, m in pairs])
        low, high = (kappa, high) if variance > 1 else (low, kappa)
    return high


def main() -> None:
    """Fit, check each family against the law fitted on the others, and write both files."""
    torch.set_num_threads(1)
    by_family = {name: controls_of(members) for name, members in families().items()}
    everything = [pair for pairs in by_family.values() for pair in pairs]
    mean = float(np.mean([np.mean([c for c, _, _ in pairs]) for pairs in by_family.values()]))
    # The largest of the families, not their mean: a law for strangers must hold for the worst.
    kappas = {name: fitted_kappa(pairs, mean) for name, pairs in by_family.items()}
    rows = []
    for name, pairs in by_family.items():
        kappa = max(value for other, value in kappas.items() if other != name)
        z = np.array([(c - mean) / math.sqrt(v + kappa**2 * m) for c, v, m in pairs])
        rows.append(
            {
                "family": name,
                "pairs": len(pairs),
                "own_kappa": round(kappas[name], 3),
                "left_out_kappa": round(kappa, 3),
                "mean_z": round(float(z.mean()), 2),
                "sd_z": round(float(z.std()), 2),
                "largest_z": round(float(z.max()), 2),
            }
        )
        print(rows[-1])
    law = {
        "pairs": len(everything),
        "mean": round(mean, 4),
        "kappa": round(max(kappas.values()), 3),
        "source": "networks of one design trained on the same data from another start "
        "(benchmarks/controls.py)",
    }
    (ROOT / "lineage/controls.json").write_text(json.dumps(law, indent=2) + "\n")
    result = {**described(), "law": law, "left_one_family_out": rows}
    (ROOT / "benchmarks/results/controls.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
