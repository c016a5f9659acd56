"""Third models: siblings, hubs and chains."""

import numpy as np
import pytest
from numpy.typing import NDArray

from kinship import Weights, judged, measured, network, printed, stepped
from lineage.direction import direction_of
from lineage.third import Meeting, meeting_point, refined
from lineage.verdict import Relation


def meeting(first: Weights, second: Weights, third: Weights) -> Meeting:
    found = meeting_point(
        "third", measured(first, second), measured(first, third), measured(second, third)
    )
    assert found is not None
    return found


def star(size: float = 0.05) -> tuple[dict[str, NDArray[np.float32]], ...]:
    base = network(1, (80, 64, 60, 10))
    return base, *(stepped(base, size, seed) for seed in (2, 3, 4))


def test_three_siblings_meet_half_way() -> None:
    _, one, two, three = star()
    found = meeting(one, two, three)
    assert found.first == pytest.approx(0.5, abs=0.05)
    assert found.branch == pytest.approx(0.5, abs=0.05)


def test_the_branches_of_a_parents_children_meet_at_the_parent() -> None:
    base, one, two, _ = star()
    assert meeting(base, one, two).first == pytest.approx(0, abs=0.05)
    assert meeting(one, base, two).first == pytest.approx(1, abs=0.05)


def test_a_grandparent_and_grandchild_meet_at_the_one_between() -> None:
    base, child, _, _ = star()
    grandchild = stepped(child, 0.05, 9)
    assert meeting(base, grandchild, child).branch == pytest.approx(0, abs=0.05)


def test_only_a_meeting_off_both_makes_siblings() -> None:
    base, one, two, three = star()
    verdict, _ = judged(one, two)
    assert refined(verdict, [meeting(one, two, three)]).relation is Relation.SIBLING
    assert refined(verdict, [meeting(one, two, base)]).relation is Relation.FINE_TUNE
    verdict, _ = judged(base, one)
    assert refined(verdict, [meeting(base, one, two)]).relation is Relation.FINE_TUNE
    assert refined(verdict, []).relation is Relation.FINE_TUNE


def test_a_chain_stays_a_fine_tune() -> None:
    base, child, _, _ = star()
    grandchild = stepped(child, 0.05, 9)
    verdict, _ = judged(base, grandchild)
    found = refined(verdict, [meeting(base, grandchild, child)])
    assert found.relation is Relation.FINE_TUNE


def test_a_stranger_says_nothing() -> None:
    _, one, two, _ = star()
    stranger = network(50, (80, 64, 60, 10))
    found = meeting_point(
        "third", measured(one, two), measured(one, stranger), measured(two, stranger)
    )
    assert found is None


def test_many_branches_at_one_end_give_a_direction_and_few_do_not() -> None:
    base = network(1, (80, 64, 60, 10))
    children = [stepped(base, 0.05, seed) for seed in range(2, 13)]
    between = measured(base, children[0])
    prints = printed(base), printed(children[0])
    verdict, _ = judged(base, children[0])
    meetings = [meeting(base, children[0], other) for other in children[1:]]
    few = direction_of(*prints, verdict, between, meetings[:2])
    many = direction_of(*prints, verdict, between, meetings)
    assert few.answer == "unknown"
    assert many.answer == "parent→child"
    assert many.confidence == pytest.approx(11 / 12)
