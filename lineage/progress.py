"""Progress of a run, drawn on the terminal's error stream."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from lineage.adding import Job, Watcher


class Bar(Watcher):
    """A bar of models and bytes read."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)
        self._done = self._number = 0

    def planned(self, jobs: Sequence[Job]) -> None:
        """Begin with the number of models and bytes."""
        self._number = len(jobs)
        self._progress.update(
            self._task, description=f"0/{len(jobs):,}", total=sum(job.size_bytes for job in jobs)
        )

    def finished(self, job: Job) -> None:
        """Move on by one model."""
        self._done += 1
        self._progress.update(
            self._task,
            description=f"{self._done:,}/{self._number:,} {job.name[-40:]}",
            advance=job.size_bytes,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
