"""Progress of a zoo's build: a bar on a terminal, a line for each shard elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from embedder.zoo.building import ZooWatcher


class _Bar(ZooWatcher):
    """A bar of shards."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)
        self._models = 0

    def planned(self, jobs: int, left: int) -> None:
        """Begin with the number of shards, those that are there already done."""
        self._progress.update(self._task, total=jobs, completed=jobs - left)

    def finished(self, shard: str, models: int) -> None:
        """Move on by one shard."""
        self._models += models
        self._progress.update(self._task, advance=1, description=f"{self._models:,} models")


class _Lines(ZooWatcher):
    """A line for each shard."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._start = time.monotonic()
        self._jobs = self._done = 0

    def planned(self, jobs: int, left: int) -> None:
        """Remember how many there are."""
        self._jobs, self._done = jobs, jobs - left

    def finished(self, shard: str, models: int) -> None:
        """Write a line."""
        self._done += 1
        seconds = time.monotonic() - self._start
        line = f"{self._done}/{self._jobs} {shard}: {models} models, {seconds:.0f} s\n"
        self._stream.write(line)
        self._stream.flush()


@contextmanager
def watching_zoo(stream: TextIO) -> Iterator[ZooWatcher]:
    """Yield what shows the progress on a stream."""
    if not stream.isatty():
        yield _Lines(stream)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(file=stream), transient=True
    ) as progress:
        yield _Bar(progress)
