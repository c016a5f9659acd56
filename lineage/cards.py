"""What training tells: how far it is while it runs, and a card beside what it made."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from embedder.families import Relative
from embedder.writing import write_text


def progress_to(steps: int) -> Callable[[int, float], None]:
    """Return what tells people how far training is."""

    def progress(step: int, loss: float) -> None:
        if step % 50 == 49:
            sys.stderr.write(f"step {step + 1}/{steps}: loss {loss:.4f}\n")

    return progress


def counts(relatives: Sequence[Relative]) -> dict[str, int]:
    """Return how many models and families training has seen."""
    families = {relative.member.family for relative in relatives}
    return {"models": len(relatives), "families": len(families)}


def write_card(target: Path, card: dict[str, Any]) -> None:
    """Write a card beside an encoder; it is either whole or not there."""
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    write_text(target.with_suffix(".json"), text)
