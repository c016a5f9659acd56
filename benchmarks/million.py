"""Search among a million identity codes, and say how many relatives are found and how fast.

    python -m benchmarks.million ZOO            about ten minutes on one core; 4 GB of memory
    python -m benchmarks.million ZOO --others   also other kinds of index; else these rows are kept

Relatives are real: the children and copies of held-back recipes, and their bases, coded by the
shipped encoder. The gallery is every base of the zoo and strangers drawn beside them: for each
design a Gaussian with the mean and the covariance of its bases' codes, half of which is one base's
own departure from the mean, so that some strangers lie near one another as real ones do. The result
file says how near drawn strangers and real ones come to the queries.

A relative counts if it lies above 99.9 % of the strangers. At a million a thousand strangers lie
above that too, so what can be found depends on how many nearest are asked for; the exact search
says what is there. How busy the machine was stands beside each time. It writes
benchmarks/results/million.json.
"""

import argparse
import sqlite3
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import load, read_result, write_result
from embedder.coding import shipped_coder
from embedder.evaluating import task_of
from embedder.families import Split, relatives_of
from embedder.matching import COUNT
from embedder.zoo.shards import open_zoo
from index.opening import FILE
from index.sqlite import SqliteCatalogue
from index.vectors import NumpyVectors, ShortlistedVectors, VectorIndex, vector_index

Json = dict[str, Any]
Codes = NDArray[np.float32]

SEED = 41
SIZES = (10_000, 100_000, 1_000_000)
COUNTS = (COUNT, 1_000)
"""How many nearest are asked for: those whose units the search matches, and all that can matter."""
ASKED, TIMED = 1_000, 200
KEPT = 0.01
"""Share that a filter keeps."""
QUANTILES = (0.5, 0.99, 0.999, 0.9999, 0.99999)
SHARE = 0.5
"""Of a drawn stranger's departure from its design's mean, what is one base's own. At .5 one in 10⁵
comes as near a query as of real ones, and one in 10⁴ nearer."""

OTHERS = {
    "SQ8": "",
    "PQ64x4fs": "",
    "PQ128x4fs": "",
    "IVF256,SQ8": "nprobe=32",
    "IVF1024,SQ8": "nprobe=64",
    "IVF4096,SQ8": "nprobe=128",
    "IVF1024,PQ128x4fs": "nprobe=64",
    "HNSW32": "efSearch=128",
}
"""FAISS's name of an index → how it is asked."""
SLOW_TO_MAKE = {"HNSW32": 100_000}
"""Codes that these are tried on."""


@dataclass(frozen=True, slots=True, eq=False)
class Real:
    """The codes of a zoo.

    Args:
        bases: (bases, 256).
        designs: (bases,) number of each one's design.
        queries: (queries, 256) of models that the encoder has not seen.
        right: (queries,) the base of each.
    """

    bases: Codes
    designs: NDArray[np.intp]
    queries: Codes
    right: NDArray[np.intp]


def real_codes(folder: Path) -> Real:
    """Return the codes of a zoo's bases, and those of what descends from held-back ones."""
    split, coder = Split(), shipped_coder()
    relatives = relatives_of(open_zoo(folder))
    task = task_of(relatives, [not split.trains(relative.row) for relative in relatives])
    names = [relative.row["design"] for relative in task.gallery]
    order = np.random.default_rng(SEED).permutation(len(task.queries))[:ASKED]
    return Real(
        np.stack([coder.code_of(base.member.tokens) for base in task.gallery]),
        np.unique(names, return_inverse=True)[1],
        np.stack([coder.code_of(task.queries[place].member.tokens) for place in order]),
        task.right[order],
    )


def strangers(real: Real, count: int, rng: np.random.Generator) -> Codes:
    """Return so many drawn codes of unit length; designs are as frequent as among the bases."""
    drawn = np.empty((count, real.bases.shape[1]), np.float32)
    chosen = rng.choice(real.designs, count)
    for design in np.unique(real.designs):
        bases = real.bases[real.designs == design]
        mean = bases.mean(axis=0)
        apart = bases - mean
        width = np.sqrt((1 - SHARE) / max(len(bases) - 1, 1))
        places = np.flatnonzero(chosen == design)
        for some in np.array_split(places, -(-len(places) // 10_000)):
            weights = rng.standard_normal((len(some), len(bases)), np.float32)
            own = apart[rng.integers(0, len(bases), len(some))]
            drawn[some] = mean + np.float32(width) * (weights @ apart) + np.sqrt(SHARE) * own
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn


def nearness(real: Real) -> Json:
    """Return the quantiles of cosines of queries with real strangers and with drawn ones."""
    others = strangers(real, 100_000, np.random.default_rng(SEED + 1))
    with_real = real.queries @ real.bases.T
    own = np.arange(len(real.bases)) == real.right[:, None]
    found = {"real": with_real[~own], "drawn": (real.queries @ others.T).ravel()}
    return {
        "quantiles": QUANTILES,
        **{
            name: np.quantile(cosines, QUANTILES).round(4).tolist()
            for name, cosines in found.items()
        },
    }


@dataclass(frozen=True, slots=True, eq=False)
class Gallery:
    """Codes among which is searched.

    Args:
        ids: (n,) numbers, rising.
        codes: (n, 256), bases and strangers mixed.
        right: (queries,) row of each query's base.
    """

    ids: NDArray[np.int64]
    codes: Codes
    right: NDArray[np.intp]


def gallery_of(real: Real, size: int) -> Gallery:
    """Return all bases among drawn strangers."""
    rng = np.random.default_rng(SEED + size)
    places = rng.permutation(size)
    codes = np.empty((size, real.bases.shape[1]), np.float32)
    codes[places[: len(real.bases)]] = real.bases
    codes[places[len(real.bases) :]] = strangers(real, size - len(real.bases), rng)
    ids = np.sort(rng.choice(3 * size, size, replace=False))
    return Gallery(ids, codes, places[real.right])


def exact_rows(queries: Codes, codes: Codes, count: int) -> NDArray[np.intp]:
    """Return the rows of the nearest codes, (queries, count), the nearest first."""
    found = []
    for some in np.array_split(queries, -(-len(queries) // 50)):
        scores = some @ codes.T
        rows = np.argpartition(-scores, count, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(scores, rows, axis=1), axis=1)
        found.append(np.take_along_axis(rows, order, axis=1))
    return np.concatenate(found)


def timed(ask: Callable[[int], object], count: int = TIMED) -> Json:
    """Return how long questions take, in milliseconds, and how busy the machine was.

    Where others are at work too, the processor's time says more than the clock.
    """
    seconds, worked = [], []
    for place in range(count):
        start, began = time.perf_counter(), time.thread_time()
        ask(place)
        worked.append(time.thread_time() - began)
        seconds.append(time.perf_counter() - start)
    return {
        "median_ms": round(1e3 * float(np.median(seconds)), 2),
        "95th_percentile_ms": round(1e3 * float(np.quantile(seconds, 0.95)), 2),
        "cpu_median_ms": round(1e3 * float(np.median(worked)), 2),
        "cpu_95th_percentile_ms": round(1e3 * float(np.quantile(worked, 0.95)), 2),
        "load": load(),
    }


def recall(real: Real, gallery: Gallery, made: VectorIndex, kin: NDArray[np.bool_]) -> Json:
    """Return the share of relatives among the nearest, beside what an exact search finds."""
    rows = exact_rows(real.queries, gallery.codes, max(COUNTS))
    found: Json = {}
    for count in COUNTS:
        hits, agreed = [], []
        for place, query in enumerate(real.queries):
            given = {number for number, _ in made.nearest(query, count)}
            hits.append(int(gallery.ids[gallery.right[place]]) in given)
            agreed.append(len(given & set(gallery.ids[rows[place, :count]].tolist())) / count)
        there = (rows[:, :count] == gallery.right[:, None]).any(axis=1)
        found[str(count)] = {
            "found": round(float(np.mean(np.array(hits)[kin])), 4),
            "found_by_exact_search": round(float(there[kin].mean()), 4),
            "of_those_found_by_exact_search": round(float(np.array(hits)[kin & there].mean()), 4),
            "of_all_nearest": round(float(np.mean(agreed)), 4),
            **timed(lambda place, count=count: made.nearest(real.queries[place], count)),  # type: ignore[misc]
        }
    return found


def filtered(real: Real, gallery: Gallery, made: VectorIndex, kin: NDArray[np.bool_]) -> Json:
    """Return the share of relatives found among a hundredth of all, which holds them."""
    rng = np.random.default_rng(SEED + 2)
    kept = int(KEPT * len(gallery.ids))
    allowed = []
    for place in range(TIMED):
        chosen = rng.choice(gallery.ids, kept, replace=False)
        chosen[0] = gallery.ids[gallery.right[place]]
        allowed.append(chosen.tolist())
    ask = {
        count: lambda place, count=count: made.nearest(real.queries[place], count, allowed[place])
        for count in COUNTS
    }
    found: Json = {"kept": kept}
    for count in COUNTS:
        hits = [
            allowed[place][0] in dict(ask[count](place)) for place in np.flatnonzero(kin[:TIMED])
        ]
        found[str(count)] = {"found": round(float(np.mean(hits)), 4), **timed(ask[count])}
    return found


def resident_mb() -> int:
    """Return how much memory this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * 4096 / 1e6)


def from_catalogue(gallery: Gallery) -> Json:
    """Return how long codes take to come out of a catalogue that holds nothing else."""
    with tempfile.TemporaryDirectory(prefix="lineage-million-") as folder:
        SqliteCatalogue(folder, create=True).close()
        rows = zip(gallery.ids.tolist(), gallery.codes, strict=True)
        with sqlite3.connect(Path(folder) / FILE) as database:
            database.executemany(
                "INSERT INTO codes VALUES (?, 'made', ?)",
                ((number, code.tobytes()) for number, code in rows),
            )
        database.close()
        with SqliteCatalogue(folder) as catalogue:
            start, before = time.perf_counter(), resident_mb()
            held = catalogue.codes("made")
            return {
                "seconds": round(time.perf_counter() - start, 2),
                "resident_mb": resident_mb() - before,
                "codes": len(held[0]),
            }


def of_size(real: Real, size: int) -> Json:
    """Measure the index that is chosen for this many codes."""
    gallery = gallery_of(real, size)
    own = (real.queries * gallery.codes[gallery.right]).sum(axis=1)
    limit = np.quantile(real.queries[:100] @ gallery.codes.T, 0.999)
    kin = own > limit
    result: Json = {
        "limit": round(float(limit), 4),
        "relatives_above_it": f"{int(kin.sum())} of {len(kin)}",
        "from_catalogue": from_catalogue(gallery),
    }
    exact = NumpyVectors(gallery.ids, gallery.codes)
    result["scan"] = timed(lambda place: exact.nearest(real.queries[place], COUNT), 30)
    before, start = resident_mb(), time.perf_counter()
    made = vector_index(gallery.ids, gallery.codes, exact=False)
    if isinstance(made, ShortlistedVectors):
        made = ShortlistedVectors(gallery.ids, gallery.codes, patience=0)
    made.nearest(real.queries[0], COUNT)
    result["index"] = {
        "kind": type(made).__name__,
        "build_seconds": round(time.perf_counter() - start, 2),
        "codes_mb": round(gallery.codes.nbytes / 1e6),
        "more_mb": resident_mb() - before,
    }
    result["nearest"] = recall(real, gallery, made, kin)
    result["filtered"] = filtered(real, gallery, made, kin)
    return result


# ------------------------------------------------------------------ what was not chosen


def tried(name: str, asking: str, codes: Codes) -> tuple[Any, Json]:
    """Return an index of FAISS's and what it took to make."""
    import faiss

    faiss.omp_set_num_threads(1)
    parameters: Any = faiss.ParameterSpace()
    start = time.perf_counter()
    index = faiss.index_factory(codes.shape[1], name, faiss.METRIC_INNER_PRODUCT)
    index.train(codes[:: max(1, len(codes) // 100_000)])
    index.add(codes)
    seconds = time.perf_counter() - start
    if asking:
        parameters.set_index_parameters(index, asking)
    size = round(faiss.serialize_index(index).nbytes / len(codes))
    return index, {"codes": len(codes), "build_seconds": round(seconds, 1), "bytes_a_code": size}


def shortlisted(index: Any, codes: Codes, query: Codes, count: int) -> NDArray[np.int64]:
    """Return the nearest rows of a shortlist, scored again."""
    found = index.search(query[None], max(512, 4 * count))[1][0]
    found = found[found >= 0]
    return np.asarray(found[np.argsort(-(codes[found] @ query), kind="stable")[:count]])


def others(real: Real) -> Json:
    """Measure the other kinds of index, on the same codes and where nothing lies in groups."""
    gallery = gallery_of(real, SIZES[-1])
    even, queries = without_groups(len(gallery.codes))
    found: Json = {}
    for name, asking in OTHERS.items():
        codes = gallery.codes[: SLOW_TO_MAKE.get(name, len(gallery.codes))]
        index, row = tried(name, asking, codes)
        rows = exact_rows(real.queries[:TIMED], codes, max(COUNTS))
        for count in COUNTS:
            agreed = [
                len(set(shortlisted(index, codes, query, count)) & set(rows[place, :count])) / count
                for place, query in enumerate(real.queries[:TIMED])
            ]
            row[str(count)] = {
                "of_all_nearest": round(float(np.mean(agreed)), 4),
                **timed(lambda p: shortlisted(index, codes, real.queries[p], count)),  # noqa: B023
            }
        index, _ = tried(name, asking, even[: len(codes)])
        hits = [
            place in shortlisted(index, even, query, COUNT) for place, query in enumerate(queries)
        ]
        row["found_without_groups"] = round(float(np.mean(hits)), 4)
        found[f"{name} {asking}".strip()] = row
        print(name, row, flush=True)
    return found


def without_groups(count: int) -> tuple[Codes, Codes]:
    """Return codes in all directions alike, and queries at a cosine of .5 to the first of them."""
    rng = np.random.default_rng(SEED + 3)
    codes = rng.standard_normal((count, 256), np.float32)
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    noise = rng.standard_normal((TIMED, 256), np.float32)
    noise -= (noise * codes[:TIMED]).sum(axis=1, keepdims=True) * codes[:TIMED]
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return codes, np.asarray(0.5 * codes[:TIMED] + np.sqrt(0.75) * noise, np.float32)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the result; return 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.million", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--others", action="store_true")
    chosen = parser.parse_args(arguments)
    before = read_result("million")
    real = real_codes(chosen.zoo)
    result: Json = {
        "seed": SEED,
        "encoder": shipped_coder().version,
        "zoo": {"bases": len(real.bases), "queries": len(real.queries)},
        "cosines_of_strangers": nearness(real),
        "sizes": {},
    }
    for size in SIZES:
        result["sizes"][str(size)] = of_size(real, size)
        print(size, result["sizes"][str(size)], flush=True)
    if chosen.others:
        result["others"] = {"encoder": result["encoder"], "kinds": others(real)}
    elif "others" in before:
        result["others"] = before["others"]
    print("written to", write_result("million", result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
