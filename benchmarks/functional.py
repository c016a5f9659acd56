"""How well neural functionals (`nfn`) find the parents of perceptrons, beside identity codes.

    pip install nfn
    python -m benchmarks.functional ZOO   about five minutes on one core

A neural functional takes weights of one design, so one is trained for each design of perceptrons
in the zoo, with the loss and the families that train the identity coder, on three copies of each
model that are reordered, rescaled and flipped. It is asked the perceptrons among the queries of
`benchmarks.identity` and told their design: it looks among bases of the same design only, where
identity codes look among all perceptrons. It writes benchmarks/results/functional.json.

Source: Zhou et al. 2023, NeurIPS (permutation equivariant neural functionals); their package.
"""

import argparse
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.identity import as_rows
from benchmarks.machine import write_result
from embedder.coding import shipped_coder
from embedder.evaluating import Task, cosines, score, task_of
from embedder.families import Relative, Split, relatives_of
from embedder.symmetry import disguised
from embedder.training import contrastive_loss, numbers_of
from embedder.zoo.shards import Zoo, open_zoo

SEED, STEPS, FAMILIES, CHANNELS, RATE, COPIES = 0, 200, 32, 16, 2e-3, 3
LEAST = 40
"""Families of a design that is trained on."""

Arrays = list[NDArray[np.float32]]


class Functional(nn.Module):
    """Two equivariant layers, a pool over hidden units, and a code of 128 numbers."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], scales: Sequence[float]) -> None:
        from nfn import layers
        from nfn.common import ArraySpec, NetworkSpec

        super().__init__()
        specs = [ArraySpec(shape) for shape in shapes]
        spec = NetworkSpec(specs[::2], specs[1::2])
        self._scales = scales
        self._equivariant = nn.Sequential(
            layers.HNPLinear(spec, 1, CHANNELS),
            layers.TupleOp(nn.ReLU()),
            layers.HNPLinear(spec, CHANNELS, CHANNELS),
            layers.TupleOp(nn.ReLU()),
            layers.HNPPool(spec),
            nn.Flatten(),
        )
        self._head = nn.Sequential(nn.LazyLinear(256), nn.ReLU(), nn.Linear(256, 128))

    def forward(self, models: Sequence[Arrays]) -> Tensor:
        """Return the codes of some models, (models, 128) of unit length."""
        from nfn.common import WeightSpaceFeatures

        stacked = [
            torch.from_numpy(np.stack(arrays)[:, None] / scale)
            for arrays, scale in zip(zip(*models, strict=True), self._scales, strict=True)
        ]
        features = WeightSpaceFeatures(stacked[::2], stacked[1::2])
        return nn.functional.normalize(self._head(self._equivariant(features)), dim=1)


def copy_of(zoo: Zoo, relative: Relative, rng: np.random.Generator) -> Arrays:
    """Return weights and biases by layer, with hidden units in another order, scale and sign."""
    model = relative.row["id"]
    weights = disguised(zoo.weights(model), zoo.architecture(model), rng)
    return [np.asarray(values, np.float32) for values in weights.values()]


def plain(zoo: Zoo, relative: Relative) -> Arrays:
    """Return weights and biases by layer."""
    return [np.asarray(v, np.float32) for v in zoo.weights(relative.row["id"]).values()]


def trained(zoo: Zoo, families: Sequence[list[Relative]]) -> Functional:
    """Return a functional trained on the families of one design."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    copies = {
        relative.row["id"]: [copy_of(zoo, relative, rng) for _ in range(COPIES)]
        for relative in chain.from_iterable(families)
    }
    known = [arrays for some in copies.values() for arrays in some]
    scales = [max(float(np.std(np.stack(v))), 1e-6) for v in zip(*known, strict=True)]
    network = Functional([values.shape for values in known[0]], scales)
    network(known[:2])  # its head learns its width
    optimiser = torch.optim.AdamW(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        chosen = rng.permutation(len(families))[:FAMILIES]
        batch = [
            families[place][member]
            for place in chosen
            for member in rng.permutation(len(families[place]))[:2]
        ]
        codes = network([copies[r.row["id"]][rng.integers(COPIES)] for r in batch])
        loss = contrastive_loss(
            codes,
            numbers_of([relative.member.family for relative in batch]),
            numbers_of([relative.member.start for relative in batch]),
        )
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return network


def families_of(relatives: Sequence[Relative]) -> list[list[Relative]]:
    """Return the families that have two members of one design."""
    found: dict[str, list[Relative]] = {}
    for relative in relatives:
        found.setdefault(relative.member.family, []).append(relative)
    return [family for family in found.values() if len(family) > 1]


def scores_of(zoo: Zoo, task: Task, train: Sequence[Relative]) -> NDArray[np.float32]:
    """Return the scores of one functional for each design; bases of others have none."""
    scores = np.full((len(task.queries), len(task.gallery)), np.nan, np.float32)
    for design in sorted({query.row["design"] for query in task.queries}):
        families = families_of([known for known in train if known.row["design"] == design])
        asked = [n for n, query in enumerate(task.queries) if query.row["design"] == design]
        bases = [n for n, base in enumerate(task.gallery) if base.row["design"] == design]
        if len(families) < LEAST or not bases:
            continue
        network = trained(zoo, families)
        with torch.no_grad():
            queries = network(
                [copy_of(zoo, task.queries[n], np.random.default_rng(n)) for n in asked]
            )
            gallery = network([plain(zoo, task.gallery[n]) for n in bases])
        scores[np.ix_(asked, bases)] = (queries @ gallery.T).numpy()
        print(len(families), len(asked), len(bases), design, flush=True)
    return scores


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("zoo", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    zoo, split = open_zoo(chosen.zoo), Split()
    relatives = relatives_of(zoo, lambda row: row["kind"] == "mlp")
    tests = [
        not split.trains(r.row) and r.row["design"] == zoo.row(r.row["family"])["design"]
        for r in relatives
    ]
    task = task_of(relatives, tests)
    start = time.process_time()
    scores = scores_of(zoo, task, [r for r in relatives if split.trains(r.row)])
    seconds = round(time.process_time() - start)
    coder = shipped_coder()
    ours = [
        np.array([coder.code_of(relative.member.tokens) for relative in part])
        for part in (task.queries, task.gallery)
    ]
    rows = {
        "nfn": as_rows([cell for cell in score(task, scores) if cell.group == "all"]),
        "encoder": as_rows([c for c in score(task, cosines(*ours)) if c.group == "all"]),
    }
    result = {
        "seed": SEED,
        "steps": STEPS,
        "queries": len(task.queries),
        "bases": len(task.gallery),
        "cpu_seconds": seconds,
        **rows,
    }
    for name, told in rows.items():
        print(name, [(row["drift"], row["first"], row["ten"]) for row in told])
    print("written to", write_result("functional", result))


if __name__ == "__main__":
    main()
