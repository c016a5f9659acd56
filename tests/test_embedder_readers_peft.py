"""PEFT adapters."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from embedder.checkpoint import Kind
from embedder.errors import MalformedError, MissingPartError, RefusedError
from embedder.opening import open_checkpoint
from reader_contract import ReaderContract, Weights, assembled

RNG = np.random.default_rng(5)
A = RNG.normal(size=(2, 9)).astype(np.float32)
B = RNG.normal(size=(7, 2)).astype(np.float32)
Arrays = dict[str, NDArray[Any]]


def write_adapter(folder: Path, tensors: Arrays, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def pair(module: str, a: NDArray[Any] = A, b: NDArray[Any] = B) -> Arrays:
    return {
        f"base_model.model.{module}.lora_A.weight": a,
        f"base_model.model.{module}.lora_B.weight": b,
    }


def only(folder: Path) -> NDArray[np.floating[Any]]:
    """Return the values of an adapter's only tensor."""
    with open_checkpoint(folder) as checkpoint:
        (tensor,) = checkpoint.tensors
        return tensor.canonical()


class TestPeft(ReaderContract):
    """Full tensors, as of `modules_to_save`; a LoRA pair is not stored as the weight it makes."""

    def write(self, folder: Path, weights: Weights) -> Path:
        saved: Arrays = {f"base_model.model.{name}": values for name, values in weights.items()}
        return write_adapter(folder / "adapter", saved)

    def damaged_file(self, opened: Path) -> Path:
        return opened / "adapter_model.safetensors"


class TestPeftConfig(TestPeft):
    """The same with damage to the config."""

    def damaged_file(self, opened: Path) -> Path:
        return opened / "adapter_config.json"


def test_a_pair_is_the_change_that_it_makes(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "x", pair("layers.0.q_proj"), base_model_name_or_path="b/c")
    with open_checkpoint(folder) as checkpoint:
        (tensor,) = checkpoint.tensors
        assert tensor.name == "layers.0.q_proj.weight"
        assert tensor.shape == (7, 9)
        assert tensor.kind is Kind.WEIGHT
        np.testing.assert_allclose(tensor.read(), 3.0 * (B @ A), rtol=1e-5)
        for most in (1, 5, 20):
            np.testing.assert_allclose(
                assembled(tensor, most).astype(float), 3.0 * (B @ A), rtol=1e-5
            )
        assert checkpoint.adapter
        assert checkpoint.parameters == A.size + B.size
        assert checkpoint.declared["adapter"]["base_model_name_or_path"] == "b/c"
        assert checkpoint.declared["adapter"]["lora_alpha"] == 6
        assert checkpoint.limits == []


def test_rank_stabilised_scaling_divides_by_the_root(tmp_path: Path) -> None:
    found = only(write_adapter(tmp_path / "x", pair("q"), use_rslora=True))
    np.testing.assert_allclose(found, 6 / math.sqrt(2) * (B @ A), rtol=1e-5)


def test_the_rank_is_that_of_the_factor_whatever_the_config_says(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "x", pair("q"), r=64, rank_pattern={"q": 2})
    np.testing.assert_allclose(only(folder), 3.0 * (B @ A), rtol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "alpha"),
    [("q_proj", 4), ("0.q_proj", 4), (r"layers\.\d+\.q_proj", 4), ("proj", 6), ("(a", 6)],
)
def test_alpha_patterns_are_honoured(tmp_path: Path, pattern: str, alpha: int) -> None:
    folder = write_adapter(tmp_path / "x", pair("layers.0.q_proj"), alpha_pattern={pattern: 4})
    np.testing.assert_allclose(only(folder), alpha / 2 * (B @ A), rtol=1e-5)


def test_a_pattern_that_could_match_for_ever_is_not_tried(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "x", pair("a" * 60), alpha_pattern={"(a+)+b": 4})
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.limits == ["alpha_pattern '(a+)+b' is too complex and was not applied"]


def test_embeddings_are_changed_by_the_transposed_product(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.wte.lora_embedding_A": A,
        "base_model.model.wte.lora_embedding_B": B,
    }
    folder = write_adapter(tmp_path / "x", tensors)
    with open_checkpoint(folder) as checkpoint:
        (tensor,) = checkpoint.tensors
        assert tensor.name == "wte.weight"
        np.testing.assert_allclose(tensor.read(), 3.0 * (B @ A).T, rtol=1e-5)
        np.testing.assert_allclose(assembled(tensor, 5).astype(float), 3.0 * (B @ A).T, rtol=1e-5)


def test_convolutions_are_changed_in_every_place_of_the_kernel(tmp_path: Path) -> None:
    a = RNG.normal(size=(2, 4, 3, 3)).astype(np.float32)
    b = RNG.normal(size=(5, 2, 1, 1)).astype(np.float32)
    found = only(write_adapter(tmp_path / "x", pair("conv", a, b)))
    wanted: NDArray[np.floating[Any]] = 3.0 * np.einsum("or,rikl->oikl", b[:, :, 0, 0], a)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_torch_file_of_half_precision_gives_the_same(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "x", pair("q"))
    (folder / "adapter_model.safetensors").unlink()
    halves = {
        name: torch.from_numpy(values).to(torch.bfloat16) for name, values in pair("q").items()
    }
    # Stored transposed, as a view.
    halves = {name: half.t().contiguous().t() for name, half in halves.items()}
    torch.save(halves, folder / "adapter_model.bin")
    a, b = (half.float().numpy() for half in halves.values())
    np.testing.assert_allclose(only(folder), 3.0 * (b @ a), rtol=1e-5)


def test_names_of_a_live_adapter_are_understood(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.q.lora_A.default.weight": A,
        "base_model.model.q.lora_B.default.weight": B,
        "base_model.model.head.modules_to_save.default.weight": np.ones((3, 4), np.float32),
    }
    with open_checkpoint(write_adapter(tmp_path / "x", tensors)) as checkpoint:
        assert {tensor.name for tensor in checkpoint.tensors} == {"q.weight", "head.weight"}
        assert checkpoint.parameters == A.size + B.size + 12


def test_dora_is_said_not_to_be_applied(tmp_path: Path) -> None:
    tensors = {**pair("q"), "base_model.model.q.lora_magnitude_vector": np.ones(7, np.float32)}
    with open_checkpoint(write_adapter(tmp_path / "x", tensors, use_dora=True)) as checkpoint:
        assert "the 1 magnitude vectors are listed and not applied" in checkpoint.limits[0]
        assert len(checkpoint.tensors) == 2


def test_half_a_pair_is_listed_and_named(tmp_path: Path) -> None:
    tensors = {"base_model.model.q.lora_A.weight": A}
    with open_checkpoint(write_adapter(tmp_path / "x", tensors)) as checkpoint:
        assert checkpoint.limits == [
            "base_model.model.q.lora_A.weight has no other half; listed as stored"
        ]


def test_other_kinds_of_adapters_are_listed_as_stored(tmp_path: Path) -> None:
    tensors = {"base_model.model.k.ia3_l": np.ones((7, 1), np.float32)}
    with open_checkpoint(write_adapter(tmp_path / "x", tensors, peft_type="IA3")) as checkpoint:
        assert checkpoint.limits[0].startswith("a IA3 adapter: its tensors are listed as stored")
        assert [tensor.name for tensor in checkpoint.tensors] == ["k.ia3_l"]


def test_factors_that_do_not_fit_are_malformed(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "x", pair("q", A, B.T.copy()))
    with pytest.raises(MalformedError, match=r"of 'base_model\.model\.q' do not fit: \[2, 9\]"):
        open_checkpoint(folder)


def test_a_config_without_weights_misses_a_part(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(MissingPartError, match=r"get adapter_model\.safetensors too"):
        open_checkpoint(tmp_path)


def test_a_config_that_is_no_object_is_malformed(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "x", pair("q"))
    (folder / "adapter_config.json").write_text("[1]")
    with pytest.raises(MalformedError, match="it is not a JSON object"):
        open_checkpoint(folder)


def test_a_malicious_adapter_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "x", pair("q"))
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02cposix\nsystem\nX\4\0\0\0true\x85R.")
    with pytest.raises(RefusedError, match=r"imports posix\.system"):
        open_checkpoint(folder)
