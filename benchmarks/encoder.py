"""Train function encoders on a zoo and score them on recipes that they have not seen.

    python -m benchmarks.encoder --zoo FOLDER --row mean      one row; a minute or two on one core
    python -m benchmarks.encoder --zoo FOLDER                 all rows that are not there yet
    python -m benchmarks.encoder --zoo FULL --shipped         the coder in this package

Models of recipe folds 0 to 6 train, those of folds 7 to 9 test. Each row trains an encoder anew on
one thread and is written at once, so that a run that was stopped goes on. It writes
benchmarks/results/encoder.json.

- *scores*: R² = 1 − mean squared error / variance, over all test models, and over those of the kind
  of network where it is lowest, against the variance within that kind. Below 0 the mean of the test
  models would have been nearer. Of the task, the share of test models whose task came first.
- *parents*: share of test models that were made from a base and whose own base, among all bases of
  the zoo, has the nearest code, by relative drift; all and in the worst kind.
- *change*: of the codes of every tenth test model, the farthest that one moved when the model's
  units were reordered, rescaled and flipped, in float32; codes have unit length.
- *shapes*: the row that looks at no weight. Gradient boosting on the kinds and sizes of layers and
  the number of edges; whatever a design tells about the labels is known to every row.
- *statistics*: gradient boosting on mean, deviation and quantiles of each tensor (StatNN) beside
  the shapes, the rival that is hard to beat. *disguised*: the same when the units of the test
  models were reordered, rescaled and flipped before, which no encoder's row would notice.

`--shipped` scores the coder in this package, and statistics, on the folds that were held back from
it, under the key `full`.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import described, load, read_result, write_result
from embedder.encoder import Encoder, EncoderConfig
from embedder.encoder_training import Example, FunctionSettings, example_of, train_function
from embedder.evaluating import cosines, score, task_of
from embedder.families import Relative, Split, relatives_of
from embedder.function import Told, shipped_function_coder
from embedder.function_scoring import property_scores
from embedder.graph import weight_graph
from embedder.rivals import statistics
from embedder.symmetry import disguised
from embedder.zoo.shards import Zoo, open_zoo, read_facts
from lineage.function_training import scores_json

Json = dict[str, Any]
Seen = NDArray[np.float64]
"""What boosting looks at, (models, numbers)."""

TRAIN_FOLDS, TEST_FOLDS = range(7), range(7, 10)
SETTINGS = FunctionSettings(steps=500)
ROWS: dict[str, EncoderConfig | None] = {
    "shapes": None,
    "statistics": None,
    "mean": EncoderConfig(),
    "sag": EncoderConfig(pooling="sag"),
    "diff": EncoderConfig(pooling="diff"),
    "no messages": EncoderConfig(rounds=0),
    "no attention": EncoderConfig(attention=False),
    "no anchors": EncoderConfig(anchors=False),
    "no gauge": EncoderConfig(gauge=False),
    "micro": EncoderConfig(levels=("micro",)),
    "meso": EncoderConfig(levels=("meso",)),
    "macro": EncoderConfig(levels=("macro",)),
}


class Models(NamedTuple):
    """The models of a zoo, as a row sees them."""

    zoo: Zoo
    relatives: list[Relative]
    examples: list[Example]

    def part(self, folds: Sequence[int]) -> list[int]:
        """Return the places of the models of some folds."""
        return [n for n, known in enumerate(self.relatives) if known.row["fold"] in folds]


def models_of(zoo: Zoo, relatives: list[Relative], *, gauge: bool) -> Models:
    """Return the graphs of all models."""
    examples = [
        example_of(known, weight_graph(zoo.weights(name), zoo.architecture(name), gauge=gauge))
        for known, name in ((known, known.row["id"]) for known in relatives)
    ]
    return Models(zoo, relatives, examples)


def trained_row(models: Models, config: EncoderConfig) -> Json:
    """Train an encoder and return what it scores."""
    began = time.process_time()
    train, test = models.part(TRAIN_FOLDS), models.part(TEST_FOLDS)
    trained = train_function([models.examples[n] for n in train], config, SETTINGS)
    seconds = time.process_time() - began
    told = trained.tell([models.examples[n].graph for n in test])
    codes = trained.tell([example.graph for example in models.examples]).codes
    return {
        "training_cpu_s": round(seconds, 1),
        "parameters": sum(values.numel() for values in trained.encoder.parameters()),
        "scores": _scores(models, test, told),
        "parents": _parents(models, test, codes),
        "change": float(f"{_change(models, test[::10], trained.encoder):.1e}"),
    }


def _change(models: Models, chosen: Sequence[int], encoder: Encoder) -> float:
    """Return how far the code of a model moves, at most, when its units are changed about."""
    most, rng = 0.0, np.random.default_rng(SETTINGS.seed)
    for number in chosen:
        name = models.relatives[number].row["id"]
        weights, architecture = models.zoo.weights(name), models.zoo.architecture(name)
        other = disguised(weights, architecture, rng)
        moved = encoder.code(weights, architecture) - encoder.code(other, architecture)
        most = max(most, float(np.linalg.norm(moved)))
    return most


def boosted_row(models: Models, train: Sequence[int], test: Sequence[int], name: str) -> Json:
    """Return what gradient boosting tells of the test models, from their shapes or statistics."""
    began = time.process_time()
    seen = partial(_seen, models, weights=name == "statistics")
    boosted = _Boosted([models.examples[n] for n in train], seen(train))
    found: Json = {"scores": _scores(models, test, boosted.tell(seen(test)))}
    found["training_cpu_s"] = round(time.process_time() - began, 1)
    if name == "statistics":
        told = boosted.tell(seen(test, disguise=True))
        found["disguised"] = _scores(models, test, told)
    return found


class _Boosted:
    """Gradient boosting for each property, and one for the task."""

    def __init__(self, examples: Sequence[Example], seen: Seen) -> None:
        from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

        measured = np.array([example.values for example in examples])
        self._values = []
        for column in measured.T:
            there = np.isfinite(column)
            regressor = HistGradientBoostingRegressor(
                max_iter=150, learning_rate=0.06, l2_regularization=1.0, random_state=SETTINGS.seed
            )
            self._values.append(regressor.fit(seen[there], column[there]))
        classifier = HistGradientBoostingClassifier(random_state=SETTINGS.seed, max_iter=30)
        self._task = classifier.fit(seen, [example.task for example in examples])

    def tell(self, seen: Seen) -> Told:
        values = np.stack([regressor.predict(seen) for regressor in self._values], axis=1)
        tasks = [str(name) for name in self._task.predict(seen)]
        return Told(np.zeros((len(seen), 0), np.float32), values, tasks)


def _seen(models: Models, chosen: Sequence[int], *, weights: bool, disguise: bool = False) -> Seen:
    """Return the shapes of some models, and if asked for the statistics of their weights."""
    found, rng = [], np.random.default_rng(SETTINGS.seed)
    for number in chosen:
        row = _shape(models.examples[number])
        if weights:
            name = models.relatives[number].row["id"]
            values: Mapping[str, NDArray[np.floating]] = models.zoo.weights(name)
            if disguise:
                values = disguised(values, models.zoo.architecture(name), rng)
            row = np.concatenate([statistics(values, ()), row])
        found.append(row)
    return np.stack(found)


def _shape(example: Example) -> NDArray[np.float64]:
    """Return the number of edges, and size and kind of up to 10 layers, zeros for the rest."""
    layers = example.graph.layers.numpy()
    found = np.zeros((10, 5))
    found[: len(layers), 0] = layers[:10, 0]
    found[: len(layers), 1:] = layers[:10, -4:]
    return np.append(found.ravel(), example.graph.num_edges)


def _scores(models: Models, test: Sequence[int], told: Told) -> list[Json]:
    """Return R² of each property and the share of tasks told right."""
    kinds = [models.relatives[n].row["kind"] for n in test]
    return scores_json(property_scores(kinds, [models.examples[n] for n in test], told))


def _parents(models: Models, test: Sequence[int], codes: NDArray[np.float32]) -> list[Json]:
    """Return recall at 1 by drift."""
    tests = np.zeros(len(models.relatives), bool)
    tests[list(test)] = True
    task = task_of(models.relatives, list(tests))
    place = {known.row["id"]: number for number, known in enumerate(models.relatives)}
    asked, known = (
        codes[[place[r.row["id"]] for r in part]] for part in (task.queries, task.gallery)
    )
    cells = score(task, cosines(asked, known))
    found = []
    for cell in cells:
        if cell.group == "all":
            kinds = [c for c in cells if c.group != "all" and c.low == cell.low]
            worst = min(kinds, key=lambda c: c.first)
            found.append(
                {
                    "drift": [cell.low, cell.high],
                    "queries": cell.queries,
                    "gallery": len(task.gallery),
                    "first": round(cell.first, 3),
                    "ten": round(cell.ten, 3),
                    "worst_kind": worst.group,
                    "worst_kind_queries": worst.queries,
                    "worst_first": round(worst.first, 3),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--zoo", type=Path, required=True, help="folder of a zoo")
    parser.add_argument("--row", action="append", choices=ROWS, help="only these, again")
    parser.add_argument("--shipped", action="store_true", help="score the coder in this package")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    zoo = open_zoo(arguments.zoo)
    relatives = relatives_of(zoo)
    if arguments.shipped:
        write_result("encoder", {**read_result("encoder"), "full": shipped_rows(zoo, relatives)})
        return
    done = read_result("encoder").get("rows", {})
    for name in arguments.row or [name for name in ROWS if name not in done]:
        config = ROWS[name]
        models = models_of(zoo, relatives, gauge=config is None or config.gauge)
        train, test = models.part(TRAIN_FOLDS), models.part(TEST_FOLDS)
        if config is None:
            row = boosted_row(models, train, test, name)
        else:
            row = trained_row(models, config)
        _keep(name, {**_made(train, test), **row}, arguments.zoo)
        print(name, json.dumps(row), flush=True)


def shipped_rows(zoo: Zoo, relatives: list[Relative]) -> Json:
    """Return what the shipped coder scores on the folds held back from it, and boosting there."""
    coder, split = shipped_function_coder(), Split()
    models = models_of(zoo, relatives, gauge=True)
    train = [n for n, known in enumerate(relatives) if split.trains(known.row)]
    test = sorted(set(range(len(relatives))) - set(train))
    told = coder.tell([models.examples[n].graph for n in test])
    codes = coder.tell([example.graph for example in models.examples]).codes
    shipped = {
        "version": coder.version,
        "scores": _scores(models, test, told),
        "parents": _parents(models, test, codes),
        "change": float(f"{_change(models, test[::10], coder.encoder):.1e}"),
    }
    rows = {name: boosted_row(models, train, test, name) for name in ("shapes", "statistics")}
    facts = {"zoo": _zoo(zoo.folder), "folds": {"test": list(split.folds)}}
    return {**_made(train, test), **facts, "rows": {"shipped": shipped, **rows}}


def _made(train: Sequence[int], test: Sequence[int]) -> Json:
    """Return when and how something was measured."""
    made = {key: described()[key] for key in ("date", "commit", "changed_since")}
    return {**made, "load": load(), "seed": SETTINGS.seed, "train": len(train), "test": len(test)}


def _zoo(folder: Path) -> Json:
    facts = read_facts(folder)
    return {"size": facts.get("size"), "seed": facts.get("seed")}


def _keep(name: str, row: Json, zoo: Path) -> None:
    """Write a row beside those that are there by now."""
    kept = read_result("encoder")
    rows = {**kept.get("rows", {}), name: row}
    facts = {
        "zoo": _zoo(zoo),
        "steps": SETTINGS.steps,
        "batch": SETTINGS.batch,
        "contrastive": SETTINGS.contrastive,
        "folds": {"train": list(TRAIN_FOLDS), "test": list(TEST_FOLDS)},
        "threads": 1,
        "rows": {known: rows[known] for known in ROWS if known in rows},
    }
    write_result("encoder", {**kept, **facts})


if __name__ == "__main__":
    main()
