"""Who hears of the progress of a run: a bar on a terminal, nobody elsewhere."""

from contextlib import AbstractContextManager, nullcontext
from typing import TextIO

from lineage.adding import Watcher


def watching(stream: TextIO) -> AbstractContextManager[Watcher | None]:
    """Return a bar of models and bytes on a terminal, and nothing elsewhere."""
    if not stream.isatty():
        return nullcontext()
    # Bars take longer to load than many a run takes.
    from lineage.progress import Bar

    return Bar()
