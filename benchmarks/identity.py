"""How well identity codes find the parents of networks that they have not seen, on a zoo.

    python -m benchmarks.identity ZOO           the shipped encoder and simpler codes, same queries
    python -m benchmarks.identity ZOO --method flat   this row anew, beside those that are there
    python -m benchmarks.identity ZOO --train   an encoder trained without one kind of network, one
                                                task and one operation, fixed beforehand
    python -m benchmarks.identity ZOO --cross   queries of all recipes, each by an encoder that was
                                                trained without its fold
    python -m benchmarks.identity ZOO --alike   which kin and strangers the search's limit lets by
    python -m benchmarks.identity ZOO --strangers OTHER   how alike networks of one design are that
                                                          learned one task from other seeds

Queries are the children and copies of held-back recipes (folds 8 and 9), reordered, rescaled and
flipped; the gallery is every base of the zoo. It writes benchmarks/results/identity.json, keeping
rows that are there already.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import read_result, write_result
from embedder.anchors import anchored
from embedder.coding import shipped_coder
from embedder.evaluating import BINS, Cell, Task, score, shares_start, task_of
from embedder.families import Relative, Split, relatives_of
from embedder.identity import IdentityCoder
from embedder.rotation import rotated
from embedder.symmetry import flipped, permuted, rescaled
from embedder.training import Settings, train_identity
from embedder.zoo.shards import Zoo, open_zoo
from index.search import ALIKE
from lineage.evaluate_commands import METHODS, scores_of, show

LEFT_OUT = Split(kind="rnn", task="textures8", operation="prune")
"""What one training never sees; chosen before any was run."""

INVARIANCE_MODELS = 300


def as_rows(cells: list[Cell]) -> list[dict[str, Any]]:
    """Return cells as a result file holds them."""
    return [
        {
            "group": cell.group,
            "drift": [cell.low, cell.high],
            "queries": cell.queries,
            "first": round(cell.first, 4),
            "apart": round(cell.apart, 4),
            "ten": round(cell.ten, 4),
            "twins_beaten": None if cell.twins is None else round(cell.twins, 4),
        }
        for cell in cells
    ]


def methods(zoo: Zoo, task: Task, names: Sequence[str]) -> dict[str, Any]:
    """Score methods on the same queries."""
    found = {}
    shown = show(zoo, task) if names else ([], [])
    for method in names:
        start = time.process_time()
        cells = score(task, scores_of(method, shown, shipped_coder()))
        found[method] = {"cells": as_rows(cells), "cpu_seconds": round(time.process_time() - start)}
        print(method, [(c.low, c.first, c.queries) for c in cells if c.group == "all"], flush=True)
    return found


def same_start(coder: IdentityCoder, task: Task, split: Split) -> list[dict[str, Any]]:
    """Return how often a base trained apart from a held-back base's start is nearest to it.

    Margin: how far its cosine lies above that of the nearest base of any other start.
    """
    codes = np.array([coder.code_of(base.member.tokens) for base in task.gallery])
    starts = np.array([base.member.start for base in task.gallery])
    found: dict[str, list[float]] = {}
    for place, base in enumerate(task.gallery):
        shared = starts == starts[place]
        if split.trains(base.row) or shared.sum() < 2:
            continue
        cosines = codes @ codes[place]
        others = shared & (np.arange(len(codes)) != place)
        margin = float(cosines[others].max() - cosines[~shared].max())
        for group in (base.row["kind"], "all"):
            found.setdefault(group, []).append(margin)
    return [
        {
            "group": group,
            "bases": len(margins),
            "nearest": round(float(np.mean(np.array(margins) > 0)), 4),
            "margin": [round(float(m), 3) for m in np.quantile(margins, [0.1, 0.5, 0.9])],
        }
        for group, margins in sorted(found.items())
    ]


def strangers(zoo: Zoo, coder: IdentityCoder) -> dict[str, Any]:
    """Return how alike codes are of networks that have all in common but their seeds.

    Those for calibration are left out. `nearest`: of each network's cosines with all others.
    """
    rows = [row for row in zoo if row["split"] == "test" and not row["diverged"]]
    units = (anchored(zoo.weights(row["id"]), zoo.architecture(row["id"])) for row in rows)
    codes = np.array([coder.code(known) for known in units])
    rng = np.random.default_rng(0)
    pairs, nearest = [], []
    for place in rng.permutation(len(codes))[:1500]:
        cosines = codes @ codes[place]
        cosines[place] = -1
        nearest.append(cosines.max())
        pairs.append(np.delete(cosines, place))
    levels = (0.5, 0.9, 0.99, 0.999, 0.9999)
    spread = np.quantile(np.concatenate(pairs), levels)
    return {
        "networks": len(codes),
        "pairs": {str(q): round(float(v), 3) for q, v in zip(levels, spread, strict=True)},
        "nearest": {str(q): round(float(np.quantile(nearest, q)), 3) for q in (0.01, 0.5, 0.99)},
    }


def alike(coder: IdentityCoder, task: Task) -> dict[str, Any]:
    """Return which cosines held-back queries have with their bases, and with all others."""
    queries, gallery = (
        np.array([coder.code_of(relative.member.tokens) for relative in side])
        for side in (task.queries, task.gallery)
    )
    scores = queries @ gallery.T
    own = scores[np.arange(len(queries)), task.right]
    drift = np.array([query.drift for query in task.queries])
    kin = shares_start(task)
    kin[np.arange(len(queries)), task.right] = True
    strange = scores[~kin]
    return {
        "limit": ALIKE,
        "kin_above": {
            f"{low} to {high}": round(
                float((own[(drift >= low) & (drift < high)] > ALIKE).mean()), 4
            )
            for low, high in pairwise(BINS)
        },
        "strangers_above": round(float((strange > ALIKE).mean()), 5),
        "strangers": {
            q: round(float(np.quantile(strange, float(q))), 3) for q in ("0.99", "0.999")
        },
    }


def left_out(zoo: Zoo, relatives: list[Relative]) -> dict[str, Any]:
    """Train without one kind, task and operation together, and score each on what was left out."""
    known = [relative for relative in relatives if LEFT_OUT.trains(relative.row)]
    start = time.process_time()
    coder = train_identity([relative.member for relative in known], Settings())
    seconds = round(time.process_time() - start)
    found: dict[str, Any] = {"trained_on": len(known), "cpu_seconds": seconds}
    for way in ("kind", "task", "operation"):
        tests = [LEFT_OUT.left_out(relative.row)[way] for relative in relatives]
        task = task_of(relatives, tests)
        shown = show(zoo, task)
        for method in ("encoder", "encoder, matched"):
            scores = scores_of(method, shown, coder)
            cells = score(task, scores, ["left out"] * len(task.queries))
            found[f"{way} {getattr(LEFT_OUT, way)}: {method}"] = as_rows(
                [cell for cell in cells if cell.group == "left out"]
            )
            print(way, method, [(c.low, c.first, c.queries) for c in cells if c.group == "all"])
    return found


PAIRS_OF_FOLDS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))


def crossed(zoo: Zoo, relatives: list[Relative]) -> dict[str, Any]:
    """Return recall over all recipes, each by an encoder trained without its pair of folds.

    Folds 6 and 7 are those on which matching was tuned.
    """
    found: dict[str, list[Cell]] = {"encoder": [], "encoder, matched": []}
    for folds in PAIRS_OF_FOLDS:
        split = Split(folds)
        coder = train_identity([r.member for r in relatives if split.trains(r.row)], Settings())
        task = task_of(relatives, [not split.trains(relative.row) for relative in relatives])
        shown = show(zoo, task)
        for method, cells in found.items():
            cells += score(task, scores_of(method, shown, coder))
        print(folds, [(c.low, c.first) for c in cells[-4:]], flush=True)
    return {method: as_rows(pooled(cells)) for method, cells in found.items()}


def pooled(cells: Sequence[Cell]) -> list[Cell]:
    """Return cells of the same group and drift as one."""
    found = []
    for group, low, high in sorted({(c.group, c.low, c.high) for c in cells}):
        same = [cell for cell in cells if (cell.group, cell.low) == (group, low)]
        counts = np.array([cell.queries for cell in same])
        first, apart, ten = (
            float(np.average([getattr(cell, name) for cell in same], weights=counts))
            for name in ("first", "apart", "ten")
        )
        # Some queries have no twins, and weigh a little too much here.
        told = np.array([(c.twins, c.queries) for c in same if c.twins is not None])
        twins = float(np.average(told[:, 0], weights=told[:, 1])) if len(told) else None
        found.append(Cell(group, low, high, int(counts.sum()), first, apart, ten, twins))
    return found


def invariance(zoo: Zoo, coder: IdentityCoder) -> dict[str, Any]:
    """Return the largest relative change of a code under each symmetry, by kind of network."""
    rng = np.random.default_rng(0)
    rows = [row for row in zoo if not row["diverged"]]
    found: dict[str, dict[str, float]] = {}
    changes: dict[str, Callable[..., Any]] = {
        "permute and rescale": lambda *given: permuted(rescaled(*given), *given[1:]),
        "flip": flipped,
        "rotate": rotated,
    }
    for place in rng.permutation(len(rows))[:INVARIANCE_MODELS]:
        row = rows[place]
        weights, architecture = zoo.weights(row["id"]), zoo.architecture(row["id"])
        before = coder.code(anchored(weights, architecture))
        for name, change in changes.items():
            after = coder.code(anchored(change(weights, architecture, rng), architecture))
            largest = found.setdefault(name, {})
            step = float(np.linalg.norm(after - before))
            largest[row["kind"]] = max(largest.get(row["kind"], 0.0), step)
    return found


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--cross", action="store_true")
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--alike", action="store_true")
    parser.add_argument("--strangers", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    zoo, split = open_zoo(chosen.zoo), Split()
    relatives = relatives_of(zoo)
    task = task_of(relatives, [not split.trains(relative.row) for relative in relatives])
    print("written to", write_result("identity", measured(zoo, relatives, task, chosen)))


def measured(
    zoo: Zoo, relatives: list[Relative], task: Task, chosen: argparse.Namespace
) -> dict[str, Any]:
    """Return what was asked for, beside what was measured of the same encoder before."""
    coder, result = shipped_coder(), read_result("identity")
    if result.get("encoder") != coder.version:
        result = {}
    some = any((chosen.method, chosen.strangers, chosen.alike, chosen.train, chosen.cross))
    if some and not result:
        raise SystemExit("there are no rows of this encoder yet; measure all of them first")
    if not some:
        result |= {
            "encoder": coder.version,
            "zoo": {"models": len(zoo), "queries": len(task.queries), "bases": len(task.gallery)},
            "invariance": invariance(zoo, coder),
            "same_start": same_start(coder, task, Split()),
        }
    if chosen.alike or not some:
        result["alike"] = alike(coder, task)
    asked = (chosen.method or ()) if some else METHODS
    rows = result.get("methods", {}) | methods(zoo, task, asked)
    result["methods"] = {name: rows[name] for name in METHODS if name in rows}
    if chosen.strangers:
        result["strangers"] = strangers(open_zoo(chosen.strangers), coder)
    if chosen.cross:
        result["crossed"] = crossed(zoo, relatives)
    if chosen.train:
        result["left_out"] = left_out(zoo, relatives)
    return result


if __name__ == "__main__":
    main()
