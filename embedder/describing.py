"""The architecture of a model, from the names and shapes of its tensors.

Names only choose which description is tried: that of a well-known family, or a chain of layers.
Whether it holds is decided by the shapes, and what is not explained is named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from embedder.architecture import Architecture
from embedder.chain import infer
from embedder.checkpoint import Checkpoint, Kind
from embedder.errors import ArchitectureError
from embedder.template import families, fill, prefixes_of

_CHANNELS_LAST = frozenset({"keras", "h5", "tensorflow", "savedmodel", "tfjs", "tflite"})
_NOT_COUNTED = frozenset({Kind.BUFFER, Kind.SCALE, Kind.OPTIMISER})


def describe(
    model: Checkpoint | Mapping[str, Sequence[int]], *, config: Mapping[str, Any] | None = None
) -> Architecture:
    """Return what a model is made of.

    Args:
        model: An open checkpoint, or name → shape in the order of the file.
        config: The declared config, where it is not in the checkpoint: `model_type`,
            `num_attention_heads`, `num_key_value_heads`, `head_dim`, `hidden_act`.

    Returns:
        The description, with axes in stored order, and with how sure it is. Tensors that it does
        not explain are named.

    Raises:
        ArchitectureError: No family has such names and the shapes are no chain, or a family's
            names are there and the shapes do not fit them. It says what was tried.

    Example:
        >>> mlp = describe({"0.weight": (8, 4), "0.bias": (8,), "2.weight": (3, 8)})
        >>> mlp.family, mlp.axes["2.weight"][1].group, mlp.confidence
        ('chain', 'units1', 0.99)
    """
    orders: dict[str, tuple[int, ...]] = {}
    channels_last = False
    if isinstance(model, Checkpoint):
        counted = [tensor for tensor in model.tensors if tensor.kind not in _NOT_COUNTED]
        shapes = {tensor.name: tensor.canonical_shape for tensor in counted}
        orders = {tensor.name: tensor.axes for tensor in counted if tensor.axes}
        config = config or model.declared.get("config")
        channels_last = any(word in model.format.lower() for word in _CHANNELS_LAST)
    else:
        shapes = {name: tuple(shape) for name, shape in model.items()}
    swapped: list[str] = []
    found = _of_family(shapes, config if isinstance(config, Mapping) else {})
    if found is None:
        found, swapped = _of_chain(shapes, channels_last)
        orders |= {name: orders.get(name, (0, 1))[::-1] for name in swapped}
    found.check({**shapes, **{name: shapes[name][::-1] for name in swapped}})
    return _as_stored(found, orders)


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
    for tried, turned in ((shapes, []), (swapped, matrices)):
        try:
            found.append((infer(tried, channels_last=channels_last), turned))
        except ArchitectureError as error:
            problems.append(str(error))
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
