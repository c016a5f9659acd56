"""The architecture of a model, from the names and shapes of its tensors.

Names only choose which description is tried: that of a well-known family, or a chain of layers.
Whether it holds is decided by the shapes, and what is not explained is named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from embedder.architecture import Architecture
from embedder.chain import infer
from embedder.checkpoint import Checkpoint, Kind
from embedder.errors import ArchitectureError
from embedder.live import open_live
from embedder.onnx_tracing import describe_onnx
from embedder.template import families, fill, prefixes_of
from embedder.tflite_tracing import describe_tflite

if TYPE_CHECKING:
    from torch import nn

_CHANNELS_LAST = frozenset({"keras", "hdf5", "tensorflow", "saved-model", "tfjs"})
_NOT_COUNTED = frozenset({Kind.BUFFER, Kind.SCALE, Kind.OPTIMISER})


def describe(
    model: "Checkpoint | nn.Module | Mapping[str, Sequence[int]]",
    *,
    config: Mapping[str, Any] | None = None,
) -> Architecture:
    """Return what a model is made of.

    ONNX and TFLite files and live modules are read from their graph; a module whose graph cannot be
    followed, and all others, from their names and shapes.

    Args:
        model: An open checkpoint, a live torch module, or name → shape in the order of the file.
        config: The declared config, where it is not in the checkpoint: `model_type`,
            `num_attention_heads`, `head_dim`, `hidden_act`.

    Returns:
        The description, with axes in stored order, and with how sure it is. Tensors that it does
        not explain are named.

    Raises:
        ArchitectureError: No family has such names and the shapes are no chain, or a family's
            names are there and the shapes do not fit them, or a node of a graph cannot be
            followed. It says what was tried.

    Example:
        >>> mlp = describe({"0.weight": (8, 4), "0.bias": (8,), "2.weight": (3, 8)})
        >>> mlp.family, mlp.axes["2.weight"][1].group, mlp.confidence
        ('chain', 'units1', 0.99)
    """
    if isinstance(model, Mapping):
        shapes = {name: tuple(shape) for name, shape in model.items()}
        return _of_shapes(shapes, {}, config or {}, channels_last=False)
    if isinstance(model, Checkpoint):
        return _of_checkpoint(model, config)
    return _of_module(model, config)


def _of_module(module: "nn.Module", config: Mapping[str, Any] | None) -> Architecture:
    """Return the description of a live module by its graph, or else by its names and shapes."""
    from embedder.torch_tracing import describe_module

    try:
        return describe_module(module)
    except ArchitectureError as error:
        try:
            return _of_checkpoint(open_live(module), config)
        except ArchitectureError as second:
            raise ArchitectureError(f"{error}; by its names and shapes: {second}") from error


def _of_checkpoint(checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> Architecture:
    counted = [tensor for tensor in checkpoint.tensors if tensor.kind not in _NOT_COUNTED]
    if checkpoint.format in ("onnx", "tflite"):
        is_onnx = checkpoint.format == "onnx"
        found = describe_onnx(checkpoint.files[0]) if is_onnx else describe_tflite(checkpoint)
        found.check({tensor.name: tensor.shape for tensor in checkpoint.tensors})
        return found
    if checkpoint.format == "paddle":
        raise ArchitectureError(
            "a Paddle file holds its tensors in the order of the alphabet, which is not that of "
            "the layers; the same model as ONNX is described from its graph"
        )
    declared = config or checkpoint.declared.get("config")
    return _of_shapes(
        {tensor.name: tensor.canonical_shape for tensor in counted},
        {tensor.name: tensor.axes for tensor in counted if tensor.axes},
        declared if isinstance(declared, Mapping) else {},
        channels_last=checkpoint.format in _CHANNELS_LAST,
    )


def _of_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    orders: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    *,
    channels_last: bool,
) -> Architecture:
    """Return the description of the family whose names are there, or that of a chain."""
    found = _of_family(shapes, config)
    if found is not None:
        return _as_stored(found, orders)
    found, swapped = _of_chain(shapes, channels_last)
    found.check({**shapes, **{name: shapes[name][::-1] for name in swapped}})
    turned = {name: orders.get(name, (0, 1))[::-1] for name in swapped}
    return _as_stored(found, {**orders, **turned})


def _of_family(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> Architecture | None:
    """Return the description of the family whose names are there; None if there is none."""
    found: list[Architecture] = []
    problems: list[str] = []
    for family in families():
        for prefix in prefixes_of(family, shapes):
            try:
                found.append(fill(family, shapes, prefix, config))
            except ArchitectureError as error:
                problems.append(f"{family['family']}: {error}")
    if not found and problems:
        raise ArchitectureError(f"no description fits; {'; '.join(problems)}")
    return max(found, key=lambda architecture: architecture.confidence, default=None)


def _of_chain(
    shapes: Mapping[str, tuple[int, ...]], channels_last: bool
) -> tuple[Architecture, list[str]]:
    """Return a chain, and the names of the matrices that lie as in × out in it."""
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    swapped = {**shapes, **{name: shapes[name][::-1] for name in matrices}}
    found: list[tuple[Architecture, list[str]]] = []
    problems: list[str] = []
    for anyhow in (False, True):
        for tried, turned in ((shapes, []), (swapped, matrices)):
            try:
                chain = infer(tried, channels_last=channels_last, in_any_order=anyhow)
                found.append((chain, turned))
            except ArchitectureError as error:
                problems.append(str(error))
        if found:
            break
    if not found:
        raise ArchitectureError(
            "no family has such tensors, and they are no chain of layers, "
            f"neither as out × in ({problems[0]}) nor as in × out ({problems[1]})"
        )
    if len(found) == 2 and matrices:
        # Both fit, as they do if no bias tells: one of them is right.
        first, turned = found[0]
        return replace(first, confidence=first.confidence / 2), turned
    return found[0]


def _as_stored(architecture: Architecture, orders: Mapping[str, tuple[int, ...]]) -> Architecture:
    """Return a description whose axes lie as they do in the file."""
    axes = dict(architecture.axes)
    for name, order in orders.items():
        if name in axes:
            stored = list(axes[name])
            for place, axis in zip(order, axes[name], strict=True):
                stored[place] = axis
            axes[name] = tuple(stored)
    steps = tuple(
        replace(step, turned=not step.turned)
        if orders.get(step.tensors.get("weight", ""), ())[:2] == (1, 0)
        else step
        for step in architecture.steps
    )
    return replace(architecture, axes=axes, steps=steps)
