"""Score the answers on real models whose relations are known.

    python -m benchmarks.corpus.score            all 158 models, 1.2 GB fetched before
    python -m benchmarks.corpus.score --core     the 85 models that the tests read, 194 MB

Fetch them first: `python -m benchmarks.corpus.fetch --all`. The whole list takes about four
minutes on two cores, the core one. It writes benchmarks/results/corpus.json (`corpus-core.json`
for the core).

Every pair of the list is compared five times: in a catalogue of all models, in the other order,
by paths without a catalogue, in a catalogue of the same files under random names that were added
in random order, and with the tensors themselves renamed and shuffled. Then all kin of all models
are asked for, the duplicates, the tree, and for every pair the claim that the second is the base
of the first. `benchmarks.corpus.expected` says which answers are right.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.stats import norm

from benchmarks.corpus import expected
from benchmarks.corpus.asking import (
    SEED,
    Answer,
    Catalogued,
    Reading,
    catalogue_of,
    compare_alone,
    compare_shuffled,
    renamed,
)
from benchmarks.corpus.listed import Known, Listed, core, is_there, listed, pairs
from benchmarks.corpus.traps import spring
from benchmarks.machine import load, write_result
from lineage.direction import BACKWARD, FORWARD

Json = dict[str, Any]

_TURNED = {FORWARD: BACKWARD, BACKWARD: FORWARD}


@dataclass(slots=True)
class PairScore:
    """All answers to one listed pair.

    Args:
        first: One model.
        second: The other.
        known: What the list says.
        answer: In a catalogue of all models.
        alone: By paths, without a catalogue.
        changed: How the same question was put where words of the answer were others.
        numbers_changed: The same, where only numbers were others.
        claim: The answer to the claim that the second is the base of the first.
    """

    first: Listed
    second: Listed
    known: Known
    answer: Answer
    alone: Answer
    changed: list[str] = field(default_factory=list)
    numbers_changed: list[str] = field(default_factory=list)
    claim: str = ""

    @property
    def mark(self) -> str:
        """How the relation is marked."""
        return expected.mark(self.first, self.second, self.known, self.answer.relation)

    @property
    def mark_alone(self) -> str:
        """How the relation is marked without a catalogue."""
        return expected.mark(self.first, self.second, self.known, self.alone.relation)

    @property
    def direction(self) -> str:
        """How the direction is marked."""
        ids = self.first.id, self.second.id
        return expected.direction_mark(*ids, self.known, self.answer.direction)

    @property
    def claim_mark(self) -> str:
        """How the answer to the claim is marked."""
        ids = self.first.id, self.second.id
        return expected.claim_mark(*ids, self.known, self.claim)

    def to_json(self) -> Json:
        """Return the row of the result file."""
        return {
            "a": self.first.id,
            "b": self.second.id,
            "listed": self.known.kind,
            "answer": str(self.answer.relation),
            "mark": self.mark,
            "operations": list(self.answer.operations),
            "agreement": _rounded(self.answer.agreement),
            "distance": _rounded(self.answer.distance),
            "shares": [_rounded(share) for share in self.answer.shares],
            "direction": self.answer.direction,
            "direction_mark": self.direction,
            "without_catalogue": str(self.alone.relation),
            "mark_without_catalogue": self.mark_alone,
            "words_change_with": self.changed,
            "numbers_change_with": self.numbers_changed,
            "claim": self.claim,
            "claim_mark": self.claim_mark,
            "seconds": round(self.answer.seconds, 3),
            "seconds_without_catalogue": round(self.alone.seconds, 3),
        }


def _rounded(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.4g}")


def say(text: str) -> None:
    """Tell the progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def score_pairs(models: Sequence[Listed], real: Catalogued, folder: Path) -> list[PairScore]:
    """Compare every listed pair whose models could be read, in every way."""
    places = renamed(models, folder / "renamed")
    order = list(models)
    random.Random(SEED).shuffle(order)
    other = catalogue_of(order, folder / "other", places)
    rows = []
    for first, second, known in pairs([model for model in models if model.id in real.read]):
        answer = real.compare(first.id, second.id)
        row = PairScore(first, second, known, answer, compare_alone(first, second, folder / "none"))
        _compare_otherwise(row, real, other)
        row.claim = real.claim(first.id, second.id)
        rows.append(row)
    return rows


def _compare_otherwise(row: PairScore, real: Catalogued, other: Catalogued) -> None:
    """Put the question in other ways, and note where that changes words or numbers."""
    ids = row.first.id, row.second.id
    turned = real.compare(ids[1], ids[0])
    mirrored = _TURNED.get(row.answer.direction, row.answer.direction)
    if (turned.relation, turned.direction) != (row.answer.relation, mirrored):
        row.changed.append(f"order of the two: {turned.relation}, {turned.direction}")
    plain, shuffled = compare_shuffled(row.first, row.second)
    for way, before, after in (
        ("names of files and models", row.answer, other.compare(*ids)),
        ("names and order of tensors", plain, shuffled),
    ):
        if before.words != after.words:
            row.changed.append(f"{way}: {', '.join(before.words)} → {', '.join(after.words)}")
        elif not before.same_numbers(after):
            row.numbers_changed.append(f"{way}: {before.agreement} → {after.agreement}")


@dataclass(slots=True)
class KinScore:
    """All kin of all models, against what the list says and what follows from it.

    Args:
        asked: Number of pairs that the answers stand for.
        accused: Pairs called kin that must not be.
        unlisted: Pairs called kin within a family that no listed relation joins.
        missed: Listed kin, or duplicates that follow from the list, that were not named.
        seconds: For each model.
    """

    asked: int
    accused: list[list[str]]
    unlisted: list[list[str]]
    missed: list[list[str]]
    seconds: list[float]


def score_kin(models: Sequence[Listed], real: Catalogued) -> KinScore:
    """Ask for the kin of every model: every pair of the catalogue is judged twice."""
    found: dict[frozenset[str], Answer] = {}
    seconds = []
    for model in real.read:
        start = time.perf_counter()
        kin = real.kin(model)
        seconds.append(time.perf_counter() - start)
        found |= {frozenset((model, other)): answer for other, answer in kin.items()}
    read = [model for model in models if model.id in real.read]
    strangers = expected.stranger_pairs(read)
    wanted = expected.duplicate_pairs(read) | {
        frozenset((first.id, second.id))
        for first, second, known in pairs(read)
        if not expected.is_negative(known.kind)
        and known.kind not in (expected.UNSCORED, "same_initialisation")
    }
    return KinScore(
        asked=len(read) * (len(read) - 1) // 2,
        accused=sorted(
            [*sorted(two), str(found[two].relation)] for two in found if two in strangers
        ),
        unlisted=[
            [*two, str(found[frozenset(two)].relation)] for two in expected.unlisted(read, found)
        ],
        missed=sorted(sorted(two) for two in wanted - found.keys()),
        seconds=seconds,
    )


def score_duplicates(models: Sequence[Listed], real: Catalogued) -> Json:
    """Ask for all duplicates; return what was missed and what was too much."""
    id_of = {name: id_ for id_, name in real.name_of.items()}
    start = time.perf_counter()
    groups = real.engine.duplicates()
    seconds = time.perf_counter() - start
    found = {
        frozenset((id_of[first], id_of[second]))
        for group in groups
        for first, second in combinations(group.models, 2)
    }
    read = [model for model in models if model.id in real.read]
    wanted = expected.duplicate_pairs(read)
    return {
        "pairs": len(wanted),
        "found": len(wanted & found),
        "missed": sorted(sorted(two) for two in wanted - found),
        "not_listed": sorted(sorted(two) for two in found - wanted),
        "seconds": round(seconds, 2),
    }


def score_tree(models: Sequence[Listed], real: Catalogued) -> Json:
    """Draw the tree of all models; return the edges that join strangers or turn a direction."""
    id_of = {name: id_ for id_, name in real.name_of.items()}
    start = time.perf_counter()
    tree = real.engine.tree()
    seconds = time.perf_counter() - start
    strangers = expected.stranger_pairs(models)
    crossing, turned = [], []
    for edge in tree.edges:
        ends = id_of.get(edge.parent), id_of.get(edge.child)
        if ends[0] is None or ends[1] is None:
            continue  # an ancestor that nobody has seen
        if frozenset((ends[0], ends[1])) in strangers:
            crossing.append(list(ends))
        if edge.known and ends in expected.CHILD_OF:  # (child, parent): the wrong way round
            turned.append(list(ends))
    return {
        "nodes": len(tree.nodes),
        "edges": len(tree.edges),
        "joins_strangers": crossing,
        "wrong_direction": turned,
        "seconds": round(seconds, 2),
    }


def reading_mark(model: Listed, reading: Reading) -> str:
    """Return `right` or `wrong`: read with the right number of parameters, or rightly refused."""
    reason = expected.UNREADABLE.get(model.id)
    if reason is not None:
        return "right" if reason in reading.refused else "wrong"
    right = not reading.refused and reading.parameters == expected.parameters_of(model)
    return "right" if right else "wrong"


def score_reading(models: Sequence[Listed], real: Catalogued) -> list[Json]:
    """Return a row for every file that is not read just as listed, with the reason."""
    rows = []
    for model in models:
        reading = real.readings[model.id]
        found = reading_mark(model, reading)
        if found == "right" and reading.parameters == model.parameters and not reading.refused:
            continue
        count = expected.COUNTS.get(model.id)
        rows.append(
            {
                "id": model.id,
                "mark": found,
                "parameters": reading.parameters,
                "listed": model.parameters,
                "reason": count.reason if count else "",
                "refused": reading.refused.rpartition(model.archive.name)[2],
            }
        )
    return rows


# ------------------------------------------------------------------ what is told


def summary(rows: Sequence[PairScore], kin: KinScore, readings: Sequence[Json]) -> Json:
    """Return the counts, the worst first."""
    marks, alone = Counter(row.mark for row in rows), Counter(row.mark_alone for row in rows)
    directions = Counter(row.direction for row in rows)
    claims = Counter(f"{row.claim}: {row.claim_mark}" for row in rows)
    duplicates = [row for row in rows if _is_duplicate(row)]
    return {
        "false_accusations": marks["accused"] + len(kin.accused),
        "false_accusations_without_catalogue": alone["accused"],
        "pairs_judged": kin.asked,
        "wrong_reading": [row["id"] for row in readings if row["mark"] == "wrong"],
        "relations": dict(marks),
        "relations_without_catalogue": dict(alone),
        "same_weights_found": [sum(row.mark == "right" for row in duplicates), len(duplicates)],
        "quantised_found": _found(rows, "int8_quantised"),
        "fine_tunes_found": _found(rows, "fine_tuned", "partly_fine_tuned"),
        "siblings_found": _found(rows, "siblings_common_parent"),
        "directions": dict(directions),
        "claims": dict(claims),
        "words_changed_by_names_or_order": sum(bool(row.changed) for row in rows),
        "only_numbers_changed": sum(bool(row.numbers_changed) for row in rows),
    }


def strangers_under_the_law(rows: Sequence[PairScore]) -> Json:
    """Return how the agreements of listed strangers lie under the law of chance.

    The law was fitted on none of them; it promises a standard deviation of z of at most 1.
    """
    chances = [
        row.answer.chance
        for row in rows
        if expected.is_negative(row.known.kind) and row.answer.chance is not None
    ]
    z = norm.isf(np.array(chances))
    return {
        "pairs": len(z),
        "mean_z": round(float(z.mean()), 2),
        "standard_deviation_of_z": round(float(z.std()), 2),
        "largest_z": round(float(z.max()), 2),
    }


def _is_duplicate(row: PairScore) -> bool:
    exact = ("identical_file", "identical_weights", "layout_permuted", "bn_folded")
    return row.known.kind in exact or row.known.kind.startswith("same_weights_")


def _found(rows: Sequence[PairScore], *kinds: str) -> list[int]:
    of_kind = [row for row in rows if row.known.kind in kinds]
    return [sum(row.mark == "right" for row in of_kind), len(of_kind)]


def shown(result: Json) -> str:
    """Return the result as text for people."""
    lines = [f"{key}: {value}" for key, value in result["summary"].items()]
    lines += ["", "Reading:"]
    lines += [
        f"  {row['mark']} {row['id']}: {row['parameters']} counted, {row['listed']} listed. "
        f"{row['reason']}{row['refused']}"
        for row in result["reading"]
    ]
    lines += ["", "Pairs that are not plainly right:"]
    for row in result["pairs"]:
        plain = (
            row["mark"] == row["mark_without_catalogue"] == "right" and not row["words_change_with"]
        )
        if plain and row["direction_mark"] in ("right", "unscored"):
            continue
        lines.append(
            f"  {row['mark']:9} {row['a']} – {row['b']}: {row['answer']} ({row['listed']}), "
            f"alone {row['without_catalogue']}, direction {row['direction_mark']}"
        )
        lines += [f"            changed by {change}" for change in row["words_change_with"]]
    wrong = [row for row in result["pairs"] if row["claim_mark"] == "wrong"]
    lines += ["", f"Claims answered wrongly: {len(wrong)}"]
    lines += [f"  {row['b']} as base of {row['a']}: {row['claim']}" for row in wrong]
    lines += ["", "Traps:"]
    for trap in result["traps"]:
        lines.append(f"  {trap['number']:2} {trap['state']:8} {trap['words']}")
        lines += [f"       {' – '.join(fallen)}" for fallen in trap["fallen"]]
    for name in ("kin", "strangers_under_the_law_of_chance", "duplicates", "tree", "seconds"):
        lines += ["", f"{name}:"] + [f"  {key}: {value}" for key, value in result[name].items()]
    return "\n".join(lines)


def scored(models: Sequence[Listed], folder: Path) -> Json:
    """Ask everything about the given models; return the result file's content."""
    start = time.perf_counter()
    load_before = load()
    lap = _laps()
    real = catalogue_of(models, folder / "real")
    lap("adding")
    rows = score_pairs(models, real, folder)
    lap("pairs, in all ways")
    kin = score_kin(models, real)
    lap("kin of all")
    tree, duplicates = score_tree(models, real), score_duplicates(models, real)
    sprung = spring([model for model in models if model.id in real.read], real.compare)
    readings = score_reading(models, real)
    laps = lap("the rest")
    return {
        "seed": SEED,
        "models": len(models),
        "load": load_before,
        "summary": summary(rows, kin, readings),
        "seconds": {
            "all": round(time.perf_counter() - start, 1),
            **laps,
            **_times(real, rows, kin),
        },
        "traps": [
            {
                "number": found.trap.number,
                "words": found.trap.words,
                "state": "fallen" if found.fallen else "avoided" if found.asked else "not asked",
                "pairs": found.asked,
                "fallen": [list(fallen) for fallen in found.fallen],
            }
            for found in sprung
        ],
        "kin": {
            "pairs": kin.asked,
            "accused": kin.accused,
            "not_listed": kin.unlisted,
            "missed": kin.missed,
        },
        "strangers_under_the_law_of_chance": strangers_under_the_law(rows),
        "duplicates": duplicates,
        "tree": tree,
        "reading": readings,
        "pairs": [row.to_json() for row in rows],
    }


def _times(real: Catalogued, rows: Sequence[PairScore], kin: KinScore) -> Json:
    """Return medians, and what was slowest."""
    alone = {f"{row.first.id} – {row.second.id}": row.alone.seconds for row in rows}
    return {
        "slowest to read": _slowest({id_: found.seconds for id_, found in real.readings.items()}),
        "cold compare, median": round(median(alone.values()), 3),
        "cold compare, slowest": _slowest(alone),
        "relatives of one, median": round(median(kin.seconds), 3),
        "relatives of one, slowest": round(max(kin.seconds), 3),
    }


def _slowest(seconds: dict[str, float]) -> dict[str, float]:
    return {
        name: round(seconds[name], 2) for name in sorted(seconds, key=lambda n: -seconds[n])[:5]
    }


def _laps() -> Callable[[str], dict[str, float]]:
    """Return a function that notes and tells how long each part took."""
    laps: dict[str, float] = {}
    last = time.perf_counter()

    def lap(name: str) -> dict[str, float]:
        nonlocal last
        now = time.perf_counter()
        laps[name] = round(now - last, 1)
        last = now
        say(f"{name}: {laps[name]} s")
        return laps

    return lap


def main(arguments: Sequence[str] | None = None) -> int:
    """Score the list or its core; return 1 if somebody was accused falsely, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.corpus.score", description="Score the answers on real models."
    )
    parser.add_argument("--core", action="store_true", help="only what the tests read")
    only_core = parser.parse_args(arguments).core
    models = core() if only_core else listed()
    missing = sorted({model.archive.name for model in models if not is_there(model)})
    if missing:
        option = "--core" if only_core else "--all"
        print(f"not fetched: {', '.join(missing)}; run: python -m benchmarks.corpus.fetch {option}")
        return 1
    with tempfile.TemporaryDirectory(prefix="lineage-score-") as folder:
        result = scored(models, Path(folder))
    print(shown(result))
    print(f"\nwritten to {write_result('corpus-core' if only_core else 'corpus', result)}")
    return 1 if result["summary"]["false_accusations"] else 0


if __name__ == "__main__":
    sys.exit(main())
