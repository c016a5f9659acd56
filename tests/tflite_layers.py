"""Operators of TFLite with their options, and whether a described model computes the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tflite
from numpy.typing import NDArray

from embedder.architecture import Architecture
from embedder.describing import describe
from embedder.opening import open_checkpoint
from embedder.symmetry import flipped, permuted, rescaled
from tflite_runner import run
from tflite_writer import Given, Step

Weights = dict[str, NDArray[np.floating[Any]]]
SYMMETRIES = (permuted, rescaled, flipped)
RNG = np.random.default_rng(5)
FUSED = {"relu": 1, "relu6": 3, "tanh": 4}


def weight(*shape: int) -> Given:
    return Given.of(RNG.normal(size=shape).astype(np.float32) * 0.5)


def whole(*numbers: int) -> Given:
    return Given.of(np.array(numbers, np.int32))


def options(table: str, **fields: int) -> Callable[[Any], tuple[int, int]]:
    """Return what writes a table of options."""

    def write(builder: Any) -> tuple[int, int]:
        getattr(tflite, f"{table}Start")(builder)
        for name, value in fields.items():
            getattr(tflite, f"{table}Add{name}")(builder, value)
        return getattr(tflite.BuiltinOptions, table), getattr(tflite, f"{table}End")(builder)

    return write


def conv(*inputs: str, to: str, act: str = "", op: str = "CONV_2D") -> Step:
    """Return a convolution of stride 1 that keeps the size of the map."""
    table = {"CONV_2D": "Conv2DOptions", "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions"}[op]
    fields = {"StrideH": 1, "StrideW": 1, "FusedActivationFunction": FUSED.get(act, 0)}
    return Step(op, inputs, [to], options(table, **fields))


def dense(*inputs: str, to: str, act: str = "") -> Step:
    fused = {"FusedActivationFunction": FUSED.get(act, 0)}
    return Step("FULLY_CONNECTED", inputs, [to], options("FullyConnectedOptions", **fused))


def pool(op: str, source: str, to: str) -> Step:
    fields = {"StrideH": 2, "StrideW": 2, "FilterHeight": 2, "FilterWidth": 2}
    return Step(op, [source], [to], options("Pool2DOptions", **fields))


def change_of(path: Path, symmetry: Callable[..., Weights]) -> float:
    """Return the largest change of an output by the largest output."""
    with open_checkpoint(path) as checkpoint:
        found = describe(checkpoint)
        tensors = {t.name: t for t in checkpoint.tensors if t.name in found.axes}
        weights = {name: tensor.read().astype(np.float64) for name, tensor in tensors.items()}
    graph = tflite.Model.GetRootAsModel(path.read_bytes(), 0).Subgraphs(0)
    rng = np.random.default_rng(3)
    feeds = [rng.normal(size=graph.Tensors(n).ShapeAsNumpy()) for n in graph.InputsAsNumpy()]
    before = run(path, weights, feeds)
    after = run(path, symmetry(weights, found, np.random.default_rng(1)), feeds)
    return max(
        float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6))
        for a, b in zip(after, before, strict=True)
    )


def described(path: Path) -> Architecture:
    with open_checkpoint(path) as checkpoint:
        return describe(checkpoint)
