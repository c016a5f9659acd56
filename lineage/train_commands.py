"""The commands of `lineage train`: what this program has learned can be learned anew."""

import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rich_click as click

from embedder.families import Split, relatives_of
from embedder.identity import IdentityCoder
from embedder.training import STEPS, Settings, train_identity
from embedder.zoo.shards import open_zoo
from lineage.answers import done_json
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


def commands(answering: Callable[[Any], Any]) -> click.RichGroup:
    """Return the group of commands.

    Args:
        answering: Adds the options that all commands share, and hands over an `Output`.
    """
    return group_of("train", {"encoder": _encoder}, answering)


@ZOO
@click.argument("target", type=click.Path(path_type=Path, readable=False))
@click.option("--steps", type=click.IntRange(min=0), default=STEPS, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Decides all draws.")
@FOLDS
def _encoder(
    output: Output, zoo: Path, target: Path, steps: int, seed: int, folds: tuple[int, ...]
) -> int:
    """Train the encoder of identity codes on the families of a zoo.

    Writes TARGET, a safetensors file, and a card beside it. Some recipes are held back, so that
    `lineage evaluate encoder` can test it on families that it has not seen.
    """
    import torch

    torch.set_num_threads(1)
    start = time.monotonic()
    split = Split(folds)
    relatives = relatives_of(open_zoo(zoo), split.trains)
    settings = Settings(seed=seed, steps=steps)

    def progress(step: int, loss: float) -> None:
        if step % 50 == 49:
            sys.stderr.write(f"step {step + 1}/{steps}: loss {loss:.4f}\n")

    coder = train_identity([relative.member for relative in relatives], settings, progress)
    card = {
        "version": coder.version,
        "date": datetime.now(UTC).date().isoformat(),
        "seed": seed,
        "steps": steps,
        "models": len(relatives),
        "families": len({relative.member.family for relative in relatives}),
        "held_back": list(split.folds),
        "seconds": round(time.monotonic() - start),
    }
    _write(coder, target, card)
    answer = done_json("train-encoder", {"file": str(target), **card}, str(zoo))
    rows = [(name, value) for name, value in card.items() if name != "held_back"]
    return output.show(answer, Table(("fact", "value"), rows, f"Written to {target}."))


def _write(coder: IdentityCoder, target: Path, card: dict[str, Any]) -> None:
    """Write the encoder, then its card; each is either whole or not there."""
    from safetensors.numpy import save_file

    beside = target.with_name(f".{target.name}.part")
    try:
        save_file(dict(coder.arrays), beside)
        beside.chmod(0o644)  # safetensors makes files for their owner alone
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    target.with_suffix(".json").write_text(text, encoding="utf-8")
