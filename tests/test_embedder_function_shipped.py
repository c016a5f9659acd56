"""The function coder in this package: its card, and that it tells of functions alone."""

import json
from pathlib import Path

import numpy as np
import pytest

from embedder.encoder_input import graph_data
from embedder.function import shipped_function_coder
from embedder.graph import weight_graph
from test_embedder_anchors import ARCHITECTURES, CHANGES, drawn, mlp


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("change", CHANGES)
def test_no_symmetry_changes_what_is_told(name: str, change: str) -> None:
    architecture, shipped = ARCHITECTURES[name], shipped_function_coder()
    weights = drawn(architecture)
    other = CHANGES[change](weights, architecture, np.random.default_rng(5))
    graphs = [graph_data(weight_graph(w, architecture)) for w in (weights, other)]
    told = shipped.tell(graphs, batch=1)
    assert np.linalg.norm(told.codes[0] - told.codes[1]) < 1e-5
    np.testing.assert_allclose(told.values[0], told.values[1], atol=1e-4)
    assert told.tasks[0] == told.tasks[1]


def test_its_card_is_of_the_same_coder() -> None:
    shipped = shipped_function_coder()
    folder = Path(__file__).parent.parent / "embedder/pretrained"
    card = json.loads((folder / "function.json").read_text(encoding="utf-8"))
    assert card["version"] == shipped.version
    assert {score["property"] for score in card["scores"]} > {"test_accuracy", "task"}
    assert {"zoo", "seed", "commit", "libraries", "encoder", "settings"} <= set(card)
    assert (folder / "function.safetensors").stat().st_size < 2_000_000


def test_a_network_of_its_own_has_a_code() -> None:
    told = shipped_function_coder().tell(
        [graph_data(weight_graph(drawn(mlp("relu")), mlp("relu")))]
    )
    assert np.isfinite(told.values).all()
    assert np.linalg.norm(told.codes[0]) == pytest.approx(1, abs=1e-6)
