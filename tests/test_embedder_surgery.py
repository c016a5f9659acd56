"""Laws of the operations on weights: merges equal their formulas, the rest is what it says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from embedder.surgery import (
    extended,
    low_rank_update,
    merged_dare,
    merged_linear,
    merged_slerp,
    merged_task_arithmetic,
    merged_ties,
    noised,
    pruned,
    pruned_two_of_four,
    quantised,
    with_layers,
)

seeds = st.integers(0, 10**6)
Array = NDArray[np.float32]


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@given(seeds, st.floats(0.001, 2))
@settings(deadline=None, max_examples=30)
def test_noise_has_the_given_share_of_the_norm(seed: int, share: float) -> None:
    x = normal(seed, 20, 30)
    step = noised(x, share, np.random.default_rng(seed)) - x
    assert np.linalg.norm(step) / np.linalg.norm(x) == pytest.approx(share, rel=1e-3)


@given(seeds, st.sampled_from([2, 4, 8]), st.sampled_from([0, 32]))
@settings(deadline=None, max_examples=30)
def test_a_lattice_has_few_levels_and_errs_by_half_a_step(seed: int, bits: int, group: int) -> None:
    x = normal(seed, 12, 64)
    y = quantised(x, bits, group=group)
    runs = (x.reshape(-1, group or 64), y.reshape(-1, group or 64))
    step = np.abs(runs[0]).max(axis=1) / (2 ** (bits - 1) - 1)
    assert np.all(np.abs(runs[0] - runs[1]) <= 0.5001 * step[:, None])
    assert max(len(np.unique(run)) for run in runs[1]) <= 2**bits - 1
    np.testing.assert_allclose(quantised(y, bits, group=group), y, atol=1e-6)


@given(seeds, st.floats(0.1, 0.9))
@settings(deadline=None, max_examples=30)
def test_pruning_sets_the_smallest_to_zero_and_leaves_the_rest(seed: int, share: float) -> None:
    x = normal(seed, 20, 30)
    y = pruned(x, share)
    assert np.mean(y == 0) == pytest.approx(share, abs=0.01)
    np.testing.assert_array_equal(x[y != 0], y[y != 0])
    assert np.abs(x[y == 0]).max() <= np.abs(x[y != 0]).min()


def test_two_of_every_four_are_left() -> None:
    y = pruned_two_of_four(normal(0, 8, 16))
    assert np.all((y.reshape(-1, 4) != 0).sum(axis=1) == 2)


@pytest.mark.parametrize("rank", [1, 4])
def test_an_update_has_its_rank_and_size(rank: int) -> None:
    x = normal(0, 30, 20)
    step = low_rank_update(x, rank, 0.1, np.random.default_rng(1)).astype(np.float64) - x
    values = np.linalg.svd(step, compute_uv=False)
    assert values[rank - 1] > 1e3 * values[rank]
    assert np.linalg.norm(step) / np.linalg.norm(x) == pytest.approx(0.1, rel=1e-4)


def test_an_extension_keeps_the_old_places() -> None:
    x = normal(0, 10, 6)
    for axis in (0, 1):
        y = extended(x, 3, np.random.default_rng(1), axis)
        assert y.shape[axis] == x.shape[axis] + 3
        np.testing.assert_array_equal(np.take(y, range(x.shape[axis]), axis), x)


class TestMerges:
    def test_a_linear_merge_is_the_weighted_sum(self) -> None:
        a, b = normal(0, 9, 8), normal(1, 9, 8)
        np.testing.assert_allclose(merged_linear([a, b], [0.6, 0.4]), 0.6 * a + 0.4 * b, rtol=1e-5)

    @given(seeds, st.floats(0, 1))
    @settings(deadline=None, max_examples=30)
    def test_the_arc_begins_and_ends_at_its_ends_and_keeps_the_length(
        self, seed: int, t: float
    ) -> None:
        a = normal(seed, 9, 8)
        b = normal(seed + 1, 9, 8)
        b *= np.linalg.norm(a) / np.linalg.norm(b)
        np.testing.assert_allclose(merged_slerp(a, b, 0.0), a, atol=1e-5)
        np.testing.assert_allclose(merged_slerp(a, b, 1.0), b, atol=1e-5)
        assert np.linalg.norm(merged_slerp(a, b, t)) == pytest.approx(np.linalg.norm(a), rel=1e-4)
        np.testing.assert_allclose(merged_slerp(a, b, t), merged_slerp(b, a, 1 - t), atol=1e-4)

    def test_the_arc_between_equal_tensors_is_the_tensor(self) -> None:
        a = normal(0, 9, 8)
        np.testing.assert_allclose(merged_slerp(a, a, 0.3), a, rtol=1e-6)

    def test_task_arithmetic_adds_steps(self) -> None:
        base, a, b = (normal(seed, 9, 8) for seed in range(3))
        found = merged_task_arithmetic(base, [a, b], [0.7, 0.5])
        np.testing.assert_allclose(found, base + 0.7 * (a - base) + 0.5 * (b - base), atol=1e-5)
        np.testing.assert_allclose(merged_task_arithmetic(base, [a], [1.0]), a, atol=1e-6)

    def test_ties_of_one_child_is_its_trimmed_step(self) -> None:
        base, child = normal(0, 40, 50), normal(1, 40, 50)
        step = merged_ties(base, [child], density=0.2) - base
        assert np.mean(np.abs(step) > 1e-6) == pytest.approx(0.2, abs=0.01)
        kept = np.abs(step) > 1e-6
        np.testing.assert_allclose(step[kept], (child - base)[kept], atol=1e-5)

    def test_ties_leaves_out_what_disagrees_with_the_elected_sign(self) -> None:
        base = np.zeros((1, 2), np.float32)
        children = [np.array([[3.0, 1.0]], np.float32), np.array([[-1.0, 1.0]], np.float32)]
        np.testing.assert_allclose(merged_ties(base, children, density=1.0), [[3.0, 1.0]])

    def test_dare_drops_at_random_and_keeps_the_mean(self) -> None:
        base, child = normal(0, 200, 300), normal(1, 200, 300)
        found = merged_dare(base, [child], [1.0], drop=0.9, rng=np.random.default_rng(2)) - base
        dropped = found == 0
        assert np.mean(dropped) == pytest.approx(0.9, abs=0.01)
        ratio = found[~dropped] / (child - base)[~dropped]
        assert np.median(ratio) == pytest.approx(10, rel=1e-3)


class TestLayers:
    WEIGHTS = {f"h.{i}.{part}": normal(i, 3) for i in range(4) for part in ("a", "b.c")} | {
        "embedding": normal(9, 5)
    }

    def test_the_same_layers_give_the_same_model(self) -> None:
        same = with_layers(self.WEIGHTS, "h", range(4))
        assert {name: id(values) for name, values in same.items()} == {
            name: id(values) for name, values in self.WEIGHTS.items()
        }

    def test_layers_are_dropped_and_repeated_in_order(self) -> None:
        found = with_layers(self.WEIGHTS, "h", [0, 2, 2])
        assert set(found) == {f"h.{i}.{part}" for i in range(3) for part in ("a", "b.c")} | {
            "embedding"
        }
        assert found["h.1.a"] is found["h.2.a"] is self.WEIGHTS["h.2.a"]

    def test_a_layer_that_is_not_there_is_an_error(self) -> None:
        with pytest.raises(KeyError):
            with_layers(self.WEIGHTS, "h", [7])
