"""How well matching hidden units from both sides tells kin from strangers, on a zoo.

    python -m benchmarks.alignment ZOO      about two minutes on one core for 4,000 networks

Pairs: other seeds of one recipe (twins), networks of one design and task with other recipes
(strangers), networks trained apart from one start, and children that were trained further, by how
far they went. Nothing is fitted here; `lineage.aligning` has the limit that these numbers show. It
writes benchmarks/results/alignment.json.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import write_result
from embedder.anchors import Units, anchored
from embedder.families import Row
from embedder.zoo.shards import Zoo, open_zoo
from lineage.aligning import AGREED, LEAST_UNITS, match_units

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
    yield from _kin(zoo, bases)


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


def told(zoo: Zoo) -> dict[str, Any]:
    """Return for each kind of pair how the shares of agreed units are spread."""
    units: dict[str, list[Units]] = {}
    least = 1.0
    found: dict[str, list[tuple[str, float, int, float]]] = defaultdict(list)
    for kind, one, other in pairs_of(zoo):
        for model in (one, other):
            if model not in units:
                units[model] = anchored(zoo.weights(model), zoo.architecture(model))
        every = [group.group for group in units[one]]
        for signless in (False, True):
            matched = match_units(units[one], units[other], every if signless else ())
            name = f"{kind}, signs not known" if signless else kind
            count = sum(match.units for match in matched)
            if not count:
                continue
            share = sum(match.agreed for match in matched) / count
            logs = [np.std(np.log(np.abs(match.factors()))) for match in matched]
            found[name].append((zoo.row(one)["kind"], share, count, float(max(logs))))
            if share >= AGREED:
                least = min(least, sum(match.nearest for match in matched) / count)
    spreads: dict[str, Any] = {kind: spread_of(rows) for kind, rows in sorted(found.items())}
    return {**spreads, "least share of equal nearest units where .6 agree": round(least, 3)}


def spread_of(rows: list[tuple[str, float, int, float]]) -> dict[str, Any]:
    """Return the spread of shares, and how many pass the limit, in all and in the worst kind."""
    shares = np.array([share for _, share, _, _ in rows])
    enough = np.array([count >= LEAST_UNITS for _, _, count, _ in rows])
    passed = (shares >= AGREED) & enough
    kinds = np.array([kind for kind, _, _, _ in rows])
    return {
        "pairs": len(rows),
        "with_enough_units": int(enough.sum()),
        "pass": int(passed.sum()),
        "median": round(float(np.median(shares)), 3),
        "one_in_a_hundred": [round(float(q), 3) for q in np.quantile(shares, [0.01, 0.99])],
        "largest": round(float(shares[enough].max()) if enough.any() else 0.0, 3),
        "pass_by_kind": {
            kind: f"{int(passed[kinds == kind].sum())} of {int(enough[kinds == kind].sum())}"
            for kind in sorted({kind for kind, *_ in rows})
        },
        "spread_of_scales": round(float(np.quantile([log for *_, log in rows], 0.95)), 3),
    }


def main() -> None:
    """Measure and write the result."""
    folder = Path(sys.argv[1])
    zoo = open_zoo(folder)
    pairs = told(zoo)
    result = {"seed": SEED, "zoo": {"models": len(zoo)}, "limit": AGREED, "pairs": pairs}
    for kind, spread in pairs.items():
        print(kind, spread)
    print("written to", write_result("alignment", result))


if __name__ == "__main__":
    main()
