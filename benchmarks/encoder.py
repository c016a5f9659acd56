"""Train function encoders on a zoo and score them on recipes that they have not seen.

    python -m benchmarks.encoder --zoo FOLDER --row mean      one row; a minute to five on one core
    python -m benchmarks.encoder --zoo FOLDER                 all rows that are not there yet

Models of recipe folds 0 to 6 train, those of folds 7 to 9 test. Each row trains an encoder anew on
one thread and is written at once, so that a run that was stopped goes on. It writes
benchmarks/results/encoder.json.

- *properties*: R² = 1 − mean squared error / variance, over all test models, and over those of the
  kind of network where it is lowest, against the variance within that kind. Below 0 the mean of the
  test models would have been nearer.
- *task*: share of test models whose task came first; all and in the worst kind.
- *parents*: share of test models that were made from a base and whose own base, among all bases of
  the zoo, has the nearest code, by relative drift; all and in the worst kind.
- *change*: of the codes of every tenth test model, the farthest that one moved when the model's
  units were reordered, rescaled and flipped, in float32; codes have unit length. It is large on
  the slice because of CNNs whose batch norms sit on residual branches: `embedder.anchors` takes
  such a norm for one of the whole stream. All other designs stay below 1e-6, measured untrained.
- *shapes*: the row that looks at no weight. Gradient boosting on the kinds and sizes of layers and
  the number of edges; whatever a design tells about the labels is known to every row.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import RESULTS, described, load, write_result
from embedder.encoder import Encoder, EncoderConfig
from embedder.encoder_training import (
    PROPERTIES,
    Example,
    FunctionSettings,
    example_of,
    tell,
    train_function,
)
from embedder.evaluating import cosines, score, task_of
from embedder.families import Relative, relatives_of
from embedder.graph import weight_graph
from embedder.symmetry import flipped, permuted, rescaled
from embedder.zoo.shards import Zoo, open_zoo, read_facts

Json = dict[str, Any]

TRAIN_FOLDS, TEST_FOLDS = range(7), range(7, 10)
SETTINGS = FunctionSettings(seed=0, steps=500)
ROWS: dict[str, EncoderConfig | None] = {
    "shapes": None,
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
    told = tell(trained, [models.examples[n].graph for n in test])
    codes = tell(trained, [example.graph for example in models.examples]).codes
    return {
        "training_cpu_s": round(seconds, 1),
        "parameters": sum(values.numel() for values in trained.encoder.parameters()),
        **_predictions(models, test, told.values, told.tasks),
        "parents": _parents(models, test, codes),
        "change": float(f"{_change(models, test[::10], trained.encoder):.1e}"),
    }


def _change(models: Models, chosen: Sequence[int], encoder: Encoder) -> float:
    """Return how far the code of a model moves, at most, when its units are changed about."""
    most, rng = 0.0, np.random.default_rng(SETTINGS.seed)
    for number in chosen:
        name = models.relatives[number].row["id"]
        weights, architecture = models.zoo.weights(name), models.zoo.architecture(name)
        other: Mapping[str, NDArray[np.floating]] = weights
        for change in (permuted, rescaled, flipped):
            other = change(other, architecture, rng)
        moved = encoder.code(weights, architecture) - encoder.code(other, architecture)
        most = max(most, float(np.linalg.norm(moved)))
    return most


def shapes_row(models: Models) -> Json:
    """Return what is known of the test models from their shapes alone."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    began = time.process_time()
    train, test = models.part(TRAIN_FOLDS), models.part(TEST_FOLDS)
    shapes = np.stack([_shape(example) for example in models.examples])
    measured = np.array([example.values for example in models.examples])
    values = np.zeros((len(test), len(PROPERTIES)))
    for column in range(len(PROPERTIES)):
        known = [n for n in train if np.isfinite(measured[n, column])]
        regressor = HistGradientBoostingRegressor(random_state=SETTINGS.seed)
        values[:, column] = regressor.fit(shapes[known], measured[known, column]).predict(
            shapes[test]
        )
    classifier = HistGradientBoostingClassifier(random_state=SETTINGS.seed, max_iter=30)
    classifier.fit(shapes[train], [models.examples[n].task for n in train])
    tasks = [str(name) for name in classifier.predict(shapes[test])]
    return {
        "training_cpu_s": round(time.process_time() - began, 1),
        **_predictions(models, test, values, tasks),
    }


def _shape(example: Example) -> NDArray[np.float64]:
    """Return the number of edges, and size and kind of up to 10 layers, zeros for the rest."""
    layers = example.graph.layers.numpy()
    found = np.zeros((10, 5))
    found[: len(layers), 0] = layers[:10, 0]
    found[: len(layers), 1:] = layers[:10, -4:]
    return np.append(found.ravel(), example.graph.num_edges)


def _predictions(
    models: Models, test: Sequence[int], values: NDArray[np.float64], tasks: Sequence[str]
) -> Json:
    """Return R² of each property and the accuracy of the task, over all and the worst kind."""
    kinds = np.array([models.relatives[n].row["kind"] for n in test])
    measured = np.array([models.examples[n].values for n in test])
    right = np.array([models.examples[n].task == t for n, t in zip(test, tasks, strict=True)])
    properties = {}
    for name, truth, said in zip(PROPERTIES, measured.T, values.T, strict=True):
        fit = partial(_r2, truth, said)
        properties[name] = _worst(kinds, np.isfinite(truth), fit)
    every = np.ones(len(test), bool)
    return {
        "r2": properties,
        "task_accuracy": _worst(kinds, every, lambda chosen: float(right[chosen].mean())),
    }


def _worst(
    kinds: NDArray[np.str_], known: NDArray[np.bool_], measure: Callable[[NDArray[np.bool_]], float]
) -> Json:
    """Return a measure of all models where it is known, and of the kind that has least of it."""
    by_kind = {
        str(kind): measure(known & (kinds == kind))
        for kind in np.unique(kinds)
        if (known & (kinds == kind)).sum() > 1
    }
    worst = min(by_kind, key=by_kind.__getitem__)
    return {
        "models": int(known.sum()),
        "all": round(measure(known), 3),
        "worst_kind": worst,
        "worst": round(by_kind[worst], 3),
    }


def _r2(truth: NDArray[np.float64], said: NDArray[np.float64], chosen: NDArray[np.bool_]) -> float:
    truth, said = truth[chosen], said[chosen]
    return float(1 - np.mean((truth - said) ** 2) / np.var(truth))


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
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done = _done()
    zoo = open_zoo(arguments.zoo)
    relatives = relatives_of(zoo)
    for name in arguments.row or [name for name in ROWS if name not in done]:
        config = ROWS[name]
        models = models_of(zoo, relatives, gauge=config is None or config.gauge)
        row = shapes_row(models) if config is None else trained_row(models, config)
        made = {key: described()[key] for key in ("date", "commit", "changed_since")}
        counts = {"train": len(models.part(TRAIN_FOLDS)), "test": len(models.part(TEST_FOLDS))}
        _keep(name, {**made, "load": load(), "seed": SETTINGS.seed, **counts, **row}, arguments.zoo)
        print(name, json.dumps(row), flush=True)


def _done() -> dict[str, Json]:
    """Return the rows that are there."""
    path = RESULTS / "encoder.json"
    if not path.exists():
        return {}
    rows: dict[str, Json] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def _keep(name: str, row: Json, zoo: Path) -> None:
    """Write a row beside those that are there by now."""
    rows = {**_done(), name: row}
    facts = read_facts(zoo)
    write_result(
        "encoder",
        {
            "zoo": {"size": facts.get("size"), "seed": facts.get("seed")},
            "steps": SETTINGS.steps,
            "batch": SETTINGS.batch,
            "contrastive": SETTINGS.contrastive,
            "folds": {"train": list(TRAIN_FOLDS), "test": list(TEST_FOLDS)},
            "threads": 1,
            "rows": {known: rows[known] for known in ROWS if known in rows},
        },
    )


if __name__ == "__main__":
    main()
