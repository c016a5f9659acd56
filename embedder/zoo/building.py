"""Builds a zoo, job by job, in several processes; what is done stays and is not made again."""

import json
import multiprocessing
import os
import platform
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from embedder.errors import ModelLineageError
from embedder.writing import write_text
from embedder.zoo import shards, sources
from embedder.zoo.data import NEEDS_ARCHIVE, check_packages, is_there, task_named
from embedder.zoo.growing import make
from embedder.zoo.labels import NAMES
from embedder.zoo.plan import SIZES, Job, jobs_of
from embedder.zoo.training import device


class ZooError(ModelLineageError, ValueError):
    """The folder holds another zoo, or something else."""


class ZooWatcher:
    """Hears of the progress of a build. The methods do nothing; the command line overrides them."""

    def planned(self, jobs: int, left: int) -> None:
        """The number of shards is known, and how many of them are left to make."""

    def finished(self, shard: str, models: int) -> None:
        """A shard was made."""


@dataclass(slots=True)
class Built:
    """What came of a build.

    Args:
        folder: Where it is.
        made: Shards that were made now.
        kept: Shards that were there.
        rows: Everything that is known of each model.
        left_out: What could not be made, and why.
    """

    folder: Path
    made: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    rows: list[shards.Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def build_zoo(
    folder: Path,
    size: str,
    *,
    seed: int = 0,
    workers: int = 1,
    watcher: ZooWatcher | None = None,
    only: Sequence[str] = (),
) -> Built:
    """Build a zoo, or go on with one.

    Args:
        folder: Where it goes.
        size: Name of one of `SIZES`.
        seed: Decides everything.
        workers: Processes, each with one thread.
        watcher: Hears of the progress.
        only: Names of the shards to make; all if there are none.

    Raises:
        MissingExtraError: A package that holds the data is not installed.
        ZooError: The folder holds a zoo of another size or seed, or something else; or there is no
            such shard.
    """
    check_packages()
    watcher = watcher or ZooWatcher()
    everything = jobs_of(SIZES[size], seed)
    if strange := sorted(set(only) - {job.name for job in everything}):
        raise ZooError(
            f"no shard {strange[0]} in a zoo of size {size}; the first is {everything[0].name}"
        )
    _claim(folder, size, seed)
    built = Built(folder)
    jobs = _possible([job for job in everything if not only or job.name in only], built)
    built.kept = [job.name for job in jobs if shards.is_done(folder, job.name)]
    left = [job for job in jobs if job.name not in built.kept]
    watcher.planned(len(jobs), len(left))
    try:
        for job, models in _made(left, folder, size, workers):
            built.made.append(job.name)
            watcher.finished(job.name, models)
    finally:
        # Also when it was stopped: what is there can be opened.
        built.rows = shards.join_tables(folder)
    write_text(folder / "card.md", card(built, size, seed))
    return built


def _possible(jobs: Sequence[Job], built: Built) -> list[Job]:
    """Return the jobs whose data are there, or can be fetched; note the others."""
    if any(job.population.task.startswith(NEEDS_ARCHIVE) for job in jobs):
        note = sources.fetch_archive()
        built.left_out += [note] if note else []
    found = []
    for job in jobs:
        if is_there(job.population.task):
            found.append(job)
        else:
            built.left_out.append(f"{job.name}: the data of {job.population.task} are not there")
    return found


def _claim(folder: Path, size: str, seed: int) -> None:
    """Make the folder a zoo's, unless it is another's."""
    wanted = {"format": shards.FORMAT, "size": size, "seed": seed}
    facts = shards.read_facts(folder)
    if facts:
        if dict(facts) != wanted:
            raise ZooError(
                f"{folder}: holds a zoo of size {facts.get('size')} and seed {facts.get('seed')}; "
                "go on with these, or name a new folder"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ZooError(f"{folder}: holds something else; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "zoo.json", json.dumps(wanted))


# ------------------------------------------------------------------ jobs, here or in processes


def make_shard(job: Job, folder: Path, size: str) -> int:
    """Make one job with one thread and write its shard; return its number of models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        members = make(job)
    finally:
        torch.set_num_threads(before)
    where = device().type
    rows = []
    for place, member in enumerate(members):
        split = split_of(job, place, SIZES[size].calibration)
        rows.append(shards.row_of(member, job, split=split, device=where))
    shards.write_shard(folder, job.name, shards.tensors_of(members), rows)
    return len(members)


def split_of(job: Job, place: int, calibration: int) -> str:
    """Say what a stranger may be used for; nothing for others."""
    if job.kind != "strangers":
        return ""
    number = int(job.name[1:]) * job.recipes + place
    return "calibration" if number < calibration else "test"


def _made(jobs: Sequence[Job], folder: Path, size: str, workers: int) -> Iterator[tuple[Job, int]]:
    """Yield each job as it is done."""
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, make_shard(job, folder, size)
        return
    context = multiprocessing.get_context("spawn")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_watch_parent)
    try:
        # Ctrl-C reaches every process of the terminal; only this one shall answer it. Workers start
        # as jobs are handed in, and inherit what is blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            waiting: dict[Future[int], Job] = {
                pool.submit(make_shard, job, folder, size): job for job in jobs
            }
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    except BaseException:
        # A job takes up to minutes, and nobody waits that long after Ctrl-C.
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _watch_parent() -> None:
    """End this process when the one that started it is gone."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# ------------------------------------------------------------------ the card


def card(built: Built, size: str, seed: int) -> str:
    """Return the data card of a zoo, as Markdown."""
    rows = built.rows
    roles = Counter(row["role"] for row in rows)
    kinds = Counter(f"{row['kind']} on {row['domain'] or 'what others chose'}" for row in rows)
    relations = Counter(row["relation"] or f"({row['operation'] or 'unknown'})" for row in rows)
    lines = [
        "# A zoo of small networks",
        "",
        f"Size `{size}`, seed {seed}: {len(rows):,} models in {len({r['shard'] for r in rows}):,} "
        f"shards, made by `lineage zoo build`. Weights are float32.",
        "",
        f"Made with Python {platform.python_version()}, numpy {np.__version__}, torch "
        f"{torch.__version__}, one thread a process, on "
        f"{', '.join(sorted({row['device'] or 'elsewhere' for row in rows})) or 'nothing yet'} "
        f"({platform.machine()}). The same versions on the same kind of machine give the same "
        "bits.",
        "",
        "A model's seeds decide its start, examples, wrong labels and their order; which "
        "activations dropout removes is drawn for the shard.",
        "",
        *_counts("role", roles),
        *_counts("design and data", kinds),
        *_counts("relation to the parent", relations),
        *_ranges(rows),
        "Labels are measured on up to 300 examples that no network was trained on. `gap` and "
        "`memorised` use the examples that a model was trained on last. None of them is taken from "
        "a recipe. Diverged models are kept and marked; `diverged` counts "
        f"{sum(bool(row['diverged']) for row in rows):,}.",
        "",
        *_data(rows),
    ]
    if built.left_out:
        lines += ["Left out:", "", *(f"- {note}" for note in built.left_out), ""]
    return "\n".join(lines)


def _counts(what: str, counts: Counter[str]) -> list[str]:
    rows = [f"| {name} | {count:,} |" for name, count in counts.most_common()]
    return [f"| {what} | models |", "| --- | --- |", *rows, ""]


def _ranges(rows: Sequence[shards.Row]) -> list[str]:
    """Return how the labels are spread."""
    lines = ["| label | models | lowest tenth | middle | highest tenth |", "| --- " * 5 + "|"]
    for name in ("drift", *NAMES):
        values = [row[name] for row in rows if row[name] is not None and np.isfinite(row[name])]
        if values:
            low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
            lines.append(f"| {name} | {len(values):,} | {low:.3f} | {middle:.3f} | {high:.3f} |")
    return [*lines, ""]


def _data(rows: Sequence[shards.Row]) -> list[str]:
    """Return the tasks with the digests of their data."""
    names = sorted({row["task"] for row in rows if row["task"]})
    lines = [
        f"| {name} | {task.kind} | {len(task.train):,} | {len(task.test):,} | {task.classes} | "
        f"{task.protected or '–'} | {task.sha256[:16]} |"
        for name in names
        for task in [task_named(name)]
    ]
    head = "| task | kind | to train | to test | classes | protected group | SHA-256 |"
    return [head, "| --- " * 7 + "|", *lines, ""]
