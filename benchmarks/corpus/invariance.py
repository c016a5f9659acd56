"""How far identity codes of real models move when their hidden units are reordered and rescaled.

    python -m benchmarks.corpus.invariance      all models that were fetched; some minutes

Every model whose architecture can be told and that has at most 150 million values is coded, its
units are put in a random order and scaled as far as their activation allows, and it is coded again.
It writes benchmarks/results/invariance.json.
"""

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from benchmarks.corpus.listed import Listed, is_there, listed, path_of
from benchmarks.machine import write_result
from embedder.anchors import anchored
from embedder.coding import shipped_coder
from embedder.describing import describe
from embedder.errors import ArchitectureError, CheckpointError
from embedder.opening import open_checkpoint
from embedder.symmetry import permuted, rescaled

SEED = 5
LARGEST = 150_000_000


def change_of(model: Listed) -> float | str:
    """Return how far the code of a model moves; or why it cannot be said."""
    coder = shipped_coder()
    try:
        with open_checkpoint(path_of(model)) as checkpoint:
            if checkpoint.parameters > LARGEST:
                return "more than 150 million values"
            architecture = describe(checkpoint)
            tensors = [t for t in checkpoint.tensors if t.name in architecture.axes]
            weights = {t.name: t.read().astype(np.float64) for t in tensors}
        before = coder.code(anchored(weights, architecture))
        rng = np.random.default_rng(SEED)
        other = permuted(rescaled(weights, architecture, rng), architecture, rng)
        after = coder.code(anchored(other, architecture))
    except ArchitectureError:
        return "architecture not told"
    except CheckpointError:
        return "not read"
    if not before.any():
        return "no hidden units"
    return float(np.linalg.norm(after - before))


def main() -> None:
    """Measure and write the result."""
    changes: dict[str, list[float]] = defaultdict(list)
    left: Counter[str] = Counter()
    worst: list[tuple[float, str]] = []
    for model in filter(is_there, listed()):
        found = change_of(model)
        print(model.id, found, flush=True)
        if isinstance(found, str):
            left[found] += 1
            continue
        changes[model.format].append(found)
        worst.append((found, model.id))
    result: dict[str, Any] = {
        "seed": SEED,
        "encoder": shipped_coder().version,
        "models": sum(map(len, changes.values())),
        "largest_change": {
            kind: {"models": len(known), "largest": float(f"{max(known):.1e}")}
            for kind, known in sorted(changes.items())
        },
        "worst": [{"model": name, "change": float(f"{c:.1e}")} for c, name in sorted(worst)[-3:]],
        "left_out": dict(left),
    }
    print("written to", write_result("invariance", result))


if __name__ == "__main__":
    main()
