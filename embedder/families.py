"""The zoo as families: who descends from whom, how far, and what the encoder is shown of it.

A family is a trained network and all that descends from it alone. Merges descend from two and are
left out; students learned from outputs and are families of their own. Early checkpoints are part of
the family of what they became.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedder.anchors import anchored
from embedder.identity import tokens_of
from embedder.training import Member
from embedder.zoo.member import drift_between
from embedder.zoo.shards import Zoo

Row = Mapping[str, Any]

_IN_PLACE = frozenset({"permute", "rescale", "flip", "rotate"})
"""Operations after which weights cannot be compared place by place."""


@dataclass(frozen=True, slots=True, eq=False)
class Relative:
    """One model of the zoo and its place in its family.

    Args:
        row: What the zoo's table says.
        member: What training is shown.
        drift: ‖Y − X‖ / ‖X‖ to the base of its family; 0 for the base. Behind a copy that was
            reordered or rescaled, the root of the sum of squares of the steps.
    """

    row: Row
    member: Member
    drift: float

    @property
    def is_base(self) -> bool:
        """Whether the family descends from it."""
        return bool(self.row["role"] == "base" and self.row["id"] == self.row["family"])

    @property
    def is_query(self) -> bool:
        """Whether it was made from the base, and may be asked where it comes from."""
        return self.row["role"] in ("child", "copy") and self.row["id"] != self.row["family"]


def relatives_of(zoo: Zoo, wanted: Callable[[Row], bool] = lambda row: True) -> list[Relative]:
    """Read the models of a zoo and return those that have one ancestor or none.

    Args:
        zoo: To read.
        wanted: Says which models; the others are not read.
    """
    found = []
    for row in zoo:
        chain = list(_chain(zoo, row))
        if row["diverged"] or not wanted(row) or any(r["relation"] == "merge" for r in chain):
            continue
        units = anchored(zoo.weights(row["id"]), zoo.architecture(row["id"]))
        student = row["role"] == "student"
        member = Member(
            family=row["id"] if student else row["family"],
            start="/".join(str(row[name]) for name in _START),
            twins=row["recipe_group"],
            complexity=float(np.log10(row["parameters"])) + len(chain) - 1,
            tokens=tokens_of(units),
        )
        found.append(Relative(row, member, _drift_to_base(zoo, row, chain)))
    return found


_START = ("design", "start_law", "start_scale", "start_seed")


def _chain(zoo: Zoo, row: Row) -> Iterator[Row]:
    """Yield a model and its first parents, up to the base or the first checkpoint."""
    while True:
        yield row
        if not row["parents"] or row["id"] == row["family"]:
            return
        row = zoo.row(row["parents"][0])


def _drift_to_base(zoo: Zoo, row: Row, chain: Sequence[Row]) -> float:
    family = row["family"]
    if row["id"] == family or row["role"] in ("student", "checkpoint"):
        return 0.0
    if not any(step["operation"] in _IN_PLACE for step in chain):
        drift = drift_between(zoo.weights(family), zoo.weights(row["id"]))
        return float("nan") if drift is None else drift
    steps = [
        step["drift"] or 0.0
        for step in chain
        if step["id"] != family and step["operation"] not in _IN_PLACE
    ]
    return float(np.sqrt(np.sum(np.square(steps))))


@dataclass(frozen=True, slots=True)
class Split:
    """Which models train and which test.

    Args:
        folds: Of recipes that test.
        kind: A kind of network that is left out of training.
        task: A task that is left out of training.
        operation: The beginning of the name of an operation that is left out of training.
    """

    folds: tuple[int, ...] = (8, 9)
    kind: str = ""
    task: str = ""
    operation: str = ""

    def trains(self, row: Row) -> bool:
        """Say whether a model may be shown in training."""
        return row["fold"] not in self.folds and not any(self.left_out(row).values())

    def left_out(self, row: Row) -> dict[str, bool]:
        """Return in which ways a model is of those that were left out."""
        return {
            "kind": bool(self.kind) and row["kind"] == self.kind,
            "task": bool(self.task) and row["task"] == self.task,
            "operation": bool(self.operation) and row["operation"].startswith(self.operation),
        }
