"""Plain pickles of arrays."""

import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from embedder.checkpoint import Kind
from embedder.errors import EmptyModelError, MalformedError, RefusedError, TruncatedError
from embedder.opening import open_checkpoint
from hostile import Evil
from reader_contract import ReaderContract, Weights


class TestPickleOfArrays(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        path = folder / "weights.pkl"
        path.write_bytes(pickle.dumps({"layers": dict(weights)}, protocol=4))
        return path


class TestPickleOfProtocol2(ReaderContract):
    """The bytes of arrays are Latin-1 text in it."""

    def write(self, folder: Path, weights: Weights) -> Path:
        path = folder / "weights.pkl"
        path.write_bytes(pickle.dumps(dict(weights), protocol=2))
        return path


class TestPickleOfTensors(ReaderContract):
    """`pickle.dump` of torch tensors: each storage is a torch file inside the pickle."""

    def write(self, folder: Path, weights: Weights) -> Path:
        path = folder / "weights.pkl"
        tensors = {name: torch.from_numpy(values) for name, values in weights.items()}
        path.write_bytes(pickle.dumps(tensors, protocol=4))
        return path


def write(path: Path, content: object, protocol: int = 5) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_malicious_pickle_is_refused_by_name_and_runs_nothing(
    tmp_path: Path, protocol: int
) -> None:
    marker = tmp_path / "ran"
    path = write(tmp_path / "x.pkl", {"w": np.ones((2, 2)), "x": Evil(marker)}, protocol)
    with pytest.raises(RefusedError, match=r"imports posix\.system, .* nothing was executed"):
        open_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_order_and_type_gives_its_values(tmp_path: Path, protocol: int) -> None:
    matrix = np.arange(6, dtype=np.float64).reshape(2, 3)
    arrays = {
        "c": matrix,
        "fortran": np.asfortranarray(matrix),
        "strided": np.arange(24.0).reshape(4, 6)[::2, ::3],
        "big": matrix.astype(">f4"),
        "half": matrix.astype(np.float16),
        "brain": matrix.astype(ml_dtypes.bfloat16),
        "complex": matrix.astype(">c8"),
        "bytes": matrix.astype(np.uint8),
        "wide": np.arange(5000.0).reshape(50, 100),
    }
    with open_checkpoint(write(tmp_path / "x", arrays, protocol)) as checkpoint:
        found = {tensor.name: tensor for tensor in checkpoint.tensors}
        assert set(found) == set(arrays)
        for name, values in arrays.items():
            np.testing.assert_array_equal(found[name].canonical(), np.abs(values))


def test_names_of_nested_containers_are_joined_with_dots(tmp_path: Path) -> None:
    one = np.ones((2, 2), np.float32)
    content = {"net": [{"w": one + 1}, (one + 2,)], 7: one + 3, "lr": 0.1, "none": None}
    with open_checkpoint(write(tmp_path / "x", content)) as checkpoint:
        assert [tensor.name for tensor in checkpoint.tensors] == ["net.0.w", "net.1.0", "7"]


def test_arrays_of_objects_are_looked_into(tmp_path: Path) -> None:
    members = np.empty(2, dtype=object)
    members[:] = [np.ones((2, 2)), {"deep": np.zeros((3, 3))}]
    with open_checkpoint(write(tmp_path / "x", {"o": members})) as checkpoint:
        assert [tensor.name for tensor in checkpoint.tensors] == ["o.0", "o.1.deep"]


def test_one_array_under_two_names_is_one_tensor(tmp_path: Path) -> None:
    shared = np.ones((3, 4), np.float32)
    branch = {"w": np.zeros((5, 5), np.float32)}
    content = {"a": shared, "b": shared, "c": branch, "d": branch}
    with open_checkpoint(write(tmp_path / "x", content)) as checkpoint:
        assert checkpoint.parameters == 12 + 25
        assert checkpoint.aliases == {"b": "a", "d": "c"}


def test_the_optimisers_state_is_told_apart_by_its_key(tmp_path: Path) -> None:
    one = np.ones((2, 2), np.float32)
    content = {"model": {"w": one}, "optimizer": {"exp_avg": one + 1}, "opt": [{"m": one + 2}]}
    with open_checkpoint(write(tmp_path / "x", content)) as checkpoint:
        kinds = {tensor.name: tensor.kind for tensor in checkpoint.tensors}
        assert checkpoint.parameters == 4
    assert kinds == {
        "model.w": Kind.WEIGHT,
        "optimizer.exp_avg": Kind.OPTIMISER,
        "opt.0.m": Kind.OPTIMISER,
    }


def test_a_mapping_that_holds_itself_is_walked_once(tmp_path: Path) -> None:
    content: dict[str, object] = {"w": np.ones((2, 2), np.float32)}
    content["me"] = content
    with open_checkpoint(write(tmp_path / "x", content)) as checkpoint:
        assert checkpoint.parameters == 4


def test_branches_shared_level_upon_level_are_walked_once(tmp_path: Path) -> None:
    content: list[object] = [np.ones((2, 2), np.float32)]
    for _ in range(60):  # 2**60 paths lead to the array
        content = [content, content]
    with open_checkpoint(write(tmp_path / "x", content)) as checkpoint:
        assert checkpoint.parameters == 4


def test_what_is_nested_too_deep_is_named_in_limits(tmp_path: Path) -> None:
    content: list[object] = [np.ones((2, 2))]
    for _ in range(400):
        content = [content]
    path = write(tmp_path / "x", [np.ones((3, 3)), content])
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.parameters == 9
        assert checkpoint.limits == ["values nested deeper than 200 levels were not read"]


def test_a_pickle_without_arrays_is_an_empty_model(tmp_path: Path) -> None:
    with pytest.raises(EmptyModelError, match="no weight in this pickle file"):
        open_checkpoint(write(tmp_path / "x", {"a": [1, 2, 3]}))


def test_a_shape_of_a_quintillion_elements_is_refused(tmp_path: Path) -> None:
    program = pickle.dumps({"w": np.ones((7, 9), np.float32)}, 2)
    shape = pickle.BININT1 + b"\7" + pickle.BININT1 + b"\x09"
    huge = pickle.LONG1 + b"\5" + (10**9).to_bytes(5, "little")
    assert shape in program
    (tmp_path / "x").write_bytes(program.replace(shape, huge + huge))
    with pytest.raises(MalformedError, match="'w' has a shape that no array can have"):
        open_checkpoint(tmp_path / "x")
    (tmp_path / "x").write_bytes(program.replace(shape, pickle.BININT1 + b"\7" + huge))
    with pytest.raises(TruncatedError, match="takes 28,000,000,000 bytes and has 252"):
        open_checkpoint(tmp_path / "x")


def test_what_follows_the_pickle_is_named_in_limits(tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"w": np.ones((2, 2))})
    path.write_bytes(path.read_bytes() + b"more")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.limits == ["4 bytes follow the first pickle and were not read"]
