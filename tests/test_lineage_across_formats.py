"""A model as ONNX is held against its tensors by name, whatever was done to it in between."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from attention_networks import llama as network
from command import answer_of
from embedder.describing import describe
from embedder.symmetry import permuted
from network import tokens
from onnx_export import as_onnx
from test_lineage_turning import (
    HEADS,
    KEYS,
    WORDS,
    Change,
    Weights,
    heads_alone,
    llama,
    saved,
    trained,
)

pytest.importorskip("onnxscript")

CONFIG = {"model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": KEYS}


def exported(weights: Weights, path: Path) -> Path:
    onnx.save(as_onnx(network().forward, weights, tokens(WORDS)), path)
    return path


def compared(weights: Weights, tmp_path: Path) -> dict[str, Any]:
    """Return what is said of a model and of what became of it, as ONNX."""
    base = tmp_path / "base"
    base.mkdir()
    saved(llama(0), base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(CONFIG))
    return dict(answer_of("compare", base, exported(weights, tmp_path / "other.onnx")))


def changed(weights: Weights, change: Change) -> Weights:
    shapes = {name: values.shape for name, values in weights.items()}
    found = change(weights, describe(shapes, config=CONFIG), np.random.default_rng(5))
    return {name: np.asarray(values, np.float32) for name, values in found.items()}


@pytest.mark.parametrize("change", [permuted, heads_alone])
def test_a_copy_has_the_same_weights(change: Change, tmp_path: Path) -> None:
    answer = compared(changed(llama(0), change), tmp_path)
    assert answer["relation"] == "same-weights"


def test_a_reordered_fine_tune_is_one_and_as_far_as_it_went(tmp_path: Path) -> None:
    answer = compared(changed(trained(llama(0), 0.05), permuted), tmp_path)
    assert answer["relation"] == "fine-tune"
    assert answer["distance"] == pytest.approx(0.05, rel=0.1)


def test_a_stranger_stays_one(tmp_path: Path) -> None:
    assert compared(llama(9), tmp_path)["relation"] == "unrelated"
