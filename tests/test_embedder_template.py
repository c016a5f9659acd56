"""Families whose streams are put beside each other: their hidden units have no order."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from embedder.checkpoint import Checkpoint, tensor_of
from embedder.describing import describe
from embedder.errors import ArchitectureError
from embedder.symmetry import folded, permuted, rescaled

Weights = Mapping[str, NDArray[np.floating[Any]]]
WIDTH, NODES, NEIGHBOURS = 6, 5, 3


def matrices(prefix: str, into: int, *names: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of three maps in a row, of a whole model or of a block."""
    sizes = [(WIDTH, into), (WIDTH, WIDTH), (WIDTH, WIDTH)]
    found: dict[str, tuple[int, ...]] = {}
    for name, size in zip(names, sizes, strict=True):
        found |= {f"{prefix}{name}.weight": size, f"{prefix}{name}.bias": size[:1]}
    return found


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the shapes of a small ProteinMPNN under its published names."""
    found = {
        "features.edge_embedding.weight": (WIDTH, 7),
        **dict.fromkeys(("features.norm_edges.weight", "features.norm_edges.bias"), (WIDTH,)),
        **{"W_e.weight": (WIDTH, WIDTH), "W_e.bias": (WIDTH,), "W_s.weight": (21, WIDTH)},
        **{"W_out.weight": (21, WIDTH), "W_out.bias": (21,)},
    }
    for kind, into in (("encoder", 3 * WIDTH), ("decoder", 4 * WIDTH)):
        for number in range(2):
            p = f"{kind}_layers.{number}."
            found |= matrices(p, into, "W1", "W2", "W3")
            if kind == "encoder":
                found |= matrices(p, into, "W11", "W12", "W13")
            found |= {
                f"{p}dense.W_in.weight": (8, WIDTH),
                f"{p}dense.W_in.bias": (8,),
                f"{p}dense.W_out.weight": (WIDTH, 8),
                f"{p}dense.W_out.bias": (WIDTH,),
            }
            for norm in ("norm1", "norm2", *(["norm3"] if kind == "encoder" else [])):
                found |= dict.fromkeys((f"{p}{norm}.weight", f"{p}{norm}.bias"), (WIDTH,))
    return found


def output(weights: Weights) -> NDArray[np.floating[Any]]:
    """Return what the network gives: Dauparas et al. 2022, Science 378, without its mask."""
    w = {name: torch.from_numpy(values) for name, values in weights.items()}
    made = torch.Generator().manual_seed(0)
    distances = torch.randn(NODES, NEIGHBOURS, 7, generator=made, dtype=torch.float64)
    near = torch.stack([torch.randperm(NODES, generator=made)[:NEIGHBOURS] for _ in range(NODES)])
    residues = torch.randint(0, 21, (NODES,), generator=made)

    def affine(name: str, x: Tensor) -> Tensor:
        return functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def three(p: str, names: tuple[str, ...], x: Tensor) -> Tensor:
        for name in names[:-1]:
            x = functional.gelu(affine(p + name, x))
        return affine(p + names[-1], x)

    def step(p: str, nodes: Tensor, beside: Tensor) -> Tensor:
        own = nodes[:, None].expand(-1, NEIGHBOURS, -1)
        message = three(p, ("W1", "W2", "W3"), torch.cat([own, beside], -1))
        nodes = norm(f"{p}norm1", nodes + message.sum(1) / 30)
        inner = functional.gelu(affine(f"{p}dense.W_in", nodes))
        return norm(f"{p}norm2", nodes + affine(f"{p}dense.W_out", inner))

    edges = affine("W_e", norm("features.norm_edges", affine("features.edge_embedding", distances)))
    nodes = torch.zeros(NODES, WIDTH, dtype=torch.float64)
    for number in range(2):
        p = f"encoder_layers.{number}."
        nodes = step(p, nodes, torch.cat([edges, nodes[near]], -1))
        own = nodes[:, None].expand(-1, NEIGHBOURS, -1)
        beside = torch.cat([own, edges, nodes[near]], -1)
        edges = norm(f"{p}norm3", edges + three(p, ("W11", "W12", "W13"), beside))
    known = w["W_s.weight"][residues]
    for number in range(2):
        beside = torch.cat([edges, known[near], nodes[near]], -1)
        nodes = step(f"decoder_layers.{number}.", nodes, beside)
    found: NDArray[np.floating[Any]] = affine("W_out", nodes).numpy()
    return found


def test_messages_between_the_parts_of_a_protein_stay_the_same() -> None:
    found = describe(shapes())
    rng = np.random.default_rng(4)
    weights = {
        name: rng.normal(size=shape) / math.sqrt(shape[-1]) for name, shape in shapes().items()
    }
    before = output(weights)
    free = [group for group in found.groups.values() if group.gauge.value != "named"]
    # Three hidden layers in a decoder's block, five in an encoder's, and the pairs and their norm.
    assert len(free) == 2 * 3 + 2 * 5 + 2
    moved = permuted(weights, found, rng)
    assert sum(not np.array_equal(moved[name], weights[name]) for name in weights) > 20
    for changed in (moved, rescaled(weights, found, rng), folded(weights, found)):
        np.testing.assert_allclose(output(changed), before, rtol=1e-9, atol=1e-9)


def test_the_alphabet_is_not_taken_for_the_order_of_layers() -> None:
    names = {"conv2d_0.w_0": (4, 3), "conv2d_1.w_0": (5, 4)}
    tensors = [tensor_of(name, np.zeros(shape, np.float32)) for name, shape in names.items()]
    with pytest.raises(ArchitectureError, match="order of the alphabet"):
        describe(Checkpoint("model.pdiparams", "paddle", tuple(tensors)))


NETS: dict[str, dict[str, tuple[int, ...]]] = {
    "pnet": {"conv1": (4, 3, 3), "conv2": (5, 4, 3), "conv3": (6, 5, 3)},
    "rnet": {"conv1": (4, 3, 3), "conv2": (5, 4, 3), "conv3": (6, 5, 2), "dense4": (7, 6 * 4)},
    "onet": {
        **{"conv1": (4, 3, 3), "conv2": (5, 4, 3), "conv3": (6, 5, 2), "conv4": (5, 6, 2)},
        "dense5": (7, 5 * 4),
    },
}
HEADS: dict[str, dict[str, tuple[int, ...]]] = {
    "pnet": {"conv4_1": (2, 6, 1), "conv4_2": (4, 6, 1)},
    "rnet": {"dense5_1": (2, 7), "dense5_2": (4, 7)},
    "onet": {"dense6_1": (2, 7), "dense6_2": (4, 7), "dense6_3": (10, 7)},
}


def detector(net: str, rng: np.random.Generator) -> Weights:
    """Return random weights of a net of MTCNN under its published names."""
    found = {}
    for name, size in (NETS[net] | HEADS[net]).items():
        shape = (*size[:2], size[2], size[2]) if len(size) == 3 else size
        found[f"{name}.weight"] = rng.normal(size=shape) / math.sqrt(math.prod(shape[1:]))
        found[f"{name}.bias"] = rng.normal(size=shape[:1])
    for number, size in enumerate(NETS[net].values(), 1):
        found[f"prelu{number}.weight"] = rng.uniform(0, 0.5, size=size[:1])
    return found


def faces(net: str, weights: Weights) -> NDArray[np.floating[Any]]:
    """Return what a net finds: Zhang et al. 2016, pooled as in its port to torch."""
    w = {name: torch.from_numpy(values.copy()) for name, values in weights.items()}
    size = {"pnet": 12, "rnet": 12, "onet": 22}[net]
    made = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, size, size, generator=made, dtype=torch.float64)
    for number, (name, shape) in enumerate(NETS[net].items(), 1):
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        if len(shape) == 2:
            x = functional.linear(x.permute(0, 3, 2, 1).reshape(2, -1), weight, bias)
        else:
            x = functional.conv2d(x, weight, bias)
        x = functional.prelu(x, w[f"prelu{number}.weight"])
        if number == 1 or (net == "onet" and number == 2):
            x = functional.max_pool2d(x, 2, ceil_mode=True)
    ends = []
    for name, shape in HEADS[net].items():
        map_or_not = functional.conv2d if len(shape) == 3 else functional.linear
        ends.append(map_or_not(x, w[f"{name}.weight"], w[f"{name}.bias"]).flatten(1))
    found: NDArray[np.floating[Any]] = torch.cat(ends, 1).numpy()
    return found


@pytest.mark.parametrize("net", list(NETS))
def test_the_nets_of_a_face_detector_find_the_same(net: str) -> None:
    rng = np.random.default_rng(6)
    weights = detector(net, rng)
    found = describe({name: values.shape for name, values in weights.items()})
    assert (found.family, found.unexplained) == ("mtcnn", ())
    assert [g.gauge.value for g in found.groups.values()].count("scale") == len(NETS[net])
    before = faces(net, weights)
    for symmetry in (permuted, rescaled):
        changed = symmetry(weights, found, rng)
        assert sum(not np.array_equal(changed[name], weights[name]) for name in weights) >= 8
        np.testing.assert_allclose(faces(net, changed), before, rtol=1e-9, atol=1e-9)


def pitch(weights: Weights) -> NDArray[np.floating[Any]]:
    """Return what a small CREPE hears: Kim et al. 2018, ICASSP, as in its port to torch."""
    w = {name: torch.from_numpy(values.copy()) for name, values in weights.items()}
    made = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 128, 1, generator=made, dtype=torch.float64)
    for number in range(1, 7):
        p = f"conv{number}"
        x = functional.relu(functional.conv2d(x, w[f"{p}.weight"], w[f"{p}.bias"], padding=(1, 0)))
        mean, variance = w[f"{p}_BN.running_mean"], w[f"{p}_BN.running_var"]
        x = functional.batch_norm(x, mean, variance, w[f"{p}_BN.weight"], w[f"{p}_BN.bias"])
        x = functional.max_pool2d(x, (2, 1))
    x = x.permute(0, 2, 1, 3).reshape(2, -1)
    found: NDArray[np.floating[Any]] = functional.linear(
        x, w["classifier.weight"], w["classifier.bias"]
    ).numpy()
    return found


def test_a_pitch_tracker_hears_the_same() -> None:
    rng = np.random.default_rng(8)
    weights: dict[str, NDArray[np.floating[Any]]] = {}
    for number, (into, out) in enumerate(pairwise((1, 5, 4, 4, 6, 5, 3)), 1):
        weights[f"conv{number}.weight"] = rng.normal(size=(out, into, 3, 1))
        weights[f"conv{number}.bias"] = rng.normal(size=out)
        for word in ("weight", "bias", "running_mean", "running_var"):
            weights[f"conv{number}_BN.{word}"] = rng.uniform(0.5, 2, size=out)
    weights["classifier.weight"], weights["classifier.bias"] = rng.normal(size=(7, 6)), np.ones(7)
    found = describe({name: values.shape for name, values in weights.items()})
    assert found.family == "crepe"
    before = pitch(weights)
    moved = permuted(weights, found, rng)
    assert sum(not np.array_equal(moved[name], weights[name]) for name in weights) > 12
    # A batch norm stands behind each ReLU here, so that none may be scaled or folded.
    for changed in (moved, rescaled(weights, found, rng), folded(weights, found)):
        np.testing.assert_allclose(pitch(changed), before, rtol=1e-9, atol=1e-9)
