"""How well the code that needs no architecture finds parents, on a zoo, against simpler ones.

    python -m benchmarks.plain ZOO          the shipped coder and its rivals, same queries
    python -m benchmarks.plain ZOO --fit    fit the coder on bases of other recipes first

Queries are the children and copies of held-back recipes (folds 8 and 9), reordered, rescaled and
flipped; the gallery is every base of the zoo. *vector* is the vector of the fingerprint, by which
`add` and `parents` search without a code. It writes benchmarks/results/plain.json.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from benchmarks.identity import as_rows
from benchmarks.machine import ROOT, write_result
from embedder.checkpoint import Checkpoint, tensor_of
from embedder.coding import shipped_coder
from embedder.evaluating import Task, cosines, score, task_of
from embedder.families import Split, relatives_of
from embedder.fingerprint import take_fingerprint
from embedder.plain import Matrices, PlainCoder, matrices_of, shipped_plain
from embedder.zoo.shards import open_zoo
from index.search import ALIKE
from lineage.evaluate_commands import Shown, scores_of, show

SHIPPED = ROOT / "embedder/pretrained/plain.safetensors"
Codes = NDArray[np.float32]


def told(shown: list[Shown]) -> list[Matrices]:
    """Return the numbers of the matrices of each model."""
    return [list(matrices_of(tensor_of(n, np.asarray(v)) for n, v in w.items())) for w, _ in shown]


def vectors(shown: list[Shown]) -> Codes:
    """Return the vector of each model's fingerprint."""
    models = [tuple(tensor_of(n, np.asarray(v)) for n, v in w.items()) for w, _ in shown]
    return np.array([take_fingerprint(Checkpoint("x", "live", m)).vector for m in models])


def row_of(task: Task, scores: Codes) -> dict[str, Any]:
    """Return recall, and how many pairs of each sort are alike."""
    own = np.zeros(scores.shape, bool)
    own[np.arange(len(own)), task.right] = True
    return {
        "cells": as_rows(score(task, scores)),
        "own_alike": round(float((scores[own] > ALIKE).mean()), 4),
        "others_alike": round(float((scores[~own] > ALIKE).mean()), 4),
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--fit", action="store_true")
    chosen = parser.parse_args()
    zoo, split = open_zoo(chosen.zoo), Split()
    relatives = relatives_of(zoo, lambda row: row["role"] == "base" or not split.trains(row))
    task = task_of(relatives, [not split.trains(relative.row) for relative in relatives])
    shown = show(zoo, task)
    start = time.process_time()
    queries, gallery = (told(part) for part in shown)
    seconds = time.process_time() - start
    coder = shipped_plain() if not chosen.fit else None
    if coder is None:
        known = zip(task.gallery, gallery, strict=True)
        coder = PlainCoder.fit([one for base, m in known if split.trains(base.row) for one in m])
        arrays = {"centre": coder.centre, "directions": coder.directions}
        save_file({name: a.astype(np.float32) for name, a in arrays.items()}, SHIPPED)
    plain = [np.array([coder.code(matrices) for matrices in part]) for part in (queries, gallery)]
    vector = [vectors(part) for part in shown]
    scores = {"plain": cosines(plain[0], plain[1]), "vector": cosines(vector[0], vector[1])}
    for rival in ("singular values", "statistics"):
        scores[rival] = scores_of(rival, shown, shipped_coder())
    result: dict[str, Any] = {
        "zoo": {"models": len(zoo), "queries": len(task.queries), "bases": len(task.gallery)},
        "milliseconds_a_model": round(1e3 * seconds / (len(queries) + len(gallery)), 2),
        "methods": {name: row_of(task, found) for name, found in scores.items()},
    }
    for name, row in result["methods"].items():
        cells = [c for c in row["cells"] if c["group"] == "all"]
        print(name, row["own_alike"], row["others_alike"])
        print("  ", [(c["drift"], c["queries"], c["first"], c["ten"]) for c in cells])
    print("written to", write_result("plain", result))


if __name__ == "__main__":
    main()
