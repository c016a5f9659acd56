"""thinc files, written with msgpack as spaCy 2 and thinc 8 do it. The reader was also checked on
files of spaCy 2.2 and 2.3 and on one of thinc 9."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from embedder.checkpoint import Kind
from embedder.errors import CheckpointError, MalformedError, TruncatedError, UnsupportedError
from embedder.opening import open_checkpoint
from reader_contract import WEIGHTS, ReaderContract, Weights


def packed(values: np.ndarray) -> dict[bytes, Any]:
    """Return an array as msgpack-numpy packs it."""
    return {
        b"nd": True,
        b"type": values.dtype.str,
        b"kind": b"",
        b"shape": values.shape,
        b"data": values.tobytes(),
    }


def write(path: Path, tree: object) -> Path:
    path.write_bytes(msgpack.packb(tree, use_bin_type=True))
    return path


def write_7(path: Path, *nodes: dict[str, np.ndarray]) -> Path:
    """Write a file as thinc 7 does: keys are bytes, names of parameters are texts."""
    weights = [
        {
            b"dims": {"nO": 1},
            b"params": [
                {b"name": name, b"offset": 0, b"shape": values.shape, b"value": packed(values)}
                for name, values in node.items()
            ],
        }
        for node in nodes
    ]
    return write(path, {b"weights": weights})


def write_8(
    path: Path, nodes: Mapping[str, dict[str, Any]], *, shims: list[list[bytes]] | None = None
) -> Path:
    """Write a file as thinc 8 does: keys are texts, nodes and parameters in parallel lists."""
    tree = {
        "nodes": [
            {"index": place, "name": name, "dims": {}, "refs": {}}
            for place, name in enumerate(nodes)
        ],
        "attrs": [{} for _ in nodes],
        "params": [
            {name: None if values is None else packed(values) for name, values in node.items()}
            for node in nodes.values()
        ],
        "shims": shims or [[] for _ in nodes],
    }
    return write(path, tree)


def as_thinc_stores(weights: Weights) -> dict[str, dict[str, np.ndarray]]:
    return {
        "embed": {"vectors": weights["embedding"]},
        "lower": {"W": weights["conv"].transpose(2, 0, 3, 1)},
        "linear": {"W": weights["dense"], "b": weights["bias"]},
    }


class TestThinc7(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        return write_7(folder / "model", {}, *as_thinc_stores(weights).values())


class TestThinc8(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        return write_8(folder / "model", as_thinc_stores(weights))


def test_biases_of_two_axes_are_not_counted_and_pieces_come_last(tmp_path: Path) -> None:
    node = {
        "W": np.ones((5, 3, 4), np.float32),
        "b": np.ones((5, 3), np.float32),
        "pad": np.ones((1, 6, 5, 3), np.float32),
        "G": np.ones(5, np.float32),
    }
    with open_checkpoint(write_7(tmp_path / "x", node)) as model:
        assert model.tensors[0].canonical_shape == (5, 4, 3)
        kinds = [tensor.kind for tensor in model.tensors]
        assert kinds == [Kind.WEIGHT, Kind.BIAS, Kind.BIAS, Kind.NORM]


def test_parameters_that_were_never_set_and_models_of_other_libraries_are_left_out(
    tmp_path: Path,
) -> None:
    node = {"W": np.ones((5, 4), np.float32), "b": None}
    nodes: dict[str, dict[str, Any]] = {"torch": {}, "linear": node}
    path = write_8(tmp_path / "x", nodes, shims=[[b"weights of torch"], []])
    with open_checkpoint(path) as model:
        assert [tensor.name for tensor in model.tensors] == ["1.linear/W"]
        assert model.limits == ["node 0 'torch' holds a model of another library, not read"]
        assert model.declared == {"thinc": 8}


def test_big_endian_arrays_are_turned(tmp_path: Path) -> None:
    values = np.arange(6, dtype=">f4").reshape(2, 3)
    with open_checkpoint(write_7(tmp_path / "x", {"W": values})) as model:
        np.testing.assert_array_equal(model.tensors[0].read(), values)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({b"shape": (10**9, 10**9)}, MalformedError, "takes 4,000,000,000,000,000,000 bytes"),
        ({b"shape": (-1,)}, MalformedError, "impossible shape"),
        ({b"shape": 7}, MalformedError, "no plain type, shape and data"),
        ({b"data": None}, MalformedError, "no plain type, shape and data"),
        ({b"type": "O"}, UnsupportedError, "'O'"),
        ({b"type": "<M8"}, UnsupportedError, "'<M8'"),
        ({b"type": "<f4,"}, UnsupportedError, "'<f4,'"),
        ({b"type": [["a", "<f4"]]}, MalformedError, "no plain type"),
    ],
)
def test_arrays_that_cannot_be_are_refused(
    tmp_path: Path, changes: dict[bytes, Any], error: type[CheckpointError], message: str
) -> None:
    value = packed(np.ones((2, 2), np.float32)) | changes
    tree = {b"weights": [{b"params": [{b"name": "W", b"value": value}]}]}
    with pytest.raises(error, match=message):
        open_checkpoint(write(tmp_path / "x", tree))


@pytest.mark.parametrize(
    "tree",
    [
        {b"weights": 5},
        {b"weights": [5]},
        {b"weights": [{b"params": [5]}]},
        {"nodes": [], "params": [], "shims": 5},
        {"nodes": [], "params": [[]], "shims": []},
        {"nodes": [], "params": [{"W": 5}], "shims": []},
    ],
)
def test_trees_of_another_form_are_refused(tmp_path: Path, tree: object) -> None:
    with pytest.raises(MalformedError, match="get the file again"):
        open_checkpoint(write(tmp_path / "x", tree))


def test_a_file_cut_short_is_named_so(tmp_path: Path) -> None:
    path = write_7(tmp_path / "x", {"W": WEIGHTS["dense"]})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(TruncatedError, match="TRUNCATED"):
        open_checkpoint(path)
