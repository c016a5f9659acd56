"""How well the margin of partners tells kin from strangers, on a zoo.

    python -m benchmarks.alignment ZOO STRANGERS    about five minutes on one core

Pairs: other seeds of one recipe (twins), networks of one design and task with other recipes
(strangers), networks of other tasks, networks trained apart from one start, and children that were
trained further, by how far they went. STRANGERS is a zoo of networks that differ in their seeds
alone; those for tests are paired at random. For children that were not reordered it is told too
which share of their units the alignment would put in the right place. Nothing is fitted here;
`embedder.matching.MARGIN` is the limit that these numbers show. It writes
benchmarks/results/alignment.json.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import write_result
from embedder.anchors import Units, anchored
from embedder.coding import shipped_coder
from embedder.families import Row
from embedder.identity import Tokens, tokens_of
from embedder.matching import FEWEST, MARGIN, MATCHED, margin, turned
from embedder.zoo.shards import Zoo, open_zoo
from lineage.partners import match_units

SEED = 3
DRIFTS = (0.0, 0.1, 0.3, 0.6, 1.0, 2.0)
TRAINED = ("train-on", "lora-1", "lora-2", "lora-4")


def pairs_of(zoo: Zoo) -> Iterator[tuple[str, str, str]]:
    """Yield what two models are to each other, and the two."""
    rng = np.random.default_rng(SEED)
    bases = {r["id"]: r for r in zoo if r["role"] == "base" and r["id"] == r["family"]}
    recipes, populations = defaultdict(list), defaultdict(list)
    for model, row in bases.items():
        recipes[row["recipe_group"]].append(model)
        populations[row["population"]].append(model)
    for models in recipes.values():
        for place, one in enumerate(models):
            for other in models[place + 1 :]:
                same = bases[one]["start_seed"] == bases[other]["start_seed"]
                yield ("one start, trained apart" if same else "twins"), one, other
    for models in populations.values():
        for one in models:
            other = str(rng.choice(models))
            if bases[one]["recipe_group"] != bases[other]["recipe_group"]:
                yield "strangers", one, other
    every = list(bases)
    for one, place in zip(every, rng.integers(len(every), size=len(every)), strict=True):
        other = every[place]
        if bases[one]["task"] != bases[other]["task"]:
            yield "other tasks", one, other
    yield from _kin(zoo, bases)


def seeds_alone(zoo: Zoo) -> Iterator[tuple[str, str, str]]:
    """Yield pairs of networks that differ in their seeds alone."""
    rows = [row["id"] for row in zoo if row["split"] == "test" and not row["diverged"]]
    rng = np.random.default_rng(SEED)
    for place, step in enumerate(rng.integers(1, len(rows), 2 * len(rows))):
        yield "other seeds alone", rows[place % len(rows)], rows[(place + step) % len(rows)]


def trained_children(rows: Iterable[Row], bases: Mapping[str, Row]) -> Iterator[Row]:
    """Yield the rows of children that were trained further from one of some bases."""
    for row in rows:
        base = bases.get(row["family"])
        if base is None or row["generation"] != 1 or row["operation"] not in TRAINED:
            continue
        if row["design"] == base["design"]:
            yield row


def _kin(zoo: Zoo, bases: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield children that were trained further, and their bases, by drift."""
    for row in trained_children(zoo, bases):
        step = np.searchsorted(DRIFTS, row["drift"], side="right") - 1
        if step < len(DRIFTS) - 1:
            yield f"kin, drift {DRIFTS[step]} to {DRIFTS[step + 1]}", row["id"], row["family"]


class Shown:
    """The models of a zoo as the margin and the alignment are shown them."""

    def __init__(self, zoo: Zoo) -> None:
        self._zoo = zoo
        self._kept: dict[str, tuple[dict[str, Tokens], list[Units]]] = {}

    def __getitem__(self, model: str) -> tuple[dict[str, Tokens], list[Units]]:
        """Return the turned units of a model, and all of them."""
        if model not in self._kept:
            units = anchored(self._zoo.weights(model), self._zoo.architecture(model))
            self._kept[model] = turned(tokens_of(units), shipped_coder()), units
        return self._kept[model]


def told(zoo: Zoo, pairs: Iterable[tuple[str, str, str]]) -> dict[str, Any]:
    """Return for each kind of pair how the margins are spread."""
    shown = Shown(zoo)
    found: dict[str, list[tuple[str, float, float, float]]] = defaultdict(list)
    for kind, one, other in pairs:
        (ours, first), (theirs, second) = shown[one], shown[other]
        if sum(min(len(ours[p].even), len(theirs[p].even)) for p in MATCHED[:2]) < FEWEST:
            continue
        matched = match_units(first, second) if kind.startswith("kin") else []
        scales = [np.std(np.log(np.abs(match.factors()))) for match in matched]
        right = [match.order == np.arange(match.units) for match in matched]
        found[kind].append(
            (
                zoo.row(one)["kind"],
                margin(ours, theirs),
                float(max(scales, default=np.nan)),
                float(np.concatenate(right).mean()) if right else np.nan,
            )
        )
    return {kind: spread_of(rows) for kind, rows in sorted(found.items())}


def spread_of(rows: list[tuple[str, float, float, float]]) -> dict[str, Any]:
    """Return the spread of margins, and how many pass the limit, in all and in the worst kind."""
    kinds, margins, scales, right = (np.array(column) for column in zip(*rows, strict=True))
    passed = margins > MARGIN
    spread: dict[str, Any] = {
        "pairs": len(rows),
        "pass": int(passed.sum()),
        "median": round(float(np.median(margins)), 3),
        "quantiles": {
            str(q): round(float(np.quantile(margins, q)), 3) for q in (0.01, 0.99, 0.999, 0.9999)
        },
        "largest": round(float(margins.max()), 3),
        "pass_by_kind": {
            str(kind): f"{int(passed[kinds == kind].sum())} of {int((kinds == kind).sum())}"
            for kind in np.unique(kinds)
        },
    }
    if np.isfinite(scales).any():
        spread["spread_of_scales"] = round(float(np.nanquantile(scales, 0.95)), 3)
        spread["put_in_place"] = round(float(np.nanmean(right)), 4)
    return spread


def main() -> None:
    """Measure and write the result."""
    zoo, strangers = (open_zoo(Path(folder)) for folder in sys.argv[1:3])
    pairs = told(zoo, pairs_of(zoo)) | told(strangers, seeds_alone(strangers))
    result = {
        "seed": SEED,
        "encoder": shipped_coder().version,
        "zoo": {"models": len(zoo), "strangers": len(strangers)},
        "limit": MARGIN,
        "pairs": pairs,
    }
    for kind, spread in pairs.items():
        print(kind, spread)
    print("written to", write_result("alignment", result))


if __name__ == "__main__":
    main()
