"""The commands of `lineage train`: what this program has learned can be learned anew."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rich_click as click

from embedder.errors import NotFoundError
from embedder.families import Split, relatives_of
from embedder.training import STEPS, Settings, train_identity
from embedder.zoo.shards import Zoo, open_zoo
from lineage.answers import done_json
from lineage.cards import counts, progress_to, write_card
from lineage.later import Output, group_of
from lineage.rendering import Table

ZOO = click.argument("zoo", type=click.Path(path_type=Path, readable=False))
FOLDS = click.option(
    "--fold",
    "folds",
    multiple=True,
    type=click.IntRange(0, 9),
    default=Split().folds,
    show_default=True,
    help="Recipes are dealt into ten folds; these are for the test.",
)
CODE = click.option(
    "--code",
    type=click.Choice(("identity", "function")),
    default="identity",
    show_default=True,
    help="Identity codes find parents; function codes tell what a network does.",
)


def commands(answering: Callable[[Any], Any]) -> click.RichGroup:
    """Return the group of commands.

    Args:
        answering: Adds the options that all commands share, and hands over an `Output`.
    """
    return group_of("train", {"encoder": _encoder}, answering)


@ZOO
@click.argument("target", type=click.Path(path_type=Path, readable=False))
@CODE
@click.option("--steps", type=click.IntRange(min=0), help="Batches. [default: as shipped]")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Decides all draws.")
@FOLDS
def _encoder(
    output: Output,
    zoo: Path,
    target: Path,
    code: str,
    steps: int | None,
    seed: int,
    folds: tuple[int, ...],
) -> int:
    """Train the encoder of identity codes, or of function codes, on the families of a zoo.

    Writes TARGET, a safetensors file, and a card beside it. Some recipes are held back, so that
    `lineage evaluate encoder` can test it on families that it has not seen.
    """
    import torch

    if not target.parent.is_dir():
        raise NotFoundError(target.parent, "no such folder", "make it first")
    torch.set_num_threads(1)
    opened, split = open_zoo(zoo), Split(folds)
    if code == "function":
        from lineage.function_training import train_function_coder

        card = train_function_coder(opened, split, target, seed=seed, steps=steps)
    else:
        steps = STEPS if steps is None else steps
        card = _identity(opened, split, target, Settings(seed=seed, steps=steps))
    answer = done_json(f"train-{_KIND[code]}", {"file": str(target), **card}, str(zoo))
    rows = [(name, value) for name, value in card.items() if not isinstance(value, list | dict)]
    return output.show(answer, Table(("fact", "value"), rows, f"Written to {target}."))


_KIND = {"identity": "encoder", "function": "function-encoder"}


def _identity(zoo: Zoo, split: Split, target: Path, settings: Settings) -> dict[str, Any]:
    """Train and write an identity coder; return its card."""
    start = time.monotonic()
    relatives = relatives_of(zoo, split.trains)
    members = [relative.member for relative in relatives]
    coder = train_identity(members, settings, progress_to(settings.steps))
    card = {
        "version": coder.version,
        "date": datetime.now(UTC).date().isoformat(),
        "seed": settings.seed,
        "steps": settings.steps,
        **counts(relatives),
        "held_back": list(split.folds),
        "seconds": round(time.monotonic() - start),
    }
    coder.save(target)
    write_card(target, card)
    return card
