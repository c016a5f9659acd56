"""Layers that run many models of one shape at once.

Every tensor begins with an axis of K models, so that one batched product does the work of K small
ones. Pictures have their channels last, because a convolution is then a product without another
copy. Nothing here draws random numbers.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

KERNEL = 3
"""Side of every kernel."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "tanh": torch.tanh,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x · weightᵀ + bias for each model.

    Args:
        x: (K, …, in).
        weight: (K, out, in).
        bias: (K, out).

    Returns:
        (K, …, out).

    Example:
        >>> linear(torch.ones(2, 5, 3), torch.ones(2, 4, 3), torch.ones(2, 4)).unique()
        tensor([4.])
    """
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    columns = weight.transpose(1, 2)
    if bias is None:
        out = torch.bmm(flat, columns)
    else:
        out = torch.baddbmm(bias.unsqueeze(1), flat, columns)
    return out.reshape(*x.shape[:-1], weight.shape[1])


class _Patches(torch.autograd.Function):
    """The 3 × 3 surroundings of each pixel, zeros beyond the border, one after the other.

    Written by hand because the derivative of slices makes a full picture of zeros for each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> Tensor:
        """Return (N, H', W', 9 · C) of (N, H, W, C)."""
        padded = functional.pad(x, (0, 0, 1, 1, 1, 1))
        ctx.stride, ctx.padded = stride, padded.shape
        return torch.cat([padded[place] for place in _places(padded.shape, stride)], dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the picture."""
        (gradient,) = gradients
        total = gradient.new_zeros(ctx.padded)
        channels = ctx.padded[-1]
        for number, place in enumerate(_places(ctx.padded, ctx.stride)):
            total[place] += gradient[..., number * channels : (number + 1) * channels]
        return total[:, 1:-1, 1:-1], None


def _places(padded: torch.Size, stride: int) -> list[tuple[slice, slice, slice]]:
    """Return where each of the nine neighbours lies in a padded picture."""
    height, width = ((side - KERNEL) // stride * stride + 1 for side in padded[1:3])
    return [
        (slice(None), slice(i, i + height, stride), slice(j, j + width, stride))
        for i in range(KERNEL)
        for j in range(KERNEL)
    ]


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """Return the 3 × 3 convolution of pictures, zeros beyond the border.

    Args:
        x: (K, B, H, W, in).
        weight: (K, out, in, 3, 3).
        bias: (K, out).
        stride: Step between outputs.

    Returns:
        (K, B, ⌈H / stride⌉, ⌈W / stride⌉, out).

    Example:
        >>> convolution(torch.ones(1, 2, 4, 4, 1), torch.ones(1, 5, 1, 3, 3), stride=2).shape
        torch.Size([1, 2, 2, 2, 5])
    """
    models, examples = x.shape[:2]
    patches: Tensor = _Patches.apply(x.flatten(0, 1), stride)  # type: ignore[no-untyped-call]
    rows = weight.permute(0, 1, 3, 4, 2).flatten(2)  # (K, out, 9 · in)
    out = linear(patches.reshape(models, -1, patches.shape[-1]), rows, bias)
    return out.reshape(models, examples, *patches.shape[1:3], weight.shape[1])


def batch_norm(
    x: Tensor,
    gain: Tensor,
    offset: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    training: bool,
    momentum: float = 0.1,
) -> Tensor:
    """Return x with each channel at mean 0 and variance 1, times the gain, plus the offset.

    Args:
        x: (K, …, C).
        gain: (K, C).
        offset: (K, C).
        mean: (K, C), the running mean; brought up to date in training.
        variance: (K, C), likewise.
        training: Whether statistics are those of this batch.
        momentum: Weight of this batch in the running statistics, as in PyTorch.

    Source:
        Ioffe & Szegedy 2015, ICML.
    """
    flat = x.flatten(1, -2)
    if training:
        spread, centre = torch.var_mean(flat, dim=1, correction=0)
        with torch.no_grad():
            number = flat.shape[1]
            mean += momentum * (centre - mean)
            variance += momentum * (spread * number / max(number - 1, 1) - variance)
    else:
        centre, spread = mean, variance
    scale = gain * torch.rsqrt(spread + 1e-5)
    return (flat * scale[:, None] + (offset - centre * scale)[:, None]).reshape(x.shape)


def layer_norm(x: Tensor, gain: Tensor, offset: Tensor | None) -> Tensor:
    """Return x with each row normed, times the gain.

    With an offset each row has mean 0 and variance 1 (Ba et al. 2016), without one its root mean
    square is 1 (Zhang & Sennrich 2019).

    Args:
        x: (K, …, C).
        gain: (K, C).
        offset: (K, C).
    """
    wide = (x.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])
    if offset is None:
        return functional.rms_norm(x, x.shape[-1:], eps=1e-6) * gain.view(wide)
    normed = functional.layer_norm(x, x.shape[-1:])
    return normed * gain.view(wide) + offset.view(wide)


def attention(query: Tensor, key: Tensor, value: Tensor, *, heads: int, causal: bool) -> Tensor:
    """Return the attention of each position to all, or to those before it.

    Args:
        query: (K, B, T, d).
        key: (K, B, T, d).
        value: (K, B, T, d).
        heads: How many share the d channels.
        causal: Whether positions see only what came before.

    Returns:
        (K, B, T, d).

    Source:
        Vaswani et al. 2017, NeurIPS.
    """
    models, examples, places, width = query.shape
    parts = (models * examples, places, heads, width // heads)
    q, k, v = (x.reshape(parts).transpose(1, 2) for x in (query, key, value))
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(width // heads)
    if causal:
        later = torch.ones(places, places, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    mixed = torch.matmul(scores.softmax(dim=-1), v)
    return mixed.transpose(1, 2).reshape(query.shape)


def elman(
    x: Tensor, weight: Tensor, recurrent: Tensor, bias: Tensor, recurrent_bias: Tensor
) -> Tensor:
    """Return the last state of an Elman network with tanh.

    Args:
        x: (K, B, T, in).
        weight: (K, units, in).
        recurrent: (K, units, units).
        bias: (K, units).
        recurrent_bias: (K, units).

    Returns:
        (K, B, units).
    """
    fed = linear(x, weight, bias + recurrent_bias)
    state = torch.tanh(fed[:, :, 0])
    for step in range(1, x.shape[2]):
        state = torch.tanh(fed[:, :, step] + torch.bmm(state, recurrent.transpose(1, 2)))
    return state


def gated_recurrent(
    x: Tensor, weight: Tensor, recurrent: Tensor, bias: Tensor, recurrent_bias: Tensor
) -> Tensor:
    """Return the last state of a GRU, gates in the order reset, update, new, as in PyTorch.

    Args:
        x: (K, B, T, in).
        weight: (K, 3 · units, in).
        recurrent: (K, 3 · units, units).
        bias: (K, 3 · units).
        recurrent_bias: (K, 3 · units).

    Returns:
        (K, B, units).

    Source:
        Cho et al. 2014, EMNLP.
    """
    fed = linear(x, weight, bias)
    units = recurrent.shape[2]
    state = x.new_zeros(x.shape[0], x.shape[1], units)
    for step in range(x.shape[2]):
        past = torch.baddbmm(recurrent_bias.unsqueeze(1), state, recurrent.transpose(1, 2))
        now = fed[:, :, step]
        reset, update = torch.sigmoid(now[..., : 2 * units] + past[..., : 2 * units]).chunk(2, -1)
        new = torch.tanh(now[..., 2 * units :] + reset * past[..., 2 * units :])
        state = new + update * (state - new)
    return state
