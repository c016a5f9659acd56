"""Computes what a TFLite file computes, for the operators that our tests and real models have.

There is no TFLite runtime to test with on every machine, so this one follows the operators'
definitions in the schema with the functions of torch. It shares nothing with what is tested.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import tflite
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Array = NDArray[np.floating[Any]]
NAMES = {number: name for name, number in vars(tflite.BuiltinOperator).items()}
FUSED: dict[int, Callable[[Tensor], Tensor]] = {
    0: lambda x: x,
    1: torch.relu,
    2: lambda x: x.clamp(-1, 1),
    3: functional.relu6,
    4: torch.tanh,
}


class Runner:
    """One file; constants that are given by name take the place of those in it."""

    def __init__(self, path: Path, weights: Mapping[str, Array]) -> None:
        self.root = tflite.Model.GetRootAsModel(path.read_bytes(), 0)
        self.graph = self.root.Subgraphs(0)
        self.weights = weights
        self.values: dict[int, Tensor] = {}

    def run(self, feeds: list[Array]) -> list[Array]:
        for number, values in zip(self.graph.InputsAsNumpy(), feeds, strict=True):
            self.values[int(number)] = torch.from_numpy(values.astype(np.float64))
        last: list[int] = []
        for place in range(self.graph.OperatorsLength()):
            node = self.graph.Operators(place)
            code = self.root.OperatorCodes(node.OpcodeIndex())
            number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
            name = NAMES[number] if number != 32 else code.CustomCode().decode()
            last = [int(output) for output in node.OutputsAsNumpy()]
            self.values[last[0]] = getattr(self, name.lower())(node)
        outputs = self.graph.OutputsAsNumpy() if self.graph.OutputsLength() else last
        return [self.values[int(number)].numpy() for number in outputs]

    def get(self, node: Any, place: int) -> Tensor:
        number = int(node.Inputs(place))
        if number not in self.values:
            record = self.graph.Tensors(number)
            self.values[number] = torch.from_numpy(self.constant(record))
        return self.values[number]

    def constant(self, record: Any) -> NDArray[Any]:
        name = record.Name().decode()
        if name in self.weights:
            return self.weights[name].astype(np.float64)
        dtype = {0: "<f4", 1: "<f2", 2: "<i4", 4: "<i8"}[record.Type()]
        data = self.root.Buffers(record.Buffer()).DataAsNumpy()
        found = np.frombuffer(data.tobytes(), dtype).reshape(record.ShapeAsNumpy())
        return found.astype(np.float64 if record.Type() < 2 else np.int64)

    def options(self, node: Any, table: str) -> Any:
        found = getattr(tflite, table)()
        if node.BuiltinOptions() is None:
            builder = flatbuffers.Builder(16)
            getattr(tflite, f"{table}Start")(builder)
            builder.Finish(getattr(tflite, f"{table}End")(builder))
            return found.GetRootAs(bytes(builder.Output()), 0)
        found.Init(node.BuiltinOptions().Bytes, node.BuiltinOptions().Pos)
        return found

    def shape(self, node: Any) -> list[int]:
        return [int(n) for n in self.graph.Tensors(node.Outputs(0)).ShapeAsNumpy()]

    def padded(self, x: Tensor, kernel: list[int], options: Any, fill: float) -> Tensor:
        """Return channels first, with the border that the padding SAME asks for."""
        x = x.permute(0, 3, 1, 2)
        if options.Padding() == tflite.Padding.VALID:
            return x
        sides: list[int] = []
        steps = (options.StrideH(), options.StrideW())
        for size, width, step in zip(x.shape[2:], kernel, steps, strict=True):
            total = max((-(-size // step) - 1) * step + width - size, 0)
            sides = [total // 2, total - total // 2, *sides]
        return functional.pad(x, sides, value=fill)

    def conv(self, node: Any, table: str, weight: Tensor, groups: int) -> Tensor:
        options = self.options(node, table)
        dilation = (options.DilationHFactor(), options.DilationWFactor())
        kernel = [(n - 1) * d + 1 for n, d in zip(weight.shape[2:], dilation, strict=True)]
        x = self.padded(self.get(node, 0), kernel, options, 0)
        bias = self.get(node, 2) if node.InputsLength() > 2 else None
        stride = (max(options.StrideH(), 1), max(options.StrideW(), 1))
        y = functional.conv2d(x, weight, bias, stride, dilation=dilation, groups=groups)
        return FUSED[options.FusedActivationFunction()](y.permute(0, 2, 3, 1))

    def conv_2d(self, node: Any) -> Tensor:
        return self.conv(node, "Conv2DOptions", self.get(node, 1).permute(0, 3, 1, 2), 1)

    def depthwise_conv_2d(self, node: Any) -> Tensor:
        weight = self.get(node, 1).permute(3, 0, 1, 2)
        return self.conv(node, "DepthwiseConv2DOptions", weight, len(weight))

    def convolution2dtransposebias(self, node: Any) -> Tensor:
        x, weight = self.get(node, 0).permute(0, 3, 1, 2), self.get(node, 1).permute(3, 0, 1, 2)
        y = functional.conv_transpose2d(x, weight, self.get(node, 2), stride=2)
        return y.permute(0, 2, 3, 1)

    def transpose_conv(self, node: Any) -> Tensor:
        x, weight = self.get(node, 2).permute(0, 3, 1, 2), self.get(node, 1).permute(3, 0, 1, 2)
        step = max(self.options(node, "TransposeConvOptions").StrideH(), 1)
        return functional.conv_transpose2d(x, weight, stride=step).permute(0, 2, 3, 1)

    def fully_connected(self, node: Any) -> Tensor:
        weight = self.get(node, 1)
        x = self.get(node, 0).reshape(-1, weight.shape[1])
        bias = self.get(node, 2) if node.InputsLength() > 2 else None
        y = functional.linear(x, weight, bias).reshape(self.shape(node))
        return FUSED[self.options(node, "FullyConnectedOptions").FusedActivationFunction()](y)

    def pool(self, node: Any, *, most: bool) -> Tensor:
        options = self.options(node, "Pool2DOptions")
        kernel = [options.FilterHeight(), options.FilterWidth()]
        x = self.padded(self.get(node, 0), kernel, options, -np.inf if most else 0)
        stride = (options.StrideH(), options.StrideW())
        function = functional.max_pool2d if most else functional.avg_pool2d
        y = function(x, kernel, stride).permute(0, 2, 3, 1)
        return FUSED[options.FusedActivationFunction()](y)

    def max_pool_2d(self, node: Any) -> Tensor:
        return self.pool(node, most=True)

    def average_pool_2d(self, node: Any) -> Tensor:
        return self.pool(node, most=False)

    def two(self, node: Any, table: str, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        y = function(self.get(node, 0), self.get(node, 1))
        return FUSED[self.options(node, table).FusedActivationFunction()](y) if table else y

    def add(self, node: Any) -> Tensor:
        return self.two(node, "AddOptions", torch.add)

    def sub(self, node: Any) -> Tensor:
        return self.two(node, "SubOptions", torch.sub)

    def mul(self, node: Any) -> Tensor:
        return self.two(node, "MulOptions", torch.mul)

    def div(self, node: Any) -> Tensor:
        return self.two(node, "DivOptions", torch.div)

    def maximum(self, node: Any) -> Tensor:
        return self.two(node, "", torch.maximum)

    def squared_difference(self, node: Any) -> Tensor:
        return self.two(node, "", lambda a, b: (a - b) ** 2)

    def prelu(self, node: Any) -> Tensor:
        return self.two(node, "", lambda x, slope: torch.where(x >= 0, x, slope * x))

    def leaky_relu(self, node: Any) -> Tensor:
        slope = self.options(node, "LeakyReluOptions").Alpha()
        return functional.leaky_relu(self.get(node, 0), slope)

    def relu(self, node: Any) -> Tensor:
        return torch.relu(self.get(node, 0))

    def relu6(self, node: Any) -> Tensor:
        return functional.relu6(self.get(node, 0))

    def tanh(self, node: Any) -> Tensor:
        return torch.tanh(self.get(node, 0))

    def logistic(self, node: Any) -> Tensor:
        return torch.sigmoid(self.get(node, 0))

    def hard_swish(self, node: Any) -> Tensor:
        return functional.hardswish(self.get(node, 0))

    def rsqrt(self, node: Any) -> Tensor:
        return torch.rsqrt(self.get(node, 0))

    def softmax(self, node: Any) -> Tensor:
        return torch.softmax(self.get(node, 0), -1)

    def dequantize(self, node: Any) -> Tensor:
        return self.get(node, 0)

    quantize = densify = dequantize

    def pad(self, node: Any) -> Tensor:
        widths = self.get(node, 1).flip(0).reshape(-1).tolist()
        return functional.pad(self.get(node, 0), widths)

    def reshape(self, node: Any) -> Tensor:
        return self.get(node, 0).reshape(self.shape(node))

    expand_dims = squeeze = reshape

    def transpose(self, node: Any) -> Tensor:
        return self.get(node, 0).permute(self.get(node, 1).tolist())

    def concatenation(self, node: Any) -> Tensor:
        terms = [self.get(node, place) for place in range(node.InputsLength())]
        return torch.cat(terms, self.options(node, "ConcatenationOptions").Axis())

    def mean(self, node: Any) -> Tensor:
        axes = self.get(node, 1).reshape(-1).tolist()
        return self.get(node, 0).mean(axes).reshape(self.shape(node))

    def resize_bilinear(self, node: Any) -> Tensor:
        size = self.get(node, 1).tolist()
        x = self.get(node, 0).permute(0, 3, 1, 2)
        return functional.interpolate(x, size, mode="bilinear").permute(0, 2, 3, 1)

    def depth_to_space(self, node: Any) -> Tensor:
        # The order within a block is not torch's: channels lie innermost here.
        x, block = self.get(node, 0), self.options(node, "DepthToSpaceOptions").BlockSize()
        n, h, w, c = x.shape
        split = x.reshape(n, h, w, block, block, c // block**2)
        return split.permute(0, 1, 3, 2, 4, 5).reshape(n, h * block, w * block, -1)


def run(path: Path, weights: Mapping[str, Array], feeds: list[Array]) -> list[Array]:
    """Return the outputs of a file with some of its constants replaced."""
    with torch.inference_mode():
        return Runner(path, weights).run(feeds)
