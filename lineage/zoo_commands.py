"""The commands of `lineage zoo`: options, one call on the zoo, an answer and its table."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich_click as click

from embedder.zoo.building import build_zoo
from embedder.zoo.collecting import collect
from embedder.zoo.plan import SIZES
from embedder.zoo.shards import open_zoo
from lineage import zoo_answers
from lineage.later import Output, group_of

_FAILED, _UNDECIDED = 1, 4
_FOLDER = click.argument("folder", type=click.Path(path_type=Path, readable=False))
_ROLES = ("base", "checkpoint", "child", "copy", "student", "control", "stranger", "collected")


def commands(answering: Callable[[Any], Any]) -> click.RichGroup:
    """Return the group of commands.

    Args:
        answering: Adds the options that all commands share, and hands over an `Output`.
    """
    found: dict[str, Callable[..., int]] = {
        "build": _build,
        "collect": _collect,
        "list": _list,
        "describe": _describe,
        "export": _export,
    }
    return group_of("zoo", found, answering)


@_FOLDER
@click.option(
    "--size",
    type=click.Choice(list(SIZES)),
    default="sample",
    show_default=True,
    help="How many: about 1,500, 4,000, 22,000, or 16,000 strangers of one design.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Decides everything.")
@click.option("--jobs", type=click.IntRange(min=1), default=2, help="Processes of one thread.")
@click.option("--only", multiple=True, metavar="SHARD", help="Make only these shards.")
def _build(
    output: Output, folder: Path, size: str, seed: int, jobs: int, only: tuple[str, ...]
) -> int:
    """Train populations of small networks and their descendants, and measure them.

    Each shard is kept as soon as it is made: stop at will, and run the same command to go on.
    """
    from lineage.zoo_progress import watching_zoo

    with watching_zoo(sys.stderr) as watcher:
        built = build_zoo(folder, size, seed=seed, workers=jobs, only=only, watcher=watcher)
    answer = zoo_answers.build_json(built)
    output.show(answer, zoo_answers.build_table(answer))
    return _UNDECIDED if answer["limits"] else 0


@_FOLDER
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path, readable=False))
def _collect(output: Output, folder: Path, models: tuple[Path, ...]) -> int:
    """Take models from outside into a zoo, with what their cards and configs say."""
    answer = zoo_answers.collect_json(collect(folder, models))
    output.show(answer, zoo_answers.collect_table(answer))
    if not answer["limits"]:
        return 0
    return _UNDECIDED if answer["added"] or answer["kept"] else _FAILED


@_FOLDER
@click.option("--role", type=click.Choice(_ROLES), help="Only these.")
@click.option("--kind", help="Only this kind of network: mlp, cnn, rnn, transformer, gnn.")
@click.option("--task", help="Only models of this task.")
@click.option("--relation", help="Only models that are this to their parent.")
@click.option("--family", help="Only the descendants of this model, and itself.")
def _list(output: Output, folder: Path, **wanted: str | None) -> int:
    """List the models of a zoo."""
    chosen = {name: value for name, value in wanted.items() if value is not None}
    answer = zoo_answers.list_json(open_zoo(folder), chosen)
    return output.show(answer, zoo_answers.list_table(answer))


@_FOLDER
@click.argument("model")
def _describe(output: Output, folder: Path, model: str) -> int:
    """Say how a model was made and what was measured of it."""
    answer = zoo_answers.describe_json(open_zoo(folder), model)
    return output.show(answer, zoo_answers.describe_table(answer))


@_FOLDER
@click.argument("model")
@click.argument("target", type=click.Path(path_type=Path, readable=False))
def _export(output: Output, folder: Path, model: str, target: Path) -> int:
    """Write a model to a safetensors file of its own, with what is known of it in its header."""
    answer = zoo_answers.export_json(open_zoo(folder), model, target)
    return output.show(answer, zoo_answers.export_table(answer))
