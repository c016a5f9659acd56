"""From a zoo to a function coder with its card, and from both to a table of scores."""

import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from embedder.encoder import EncoderConfig
from embedder.encoder_training import (
    FUNCTION_STEPS,
    Example,
    FunctionSettings,
    example_of,
    train_function,
)
from embedder.families import Relative, Split, relatives_of
from embedder.function import FunctionCoder
from embedder.function_scoring import PropertyScore, property_scores
from embedder.graph import weight_graph
from embedder.zoo.shards import Zoo, read_facts
from lineage.answers import tool_version
from lineage.cards import counts, progress_to, write_card

Json = dict[str, Any]


def train_function_coder(
    zoo: Zoo, split: Split, target: Path, *, seed: int, steps: int | None
) -> Json:
    """Train a function coder, write it and its card, and return the card.

    Args:
        zoo: Where the models are.
        split: Which of them train.
        target: The coder's file; its card lies beside it.
        seed: Of the first values and all draws.
        steps: Batches; None for as many as the shipped coder was trained with.
    """
    start = time.monotonic()
    settings = FunctionSettings(seed=seed, steps=FUNCTION_STEPS if steps is None else steps)
    config, progress = EncoderConfig(seed=seed), progress_to(settings.steps)
    relatives = relatives_of(zoo, split.trains)
    coder = train_function(examples_of(zoo, relatives), config, settings, progress)
    coder.save(target)
    facts = read_facts(zoo.folder)
    card = {
        "version": coder.version,
        "date": datetime.now(UTC).date().isoformat(),
        "seed": seed,
        "steps": settings.steps,
        **counts(relatives),
        "held_back": list(split.folds),
        "zoo": {"size": facts.get("size"), "seed": facts.get("seed")},
        "encoder": asdict(config),
        "settings": asdict(settings),
        "parameters": sum(values.numel() for values in coder.encoder.parameters()),
        "program": tool_version(),
        "commit": _commit(),
        "libraries": {name: version(name) for name in ("numpy", "torch", "torch-geometric")},
        "scores": scores_json(score_of(coder, zoo, split)),
        "seconds": round(time.monotonic() - start),
    }
    write_card(target, card)
    return card


def examples_of(zoo: Zoo, relatives: Sequence[Relative]) -> list[Example]:
    """Return models of a zoo as training takes them."""
    found = []
    for relative in relatives:
        name = relative.row["id"]
        graph = weight_graph(zoo.weights(name), zoo.architecture(name))
        found.append(example_of(relative, graph))
    return found


def score_of(coder: FunctionCoder, zoo: Zoo, split: Split) -> list[PropertyScore]:
    """Return how well a coder tells what was measured of the models that are held back."""
    relatives = relatives_of(zoo, lambda row: not split.trains(row))
    if not relatives:
        return []
    examples = examples_of(zoo, relatives)
    kinds = [relative.row["kind"] for relative in relatives]
    return property_scores(kinds, examples, coder.tell([example.graph for example in examples]))


def scores_json(scores: Sequence[PropertyScore]) -> list[Json]:
    """Return scores as answers and cards hold them."""
    return [
        {
            "property": score.name,
            "models": score.models,
            "score": round(score.score, 4),
            "worst_kind": score.worst_kind,
            "worst_score": round(score.kinds[score.worst_kind], 4) if score.kinds else None,
            "kinds": {kind: round(value, 4) for kind, value in score.kinds.items()},
        }
        for score in scores
    ]


def _commit() -> str | None:
    """Return the commit of the checkout that this program runs from, if it runs from one."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    home = Path(__file__).parent.parent
    if not (home / ".git").exists():
        return None
    try:
        done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
