"""Random TFLite graphs: whatever is described computes the same."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from embedder.errors import ArchitectureError
from tflite_layers import SYMMETRIES, change_of, conv, described, options
from tflite_writer import Given, Graph, Step, Writer

MAP = (1, 4, 4)


class Maker:
    """Puts operators together at random; each value's shape is known."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.tensors: dict[str, Given] = {"x": Given((*MAP, 3))}
        self.steps: list[Step] = []
        self.values = [("x", 3)]
        kinds = [self.mixed, self.mixed, self.depthwise, self.function, self.added, self.gated]
        kinds += [self.sloped, self.shifted, self.beside]
        for _ in range(int(self.rng.integers(3, 12))):
            place = -1 - min(int(self.rng.geometric(0.6)) - 1, len(self.values) - 1)
            kinds[int(self.rng.integers(len(kinds)))](*self.values[place])
        name, width = self.values[-1]
        self.steps.append(conv(name, self.constant(2, 1, 1, width), to=self.value(2)))
        self.graph = Graph(self.tensors, self.steps, ["x"], [self.values[-1][0]])

    def constant(self, *shape: int) -> str:
        name = f"w{len(self.tensors)}"
        self.tensors[name] = Given.of(self.rng.normal(size=shape).astype(np.float32))
        return name

    def value(self, width: int) -> str:
        name = f"v{len(self.tensors)}"
        self.tensors[name] = Given((*MAP, width))
        self.values.append((name, width))
        return name

    def alike(self, width: int) -> str:
        names = [name for name, other in self.values if other == width]
        return names[int(self.rng.integers(len(names)))]

    def act(self) -> str:
        return ["", "relu", "relu6", "tanh"][int(self.rng.integers(4))]

    def mixed(self, name: str, width: int) -> None:
        out = int(self.rng.choice([4, 5]))
        inputs = [name, self.constant(out, 1, 1, width)]
        inputs += [self.constant(out)] * int(self.rng.integers(2))
        self.steps.append(conv(*inputs, to=self.value(out), act=self.act()))

    def depthwise(self, name: str, width: int) -> None:
        inputs = [name, self.constant(1, 3, 3, width), self.constant(width)]
        step = conv(*inputs, to=self.value(width), act=self.act(), op="DEPTHWISE_CONV_2D")
        self.steps.append(step)

    def function(self, name: str, width: int) -> None:
        op = ["RELU", "TANH", "LOGISTIC", "RELU6", "SOFTMAX"][int(self.rng.integers(5))]
        self.steps.append(Step(op, [name], [self.value(width)]))

    def added(self, name: str, width: int) -> None:
        op = ["ADD", "SUB", "MAXIMUM"][int(self.rng.integers(3))]
        self.steps.append(Step(op, [name, self.alike(width)], [self.value(width)]))

    def gated(self, name: str, width: int) -> None:
        self.steps.append(Step("MUL", [name, self.alike(width)], [self.value(width)]))

    def sloped(self, name: str, width: int) -> None:
        self.steps.append(Step("PRELU", [name, self.constant(1, 1, width)], [self.value(width)]))

    def shifted(self, name: str, width: int) -> None:
        op = ["ADD", "MUL"][int(self.rng.integers(2))]
        other = self.constant(*[(width,), (1,), (4, 1)][int(self.rng.integers(3))])
        self.steps.append(Step(op, [name, other], [self.value(width)]))

    def beside(self, name: str, width: int) -> None:
        axis = options("ConcatenationOptions", Axis=3)
        names = [name, self.alike(width)]
        self.steps.append(Step("CONCATENATION", names, [self.value(2 * width)], axis))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_whatever_is_described_computes_the_same(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    path = Writer([Maker(seed).graph]).write(tmp_path_factory.mktemp("random") / "m.tflite")
    try:
        described(path)
    except ArchitectureError:
        assume(False)
    for symmetry in SYMMETRIES:
        assert change_of(path, symmetry) < 1e-9
