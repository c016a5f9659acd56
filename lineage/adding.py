"""Read models and remember them: incremental, resumable, in parallel.

Each model is one transaction. What was finished stays when the run is stopped; running the same
command again reads only what is new or has changed.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from embedder.coding import coded, current_encoders
from embedder.discovery import Found, find_models, folder_kind, located
from embedder.errors import CheckpointError, EmptyModelError, MissingExtraError, ModelLineageError
from embedder.fingerprint import METHOD, Fingerprint, take_fingerprint
from embedder.identity import IdentityCode
from embedder.opening import open_checkpoint
from embedder.sniff import sniff
from index.catalogue import Catalogue, Entry
from index.errors import NameTakenError
from lineage.measure import measure
from lineage.relation import decide
from lineage.rendering import printable
from lineage.verdict import COPIES

_POOL_FROM = 12
"""Models from which worker processes pay for their start (.25 s each)."""
_LARGE_BYTES = 64 << 20
"""Models from this size are read one after the other, by two threads each."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A model that was not added, and why."""

    model: str
    reason: str


@dataclass(slots=True)
class Added:
    """What became of the models of one run.

    Args:
        added: Names that were read and remembered.
        unchanged: Names that were there already, their files unchanged.
        failed: Models that could not be read.
        limits: Name → what could not be read or counted of an added model.
    """

    added: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    limits: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """One model that is to be read.

    Args:
        name: The name that it will have.
        path: What to open.
        kind: Its format, as far as it is known before it is opened.
        size_bytes: Size of the file, or of the folder's files.
        sure: Whether it must be a model; if not, one without weights is passed over.
        allow_partial: Read what is there of a model with missing shards.
        codes: Whether to make its identity code too.
    """

    name: str
    path: Path
    kind: str
    size_bytes: int
    sure: bool
    allow_partial: bool
    codes: bool = True


BYTES_A_SECOND = 500e6
"""Rate of reading with which `estimate` reckons; 2.4 GB of bf16 took 3.4 s on two cores."""


def estimate(jobs: Sequence[Job]) -> tuple[float, int]:
    """Return about how many seconds reading takes, and the bytes that are read."""
    total = sum(job.size_bytes for job in jobs)
    return 0.01 * len(jobs) + total / BYTES_A_SECOND, total


class Watcher:
    """Hears of the progress of a run. The methods do nothing; the command line overrides them."""

    def planned(self, jobs: Sequence[Job]) -> None:
        """The models that will be read are known."""

    def finished(self, job: Job) -> None:
        """One of them was read, or could not be."""


def plan(
    paths: Iterable[Path],
    catalogue: Catalogue | None,
    *,
    name: str = "",
    allow_partial: bool = False,
    codes: bool = True,
) -> tuple[list[Job], list[str]]:
    """Return the models that have to be read and the names of those that have not changed.

    Args:
        paths: Files and folders.
        catalogue: Where they will go; None if it is not there yet.
        name: Name of the only model.
        allow_partial: Read what is there of models with missing shards.
        codes: Whether to make identity codes too.

    Raises:
        NameTakenError: `name` was given for several models, or another model has it.
    """
    known = {entry.name: entry for entry in catalogue.entries()} if catalogue is not None else {}
    by_location = {entry.location: entry for entry in known.values()}
    outdated = _outdated(catalogue, known.values()) if catalogue is not None and codes else set()
    jobs, unchanged, taken = [], [], set(known)
    for location, found in _found_once(paths):
        entry = by_location.get(location)
        same = entry and entry.method == METHOD and not name
        if entry and same and entry.stamp == restamped(entry.stamp) and entry.id not in outdated:
            unchanged.append(entry.name)
            continue
        chosen = name or (entry.name if entry else _free_name(found, taken))
        taken.add(chosen)
        kind, size = _look_of(found.path)
        jobs.append(Job(chosen, found.path, kind, size, found.sure, allow_partial, codes))
    if name:
        _check_name(name, jobs, known)
    return jobs, unchanged


def _outdated(catalogue: Catalogue, entries: Iterable[Entry]) -> set[int]:
    """Return the numbers of models whose codes were made by another encoder than this program's."""
    known = catalogue.encoders()
    stale = known.keys() - current_encoders() if known else ()
    if not stale:
        return set()
    codes = ((entry.id, catalogue.code(entry.id)) for entry in entries)
    return {model for model, code in codes if code and code.encoder in stale}


def _found_once(paths: Iterable[Path]) -> Iterator[tuple[str, Found]]:
    """Yield each model with its location; a path that cannot be searched stands for itself.

    Reading it will say what is wrong, and the others are read all the same.
    """
    seen = set()
    for path in paths:
        try:
            models = list(find_models(path))
        except (CheckpointError, OSError):
            models = [Found(path.name, path)]
        for found in models:
            location = str(located(found.path))
            if location not in seen:
                seen.add(location)
                yield location, found


def _check_name(name: str, jobs: Sequence[Job], known: Mapping[str, Entry]) -> None:
    if len(jobs) > 1:
        raise NameTakenError(
            f"{name}: one name for {len(jobs)} models; nothing was added; add them without --name, "
            "or one by one"
        )
    holder = known.get(name)
    if holder is not None and any(str(located(job.path)) != holder.location for job in jobs):
        raise NameTakenError(
            f"{name}: another model has this name, from {holder.location or 'an import'}; nothing "
            f"was added; choose another name, or first: lineage remove {name}"
        )


def _free_name(found: Found, taken: set[str]) -> str:
    """Return a name that nobody has: the path's own, with as many parent folders as it takes."""
    parts = located(found.path).parts
    names = [found.name, *("/".join(parts[first:]) for first in range(len(parts) - 2, 0, -1))]
    # Bytes of a file's name that are no text cannot be typed, printed or stored as one.
    shown = [printable(name) for name in (*names, str(located(found.path)))]
    return next((name for name in shown if name not in taken), shown[-1])


def _look_of(path: Path) -> tuple[str, int]:
    """Return format and size as far as a look from outside tells them."""
    try:
        return (folder_kind(path) if path.is_dir() else sniff(path)) or "", _size_of(path)
    except OSError:
        return "", 0


def _size_of(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return path.stat().st_size if path.is_file() else 0


def stamp_of(files: Iterable[Path]) -> str:
    """Return path, size and time of change of each file, to see later whether it has changed."""
    stamps = []
    for file in files:
        found = file.stat()
        stamps.append([str(file.absolute()), found.st_size, found.st_mtime_ns])
    return json.dumps(stamps)


def restamped(stamp: str) -> str:
    """Return the stamp that the same files have now; empty if one is gone."""
    try:
        return stamp_of(Path(path) for path, _, _ in json.loads(stamp))
    except (OSError, ValueError):
        return ""


def add_models(
    catalogue: Catalogue, jobs: Sequence[Job], *, workers: int = 2, watcher: Watcher | None = None
) -> Added:
    """Read models and remember them, each as soon as it is read.

    Args:
        catalogue: Where they go.
        jobs: From `plan`.
        workers: Processes that read small models.
        watcher: Hears of the progress.

    Raises:
        CatalogueError: The catalogue could not be written; what was finished is kept.
    """
    watcher = watcher or Watcher()
    watcher.planned(jobs)
    result = Added()
    for job, outcome in _outcomes(jobs, workers):
        if isinstance(outcome, Exception):
            if job.sure or not isinstance(outcome, EmptyModelError):
                result.failed.append(Failure(job.name, str(outcome)))
        else:
            fingerprint, stamp, code = outcome
            catalogue.add(entry_of(job, fingerprint, stamp), fingerprint, code)
            result.added.append(job.name)
            if fingerprint.limits:
                result.limits[job.name] = fingerprint.limits
        watcher.finished(job)
    return result


Outcome = tuple[Fingerprint, str, IdentityCode | None] | Exception


def _outcomes(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Outcome]]:
    """Yield what was read of each model, or why nothing was, as they come."""
    small = [job for job in jobs if job.size_bytes < _LARGE_BYTES]
    if workers < 2 or len(small) < _POOL_FROM:
        for job in jobs:
            yield job, read_model(job)
        return
    for job in jobs:
        if job.size_bytes >= _LARGE_BYTES:
            yield job, read_model(job)
    # Spawned, not forked: a fork would copy threads' locks in whatever state they are.
    context = multiprocessing.get_context("spawn")
    # One thread in each of two processes beats two threads in one for many small products. It is
    # set here because a worker has loaded numpy before any line of ours runs in it.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_watch_parent)
    try:
        # Ctrl-C reaches every process of the terminal; only this one shall answer it. Workers start
        # as jobs are handed in, and inherit what is blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            waiting: dict[Future[Outcome], Job] = {pool.submit(read_model, j): j for j in small}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for done in as_completed(waiting):
            job, error = waiting[done], done.exception()
            yield job, _lost(job, error) if error else done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _lost(job: Job, error: BaseException) -> ModelLineageError:
    return ModelLineageError(
        f"{job.path}: the process that read it ended ({error}); run the same command again"
    )


def _watch_parent() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker whose parent was killed would wait for its next model for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def read_model(job: Job) -> Outcome:
    """Open one model; return its fingerprint, its stamp and its identity code, or the error."""
    try:
        with open_checkpoint(job.path, allow_partial=job.allow_partial) as opened:
            checkpoint = opened.read_once() if job.codes else opened
            stamp = stamp_of(checkpoint.files)
            fingerprint = take_fingerprint(checkpoint)
            code = coded(checkpoint)[0] if job.codes else None
            return compared_with_renderings(fingerprint, checkpoint.renderings), stamp, code
    except (CheckpointError, MissingExtraError) as error:
        return error
    except (OSError, MemoryError, RecursionError) as error:
        return ModelLineageError(f"{job.path}: {error or type(error).__name__}")


def compared_with_renderings(fingerprint: Fingerprint, renderings: Sequence[Path]) -> Fingerprint:
    """Return a folder's fingerprint with a limit for each rendering that holds other weights.

    Args:
        fingerprint: Of the preferred rendering.
        renderings: The other files that should hold the same model.
    """
    limits = []
    for file in renderings:
        try:
            with open_checkpoint(file) as other:
                theirs = take_fingerprint(other)
        except (CheckpointError, MissingExtraError) as error:
            limits.append(f"not compared with the rendering beside it: {error}")
            continue
        verdict = decide(fingerprint, theirs, measure(fingerprint, theirs))
        if verdict.relation not in COPIES:
            limits.append(f"{file.name} beside it holds other weights: {verdict.relation}")
    return replace(fingerprint, limits=(*fingerprint.limits, *limits)) if limits else fingerprint


def entry_of(job: Job, fingerprint: Fingerprint, stamp: str) -> Entry:
    """Return the catalogue's entry for a model that was just read."""
    return Entry(
        name=job.name,
        location=str(located(job.path)),
        format=fingerprint.format,
        sha256=fingerprint.sha256,
        content=fingerprint.content,
        identity=fingerprint.identity,
        parameters=fingerprint.parameters,
        size_bytes=fingerprint.size_bytes,
        adapter=fingerprint.adapter,
        method=fingerprint.method,
        added_at=datetime.now(UTC).isoformat(timespec="seconds"),
        stamp=stamp,
        declared=fingerprint.declared,
    )
