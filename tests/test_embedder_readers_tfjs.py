"""TensorFlow.js models, written as its description of the format says."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedder.checkpoint import Checkpoint, Kind, Tensor
from embedder.errors import (
    CheckpointError,
    MalformedError,
    MissingPartError,
    RefusedError,
    TruncatedError,
    UnsupportedError,
)
from embedder.opening import open_checkpoint
from reader_contract import WEIGHTS, ReaderContract, Weights


def write_model(
    folder: Path,
    weights: dict[str, np.ndarray],
    *,
    shards: int = 1,
    topology: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
    paths: list[str] | None = None,
) -> Path:
    """Write a model whose one group lies in so many shards.

    Args:
        changes: Entries that replace those of the first weight.
        paths: Names of the shards in the list, instead of the true ones.
    """
    folder.mkdir(exist_ok=True)
    entries: list[dict[str, Any]] = [
        {"name": name, "shape": list(values.shape), "dtype": str(values.dtype)}
        for name, values in weights.items()
    ]
    entries[0] |= changes or {}
    content = b"".join(values.tobytes() for values in weights.values())
    names = [f"group1-shard{number + 1}of{shards}.bin" for number in range(shards)]
    cuts = [len(content) * number // shards for number in range(shards + 1)]
    for name, start, stop in zip(names, cuts, cuts[1:], strict=False):
        (folder / name).write_bytes(content[start:stop])
    model = {
        "format": "layers-model",
        "modelTopology": topology or {},
        "weightsManifest": [{"paths": paths or names, "weights": entries}],
    }
    (folder / "model.json").write_text(json.dumps(model))
    return folder


class TestTfjs(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        stored = {
            "emb/embeddings": weights["embedding"],
            "stem/kernel": weights["conv"].transpose(2, 3, 1, 0),
            "head/kernel": weights["dense"].T,
            "head/bias": weights["bias"],
        }
        return write_model(folder / "web", stored, shards=3)

    def damaged_file(self, opened: Path) -> Path:
        return opened / "model.json"


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def only(checkpoint: Checkpoint, name: str) -> Tensor:
    return next(tensor for tensor in checkpoint.tensors if tensor.name == name)


@pytest.mark.parametrize("opened", ["", "model.json", "group1-shard2of5.bin"])
def test_folder_list_and_shard_stand_for_the_same_model(tmp_path: Path, opened: str) -> None:
    weights = {"a/kernel": ones(4, 3), "a/bias": ones(3)}
    folder = write_model(tmp_path / "m", weights, shards=5)
    with open_checkpoint(folder / opened) as model:
        assert model.parameters == 15
        assert len(model.files) == 6


def test_quantised_weights_are_scaled_and_shifted(tmp_path: Path) -> None:
    stored = np.array([[0, 128], [255, 64]], np.uint8)
    quantisation = {"dtype": "uint8", "scale": 0.5, "min": -64.0}
    changes = {"dtype": "float32", "quantization": quantisation}
    with open_checkpoint(write_model(tmp_path / "m", {"w": stored}, changes=changes)) as model:
        np.testing.assert_array_equal(model.tensors[0].read(), [[-64, 0], [63.5, -32]])
        assert model.tensors[0].kind is Kind.WEIGHT
        assert model.parameters == 4


def test_weights_halved_to_float16_are_read(tmp_path: Path) -> None:
    stored = np.array([[1.5, -2.0]], np.float16)
    changes = {"dtype": "float32", "quantization": {"dtype": "float16"}}
    with open_checkpoint(write_model(tmp_path / "m", {"w": stored}, changes=changes)) as model:
        np.testing.assert_array_equal(model.tensors[0].read(), [[1.5, -2.0]])


def test_texts_between_weights_are_passed_over(tmp_path: Path) -> None:
    texts = b"".join(struct.pack("<I", len(text)) + text for text in (b"one", b"", b"three"))
    weights = {"words": np.frombuffer(texts, np.uint8), "w": ones(2, 2)}
    changes = {"dtype": "string", "shape": [3]}
    with open_checkpoint(write_model(tmp_path / "m", weights, changes=changes)) as model:
        assert [tensor.name for tensor in model.tensors] == ["w"]
        assert model.limits == ["'words' holds texts"]


def test_layer_classes_come_from_the_config_and_lambda_is_not_run(tmp_path: Path) -> None:
    layers = [
        {"class_name": "Conv2DTranspose", "config": {"name": "up"}},
        {"class_name": "Lambda", "config": {"name": "half"}},
    ]
    config = {"class_name": "Model", "config": {"name": "net", "layers": layers}}
    topology = {"keras_version": "2.10.0", "model_config": config}
    folder = write_model(tmp_path / "m", {"up/kernel": ones(3, 5, 4, 6)}, topology=topology)
    with open_checkpoint(folder) as model:
        assert model.tensors[0].canonical_shape == (4, 6, 3, 5)
        assert model.declared["model_name"] == "net"
        assert model.limits == ["holds a Lambda layer whose code was not run: 'half'"]


def test_the_operations_of_a_graph_model_tell_the_axes(tmp_path: Path) -> None:
    def node(name: str, operation: str, *taken: str, **attributes: bool) -> dict[str, Any]:
        attr = {key: {"b": value} for key, value in attributes.items()}
        return {"name": name, "op": operation, "input": list(taken), "attr": attr}

    nodes = [
        node("read", "Identity", "conv/filter"),
        node("1", "_FusedConv2D", "x", "read"),
        node("2", "DepthwiseConv2dNative", "1", "each"),
        node("3", "Conv2DBackpropInput", "shape", "up", "2"),
        node("4", "MatMul", "3", "product"),
        node("5", "MatMul", "4", "turned", transpose_b=True),
        node("6", "GatherV2", "table", "ids", "axis"),
    ]
    weights = {
        "conv/filter": ones(3, 5, 4, 6),
        "each": ones(3, 5, 4, 1),
        "up": ones(3, 5, 4, 6),
        "product": ones(4, 6),
        "turned": ones(4, 6),
        "table": ones(4, 6),
    }
    with open_checkpoint(write_model(tmp_path / "m", weights, topology={"node": nodes})) as model:
        shapes = {tensor.name: tensor.canonical_shape for tensor in model.tensors}
    assert shapes == {
        "conv/filter": (6, 4, 3, 5),
        "each": (4, 1, 3, 5),
        "up": (4, 6, 3, 5),
        "product": (6, 4),
        "turned": (4, 6),
        "table": (4, 6),
    }


def test_a_missing_shard_is_named_and_other_groups_are_read_on_request(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {"a": ones(4, 3)}, shards=2)
    listing = folder / "model.json"
    model = json.loads(listing.read_text())
    (folder / "other.bin").write_bytes(bytes(16))
    weights = [{"name": "b", "shape": [2, 2], "dtype": "float32"}]
    model["weightsManifest"].append({"paths": ["other.bin"], "weights": weights})
    listing.write_text(json.dumps(model))
    (folder / "group1-shard2of2.bin").unlink()
    with pytest.raises(MissingPartError, match=r"group1-shard2of2\.bin is missing"):
        open_checkpoint(folder)
    with open_checkpoint(folder, allow_partial=True) as partial:
        assert [tensor.name for tensor in partial.tensors] == ["b"]
        assert partial.limits == [
            "the shard group1-shard2of2.bin is missing",
            "not read, as a shard of their group is missing: 'a'",
        ]


@pytest.mark.parametrize(
    "name", ["../secret.bin", "/etc/passwd", "a/../../secret.bin", "c:\\x", ""]
)
def test_shards_outside_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    folder = write_model(tmp_path / "m", {"a": ones(4, 3)}, paths=[name])
    with pytest.raises(RefusedError, match="would lie outside"):
        open_checkpoint(folder)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    folder = write_model(tmp_path / "m", {"a": ones(4, 3)}, paths=["link.bin"])
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(RefusedError, match="link that leads out"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shape": [10**9, 10**9]}, TruncatedError, "ends at byte 4,000,000,000,000,000,000"),
        ({"shape": [10**30]}, MalformedError, "impossible shape"),
        ({"shape": [-1, 3]}, MalformedError, "impossible shape"),
        ({"shape": [4.5]}, MalformedError, "impossible shape"),
        ({"shape": "x"}, MalformedError, "no valid shape"),
        ({"shape": [2, 3]}, MalformedError, "24 bytes follow the last weight"),
        ({"dtype": "float31"}, UnsupportedError, "stored as 'float31'"),
        ({"quantization": {"dtype": "uint8", "scale": 0, "min": 0}}, MalformedError, "scale 0"),
        (
            {"quantization": {"dtype": "uint8", "scale": 10**400, "min": 0}},
            MalformedError,
            "quantised with",
        ),
        ({"quantization": {"dtype": "uint8", "scale": 1}}, MalformedError, "min None"),
    ],
)
def test_entries_that_cannot_be_are_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[CheckpointError], message: str
) -> None:
    folder = write_model(tmp_path / "m", {"a": ones(4, 3)}, changes=changes)
    with pytest.raises(error, match=message):
        open_checkpoint(folder)


def test_a_list_of_texts_without_end_is_refused(tmp_path: Path) -> None:
    changes = {"dtype": "string", "shape": [10**9]}
    with pytest.raises(TruncatedError):
        open_checkpoint(write_model(tmp_path / "m", {"a": ones(4, 3)}, changes=changes))


def test_a_tensor_may_begin_in_one_shard_and_end_in_the_next(tmp_path: Path) -> None:
    folder = TestTfjs().write(tmp_path, WEIGHTS)
    with open_checkpoint(folder) as model:
        assert only(model, "stem/kernel").canonical_shape == WEIGHTS["conv"].shape
