"""Models in several files with an index."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from embedder.errors import CheckpointError, MalformedError, MissingPartError
from embedder.opening import open_checkpoint
from reader_contract import WEIGHTS, ReaderContract, Weights


def shard(folder: Path, weights: Weights, *, torch_files: bool = False) -> list[str]:
    """Write one shard per weight and the index; return the shards' names."""
    folder.mkdir(exist_ok=True)
    suffix, stem = (".bin", "pytorch_model") if torch_files else (".safetensors", "model")
    names = {}
    for place, (name, values) in enumerate(weights.items(), 1):
        file = f"{stem}-{place:05}-of-{len(weights):05}{suffix}"
        if torch_files:
            torch.save({name: torch.from_numpy(values)}, folder / file)
        else:
            save_file({name: values}, folder / file, metadata={"format": "pt"})
        names[name] = file
    content = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(content))
    return list(names.values())


class TestShardedSafetensors(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        shard(folder / "model", weights)
        return folder / "model"

    def damaged_file(self, opened: Path) -> Path:
        return opened / "model-00003-of-00004.safetensors"


class TestShardedTorch(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        shard(folder / "model", weights, torch_files=True)
        return folder / "model"

    def damaged_file(self, opened: Path) -> Path:
        return opened / "pytorch_model-00003-of-00004.bin"


class TestShardedIndex(TestShardedSafetensors):
    """The same with damage to the index."""

    def damaged_file(self, opened: Path) -> Path:
        return opened / "model.safetensors.index.json"


def test_a_sharded_folder_equals_a_single_file(tmp_path: Path) -> None:
    shard(tmp_path / "shards", WEIGHTS)
    save_file(dict(WEIGHTS), tmp_path / "single.safetensors")
    with (
        open_checkpoint(tmp_path / "shards") as parts,
        open_checkpoint(tmp_path / "single.safetensors") as whole,
    ):
        assert parts.format == whole.format
        assert parts.parameters == whole.parameters
        found = {tensor.name: tensor for tensor in parts.tensors}
        for tensor in whole.tensors:
            assert bytes(found[tensor.name].storage.read(0, tensor.storage.size_bytes)) == bytes(
                tensor.storage.read(0, tensor.storage.size_bytes)
            )
        assert parts.declared["index"] == {"total_size": 1}
        assert len(parts.files) == 5


def test_any_shard_stands_for_the_whole(tmp_path: Path) -> None:
    first, *_ = shard(tmp_path / "m", WEIGHTS)
    with open_checkpoint(tmp_path / "m" / first) as checkpoint:
        assert checkpoint.parameters == sum(values.size for values in WEIGHTS.values())


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    first, second, _, last = shard(tmp_path / "m", WEIGHTS)
    (tmp_path / "m" / second).unlink()
    (tmp_path / "m" / last).unlink()
    with pytest.raises(MissingPartError, match=f"2 of 4 shards are missing: {second}, {last}"):
        open_checkpoint(tmp_path / "m")
    with open_checkpoint(tmp_path / "m", allow_partial=True) as checkpoint:
        assert {tensor.name for tensor in checkpoint.tensors} == {"embedding", "dense"}
        assert checkpoint.limits == [
            f"2 of 4 shards are missing: {second}, {last}; their 2 tensors were not read"
        ]
    assert first in {file.name for file in checkpoint.files}


def test_without_any_shard_nothing_is_read_even_in_part(tmp_path: Path) -> None:
    for name in shard(tmp_path / "m", WEIGHTS):
        (tmp_path / "m" / name).unlink()
    with pytest.raises(MissingPartError, match="4 of 4 shards are missing"):
        open_checkpoint(tmp_path / "m", allow_partial=True)


def test_of_two_sets_the_complete_one_is_read(tmp_path: Path) -> None:
    names = shard(tmp_path / "m", WEIGHTS)
    shard(tmp_path / "m", WEIGHTS, torch_files=True)
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.format == "safetensors"
        assert [file.name for file in checkpoint.renderings] == ["pytorch_model.bin.index.json"]
    (tmp_path / "m" / names[0]).unlink()
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.format == "pytorch"


def change_index(folder: Path, **weight_map: str) -> None:
    file = folder / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    content["weight_map"] |= weight_map
    file.write_text(json.dumps(content))


def test_a_tensor_of_the_index_that_no_shard_holds_is_malformed(tmp_path: Path) -> None:
    names = shard(tmp_path / "m", WEIGHTS)
    change_index(tmp_path / "m", ghost=names[0])
    with pytest.raises(MalformedError, match="1 tensors of the index are in no shard: ghost"):
        open_checkpoint(tmp_path / "m")
    with open_checkpoint(tmp_path / "m", allow_partial=True) as checkpoint:
        assert checkpoint.limits == ["1 tensors of the index are in no shard: ghost"]


def test_a_tensor_that_the_index_does_not_name_is_read_and_said(tmp_path: Path) -> None:
    names = shard(tmp_path / "m", WEIGHTS)
    extra = {"bias": WEIGHTS["bias"], "extra": np.ones((3, 3), np.float32)}
    save_file(extra, tmp_path / "m" / names[3])
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.limits == ["1 tensors are in the shards, not in the index: extra"]
        assert "extra" in {tensor.name for tensor in checkpoint.tensors}


def test_a_tensor_in_two_shards_is_the_one_that_the_index_names(tmp_path: Path) -> None:
    names = shard(tmp_path / "m", WEIGHTS)
    twice = {"embedding": WEIGHTS["embedding"], "bias": WEIGHTS["bias"] + 1}
    save_file(twice, tmp_path / "m" / names[0])
    with open_checkpoint(tmp_path / "m") as checkpoint:
        (bias,) = (tensor for tensor in checkpoint.tensors if tensor.name == "bias")
        np.testing.assert_array_equal(bias.read(), WEIGHTS["bias"])
        assert checkpoint.limits == ["1 tensors lie in two shards: bias"]


def test_tied_tensors_satisfy_the_index_by_either_name(tmp_path: Path) -> None:
    shared = torch.ones(4, 3)
    torch.save({"embed": shared, "head": shared}, tmp_path / "a.bin")
    content = {"weight_map": {"embed": "a.bin", "head": "a.bin"}}
    (tmp_path / "x.index.json").write_text(json.dumps(content))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.parameters == 12
        assert checkpoint.aliases == {"head": "embed"}


@pytest.mark.parametrize("shard_name", ["../secret", "/etc/passwd", 7, "x" * 300])
def test_an_index_cannot_name_files_outside_the_folder(tmp_path: Path, shard_name: object) -> None:
    content = {"weight_map": {"w": shard_name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"is not a file name|shards are missing"):
        open_checkpoint(tmp_path)
