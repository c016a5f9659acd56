"""Search a catalogue of 10,000 models, and time it.

    python -m benchmarks.search                 about five minutes on two cores, 0.4 GB of disk
    python -m benchmarks.search --models 2000   smaller, to try it

The models are made up, for no one has 10,000 real ones at hand: 250 small designs (perceptrons,
convolutions, transformer blocks), ten founders of each with independent heavy-tailed weights, and
four members a family: the founder, two children and a grandchild, each a random step of .01 to 1
of its parent's norm away. Founders of one design are strangers of equal shapes, the hard case.
Each goes through the real fingerprint and into the real catalogue. There are no files, so kin are
judged by fingerprints alone, which is how a large catalogue is searched.

`parents` is the engine's call in a process that is already running. Recall at 10 is against all
inner products of the same vectors. It writes benchmarks/results/search.json.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import load, spread, wait_until_idle, write_result
from benchmarks.made import trained_looking
from benchmarks.speed import environment, lineage
from embedder.checkpoint import Checkpoint, tensor_of
from embedder.fingerprint import METHOD, Fingerprint, take_fingerprint
from index.catalogue import Entry
from index.search import NOISE, ModelIndex
from lineage.engine import LineageEngine

Json = dict[str, Any]
Weights = dict[str, NDArray[np.float32]]
Shapes = dict[str, tuple[int, ...]]

SEED = 23
DESIGNS, FOUNDERS, MEMBERS = 250, 10, 4
QUERIES = 200
STEPS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Limits of the bins of steps, which are drawn evenly in their logarithm."""


@dataclass(frozen=True, slots=True)
class Member:
    """One model of a family.

    Args:
        name: Its name in the catalogue.
        family: Number of its family.
        parent: Its parent's name; empty for a founder.
        step: Length of the step from its parent, relative to the parent's norm.
    """

    name: str
    family: int
    parent: str
    step: float


def design(rng: np.random.Generator) -> Shapes:
    """Return the shapes of a small network."""
    depth, width = int(rng.integers(2, 5)), int(rng.integers(4, 13)) * 8
    kind = ("perceptron", "convolutional", "transformer")[int(rng.integers(0, 3))]
    shapes: Shapes = {"input": (width, int(rng.integers(16, 65)))}
    for layer in range(depth):
        if kind == "convolutional":
            shapes[f"{layer}.conv"] = (width // 2, width // 2, 3, 3)
        elif kind == "transformer":
            shapes |= {f"{layer}.{name}": (width, width) for name in "qkvo"}
            shapes[f"{layer}.up"] = (2 * width, width)
            shapes[f"{layer}.down"] = (width, 2 * width)
        else:
            shapes[f"{layer}.dense"] = (width, width)
        shapes[f"{layer}.bias"] = (width,)
    return {**shapes, "head": (int(rng.integers(8, 33)), width)}


def family(
    rng: np.random.Generator, shapes: Shapes, number: int
) -> Iterator[tuple[Member, Weights]]:
    """Yield the members of a family: founder, two children, a child of the first child."""
    founder = {name: trained_looking(rng, shape) for name, shape in shapes.items()}
    made = [(Member(f"{number:04}/0", number, "", 0.0), founder)]
    for place, parent in enumerate((0, 0, 1), start=1):
        step = float(np.exp(rng.uniform(np.log(STEPS[0]), np.log(STEPS[-1]))))
        weights = {
            name: values + np.float32(step * np.std(values)) * _noise(rng, values.shape)
            for name, values in made[parent][1].items()
        }
        member = Member(f"{number:04}/{place}", number, made[parent][0].name, step)
        made.append((member, weights))
    yield from made[:MEMBERS]


def _noise(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.asarray(rng.standard_normal(shape, np.float32))


def members(count: int) -> Iterator[tuple[Member, Weights]]:
    """Yield so many models, family by family, designs in turn so that any number holds many."""
    rng = np.random.default_rng(SEED)
    designs = [design(rng) for _ in range(max(1, count // (FOUNDERS * MEMBERS)))]
    made = 0
    for number in range(-(-count // MEMBERS)):
        for member, weights in family(rng, designs[number % len(designs)], number):
            if made == count:
                return
            made += 1
            yield member, weights


def fingerprint_of(weights: Weights) -> Fingerprint:
    """Return the fingerprint of weights in memory."""
    tensors = tuple(tensor_of(name, values) for name, values in weights.items())
    return take_fingerprint(Checkpoint("made", "made", tensors), threads=1)


def entry_of(member: Member, fingerprint: Fingerprint) -> Entry:
    """Return the catalogue's entry for a model that has no file."""
    return Entry(
        name=member.name,
        location=f"/nowhere/{member.name}",
        format="made",
        sha256=hashlib.sha256(member.name.encode()).hexdigest(),
        content=fingerprint.content,
        identity=fingerprint.identity,
        parameters=fingerprint.parameters,
        size_bytes=4 * fingerprint.parameters,
        adapter=False,
        method=METHOD,
        added_at="2024-01-01T00:00:00+00:00",
        stamp="",
    )


def fill(engine: LineageEngine, count: int) -> tuple[list[Member], Json]:
    """Put the models into the catalogue; return them, and how long each part took."""
    seconds = dict.fromkeys(("making weights", "fingerprints", "catalogue"), 0.0)
    found, parameters = [], 0
    source = members(count)
    while True:
        laps = [time.perf_counter()]
        following = next(source, None)
        if following is None:
            break
        member, weights = following
        laps.append(time.perf_counter())
        fingerprint = fingerprint_of(weights)
        laps.append(time.perf_counter())
        engine.catalogue.add(entry_of(member, fingerprint), fingerprint)
        laps.append(time.perf_counter())
        for name, (before, after) in zip(seconds, pairwise(laps), strict=True):
            seconds[name] += after - before
        found.append(member)
        parameters += fingerprint.parameters
    return found, {
        "models": len(found),
        "mean_parameters": round(parameters / len(found)),
        **{f"seconds_{name}": round(taken, 1) for name, taken in seconds.items()},
    }


# ------------------------------------------------------------------ how good the search is


def recall_at_10(engine: LineageEngine, queries: Sequence[Member]) -> Json:
    """Return how many of the ten nearest vectors are among the first ten candidates.

    Candidates below the noise of strangers are cut after a few, so the share is told also of those
    of the ten that lie above it.
    """
    ids, vectors = engine.catalogue.vectors()
    index = ModelIndex(engine.catalogue)
    hits = near = near_hits = 0
    seconds = []
    for query in queries:
        entry = engine.catalogue.get(query.name)
        fingerprint = engine.catalogue.fingerprint(entry.id)
        start = time.perf_counter()
        candidates = index.candidates(fingerprint)
        seconds.append(time.perf_counter() - start)
        first = {c.model for c in [c for c in candidates if c.model != entry.id][:10]}
        scores = np.where(ids == entry.id, -np.inf, vectors @ fingerprint.vector)
        for place in np.argsort(-scores, kind="stable")[:10]:
            found = int(ids[place]) in first
            hits += found
            near += bool(scores[place] > NOISE)
            near_hits += found and bool(scores[place] > NOISE)
    return {
        "recall_at_10": round(hits / (10 * len(queries)), 4),
        "above_the_noise": near,
        "recall_above_the_noise": round(near_hits / max(near, 1), 4),
        "seconds": spread(seconds[1:], 5),
    }


def true_kin(member: Member, of_family: Sequence[Member]) -> dict[str, float]:
    """Return the kin of a member: name → length of the steps between them."""
    by_name = {other.name: other for other in of_family}

    def squares(name: str) -> dict[str, float]:
        """Return each ancestor, and the sum of squared steps from it."""
        found, total = {name: 0.0}, 0.0
        while by_name[name].parent:
            total += by_name[name].step ** 2
            name = by_name[name].parent
            found[name] = total
        return found

    ours = squares(member.name)
    result = {}
    for other in of_family:
        if other.name != member.name:
            theirs = squares(other.name)
            meeting = min(ours[name] + theirs[name] for name in ours.keys() & theirs.keys())
            result[other.name] = float(np.sqrt(meeting))
    return result


def ask(engine: LineageEngine, queries: Sequence[Member], everyone: Sequence[Member]) -> Json:
    """Ask for the kin of every query; return times, what was found and whom it accused."""
    families = defaultdict(list)
    for member in everyone:
        families[member.family].append(member)
    engine.relatives(queries[0].name)  # loads the vectors
    seconds, accused = [], []
    found_in: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for query in queries:
        start = time.perf_counter()
        found = {c.first.name for c in engine.relatives(query.name).found}
        seconds.append(time.perf_counter() - start)
        wanted = true_kin(query, families[query.family])
        entry = engine.catalogue.get(query.name)
        candidates = engine.known.candidates(engine.catalogue.fingerprint(entry.id))
        near = {one.name for one in engine.catalogue.by_id([c.model for c in candidates])}
        for name, distance in wanted.items():
            counts = found_in[_bin(distance)]
            counts[0] += 1
            counts[1] += name in near
            counts[2] += name in found
        accused += [[query.name, name] for name in sorted(found - wanted.keys())]
    return {
        "queries": len(queries),
        "seconds": spread(seconds, 4),
        "seconds_95th_percentile": round(float(np.quantile(seconds, 0.95)), 4),
        "false_accusations": accused,
        "kin_by_distance": {
            name: {"pairs": total, "among_candidates": near, "called_kin": called}
            for name, (total, near, called) in sorted(found_in.items())
        },
    }


def _bin(distance: float) -> str:
    for low, high in pairwise(STEPS):
        if distance < high:
            return f"{low} to {high}"
    return "over 1"


def cold_parents(catalogue: Path, names: Sequence[str]) -> Json:
    """Return how long the command takes that asks for the parents of one model."""
    seconds = []
    for name in names:
        start = time.perf_counter()
        command = lineage("parents", name, "--catalogue", catalogue)
        subprocess.run(command, env=environment(), cwd=catalogue, capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    return spread(seconds)


def measured(folder: Path, count: int) -> Json:
    """Fill a catalogue and search it; return the result file's content."""
    load_at_start = load()
    with LineageEngine(str(folder), create=True) as engine:
        everyone, filling = fill(engine, count)
        rng = np.random.default_rng(SEED + 1)
        chosen = rng.choice(len(everyone), min(QUERIES, len(everyone)), replace=False)
        queries = [everyone[place] for place in chosen]
        load_before = wait_until_idle()
        asked = ask(engine, queries, everyone)
        recall = recall_at_10(engine, queries)
    cold = cold_parents(folder, [query.name for query in queries[:5]])
    size = sum(file.stat().st_size for file in folder.iterdir())
    median_s = asked["seconds"]["median"]
    return {
        "seed": SEED,
        "targets": {
            "parents": {"target": "less than 0.1 s", "reached": median_s, "met": median_s < 0.1},
            "recall_at_10": {
                "target": "at least .99",
                "reached": recall["recall_at_10"],
                "met": recall["recall_at_10"] >= 0.99,
            },
        },
        "load_at_start": load_at_start,
        "load_before_queries": load_before,
        "filling": filling,
        "catalogue_bytes": size,
        "catalogue_bytes_a_model": round(size / count),
        "parents": asked,
        "candidates": recall,
        "parents_as_a_command": cold,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and write the result; return 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search", description="Search a catalogue of 10,000 models."
    )
    parser.add_argument("--models", type=int, default=DESIGNS * FOUNDERS * MEMBERS)
    count = parser.parse_args(arguments).models
    with tempfile.TemporaryDirectory(prefix="lineage-search-") as folder:
        result = measured(Path(folder) / "catalogue", count)
    for name, value in result.items():
        print(f"{name}: {value}")
    print(f"written to {write_result('search', result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
