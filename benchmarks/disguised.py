"""What `compare` says of networks whose units were reordered, rescaled and flipped, by kind.

    python -m benchmarks.disguised ZOO      two minutes on one core

Each pair is written to two bare safetensors files, so that names and shapes alone tell the
architecture, and the second is disguised: hidden units, heads and the channels of streams in
another order, scaled and flipped as far as the design allows. Transformers are asked about twice
more, with their streams rotated and the channels of their heads mixed, alone and before the rest.
Copies are the first, disguised; kin are children that were trained further, by how far they went;
strangers have the same design and another start, and some networks were trained apart from one
start. Training here is short, so that many children still look like a random start, and
`cannot-say` is right for them; `unrelated` is wrong for all kin, and whatever says that one model
descends from another is wrong for all others. It writes benchmarks/results/disguised.json.
"""

import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks.alignment import trained_children
from benchmarks.machine import write_result
from embedder.architecture import Architecture
from embedder.rotation import rotated
from embedder.symmetry import Values, Weights, disguised
from embedder.zoo.shards import Zoo, open_zoo
from lineage.engine import LineageEngine

SEED = 0
DRIFTS = (0.0, 0.1, 0.3, 1.0, np.inf)
PAIRS = 100
"""Pairs of each kind of network, of copies, of kin, of strangers and of one start."""


def pairs_of(zoo: Zoo, kind: str, rng: np.random.Generator) -> Iterator[tuple[str, str, str]]:
    """Yield what two networks of a kind are to each other, and the two."""
    rows = [row for row in zoo if row["kind"] == kind and not row["diverged"]]
    bases = {row["id"]: row for row in rows if row["role"] == "base" and row["id"] == row["family"]}
    children = list(trained_children(rows, bases))
    for place in rng.permutation(len(children))[:PAIRS]:
        row = children[place]
        step = int(np.searchsorted(DRIFTS, row["drift"], side="right"))
        yield f"kin, drift {DRIFTS[step - 1]} to {DRIFTS[step]}", row["family"], row["id"]
    by_design = defaultdict(list)
    for row in bases.values():
        by_design[row["design"]].append(row)
    for place in rng.permutation(len(bases))[:PAIRS]:
        one = list(bases.values())[place]
        yield "copies", one["id"], one["id"]
        others = [r for r in by_design[one["design"]] if r["start_seed"] != one["start_seed"]]
        if others:
            yield "strangers", one["id"], others[rng.integers(len(others))]["id"]
    apart = [
        (one["id"], other["id"])
        for one, other in combinations(bases.values(), 2)
        if one["recipe_group"] == other["recipe_group"] and one["start_seed"] == other["start_seed"]
    ]
    for place in rng.permutation(len(apart))[:PAIRS]:
        yield "one start, trained apart", *apart[place]


def turned_and_disguised(
    weights: Weights, architecture: Architecture, rng: np.random.Generator
) -> dict[str, Values]:
    """Return the weights rotated as far as the design allows, and then disguised."""
    return disguised(rotated(weights, architecture, rng), architecture, rng)


KINDS = {kind: (kind, disguised) for kind in ("cnn", "gnn", "mlp", "rnn", "transformer")} | {
    "rotated transformer": ("transformer", rotated),
    "rotated and disguised transformer": ("transformer", turned_and_disguised),
}
"""What is shown → kind of network, and what is done to the second of a pair."""


def answers(zoo: Zoo, folder: Path) -> dict[str, Any]:
    """Return how often each relation was said, by kind of network and of pair."""
    rng = np.random.default_rng(SEED)
    said: dict[str, dict[str, Counter[str]]] = {}
    one, other = folder / "one.safetensors", folder / "other.safetensors"
    with LineageEngine(str(folder / "none"), optional=True) as engine:
        for shown, (kind, change) in KINDS.items():
            told = said[shown] = defaultdict(Counter)
            for name, first, second in pairs_of(zoo, kind, rng):
                save_file(zoo.weights(first), one)
                changed = change(zoo.weights(second), zoo.architecture(second), rng)
                save_file(
                    {n: np.ascontiguousarray(w, np.float32) for n, w in changed.items()}, other
                )
                told[name][str(engine.compare(str(one), str(other)).relation)] += 1
            print(shown, {name: dict(count) for name, count in sorted(told.items())}, flush=True)
    return {kind: {n: dict(c) for n, c in sorted(told.items())} for kind, told in said.items()}


def main() -> None:
    """Measure and write the result."""
    zoo = open_zoo(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory(prefix="lineage-disguised-") as made:
        said = answers(zoo, Path(made))
    result = {"seed": SEED, "zoo": {"models": len(zoo)}, "said": said}
    print("written to", write_result("disguised", result))


if __name__ == "__main__":
    main()
