"""Small networks of well-known families, under their published tensor names, run by torch.

Each is a function of its weights, so that a test can change these and compare what comes out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Shapes = dict[str, tuple[int, ...]]
Weights = Mapping[str, NDArray[np.floating]]
Torch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Network:
    """Shapes of a family's tensors, and what is computed with them."""

    shapes: Shapes
    inputs: Callable[[], Tensor]
    forward: Callable[[Torch, Tensor], Tensor]
    config: dict[str, object]

    def weights(self, seed: int = 0, dtype: str = "float64") -> dict[str, NDArray[np.floating]]:
        """Return random weights: gains and variances around one, the rest small."""
        rng = np.random.default_rng(seed)
        return {name: drawn(name, shape, rng).astype(dtype) for name, shape in self.shapes.items()}

    def output(self, weights: Weights) -> NDArray[np.floating]:
        """Return what the network computes from fixed inputs."""
        found = {name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in weights.items()}
        inputs = self.inputs()
        if inputs.is_floating_point():
            inputs = inputs.to(next(iter(found.values())).dtype)
        with torch.no_grad():
            return np.asarray(self.forward(found, inputs).numpy())


def drawn(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    if name.endswith("running_var"):
        return np.exp(rng.normal(scale=0.3, size=shape))
    if len(shape) == 1 and name.endswith("weight"):
        return 1 + rng.normal(scale=0.3, size=shape)
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 4
    return rng.normal(scale=1.5 / np.sqrt(fan_in), size=shape)


def tokens(vocabulary: int = 11) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, vocabulary, (2, 6)))


def images(size: int = 16) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=(2, 3, size, size)))


def affine(w: Torch, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def layer_norm(w: Torch, name: str, x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, *, rotary: int = 0) -> Tensor:
    """Return attention; keys and values may have fewer heads, of the same number of channels.

    So many channels of each head are turned by positions, and then none looks ahead.
    """
    channels = q.shape[-1] // heads

    def split(x: Tensor) -> Tensor:
        x = x.reshape(*x.shape[:-1], -1, channels).transpose(1, 2)
        return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)

    q, k, v = split(q), split(k), split(v)
    if rotary:
        q, k = turned_by_position(q, rotary), turned_by_position(k, rotary)
    found = functional.scaled_dot_product_attention(q, k, v, is_causal=rotary > 0)
    return found.transpose(1, 2).flatten(2)


def turned_by_position(x: Tensor, count: int) -> Tensor:
    half = count // 2
    angle = torch.outer(torch.arange(x.shape[2]), 10.0 ** -torch.arange(half)).to(x.dtype)
    a, b, rest = x[..., :half], x[..., half:count], x[..., count:]
    return torch.cat(
        [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], dim=-1
    )


def norm_shapes(name: str, size: int, *, bias: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (size,)}
    return shapes | ({f"{name}.bias": (size,)} if bias else {})


def affine_shapes(name: str, out: int, into: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})
