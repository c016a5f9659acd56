"""Which tensor corresponds to which: by values and sketches, with names as a mere help."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kinship import Weights, network, normal, printed, stepped
from lineage.pairing import pair_tensors


def pairs_of(first: Weights, second: Weights) -> dict[str, str]:
    one, other = printed(first), printed(second)
    return {
        one.tensors[match.first].name: other.tensors[match.second].name
        for match in pair_tensors(one, other)
    }


def renamed(weights: Weights, seed: int) -> tuple[dict[str, NDArray[np.floating]], dict[str, str]]:
    """Return the weights under random names in a random order, and old name → new."""
    rng = np.random.default_rng(seed)
    names = {name: f"t{rng.integers(10**9)}" for name in weights}
    order = rng.permutation(len(weights))
    keys = list(weights)
    return {names[keys[i]]: np.asarray(weights[keys[i]]) for i in order}, names


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=20)
def test_names_and_order_play_no_part_for_kin(seed: int) -> None:
    weights = {f"block.{i}": normal(24, 24, seed=seed + i) for i in range(6)}
    child, names = renamed(stepped(weights, 0.2, seed), seed)
    assert pairs_of(weights, child) == names


def test_equal_tensors_find_each_other_in_another_order_of_axes() -> None:
    weights = {f"{i}": normal(5, 6, 3, 3, seed=i) for i in range(4)}
    turned = {
        f"x{name}": np.ascontiguousarray(np.transpose(values, (2, 3, 1, 0)))
        for name, values in reversed(weights.items())
    }
    assert pairs_of(weights, turned) == {name: f"x{name}" for name in weights}


def test_square_matrices_are_tried_both_ways_round() -> None:
    weights = {"w": normal(30, 30)}
    one, other = printed(weights), printed({"w": np.ascontiguousarray(weights["w"].T)})
    (match,) = pair_tensors(one, other)
    assert match.order == (1, 0)
    assert match.how == "turned"


def test_strangers_are_paired_by_name_so_that_they_can_be_compared() -> None:
    first, second = network(1), network(2)
    assert pairs_of(first, second) == {name: name for name in first if "weight" in name}


def test_every_tensor_is_in_one_pair_at_most() -> None:
    first = {f"{i}": normal(16, 16, seed=i) for i in range(5)}
    second = {f"{i}": normal(16, 16, seed=i + 100) for i in range(3)}
    matches = pair_tensors(printed(first), printed(second))
    assert len(matches) == 3
    assert len({match.first for match in matches}) == len({match.second for match in matches}) == 3


@pytest.mark.parametrize("axis", [0, 1])
def test_a_longer_tensor_is_paired_with_the_shorter(axis: int) -> None:
    first = {"e": normal(20, 12), "w": normal(12, 12, seed=1)}
    pad = [(0, 0), (0, 0)]
    pad[axis] = (0, 3)
    second = {"e": np.pad(first["e"], pad, constant_values=1.5), "w": first["w"]}
    matches = pair_tensors(printed(first), printed(second))
    assert [match.grown for match in matches] == [(axis,), ()]


def test_constants_and_vectors_are_not_paired() -> None:
    first = {"eye": np.eye(9, dtype=np.float32), "b": normal(9), "w": normal(9, 7)}
    assert pairs_of(first, first) == {"w": "w"}


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=20)
def test_grown_tensors_of_one_shape_find_their_own(seed: int) -> None:
    base = {f"{i}": normal(24, 20, seed=seed + i) for i in range(3)}
    base |= {f"same.{i}": normal(24, 24, seed=seed + 10 + i) for i in range(9)}
    grown = {
        name: np.concatenate([values, normal(24, 2, seed=seed + 99)], axis=1)
        if name.isdigit()
        else values
        for name, values in base.items()
    }
    child, names = renamed(grown, seed)
    assert pairs_of(base, child) == names
