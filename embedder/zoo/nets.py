"""The networks of the zoo: what they are made of, how they start, how they compute.

A `Config` names one design. Its `Architecture` is the one source of the tensors' names and shapes,
so that the description which the encoder and the symmetries use cannot differ from what was
trained. `forward` runs K models of a design at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedder.architecture import Architecture, Op
from embedder.zoo import layers
from embedder.zoo.designs import DESIGNS, Config

Array = NDArray[np.float32]
Weights = Mapping[str, Tensor]
Drop = Callable[[Tensor], Tensor]

BUFFERS = ("mean", "variance")
"""Roles of tensors that training does not move: running statistics."""


@lru_cache(maxsize=256)
def architecture_of(config: Config) -> Architecture:
    """Return the description of a design.

    Example:
        >>> architecture_of(Config("mlp", 4, 3, (8,))).groups["hidden.0"].gauge
        <Gauge.SCALE: 'scale'>
    """
    return DESIGNS[config.kind](config)


@lru_cache(maxsize=256)
def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Return name → shape of a design's tensors, out × in × space.

    Example:
        >>> shapes_of(Config("mlp", 4, 3, (8,)))
        {'0.weight': (8, 4), '0.bias': (8,), '2.weight': (3, 8), '2.bias': (3,)}
    """
    made = architecture_of(config)
    return {
        name: tuple(
            layers.KERNEL
            if axis is None
            else axis.before * made.groups[axis.group].size * axis.inner
            for axis in axes
        )
        for name, axes in made.axes.items()
    }


@lru_cache(maxsize=256)
def roles_of(config: Config) -> dict[str, str]:
    """Return name → role of a design's tensors, as `Step.tensors` names them; `table` if looked up.

    Example:
        >>> roles_of(Config("mlp", 4, 3, (8,)))["0.bias"]
        'bias'
    """
    return {
        name: "table" if step.op is Op.EMBEDDING else role
        for step in architecture_of(config).steps
        for role, name in step.tensors.items()
    }


def new_start(
    config: Config, seed: int, *, law: str = "uniform", scale: float = 1.0
) -> dict[str, Array]:
    """Return a random start.

    Args:
        config: The design.
        seed: Decides every value.
        law: `uniform`: weights and biases within ±1/√fan-in, as PyTorch starts them; `normal`:
            variance 2/fan-in (He et al. 2015, ICCV), biases 0.
        scale: Multiplies the weights, not biases, tables, gains and statistics.

    Example:
        >>> new_start(Config("mlp", 4, 3, (8,)), 0)["0.weight"].shape
        (8, 4)
    """
    rng = np.random.default_rng(seed)
    roles, shapes = roles_of(config), shapes_of(config)
    start: dict[str, Array] = {}
    fan_in = 1
    for name, shape in shapes.items():
        role = roles[name]
        if role in ("gain", "variance"):
            values = np.ones(shape)
        elif role in ("offset", "mean"):
            values = np.zeros(shape)
        elif role == "table":
            values = rng.normal(0, 0.5, shape)
        elif len(shape) == 1:
            # A bias follows its weights, so the last fan-in is its own.
            limit = 1 / np.sqrt(fan_in)
            values = rng.uniform(-limit, limit, shape) if law == "uniform" else np.zeros(shape)
        else:
            fan_in = int(np.prod(shape[1:]))
            limit = scale / np.sqrt(fan_in)
            values = (
                rng.uniform(-limit, limit, shape)
                if law == "uniform"
                else rng.normal(0, limit * np.sqrt(2), shape)
            )
        start[name] = values.astype(np.float32)
    return start


def forward(
    config: Config, weights: Weights, x: Tensor, *, training: bool = False, drop: Drop | None = None
) -> Tensor:
    """Return the logits of K models.

    Args:
        config: Their design.
        weights: Name → (K, …).
        x: (K, B, H, W) pictures, sounds or rows of columns (H = 1), (K, B, N, F + N) graphs whose
            nodes have F values and a row of neighbours, or (K, B, T) numbers of tokens.
        training: Whether batch norms use and remember the statistics of the batch.
        drop: Done to hidden activations.

    Returns:
        (K, B, classes), or (K, B, T, classes) of a language model.
    """
    return _FORWARD[config.kind](config, weights, x, _Mode(training, drop or _kept))


def _kept(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, slots=True)
class _Mode:
    """What differs between training and use."""

    training: bool
    drop: Drop


def _mlp(config: Config, w: Weights, x: Tensor, mode: _Mode) -> Tensor:
    act = layers.ACTIVATIONS[config.activation]
    x = x.flatten(2)
    for number in range(len(config.widths)):
        x = layers.linear(x, w[f"{2 * number}.weight"], w[f"{2 * number}.bias"])
        x = mode.drop(act(x))
    last = 2 * len(config.widths)
    return layers.linear(x, w[f"{last}.weight"], w[f"{last}.bias"])


def _normed(config: Config, w: Weights, x: Tensor, norm: str, mode: _Mode) -> Tensor:
    """Return what the batch norm of this name makes of x; x, if the design has none."""
    if not config.norm:
        return x
    names = ("weight", "bias", "running_mean", "running_var")
    parts = [w[f"{norm}.{name}"] for name in names]
    return layers.batch_norm(x, *parts, training=mode.training)


def _cnn(config: Config, w: Weights, x: Tensor, mode: _Mode) -> Tensor:
    act = layers.ACTIVATIONS[config.activation]
    x = x.unsqueeze(-1)
    if config.residual:
        x = act(_normed(config, w, _conv(w, "stem", x, 2), "stem_norm", mode))
        for number in range(len(config.widths)):
            block = f"blocks.{number}"
            inner = _normed(config, w, _conv(w, f"{block}.conv1", x), f"{block}.norm1", mode)
            inner = _conv(w, f"{block}.conv2", mode.drop(act(inner)))
            x = act(x + _normed(config, w, inner, f"{block}.norm2", mode))
    else:
        for number in range(len(config.widths)):
            x = _conv(w, f"convs.{number}", x, 2)
            x = mode.drop(act(_normed(config, w, x, f"norms.{number}", mode)))
    return layers.linear(x.mean(dim=(2, 3)), w["head.weight"], w["head.bias"])


def _conv(w: Weights, name: str, x: Tensor, stride: int = 1) -> Tensor:
    return layers.convolution(x, w[f"{name}.weight"], w.get(f"{name}.bias"), stride)


def _rnn(config: Config, w: Weights, x: Tensor, mode: _Mode) -> Tensor:
    run = layers.elman if config.cell == "elman" else layers.gated_recurrent
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    x = mode.drop(run(x, *(w[f"rnn.{name}"] for name in names)))
    return layers.linear(x, w["head.weight"], w["head.bias"])


def _transformer(config: Config, w: Weights, x: Tensor, mode: _Mode) -> Tensor:
    if config.causal:
        # A product with one-hot rows: its derivative is a product too, always in the same order.
        table = w["tokens.weight"]
        chosen = torch.nn.functional.one_hot(x.long(), table.shape[1]).to(table.dtype)
        x = torch.bmm(chosen.flatten(1, 2), table).reshape(*x.shape, table.shape[2])
    else:
        x = layers.linear(_pieces(x, config.patch), w["embed.weight"], w.get("embed.bias"))
    x = x + w["position.weight"][:, None, : x.shape[2]]
    for number in range(len(config.widths)):
        block = f"blocks.{number}"
        read = layers.layer_norm(x, w[f"{block}.norm1.weight"], w.get(f"{block}.norm1.bias"))
        q, k, v = (
            layers.linear(
                read, w[f"{block}.attention.{n}.weight"], w.get(f"{block}.attention.{n}.bias")
            )
            for n in ("query", "key", "value")
        )
        mixed = layers.attention(q, k, v, heads=config.heads, causal=config.causal)
        x = x + mode.drop(_linear(w, f"{block}.attention.output", mixed))
        read = layers.layer_norm(x, w[f"{block}.norm2.weight"], w.get(f"{block}.norm2.bias"))
        x = x + mode.drop(_mixed_channels(config, w, block, read))
    x = layers.layer_norm(x, w["norm.weight"], w.get("norm.bias"))
    return _linear(w, "head", x if config.causal else x.mean(dim=2))


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return layers.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _mixed_channels(config: Config, w: Weights, block: str, x: Tensor) -> Tensor:
    act = layers.ACTIVATIONS[config.activation]
    if config.norm == "rms":
        gate = act(_linear(w, f"{block}.mlp.gate", x))
        return _linear(w, f"{block}.mlp.down", gate * _linear(w, f"{block}.mlp.up", x))
    return _linear(w, f"{block}.mlp.out", act(_linear(w, f"{block}.mlp.in", x)))


def _pieces(x: Tensor, patch: int) -> Tensor:
    """Return a picture (K, B, H, W) as a sequence: squares of this side, or its rows if it is 0."""
    if not patch:
        return x
    models, examples, height, width = x.shape
    parts = x.reshape(models, examples, height // patch, patch, width // patch, patch)
    return parts.permute(0, 1, 2, 4, 3, 5).reshape(models, examples, -1, patch * patch)


def _gnn(config: Config, w: Weights, x: Tensor, mode: _Mode) -> Tensor:
    act = layers.ACTIVATIONS[config.activation]
    x, neighbours = x[..., : config.inputs], x[..., config.inputs :]
    for number in range(len(config.widths)):
        around = torch.matmul(neighbours, x)
        name = f"convs.{number}"
        if config.cell == "sage":
            own = layers.linear(x, w[f"{name}.self.weight"])
            x = own + _linear(w, f"{name}.neighbour", around)
        else:
            x = _linear(w, name, around)
        x = mode.drop(act(x))
    return _linear(w, "head", x.mean(dim=2))


_FORWARD: dict[str, Callable[[Config, Weights, Tensor, _Mode], Tensor]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "rnn": _rnn,
    "transformer": _transformer,
    "gnn": _gnn,
}


def to_json(config: Config) -> dict[str, Any]:
    """Return a design as JSON keeps it.

    Example:
        >>> from_json(to_json(Config("mlp", 4, 3, (8,)))).widths
        (8,)
    """
    return asdict(config)


def from_json(facts: Mapping[str, Any]) -> Config:
    """Return the design that `to_json` wrote down."""
    known = {field.name for field in fields(Config)}
    values = {name: value for name, value in facts.items() if name in known}
    return Config(**{**values, "widths": tuple(facts["widths"])})
