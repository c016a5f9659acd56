"""What was done to a tensor, told from the values of both."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from embedder.checkpoint import tensor_of
from embedder.fingerprint import take_print
from kinship import normal
from lineage.measure import compared
from lineage.operations import Operation, coarser, operation_between
from lineage.parts import matched_parts

Array = NDArray[np.floating]
seeds = st.integers(0, 2**31)


def found(x: Array, y: Array) -> Operation | None:
    prints = take_print(tensor_of("x", x)), take_print(tensor_of("y", y))
    return operation_between(x, y, prints, compared([(x, y)]).cosine)


def name_of(operation: Operation | None) -> str:
    return operation.name if operation else ""


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_cast_is_named_and_the_narrow_one_is_the_child(dtype: type) -> None:
    x = normal(20, 30)
    y: NDArray[np.float32] = x.astype(dtype).astype(np.float32)
    assert found(x, y) == Operation(
        "cast", f"rounded to {'F16' if dtype is np.float16 else 'BF16'}", "second"
    )
    turned = found(y, x)
    assert turned is not None
    assert turned.child == "first"


@pytest.mark.parametrize("levels", [7, 127])
@pytest.mark.parametrize("width", [32, 64, 300])
def test_a_lattice_of_one_scale_a_row_is_named(levels: int, width: int) -> None:
    x = normal(24, width)
    step = np.abs(x).max(axis=1, keepdims=True) / levels
    y = (np.round(x / step) * step).astype(np.float32)
    operation = found(x, y)
    assert operation is not None
    assert (operation.name, operation.child) == ("quantised", "second")


def test_a_lattice_of_groups_of_32_is_named() -> None:
    x = normal(24, 128)
    groups = x.reshape(24, 4, 32)
    step = np.abs(groups).max(axis=2, keepdims=True) / 7
    y = (np.round(groups / step) * step).astype(np.float32).reshape(24, 128)
    assert name_of(found(x, y)) == "quantised"


def test_what_was_trained_further_and_then_quantised_is_not_only_quantised() -> None:
    x = normal(24, 64)
    trained = x + 0.1 * normal(24, 64, seed=1)
    step = np.abs(trained).max(axis=1, keepdims=True) / 127
    y = (np.round(trained / step) * step).astype(np.float32)
    assert found(x, y) is None
    prints = take_print(tensor_of("x", x)), take_print(tensor_of("y", y))
    assert coarser(x, y, prints) == "second"


def test_zeros_set_are_named_with_their_share() -> None:
    x = normal(20, 30)
    y = np.where(np.abs(x) < np.median(np.abs(x)), np.float32(0), x)
    assert found(x, y) == Operation("pruned", "50% of the values set to zero", "second")


@given(seeds)
@settings(deadline=None, max_examples=30)
def test_scaled_rows_and_columns_are_undone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(12, 9, 3)).astype(np.float32)
    rows, columns = np.exp(rng.normal(size=(12, 1, 1))), np.exp(rng.normal(size=(9, 1)))
    assert name_of(found(x, (x * rows).astype(np.float32))) == "rescaled"
    assert name_of(found(x, (x * rows * columns).astype(np.float32))) == "rescaled"


@given(seeds)
@settings(deadline=None, max_examples=30)
def test_strangers_and_noisy_copies_have_no_operation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 12, 9)).astype(np.float32)
    assert found(x, y) is None
    assert found(x, (x + 0.01 * y).astype(np.float32)) is None


def test_a_column_scaled_is_no_proof_where_anything_would_fit() -> None:
    # One column: every other column is a scaled copy of it, row by row.
    assert found(normal(20, 1), normal(20, 1, seed=1)) is None


@given(seeds)
@settings(deadline=None, max_examples=30)
def test_reordered_rows_and_columns_are_recognised(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(12, 9, 2)).astype(np.float32)
    rows, columns = rng.permutation(12), rng.permutation(9)
    for y in (x[rows], x[:, columns], x[rows][:, columns]):
        if not np.array_equal(x, y):
            assert name_of(found(x, np.ascontiguousarray(y))) == "reordered"
    shuffled = rng.permutation(x.reshape(-1)).reshape(x.shape)
    assert found(x, shuffled) is None


def test_an_inserted_column_is_passed_over() -> None:
    x = normal(20, 9)
    y = np.insert(x, 4, 0, axis=1)
    ours, theirs, detail = matched_parts(x, y, (1,))
    np.testing.assert_array_equal(ours, theirs)
    assert detail == "9 of 9 slices along axis 1 are equal"


def test_an_extended_and_trained_vocabulary_is_matched_from_the_start() -> None:
    x = normal(20, 9)
    y = np.concatenate([x + 0.01 * normal(20, 9, seed=1), normal(3, 9, seed=2)])
    ours, theirs, _ = matched_parts(x, y, (0,))
    assert ours.shape == theirs.shape == (20, 9)
    np.testing.assert_array_equal(theirs, y[:20])


def test_a_block_of_rows_and_columns_is_found_in_the_whole() -> None:
    rng = np.random.default_rng(0)
    x = normal(30, 25, 3)
    rows, columns = np.sort(rng.permutation(30)[:18]), np.sort(rng.permutation(25)[:20])
    block = np.ascontiguousarray(x[np.ix_(rows, columns)])
    for pair in ((x, block), (block, x)):
        ours, theirs, detail = matched_parts(*pair, (0, 1))
        np.testing.assert_array_equal(ours, block)
        np.testing.assert_array_equal(theirs, block)
        assert detail == "12 rows and 5 columns taken out"


def test_a_smaller_stranger_is_no_block() -> None:
    ours, _, _ = matched_parts(normal(30, 25), normal(18, 20, seed=1), (0, 1))
    assert ours.size == 0


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (2, 3, 1, 0), (3, 2, 0, 1)])
def test_kernels_that_were_turned_over_are_reordered_in_any_layout(axes: tuple[int, ...]) -> None:
    kernel = np.random.default_rng(5).normal(size=(16, 10, 3, 3)).astype(np.float32)
    one, other = kernel.transpose(axes), kernel.swapaxes(2, 3).transpose(axes)
    prints = take_print(tensor_of("a", one)), take_print(tensor_of("b", other))
    found = operation_between(one, other, prints, 0.3)
    assert found is not None
    assert found.name == "reordered"
