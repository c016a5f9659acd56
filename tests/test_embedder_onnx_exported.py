"""Networks that PyTorch exported as ONNX: they are described as their tensors by name are."""

from collections import Counter
from functools import cache

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from embedder.anchors import anchored
from embedder.architecture import Architecture, Op
from embedder.coding import identity_code
from embedder.describing import describe
from embedder.onnx_tracing import describe_onnx_model
from embedder.rotation import rotated
from embedder.symmetry import permuted, rescaled
from network import Network
from networks import FAMILIES
from onnx_export import as_onnx
from onnx_runner import outputs_of, with_weights

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

Weights = dict[str, NDArray[np.floating]]
EACH = [
    pytest.param(family, marks=pytest.mark.xdist_group(f"exported {family}")) for family in FAMILIES
]
"""Each family in one process, which exports it once."""
SYMMETRIES = {"permuted": permuted, "rescaled": rescaled, "rotated": rotated}


@cache
def exported(family: str) -> tuple[onnx.ModelProto, Weights]:
    """Return a network as ONNX with batch and length left open, and its weights."""
    network = FAMILIES[family]()
    weights = network.weights(dtype="float32")
    return as_onnx(network.forward, weights, inputs_of(network)), weights


def inputs_of(network: Network) -> Tensor:
    inputs = network.inputs()
    return inputs.float() if inputs.is_floating_point() else inputs


def values_of(model: onnx.ModelProto) -> Weights:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def output_of(model: onnx.ModelProto, x: Tensor) -> NDArray[np.float64]:
    return np.asarray(outputs_of(model, {"x": x.numpy()})[0], np.float64)


def blocks_of(architecture: Architecture) -> Counter[Op]:
    return Counter(s.op for s in architecture.steps if s.op in (Op.ATTENTION, Op.GATED))


@pytest.mark.parametrize("family", EACH)
def test_an_exported_network_has_the_code_of_its_tensors(family: str) -> None:
    model, weights = exported(family)
    by_graph = describe_onnx_model(model)
    shapes = {name: values.shape for name, values in weights.items()}
    by_name = describe(shapes, config=FAMILIES[family]().config)
    assert blocks_of(by_graph) == blocks_of(by_name)
    codes = [
        identity_code(anchored(values, architecture)).vector
        for values, architecture in ((values_of(model), by_graph), (weights, by_name))
    ]
    # .996 at least; strangers reach .5 once in a thousand times.
    assert float(codes[0] @ codes[1]) > 0.99


@pytest.mark.parametrize("family", EACH)
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_an_exported_network_computes_the_same_when_it_is_changed(
    family: str, symmetry: str
) -> None:
    model, _ = exported(family)
    found, x = describe_onnx_model(model), inputs_of(FAMILIES[family]())
    values = {name: values_of(model)[name] for name in found.axes}
    changed = SYMMETRIES[symmetry](values, found, np.random.default_rng(1))
    if symmetry != "rotated" or blocks_of(found):
        assert any(not np.array_equal(changed[name], values[name]) for name in values)
    before, after = (output_of(one, x) for one in (model, with_weights(model, changed)))
    assert float(np.abs(after - before).max() / np.abs(before).max()) < 1e-5
