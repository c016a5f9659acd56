"""Folders with a config and weights in one or more formats."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from embedder.errors import EmptyModelError, MalformedError
from embedder.opening import open_checkpoint
from reader_contract import WEIGHTS, ReaderContract, Weights


def make_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"model_type": "bert", "hidden_size": 6, "unknown": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def state_dict(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values) for name, values in weights.items()}


class TestHuggingFace(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        model = make_folder(folder / "model")
        save_file(dict(weights), model / "model.safetensors")
        return model

    def damaged_file(self, opened: Path) -> Path:
        return opened / "model.safetensors"


def test_the_preferred_format_is_read_and_the_others_are_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    torch.save(state_dict(WEIGHTS), folder / "pytorch_model.bin")
    save_file(dict(WEIGHTS), folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.format == "safetensors"
        assert checkpoint.renderings == (folder / "pytorch_model.bin",)
        assert checkpoint.files == (folder / "model.safetensors",)
        assert checkpoint.declared["config"] == {"model_type": "bert", "hidden_size": 6}
        assert checkpoint.location == str(folder)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_a_trainer_leaves_beside_the_weights_is_not_the_model(
    tmp_path: Path, legacy: bool
) -> None:
    folder = make_folder(tmp_path / "m")
    model = torch.nn.Linear(5, 3)
    optimiser = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    optimiser.step()
    torch.save(optimiser.state_dict(), folder / "optimizer.pt")
    torch.save({"step": 1}, folder / "scheduler.pt")
    torch.save(
        model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy
    )
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.parameters == 18
        assert checkpoint.renderings == ()
        assert checkpoint.files == (folder / "pytorch_model.bin",)


class Settings:
    """A class of the user's own, which a pickle may not import."""


def test_a_file_that_is_refused_beside_the_weights_is_named_in_limits(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    torch.save(Settings(), folder / "training_args.bin")
    torch.save(state_dict(WEIGHTS), folder / "pytorch_model.bin")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.parameters == sum(values.size for values in WEIGHTS.values())
        assert checkpoint.limits[0].startswith("training_args.bin was not read: the pickle imports")


def test_a_damaged_preferred_format_is_an_error_not_a_reason_to_read_another(
    tmp_path: Path,
) -> None:
    folder = make_folder(tmp_path / "m")
    save_file(dict(WEIGHTS), folder / "model.safetensors")
    torch.save(state_dict(WEIGHTS), folder / "pytorch_model.bin")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-4])
    with pytest.raises(MalformedError, match="TRUNCATED"):
        open_checkpoint(folder)


def test_a_folder_whose_files_hold_no_weights_is_empty(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    torch.save({"step": np.float32(1)}, folder / "state.pt")
    with pytest.raises(EmptyModelError, match="no file in this folder holds weights"):
        open_checkpoint(folder)
