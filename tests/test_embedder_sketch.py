"""The laws of the linear sketch."""

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from embedder.checkpoint import tensor_of
from embedder.sketch import (
    Sketcher,
    common,
    kept,
    signs,
    sketch,
    sketch_of_ones,
    transposed,
    widths,
)

shapes = st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple)
seeds = st.integers(0, 2**32 - 1)


def normal(shape: tuple[int, ...], seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=shape)


def close(first: NDArray[np.floating], second: NDArray[np.floating]) -> bool:
    scale = max(float(np.abs(first).max(initial=0)), 1e-6)
    return bool(np.allclose(first, second, rtol=1e-4, atol=1e-4 * scale))


@given(shapes, seeds, st.floats(-3, 3), st.floats(-3, 3))
@settings(deadline=None)
def test_the_sketch_is_linear(shape: tuple[int, ...], seed: int, a: float, b: float) -> None:
    x, y = normal(shape, seed), normal(shape, seed + 1)
    expected = a * sketch(x).astype(np.float64) + b * sketch(y)
    scale = np.abs(sketch(x)).max(initial=0) + np.abs(sketch(y)).max(initial=0) + 1e-6
    np.testing.assert_allclose(sketch(a * x + b * y), expected, atol=1e-4 * scale)


@given(shapes, seeds, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_a_transposed_tensor_has_the_transposed_sketch(
    shape: tuple[int, ...], seed: int, random: Random
) -> None:
    x = normal(shape, seed)
    order = list(range(x.ndim))
    random.shuffle(order)
    assert close(transposed(sketch(x), shape, tuple(order)), sketch(np.transpose(x, order)))


@pytest.mark.parametrize("shape", [(40, 30), (64,), (20, 9, 3, 3)])
def test_a_longer_axis_continues_a_shorter_one(shape: tuple[int, ...]) -> None:
    long = normal((shape[0] + 7, *shape[1:]), 3)
    head, tail = long.copy(), long.copy()
    head[shape[0] :] = 0  # the shorter tensor, as the beginning of the longer one
    tail[: shape[0]] = 0
    assert close(sketch(long), sketch(long[: shape[0]]) + sketch(tail))
    assert close(sketch(head), sketch(long[: shape[0]]))


@given(shapes, seeds, st.sampled_from([1, 5, 40, 1 << 18]))
@settings(deadline=None)
def test_blocks_of_any_size_give_one_sketch(shape: tuple[int, ...], seed: int, most: int) -> None:
    tensor = tensor_of("x", normal(shape, seed).astype(np.float32))
    sketcher = Sketcher(shape)
    for block in tensor.blocks(most):
        sketcher.add(block)
    assert close(sketch(tensor.read()), sketcher.result(tuple(range(len(shape)))))


@given(shapes)
@settings(deadline=None)
def test_the_sketch_of_ones_needs_no_ones(shape: tuple[int, ...]) -> None:
    assert close(sketch(np.ones(shape)), sketch_of_ones(shape))


@given(shapes, seeds)
@settings(deadline=None)
def test_axes_of_length_one_play_no_part(shape: tuple[int, ...], seed: int) -> None:
    x = normal(shape, seed)
    assert close(sketch(x), sketch(np.squeeze(x)))


def test_the_sketch_is_what_its_definition_says() -> None:
    x = normal((5, 6, 7), 0)
    columns = widths(x.shape)
    ends = [signs(0, n, d) for n, d in zip(x.shape, columns, strict=True)]
    whole = np.einsum("abc,ai,bj,ck->ijk", x, *ends)
    entries = kept(columns)
    expected = whole[tuple(entries)] / np.sqrt(entries.shape[1])
    assert close(expected, sketch(x))


@pytest.mark.parametrize("shape", [(300,), (200, 150), (64, 32, 3, 3), (30, 20, 25), (40, 1, 3, 3)])
def test_the_cosine_of_strangers_errs_as_the_dimensions_predict(shape: tuple[int, ...]) -> None:
    # For given signs and normal tensors the inner product has the variance Π(1/d + 1/n) over the
    # axes, times what leaving out equal columns costs (d² / kept for two axes).
    columns = [(d, n) for d, n in zip(widths(shape), shape, strict=True) if d]
    whole = np.prod([d for d, _ in columns])
    kept_share = kept(tuple(d for d, _ in columns)).shape[1] / whole
    predicted = np.sqrt(np.prod([1 / d + 1 / n for d, n in columns]) / kept_share)
    cosines = []
    for seed in range(200):
        x, y = normal(shape, 2 * seed), normal(shape, 2 * seed + 1)
        norms = np.linalg.norm(x) * np.linalg.norm(y)
        cosines.append(float(sketch(x) @ sketch(y)) / norms)
    assert abs(np.mean(cosines)) < 4 * predicted / np.sqrt(200)
    assert 0.7 < np.std(cosines) / predicted < 1.35


def test_the_norm_of_an_identity_is_kept() -> None:
    # With equal columns on both axes it would come out 300 / 16 times too large.
    assert float(np.sum(sketch(np.eye(300)) ** 2)) == pytest.approx(300, rel=0.3)


def test_sketches_across_a_limit_of_widths_can_be_compared() -> None:
    # Heads of 8 places are contracted to fewer columns than heads of 9.
    x = normal((20, 8, 3), 5)
    y = np.concatenate([x, normal((20, 1, 3), 6) * 0], axis=1)
    first, second = common(sketch(x), sketch(y), (x.shape, y.shape))
    assert close(first, second)
