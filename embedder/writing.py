"""Files that are either whole or not there."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, and give it its own when it is whole.

    Args:
        path: Of the file.
        write: Writes to the path that it is given.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> write_whole(path, lambda beside: beside.write_text("all of it"))
        >>> path.read_text(), len(list(path.parent.iterdir()))
        ('all of it', 1)
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text."""
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_encoder(path: Path, save: Callable[[Path], object]) -> None:
    """Write an encoder by safetensors, which makes files for their owner alone; all may read it.

    Args:
        path: Of the file.
        save: Saves its tensors to the path that it is given.
    """

    def write(beside: Path) -> None:
        save(beside)
        beside.chmod(0o644)

    write_whole(path, write)
