"""A function coder in its file: whole, of this version, as it was saved, or refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from embedder.encoder import Encoder, EncoderConfig
from embedder.encoder_training import FunctionSettings, train_function
from embedder.errors import MalformedError, NotFoundError
from embedder.function import FORMAT, FunctionCoder, Heads
from embedder.pooling import POOLINGS
from test_embedder_encoder_training import EXAMPLES, GRAPHS, SMALL


def coder(pooling: str = "mean") -> FunctionCoder:
    torch.manual_seed(0)
    heads = Heads(("cats", "dogs"), torch.zeros(5), torch.ones(5))
    config = EncoderConfig(width=16, heads=2, pooling=pooling)
    return FunctionCoder(Encoder(config).eval(), heads.eval())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "coder.safetensors"
    coder().save(path)
    return path


def facts_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as opened:
        return dict(json.loads(opened.metadata()["lineage"]))


def write(path: Path, tensors: dict[str, torch.Tensor], facts: object) -> None:
    save_file(tensors, path, metadata={"lineage": json.dumps(facts)})


def told_other(path: Path, **facts: Any) -> None:
    """Write a coder's file anew with other facts of it."""
    write(path, load_file(path), {**facts_of(path), **facts})


class TestFiles:
    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_a_saved_coder_tells_the_same(self, pooling: str, tmp_path: Path) -> None:
        made = coder(pooling)
        made.save(tmp_path / "c.safetensors")
        loaded = FunctionCoder.load(tmp_path / "c.safetensors")
        for one, other in zip(loaded.tell(GRAPHS), made.tell(GRAPHS), strict=True):
            np.testing.assert_array_equal(one, other)
        assert loaded.version == made.version
        assert loaded.encoder.config == made.encoder.config
        assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]

    def test_a_seed_gives_the_same_bytes(self, tmp_path: Path) -> None:
        torch.set_num_threads(1)
        for name in ("one", "other"):
            made = train_function(EXAMPLES, SMALL, FunctionSettings(steps=3, batch=8))
            made.save(tmp_path / name)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()

    def test_what_is_no_coder_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "c.safetensors"
        with pytest.raises(NotFoundError, match="no such file"):
            FunctionCoder.load(path)
        path.write_bytes(b"no tensors")
        with pytest.raises(MalformedError, match="holds no encoder"):
            FunctionCoder.load(path)
        save_file({"a": torch.ones(1)}, path)
        with pytest.raises(MalformedError, match="holds no function encoder"):
            FunctionCoder.load(path)

    def test_another_format_is_refused(self, file: Path) -> None:
        told_other(file, format="lineage/function-coder/0")
        with pytest.raises(MalformedError, match=r"another version: .*/0, not .*/1"):
            FunctionCoder.load(file)

    @pytest.mark.parametrize(
        "change",
        [
            lambda made: [],
            lambda made: {"encoder": made["encoder"]},
            lambda made: {**made, "properties": ["beauty"]},
            lambda made: {**made, "tasks": ["cats"]},
            lambda made: {**made, "tasks": [1, 2]},
            lambda made: {**made, "encoder": {**made["encoder"], "width": 32}},
            lambda made: {**made, "encoder": {**made["encoder"], "width": 1 << 40}},
            lambda made: {**made, "encoder": {**made["encoder"], "rounds": 1 << 40}},
            lambda made: {**made, "encoder": {**made["encoder"], "width": "16"}},
            lambda made: {**made, "encoder": {**made["encoder"], "levels": ["nano"]}},
            lambda made: {**made, "encoder": {**made["encoder"], "depth": 3}},
        ],
    )
    def test_a_configuration_that_does_not_fit_is_refused(self, file: Path, change: Any) -> None:
        told_other(file, made_of=change(facts_of(file)["made_of"]))
        with pytest.raises(MalformedError, match="another version"):
            FunctionCoder.load(file)

    @pytest.mark.parametrize("facts", [[], 7, {}, {"format": 7}])
    def test_facts_that_are_none_are_refused(self, file: Path, facts: object) -> None:
        write(file, load_file(file), facts)
        with pytest.raises(MalformedError, match="holds no function encoder"):
            FunctionCoder.load(file)
        save_file(load_file(file), file, metadata={"lineage": "{"})
        with pytest.raises(MalformedError, match="holds no encoder"):
            FunctionCoder.load(file)

    @pytest.mark.parametrize("name", ["a missing one", "one more", "other numbers"])
    def test_tensors_that_do_not_fit_are_refused(self, file: Path, name: str) -> None:
        tensors = load_file(file)
        if name == "a missing one":
            del tensors["heads.task.bias"]
        elif name == "one more":
            tensors["heads.more"] = torch.ones(1)
        else:
            tensors["heads.task.bias"] = tensors["heads.task.bias"].double()
        write(file, tensors, facts_of(file))
        with pytest.raises(MalformedError, match="another version"):
            FunctionCoder.load(file)

    @pytest.mark.parametrize(("value", "problem"), [(0.5, "was changed"), (torch.nan, "NaN")])
    def test_values_that_are_not_as_saved_are_refused(
        self, file: Path, value: float, problem: str
    ) -> None:
        tensors = load_file(file)
        tensors["encoder.token_norm.weight"][3] = value
        write(file, tensors, facts_of(file))
        with pytest.raises(MalformedError, match=problem):
            FunctionCoder.load(file)

    def test_every_byte_counts(self, file: Path) -> None:
        whole, rng = file.read_bytes(), np.random.default_rng(0)
        for place in rng.integers(0, len(whole), 40):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            with pytest.raises(MalformedError):
                FunctionCoder.load(file)

    def test_a_file_that_was_cut_is_refused(self, file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(MalformedError, match="holds no encoder"):
            FunctionCoder.load(file)

    def test_the_format_is_named_in_the_file(self, file: Path) -> None:
        assert facts_of(file)["format"] == FORMAT
