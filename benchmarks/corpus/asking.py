"""Put the questions of the score to the product and keep its answers."""

import math
import os
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.corpus.listed import Listed, path_of
from embedder.checkpoint import Checkpoint
from embedder.fingerprint import take_fingerprint
from embedder.opening import open_checkpoint
from lineage.comparison import Comparison
from lineage.direction import Direction, direction_of
from lineage.engine import LineageEngine
from lineage.measure import measure
from lineage.relation import decide
from lineage.verdict import Relation, Verdict

SEED = 20_240


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said of a pair.

    Args:
        relation: The word for it.
        direction: `parent→child`, `child→parent` or `unknown`.
        operations: What was done.
        agreement: Agreement, None where nothing matched.
        distance: Drift, None where nothing matched.
        shares: Share of the first and of the second that beats the controls.
        chance: Probability that strangers agree as much; None where values prove kinship.
        seconds: How long it took.
    """

    relation: Relation
    direction: str
    operations: tuple[str, ...]
    agreement: float | None
    distance: float | None
    shares: tuple[float, float]
    chance: float | None
    seconds: float = 0.0

    @property
    def words(self) -> tuple[str, ...]:
        """The answer without its numbers."""
        return (str(self.relation), self.direction, *self.operations)

    def same_numbers(self, other: "Answer") -> bool:
        """Say whether two answers give one number, but for the rounding of sums."""
        ours = (self.agreement, self.distance, *self.shares)
        theirs = (other.agreement, other.distance, *other.shares)
        return all(_close(x, y) for x, y in zip(ours, theirs, strict=True))


def _close(x: float | None, y: float | None) -> bool:
    if x is None or y is None:
        return x is y
    return math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-9)


def answer_of(found: Comparison, seconds: float) -> Answer:
    """Return the part of a comparison that is scored."""
    return _answer(found.verdict, found.direction, seconds)


def _answer(verdict: Verdict, direction: Direction, seconds: float) -> Answer:
    return Answer(
        verdict.relation,
        direction.answer,
        verdict.operations,
        verdict.agreement,
        verdict.distance,
        (verdict.first_share, verdict.second_share),
        verdict.chance.p if verdict.chance else None,
        seconds,
    )


@dataclass(frozen=True, slots=True)
class Reading:
    """What became of reading one file.

    Args:
        seconds: How long it took.
        parameters: Values in all weight tensors; None if it was refused.
        refused: Why it was refused; empty if it was read.
    """

    seconds: float
    parameters: int | None
    refused: str = ""


@dataclass(slots=True)
class Catalogued:
    """The listed models in one catalogue, under given names.

    Args:
        engine: Over the catalogue.
        name_of: Id → catalogued name.
        readings: Id → what became of reading it.
    """

    engine: LineageEngine
    name_of: dict[str, str]
    readings: dict[str, Reading] = field(default_factory=dict)

    def compare(self, first: str, second: str) -> Answer:
        """Compare two listed models, with all others as third models."""
        start = time.perf_counter()
        found = self.engine.compare(self.name_of[first], self.name_of[second])
        return answer_of(found, time.perf_counter() - start)

    def claim(self, child: str, base: str) -> str:
        """Return what is said to the claim that one listed model is the base of another."""
        found = self.engine.verify(self.name_of[child], [self.name_of[base]])
        return found.answers[0].answer

    def kin(self, model: str) -> dict[str, Answer]:
        """Return the catalogued kin of a listed model: id → answer."""
        id_of = {name: id_ for id_, name in self.name_of.items()}
        start = time.perf_counter()
        found = self.engine.relatives(self.name_of[model]).found
        seconds = time.perf_counter() - start
        return {id_of[c.first.name]: answer_of(c, seconds) for c in found}

    @property
    def read(self) -> list[str]:
        """Ids of the models that could be read."""
        return [id_ for id_, reading in self.readings.items() if not reading.refused]


def catalogue_of(
    models: Sequence[Listed], folder: Path, places: dict[str, tuple[str, Path]] | None = None
) -> Catalogued:
    """Add models to a new catalogue, one by one.

    Args:
        models: In the order in which they are added.
        folder: Where the catalogue goes.
        places: Id → name and path; the list's ids and the corpus if None.
    """
    places = places or {model.id: (model.id, path_of(model)) for model in models}
    catalogued = Catalogued(
        LineageEngine(str(folder), create=True),
        {model.id: places[model.id][0] for model in models},
    )
    for model in models:
        name, path = places[model.id]
        start = time.perf_counter()
        added = catalogued.engine.add([path], name=name)
        seconds = time.perf_counter() - start
        if added.failed:
            reading = Reading(seconds, None, added.failed[0].reason)
        else:
            reading = Reading(seconds, catalogued.engine.catalogue.get(name).parameters)
        catalogued.readings[model.id] = reading
    return catalogued


def compare_alone(first: Listed, second: Listed, nowhere: Path) -> Answer:
    """Compare two listed models by their paths, without a catalogue.

    Args:
        first: One model.
        second: The other.
        nowhere: A path where there is no catalogue.
    """
    start = time.perf_counter()
    with LineageEngine(str(nowhere), optional=True) as engine:
        found = engine.compare(str(path_of(first)), str(path_of(second)))
    return answer_of(found, time.perf_counter() - start)


# ------------------------------------------------------------------ other names for the same


def renamed(
    models: Sequence[Listed], folder: Path, seed: int = SEED
) -> dict[str, tuple[str, Path]]:
    """Link every model under random names; return id → random name and path.

    Only what a format itself prescribes keeps its name: the files inside a SavedModel and a
    TensorFlow.js model, and a member inside an archive.
    """
    rng = random.Random(seed)
    return {model.id: (_word(rng), _linked(model, folder / _word(rng), rng)) for model in models}


def _word(rng: random.Random) -> str:
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=12))


def _linked(model: Listed, folder: Path, rng: random.Random) -> Path:
    """Link one model into a folder of its own and return what to open."""
    source = path_of(model)
    folder.mkdir(parents=True)
    if "!" in source.name:
        archive, _, member = str(source).partition("!")
        _link(Path(archive), folder / _word(rng))
        return Path(f"{next(folder.iterdir())}!{member}")
    if source.parent.name == "variables":  # a SavedModel
        _link_all(source.parent.parent, folder)
        return folder
    if source.name == "model.json":
        _link_all(source.parent, folder)
        return folder
    target = folder / _word(rng)
    if source.suffix == ".pdiparams":  # its program says which tensor is a running mean
        target = target.with_suffix(source.suffix)
        _link(source.with_suffix(".pdmodel"), target.with_suffix(".pdmodel"))
    _link(source, target)
    return target


def _link_all(source: Path, folder: Path) -> None:
    for file in sorted(source.rglob("*")):
        if file.is_file():
            (folder / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            _link(file, folder / file.relative_to(source))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copyfile(source, target)


def compare_shuffled(first: Listed, second: Listed, seed: int = SEED) -> tuple[Answer, Answer]:
    """Compare two models as they are, and with tensors in random order under random names.

    Returns:
        Both answers, each from the two models alone.
    """
    rng = random.Random(seed)
    with open_checkpoint(path_of(first)) as one, open_checkpoint(path_of(second)) as other:
        return (
            _judged(one, other),
            _judged(_shuffled(one, rng), _shuffled(other, rng)),
        )


def _shuffled(checkpoint: Checkpoint, rng: random.Random) -> Checkpoint:
    tensors = [replace(tensor, name=_word(rng)) for tensor in checkpoint.tensors]
    rng.shuffle(tensors)
    return replace(checkpoint, tensors=tuple(tensors), open_files=[], on_close=[])


def _judged(one: Checkpoint, other: Checkpoint) -> Answer:
    start = time.perf_counter()
    prints = take_fingerprint(one), take_fingerprint(other)
    measured = measure(*prints, (one, other))
    verdict = decide(*prints, measured)
    direction = direction_of(*prints, verdict, measured)
    return _answer(verdict, direction, time.perf_counter() - start)
