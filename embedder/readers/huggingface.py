"""A folder with one `config.json` and weights, perhaps the same weights in several formats."""

from itertools import groupby
from pathlib import Path

from embedder.checkpoint import Checkpoint, is_parameter
from embedder.discovery import renderings
from embedder.errors import CheckpointError, EmptyModelError
from embedder.readers import reader_of
from embedder.sniff import sniff


def open_huggingface(folder: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open the weights of a folder in the preferred of the formats that are there.

    Of several files in that format, the one with the most parameters is the model: a trainer
    leaves `optimizer.pt` and `training_args.bin` beside `pytorch_model.bin`. All others that
    hold weights, in whatever format, are the checkpoint's `renderings`.

    Args:
        folder: The folder.
        allow_partial: Passed on to the reader of the format.

    Raises:
        EmptyModelError: No file in the folder holds weights.
        CheckpointError: The weights in the preferred format cannot be read.
    """
    chosen: Checkpoint | None = None
    others: list[Path] = []
    limits: list[str] = []
    for kind, group in groupby(renderings(folder), key=_family):
        if chosen is not None and kind != "pytorch":
            others += group  # each is a model; only PyTorch files may be something else
            continue
        opened, errors = _open_models(list(group), allow_partial)
        if errors and not opened and chosen is None:
            # That the preferred format cannot be read is to be known, not to be worked around.
            raise errors[0]
        limits += [f"{Path(error.location).name} was not read: {error.problem}" for error in errors]
        opened.sort(key=lambda checkpoint: checkpoint.parameters, reverse=True)
        if opened and chosen is None:
            chosen = opened.pop(0)
        for checkpoint in opened:
            others += checkpoint.files
            checkpoint.close()
    if chosen is None:
        raise EmptyModelError(folder, "no file in this folder holds weights")
    chosen.location = str(folder)
    chosen.renderings = tuple(others)
    chosen.limits += limits
    return chosen


def _family(file: Path) -> str:
    """Return the format of a file, the same for both kinds of PyTorch files."""
    return (sniff(file) or "").removesuffix("-legacy")


def _open_models(
    files: list[Path], allow_partial: bool
) -> tuple[list[Checkpoint], list[CheckpointError]]:
    """Return the files that hold weights, open, and the errors of those that cannot be read."""
    opened: list[Checkpoint] = []
    errors: list[CheckpointError] = []
    for file in files:
        try:
            checkpoint = reader_of(sniff(file) or "")(file, allow_partial=allow_partial)
        except CheckpointError as error:
            errors.append(error)
            continue
        if any(is_parameter(tensor) and tensor.size for tensor in checkpoint.tensors):
            opened.append(checkpoint)
        else:
            checkpoint.close()
    return opened, errors
