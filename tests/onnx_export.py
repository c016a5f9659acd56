"""Networks of these tests as ONNX, by PyTorch's own exporter."""

import warnings
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

Forward = Callable[[Mapping[str, Tensor], Tensor], Tensor]
Weights = Mapping[str, NDArray[np.floating]]


class _Module(nn.Module):
    """A function of weights, which are its parameters."""

    def __init__(self, function: Forward, weights: Weights) -> None:
        super().__init__()
        self.function, self.names = function, list(weights)
        for name, values in weights.items():
            tensor = torch.from_numpy(np.ascontiguousarray(values))
            parameter = nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name.replace(".", "__"), parameter)

    def forward(self, x: Tensor) -> Tensor:
        named = {name: getattr(self, name.replace(".", "__")) for name in self.names}
        return self.function(named, x)


def _rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor, epsilon: float) -> Tensor:
    """Return what torch's function does, in the operations in which models write it."""
    assert shape == x.shape[-1:]
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))


def as_onnx(function: Forward, weights: Weights, x: Tensor) -> onnx.ModelProto:
    """Return a network as ONNX; the sizes of its input are left open, but those of images."""
    open_axes = "n" if x.ndim > 2 else "nl"
    sizes = {place: torch.export.Dim(name) for place, name in enumerate(open_axes)}
    module = _Module(function, weights).eval()
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(functional, "rms_norm", _rms_norm)
        program = torch.onnx.export(module, (x,), dynamic_shapes=(sizes,), verbose=False)
    assert program is not None
    return program.model_proto
