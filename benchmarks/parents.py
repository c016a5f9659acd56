"""What `parents` says of disguised networks in a catalogue of all bases of a zoo.

    python -m benchmarks.parents ZOO        about twenty minutes on two cores, 0.4 GB of disk

Every base is a bare safetensors file in one catalogue. Asked about are children and copies of
recipes that the encoder has not seen, so many of each kind of network and each range of drift as
there are, 25 at most, each written with its units in another order, scaled and flipped. They are
asked about twice: before the bases of such recipes are catalogued, so that whoever is named is no
kin (`without_kin`), and after. For each is told whether its base is a candidate by its code,
whether it is the first of these, whether the answer lists it, or names it as undecided (because its
units are partners, or stand out from all others), and whom else. Another base of the same random
start is no relative; it is told apart, for its weights can be as near. It writes
benchmarks/results/parents.json.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks.machine import load, spread, write_result
from embedder.coding import shipped_coder
from embedder.evaluating import BINS, Task, shares_start, task_of
from embedder.families import Relative, Split, relatives_of
from embedder.matching import MARGIN
from embedder.symmetry import disguised
from embedder.zoo.shards import Zoo, open_zoo
from lineage.engine import LineageEngine
from lineage.relatives import find_relatives

Json = dict[str, Any]

SEED = 53
MOST = 25
"""Queries of one kind of network and one range of drift."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said of one query.

    Args:
        kind: Of network.
        low: Least drift of its range.
        candidate: Whether its base is a candidate by its code.
        first: Whether it is the first of these.
        listed: Whether it is among the parents, or the children.
        partner: Whether it is named as undecided because its units are partners.
        ahead: Whether it is named because they stand out.
        others_listed: Other bases that are called kin.
        others_partners: Other bases that are named as partners.
        others_ahead: Other bases that are named because they stand out.
        same_start: Those of these three that share the random start of its base.
        seconds: For the answer, from the file.
    """

    kind: str
    low: float
    candidate: bool
    first: bool
    listed: bool
    partner: bool
    ahead: bool
    others_listed: int
    others_partners: int
    others_ahead: int
    same_start: int
    seconds: float


def chosen(task: Task) -> list[tuple[int, float]]:
    """Return the places of the queries that are asked, and the least drift of their range."""
    cells: dict[tuple[str, float], list[tuple[int, float]]] = defaultdict(list)
    for place in np.random.default_rng(SEED).permutation(len(task.queries)):
        query = task.queries[place]
        for low, high in pairwise(BINS):
            if low <= query.drift < high and len(cells[query.row["kind"], low]) < MOST:
                cells[query.row["kind"], low].append((int(place), low))
    return [one for cell in sorted(cells) for one in cells[cell]]


def write(zoo: Zoo, relative: Relative, path: Path, disguise: int | None = None) -> None:
    """Write a network to a file, disguised by a seed if one is given."""
    model = relative.row["id"]
    weights: dict[str, Any] = dict(zoo.weights(model))
    if disguise is not None:
        rng = np.random.default_rng(disguise)
        weights = disguised(weights, zoo.architecture(model), rng)
    save_file({name: np.ascontiguousarray(w, np.float32) for name, w in weights.items()}, path)


def ask(engine: LineageEngine, path: Path, right: str, same_start: set[str]) -> Json:
    """Return what is said of one file."""
    start = time.perf_counter()
    model, known = engine.model(str(path)), engine.known
    found = find_relatives(model, known)
    seconds = time.perf_counter() - start
    coded = [c for c in known.candidates(model.fingerprint, model.code) if c.alike > 0]
    coded.sort(key=lambda one: (one.margin <= MARGIN, -one.ahead, -one.margin))
    names = [known.candidate(candidate).name for candidate in coded]
    listed = {comparison.first.name for comparison in found.parents()}
    listed |= {comparison.second.name for comparison in found.children()} - {str(path)}
    partners, ahead = (
        {name for name in names for limit in found.limits if words in limit and name in limit}
        for words in ("find partners", "pair off far better")
    )
    return {
        "candidate": right in names,
        "first": names[:1] == [right],
        "listed": right in listed,
        "partner": right in partners,
        "ahead": right in ahead,
        "others_listed": len(listed - {right}),
        "others_partners": len(partners - {right}),
        "others_ahead": len(ahead - {right}),
        "same_start": len((listed | partners | ahead) & same_start),
        "seconds": seconds,
    }


def answers(zoo: Zoo, task: Task, folder: Path) -> Iterator[list[Answer]]:
    """Make the catalogue in two steps, and yield after each what is said of all queries."""
    # The longest name is as long as the shortest, so that none is part of another.
    names = [f"{place:06}.safetensors" for place in range(len(task.gallery))]
    shared, split = shares_start(task), Split()
    with LineageEngine(str(folder / "catalogue"), create=True) as engine:
        for unseen in (False, True):
            bases = folder / f"bases-{unseen}"
            bases.mkdir()
            for name, base in zip(names, task.gallery, strict=True):
                if split.trains(base.row) is not unseen:
                    write(zoo, base, bases / name)
            added = engine.add([bases])
            print(f"{len(added.added):,} models are added", flush=True)
            found = []
            for place, low in chosen(task):
                path = folder / "query.safetensors"
                write(zoo, task.queries[place], path, disguise=place)
                right = names[task.right[place]]
                same = {names[other] for other in np.flatnonzero(shared[place])}
                kind = task.queries[place].row["kind"]
                found.append(Answer(kind, low, **ask(engine, path, right, same)))
            yield found


def said(answer: Answer) -> bool:
    """Say whether the base of a query is called kin or named as undecided."""
    return answer.listed or answer.partner or answer.ahead


def told(found: Sequence[Answer]) -> list[Json]:
    """Return the rows of the result: each kind of network and all, by drift."""
    rows = []
    for kind in (*sorted({answer.kind for answer in found}), "all"):
        for low, high in pairwise(BINS):
            some = [a for a in found if a.low == low and kind in (a.kind, "all")]
            if some:
                shares = ("candidate", "first", "listed", "partner", "ahead")
                sums = ("others_listed", "others_partners", "others_ahead", "same_start")
                rows.append(
                    {"group": kind, "drift": [low, high], "queries": len(some)}
                    | {n: round(float(np.mean([getattr(a, n) for a in some])), 4) for n in shares}
                    | {"said": round(float(np.mean([said(a) for a in some])), 4)}
                    | {name: sum(getattr(a, name) for a in some) for name in sums}
                    | {"with_others_ahead": sum(a.others_ahead > 0 for a in some)}
                )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the result; return 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parents", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("zoo", type=Path)
    given = parser.parse_args(arguments)
    zoo, split = open_zoo(given.zoo), Split()
    relatives = relatives_of(zoo, lambda row: row["role"] == "base" or not split.trains(row))
    task = task_of(relatives, [not split.trains(relative.row) for relative in relatives])
    with tempfile.TemporaryDirectory(prefix="lineage-parents-") as made:
        without, found = list(answers(zoo, task, Path(made)))
    rows = told(found)
    result: Json = {
        "seed": SEED,
        "encoder": shipped_coder().version,
        "catalogued": len(task.gallery),
        "load": load(),
        "seconds": spread([answer.seconds for answer in found]),
        "told": rows,
        "without_kin": told(without),
    }
    for row in (*result["without_kin"], *rows):
        print(row)
    print("written to", write_result("parents", result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
