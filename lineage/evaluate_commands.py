"""The commands of `lineage evaluate`: how good what was learned is, on models it has not seen."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rich_click as click
from numpy.typing import NDArray

from embedder.anchors import Units, anchored
from embedder.coding import shipped_coder
from embedder.errors import MalformedError, NotFoundError
from embedder.evaluating import Cell, Scores, Task, cosines, score, task_of
from embedder.families import Relative, Split, relatives_of
from embedder.identity import IdentityCoder, tokens_of, untrained
from embedder.matching import packed, reranked, turned, unpacked
from embedder.rivals import REDUCED, RIVALS, STANDARDISED, reduced, standardised
from embedder.symmetry import disguised
from embedder.zoo.shards import Zoo, open_zoo
from lineage.answers import done_json
from lineage.later import Output, group_of
from lineage.rendering import Table
from lineage.train_commands import CODE, FOLDS, ZOO

METHODS = ("encoder", "encoder, matched", "untrained", *RIVALS)


def commands(answering: Callable[[Any], Any]) -> click.RichGroup:
    """Return the group of commands.

    Args:
        answering: Adds the options that all commands share, and hands over an `Output`.
    """
    return group_of("evaluate", {"encoder": _encoder}, answering)


@ZOO
@CODE
@click.option("--method", "methods", multiple=True, type=click.Choice(METHODS), help="Only these.")
@click.option("--encoder", type=click.Path(path_type=Path), help="Another encoder's file.")
@click.option(
    "--predictions",
    type=click.Path(path_type=Path, readable=False),
    help="Score somebody's answers: a CSV file with the columns query, base and score.",
)
@FOLDS
def _encoder(
    output: Output,
    zoo: Path,
    code: str,
    methods: tuple[str, ...],
    encoder: Path | None,
    predictions: Path | None,
    folds: tuple[int, ...],
) -> int:
    """Test an encoder on models of a zoo that it has not seen.

    Of identity codes: find their parents among all bases. Every model that is asked about is
    reordered, rescaled and flipped before. Recall is told by how far it has moved from its base,
    for each kind of network.

    Of function codes: tell what was measured of them, over all and in the worst kind of network.
    """
    opened, split = open_zoo(zoo), Split(folds)
    if code == "function":
        if methods or predictions:
            raise click.UsageError("--method and --predictions are for identity codes")
        return output.show(*_function(opened, split, zoo, encoder))
    relatives = relatives_of(opened, lambda row: row["role"] == "base" or not split.trains(row))
    task = task_of(relatives, [not split.trains(relative.row) for relative in relatives])
    if not task.queries:
        raise _nothing_held_back(zoo, folds)
    coder = shipped_coder() if encoder is None else IdentityCoder.load(encoder)
    found: dict[str, list[Cell]] = {}
    if predictions is not None:
        found[str(predictions)] = score(task, read_predictions(predictions, task))
    asked = methods or (() if predictions else METHODS)
    shown = show(opened, task) if asked else ([], [])
    for method in asked:
        found[method] = score(task, scores_of(method, shown, coder))
    return output.show(*_answer(found, task, zoo))


def _nothing_held_back(zoo: Path, folds: tuple[int, ...]) -> NotFoundError:
    return NotFoundError(
        zoo,
        f"no model of it was held back in folds {folds}",
        "build a larger zoo, or name others",
    )


def _function(
    opened: Zoo, split: Split, zoo: Path, encoder: Path | None
) -> tuple[dict[str, Any], Table]:
    """Return how well function codes tell what was measured, and its table."""
    import torch

    from embedder.function import FunctionCoder, shipped_function_coder
    from lineage.function_training import score_of, scores_json

    torch.set_num_threads(1)
    coder = shipped_function_coder() if encoder is None else FunctionCoder.load(encoder)
    scores = scores_json(score_of(coder, opened, split))
    if not scores:
        raise _nothing_held_back(zoo, split.folds)
    columns = ("property", "models", "score", "worst_kind", "worst_score")
    rows = [tuple(score[name] for name in columns) for score in scores]
    closing = "Scores are R², of the task the share told right; of models that were held back."
    facts = {"version": coder.version, "scores": scores}
    return done_json("evaluate-function-encoder", facts, str(zoo)), Table(columns, rows, closing)


Shown = tuple[dict[str, NDArray[Any]], list[Units]]
"""Weights and units of a model, as a method is shown them."""


def show(zoo: Zoo, task: Task) -> tuple[list[Shown], list[Shown]]:
    """Return queries and bases as all methods are shown them.

    The units of every query are put in another order, scaled and flipped, as far as its design
    allows.
    """
    queries = [_shown(zoo, r, disguise=number) for number, r in enumerate(task.queries)]
    return queries, [_shown(zoo, relative) for relative in task.gallery]


def scores_of(method: str, shown: tuple[list[Shown], list[Shown]], coder: IdentityCoder) -> Scores:
    """Return how near each query is to each base by a method, (queries, bases).

    Args:
        method: One of `METHODS`.
        shown: What `show` returns.
        coder: The encoder that is tested.
    """
    name = method.partition(",")[0]
    chosen = {"encoder": coder, "untrained": untrained()}.get(name)
    codes = [
        np.array(
            [chosen.code(units) if chosen else RIVALS[name](w, units) for w, units in part],
            np.float32,
        )
        for part in shown
    ]
    if name in STANDARDISED:
        codes = standardised(*codes)
    elif name in REDUCED:
        codes = reduced(*codes)
    scores = cosines(*codes)
    if method == name:
        return scores
    queries, gallery = ([turned(tokens_of(units), coder) for _, units in part] for part in shown)
    # As a catalogue keeps them.
    return reranked(scores, queries, [unpacked(packed(units)) for units in gallery])


def _shown(zoo: Zoo, relative: Relative, disguise: int | None = None) -> Shown:
    """Return the weights and units of a model, disguised by a seed if one is given."""
    model = relative.row["id"]
    architecture = zoo.architecture(model)
    weights: dict[str, NDArray[Any]] = dict(zoo.weights(model))
    if disguise is not None:
        weights = disguised(weights, architecture, np.random.default_rng(disguise))
    return weights, anchored(weights, architecture)


def read_predictions(path: Path, task: Task) -> Scores:
    """Return the scores in a CSV file with the columns query, base and score.

    A pair that is not in it scores lowest.

    Raises:
        MalformedError: It has other columns, names unknown models, or a score is no number.
    """
    queries = {query.row["id"]: place for place, query in enumerate(task.queries)}
    bases = {base.row["id"]: place for place, base in enumerate(task.gallery)}
    scores = np.full((len(queries), len(bases)), np.nan, np.float32)
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if not {"query", "base", "score"} <= set(reader.fieldnames or ()):
            raise MalformedError(path, "needs the columns query, base and score")
        for number, row in enumerate(reader, 2):
            try:
                scores[queries[row["query"]], bases[row["base"]]] = float(row["score"])
            except (KeyError, ValueError) as error:
                raise MalformedError(
                    path, f"line {number}: {error} is no query, base or number"
                ) from error
    return scores


def _answer(found: dict[str, list[Cell]], task: Task, zoo: Path) -> tuple[dict[str, Any], Table]:
    """Return the answer and its table: one row for each method and kind of network."""
    cells = [
        {
            "method": method,
            "group": cell.group,
            "from": cell.low,
            "to": cell.high,
            "queries": cell.queries,
            "first": round(cell.first, 4),
            "apart": round(cell.apart, 4),
            "first_ten": round(cell.ten, 4),
            "twins_beaten": None if cell.twins is None else round(cell.twins, 4),
        }
        for method, told in found.items()
        for cell in told
    ]
    facts = {
        "queries": [query.row["id"] for query in task.queries],
        "bases": [base.row["id"] for base in task.gallery],
        "recall": cells,
    }
    shares = ("first", "apart", "first_ten", "twins_beaten")
    columns = ("method", "group", "from", "to", "queries", *shares)
    rows = [tuple(cell[name] for name in columns) for cell in cells]
    closing = f"{len(task.queries):,} queries among {len(task.gallery):,} bases."
    return done_json("evaluate-encoder", facts, str(zoo)), Table(columns, rows, closing)
