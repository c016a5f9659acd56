"""The code that needs no architecture is told by matrices alone, whatever their order and scale."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from embedder.checkpoint import Kind, Tensor, tensor_of
from embedder.coding import coded, shipped_coder
from embedder.encoding import Plain
from embedder.errors import ArchitectureError
from embedder.opening import open_checkpoint
from embedder.plain import ENCODER, NUMBERS, matrices_of, numbers_of, shipped_plain
from embedder.storage import ComputedStorage

Weights = dict[str, NDArray[np.floating]]


def model(seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    shapes = {"a": (40, 30), "b": (20, 40), "c": (20, 40), "k": (12, 6, 3, 3), "v": (40,)}
    return {name: rng.standard_t(5, shape) for name, shape in shapes.items()}


def code(weights: Weights, dtype: str = "float64") -> NDArray[np.float32]:
    tensors = [tensor_of(name, values.astype(dtype)) for name, values in weights.items()]
    return shipped_plain().code(list(matrices_of(tensors)))


def disguised(weights: Weights, seed: int) -> Weights:
    """Return a copy whose rows and columns are in another order, scaled and flipped."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, values in weights.items():
        copy = values.copy()
        for axis in range(min(values.ndim, 2)):
            length = values.shape[axis]
            scale = np.exp(rng.normal(size=length)) * rng.choice([-1, 1], length)
            shape = [length if place == axis else 1 for place in range(values.ndim)]
            copy = np.take(copy, rng.permutation(length), axis) * scale.reshape(shape)
        found[name] = copy
    return found


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("seed", range(5))
def test_no_order_scale_or_sign_of_rows_and_columns_changes_the_code(seed: int, dtype: str) -> None:
    weights = model(seed)
    assert np.linalg.norm(code(weights, dtype) - code(disguised(weights, seed), dtype)) < 1e-5


def test_no_name_and_no_order_of_tensors_changes_the_code() -> None:
    weights = model(0)
    other = {f"z{name}": weights[name] for name in reversed(weights)}
    assert np.linalg.norm(code(weights) - code(other)) < 1e-6


def test_a_child_is_nearer_than_any_stranger() -> None:
    rng = np.random.default_rng(9)
    child = {n: v + 0.1 * v.std() * rng.normal(size=v.shape) for n, v in model(3).items()}
    found = code(disguised(child, 1))
    near = [float(found @ code(model(seed))) for seed in range(30)]
    assert int(np.argmax(near)) == 3


def test_sparse_and_constant_matrices_have_numbers() -> None:
    sparse = np.zeros((9, 7))
    sparse[2, 3] = sparse[4, 3] = 1
    for values in (sparse, np.ones((5, 6)), np.eye(8), np.full((3, 4), 1e-300)):
        found = numbers_of(values)
        assert found is not None
        assert found.shape == (NUMBERS,)
        assert np.isfinite(found).all()


def test_what_is_no_matrix_or_empty_of_values_has_none() -> None:
    for shape in ((5,), (1, 7), (4, 0), ()):
        assert numbers_of(np.ones(shape)) is None
    assert numbers_of(np.zeros((4, 5))) is None
    assert not code({"v": np.ones(4)}).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_no_number_is_refused(value: float, tmp_path: Path) -> None:
    weights = model(0)
    weights["b"][3, 4] = value
    with pytest.raises(ArchitectureError, match="NaN or infinite"):
        code(weights)
    path = tmp_path / "m.safetensors"
    save_file({name: values.astype(np.float32) for name, values in weights.items()}, path)
    with open_checkpoint(path) as checkpoint:
        assert coded(checkpoint)[0] is None


def test_large_matrices_are_passed_over_unread() -> None:
    def never(first: int, last: int) -> NDArray[np.float32]:
        raise AssertionError

    storage = ComputedStorage(2000, 50, never)
    large = Tensor("large", (2000, 50), Plain("F32"), storage, Kind.WEIGHT)
    assert list(matrices_of([large])) == []


def test_it_is_never_compared_with_identity_codes() -> None:
    assert shipped_coder().version != ENCODER
