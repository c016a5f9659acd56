"""Real models that other people trained, with known relations: the core of the corpus.

`make test` fetches it; the whole list is scored by `make corpus`. What is right is written down in
`benchmarks.corpus.expected`.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.corpus import expected
from benchmarks.corpus.asking import (
    SEED,
    Catalogued,
    catalogue_of,
    compare_alone,
    compare_shuffled,
    renamed,
)
from benchmarks.corpus.listed import Known, Listed, core, corpus_folder, is_there, pairs
from benchmarks.corpus.score import reading_mark, score_duplicates, score_kin, score_tree
from benchmarks.corpus.traps import TRAPS, spring
from lineage.direction import BACKWARD, FORWARD

CORE = core()
PAIRS = tuple(pairs(CORE))
ABSTAINED = {
    ("silero/6.2.3/safetensors", "silero/6.2.3/jit"),  # drift .33: twins of one start part as far
    ("nudenet/3.0.8", "nudenet/3.4.2"),  # agreement .24: a common start would leave as much
}
"""Kin that cannot be told from models of one random start. To find more of them is no error."""

pytestmark = [
    pytest.mark.corpus,
    pytest.mark.xdist_group("corpus"),  # so that one process reads them once
    pytest.mark.skipif(
        not all(is_there(model) for model in CORE),
        reason=f"the core of the corpus is not in {corpus_folder()}; fetch it: "
        "python -m benchmarks.corpus.fetch --core",
    ),
]

each_model = pytest.mark.parametrize("model", CORE, ids=lambda model: model.id)
each_pair = pytest.mark.parametrize(
    ("first", "second", "known"), PAIRS, ids=[f"{a.id} {b.id}" for a, b, _ in PAIRS]
)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalogued]:
    """Return the core in a catalogue, under its own names."""
    found = catalogue_of(CORE, tmp_path_factory.mktemp("real") / "catalogue")
    yield found
    found.engine.close()


@pytest.fixture(scope="module")
def nameless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalogued]:
    """Return the core in a catalogue, under random names, added in random order."""
    folder = tmp_path_factory.mktemp("nameless")
    order = list(CORE)
    random.Random(SEED).shuffle(order)
    found = catalogue_of(order, folder / "catalogue", renamed(CORE, folder / "files"))
    yield found
    found.engine.close()


@each_model
def test_a_file_is_read_with_the_right_number_of_parameters(
    real: Catalogued, model: Listed
) -> None:
    reading = real.readings[model.id]
    assert reading_mark(model, reading) == "right", reading


@each_pair
def test_a_relation_is_found(real: Catalogued, first: Listed, second: Listed, known: Known) -> None:
    answer = real.compare(first.id, second.id)
    mark = expected.mark(first, second, known, answer.relation)
    allowed = {"right", "unscored"}
    if (first.id, second.id) in ABSTAINED:
        allowed.add("abstained")
    assert mark in allowed, answer
    direction = expected.direction_mark(first.id, second.id, known, answer.direction)
    assert direction in ("right", "unscored"), answer


@each_pair
def test_nobody_is_accused_without_a_catalogue(
    first: Listed, second: Listed, known: Known, tmp_path: Path
) -> None:
    answer = compare_alone(first, second, tmp_path / "none")
    assert not expected.is_accusation(known.kind, answer.relation), answer


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (first, second)
        for first, second, known in PAIRS
        if known.certainty == "bit-level" and known.kind.startswith("same_weights_")
    ],
    ids=lambda model: model.id,
)
def test_formats_give_the_same_numbers_to_the_last_bit(
    real: Catalogued, first: Listed, second: Listed
) -> None:
    found = real.engine.compare(first.id, second.id).measured
    assert found.pairs
    assert {pair.operation for pair in found.pairs} <= {"equal", "turned", "shuffled", "reordered"}
    assert {pair.difference for pair in found.pairs if pair.operation in ("equal", "turned")} == {0}


@each_pair
def test_the_order_of_two_models_changes_no_word(
    real: Catalogued, first: Listed, second: Listed, known: Known
) -> None:
    there, back = real.compare(first.id, second.id), real.compare(second.id, first.id)
    turned = {FORWARD: BACKWARD, BACKWARD: FORWARD}
    assert back.relation == there.relation
    assert back.direction == turned.get(there.direction, there.direction)


@each_pair
def test_names_of_files_and_models_change_nothing(
    real: Catalogued, nameless: Catalogued, first: Listed, second: Listed, known: Known
) -> None:
    plain, other = (where.compare(first.id, second.id) for where in (real, nameless))
    assert other.words == plain.words
    assert other.same_numbers(plain), (plain, other)


@each_pair
def test_names_and_order_of_tensors_change_no_word(
    first: Listed, second: Listed, known: Known
) -> None:
    plain, shuffled = compare_shuffled(first, second)
    assert shuffled.words == plain.words


def test_no_strangers_are_called_kin_and_no_listed_kin_missed(real: Catalogued) -> None:
    kin = score_kin(CORE, real)
    assert kin.asked > 3000
    assert kin.accused == []
    assert {tuple(sorted(two)) for two in kin.missed} <= {tuple(sorted(two)) for two in ABSTAINED}


def test_all_duplicates_are_grouped(real: Catalogued) -> None:
    found = score_duplicates(CORE, real)
    assert found["missed"] == []
    strangers = expected.stranger_pairs(CORE)
    assert not [two for two in found["not_listed"] if frozenset(two) in strangers]


def test_the_tree_joins_no_strangers(real: Catalogued) -> None:
    found = score_tree(CORE, real)
    assert found["edges"] > 10
    assert found["joins_strangers"] == []
    assert found["wrong_direction"] == []


def test_no_claim_is_answered_wrongly(real: Catalogued) -> None:
    wrong = []
    for first, second, known in PAIRS:
        answer = real.claim(first.id, second.id)
        if expected.claim_mark(first.id, second.id, known, answer) == "wrong":
            wrong.append((first.id, second.id, answer))
    assert wrong == []


@pytest.mark.parametrize("number", [trap.number for trap in TRAPS])
def test_a_trap_is_avoided(real: Catalogued, number: int) -> None:
    (found,) = [found for found in spring(CORE, real.compare) if found.trap.number == number]
    if not found.asked:
        pytest.skip("its models are not in the core")
    assert found.fallen == ()
