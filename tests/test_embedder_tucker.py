"""The spectrum of an attention is one of its scores: laws of the higher-order decomposition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedder.tucker import LEADING, SPECTRUM, head_spectrum


def scores(seed: int, heads: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(heads, 6, 5))


@given(st.integers(0, 99), st.integers(1, 6))
def test_heads_may_come_in_any_order(seed: int, heads: int) -> None:
    tensor = scores(seed, heads)
    order = np.random.default_rng(seed).permutation(heads)
    np.testing.assert_allclose(
        head_spectrum(tensor[order]), head_spectrum(tensor)[order], atol=1e-9
    )


@given(st.integers(0, 99))
def test_rotations_of_either_side_and_a_scale_change_nothing(seed: int) -> None:
    tensor, rng = scores(seed), np.random.default_rng(seed + 1)
    left, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    right, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    np.testing.assert_allclose(
        head_spectrum(3 * left @ tensor @ right), head_spectrum(tensor), atol=1e-9
    )


@given(st.integers(0, 99))
def test_the_squares_of_all_singular_values_of_a_mode_add_up_to_one(seed: int) -> None:
    found = head_spectrum(scores(seed, heads=LEADING))
    assert np.sum(found[0, :LEADING] ** 2) == pytest.approx(1)


def test_equal_heads_are_of_one_kind_and_orthogonal_ones_of_as_many_as_there_are() -> None:
    one = scores(0)[0]
    equal = head_spectrum(np.stack([one, one]))
    np.testing.assert_allclose(equal[0, :2], [1, 0], atol=1e-7)
    apart = np.zeros((2, 6, 5))
    apart[0, 0, 0] = apart[1, 1, 1] = 1
    np.testing.assert_allclose(head_spectrum(apart)[0, :2], [0.5**0.5] * 2)


def test_scores_of_zero_have_a_spectrum_of_zeros() -> None:
    assert not head_spectrum(np.zeros((2, 6, 5))).any()
    assert head_spectrum(np.zeros((2, 6, 5))).shape == (2, SPECTRUM)
