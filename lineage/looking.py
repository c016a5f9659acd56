"""A look at a file's header, which is worth having even where the rest is missing."""

from pathlib import Path

from embedder.checkpoint import Checkpoint
from embedder.errors import CheckpointError, MissingPartError, TruncatedError
from embedder.opening import open_checkpoint


def look_at(path: Path) -> tuple[Checkpoint, bool]:
    """Open a model for its header; close it afterwards.

    Returns:
        The model, and whether all of it is there. What is missing is named in its limits.

    Raises:
        CheckpointError: Not even the header can be read.
    """
    try:
        return open_checkpoint(path), True
    except (TruncatedError, MissingPartError) as error:
        try:
            checkpoint = open_checkpoint(path, allow_partial=True)
        except CheckpointError:
            raise error from None
        checkpoint.limits.append(str(error))
        return checkpoint, False
