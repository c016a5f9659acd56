"""Live torch modules, described from their graph: what they compute stays."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from embedder.architecture import Architecture, Op
from embedder.describing import describe
from embedder.errors import ArchitectureError
from embedder.symmetry import flipped, folded, permuted, rescaled
from embedder.torch_tracing import describe_module

Weights = dict[str, NDArray[np.floating]]
SYMMETRIES: dict[str, Callable[[Weights, Architecture, np.random.Generator], Weights]] = {
    "permuted": permuted,
    "rescaled": rescaled,
    "flipped": flipped,
    "folded": lambda weights, architecture, rng: folded(weights, architecture),
}


class Residual(nn.Module):
    """Batch norms in place and before, a sum around a depthwise convolution, a square, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.deep, self.deep_bn = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)
        self.before, self.wide = nn.BatchNorm2d(6), nn.Conv2d(6, 9, 1)
        self.gate, self.squared = nn.Conv2d(6, 9, 1), nn.Conv2d(9, 5, 1)
        self.head = nn.Linear(5 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.stem(x)))
        x = x + self.deep_bn(self.deep(x))
        h = torch.relu(self.before(x))
        h = self.wide(h) * torch.sigmoid(self.gate(x))
        h = self.squared(h)
        h = functional.max_pool2d(h * h, 2)
        found: Tensor = self.head(h.view(h.size(0), -1))
        return found


class Shared(nn.Module):
    """One layer used twice, and one whose output two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x)) + self.shift
        x = torch.tanh(self.again(torch.tanh(self.again(x))))
        found: Tensor = self.last(x)
        return found


class Transposed(nn.Module):
    """Units that are looked at from another side, which cannot be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(4, 5), nn.Linear(5, 5)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(functional.relu(self.middle(functional.relu(self.first(x)).T)))
        return found


def images() -> Tensor:
    return torch.randn(2, 3, 4, 4)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = {
    "perceptron": (
        lambda: nn.Sequential(
            nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 2)
        ),
        lambda: torch.randn(3, 4),
        "named scale order named",
    ),
    "normed": (
        lambda: nn.Sequential(
            *[nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 6)],
            *[nn.LayerNorm(6), nn.PReLU(), nn.Linear(6, 2)],
        ),
        lambda: torch.randn(3, 4),
        "named sign order scale named",
    ),
    "convolutional": (
        lambda: nn.Sequential(
            *[nn.Conv2d(3, 6, 3), nn.PReLU(6), nn.Conv2d(6, 8, 1), nn.ReLU6(), nn.AvgPool2d(2)],
            *[nn.Flatten(), nn.Dropout(), nn.Linear(8, 2), nn.Softmax(1)],
        ),
        images,
        "named scale order named",
    ),
    "residual": (Residual, images, "named order scale order order named"),
    "shared": (Shared, lambda: torch.randn(3, 4), "named sign named"),
    "pooled": (
        lambda: nn.Sequential(
            *[nn.Linear(4, 6), nn.AvgPool1d(2), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)]
        ),
        lambda: torch.randn(3, 4),
        "named named named sign named",
    ),
}


def ready(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = make().double().eval()
    for name, values in module.state_dict().items():
        if values.is_floating_point() and values.ndim == 1:
            values.copy_(torch.rand(values.shape) + (0.5 if "var" in name else 0.1))
    return module


def change_of(module: nn.Module, found: Architecture, inputs: Tensor, symmetry: str) -> float:
    weights = {n: w.numpy() for n, w in module.state_dict().items() if w.is_floating_point()}
    moved = SYMMETRIES[symmetry](weights, found, np.random.default_rng(1))
    given = {name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in moved.items()}
    with torch.no_grad():
        before = module(inputs.double())
        after = torch.func.functional_call(module, given, (inputs.double(),))
    return float((after - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("symmetry", list(SYMMETRIES))
@pytest.mark.parametrize("name", list(CASES))
def test_the_function_is_kept(name: str, symmetry: str) -> None:
    make, inputs, gauges = CASES[name]
    module = ready(make)
    found = describe_module(module)
    assert change_of(module, found, inputs(), symmetry) < 1e-11
    kinds = [group.gauge.value for group in found.groups.values()]
    assert sorted(kinds) == sorted(gauges.split())
    assert found.confidence == 1


def test_a_module_that_cannot_be_walked_through_is_described_by_its_shapes() -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.b(torch.relu(self.a(x)) if x.sum() > 0 else self.a(x))
            return found

    with pytest.raises(ArchitectureError, match="cannot be walked through"):
        describe_module(Asking())
    assert describe(Asking()).family == "chain"
    assert describe(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))).family == "graph"


def test_an_operation_that_cannot_be_followed_is_named() -> None:
    class Sorting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(9, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.b(torch.cat([self.a(x).sort().values, x[:, :1]], 1))
            return found

    with pytest.raises(ArchitectureError, match=r"sort.*by its names and shapes: .* takes 9"):
        describe(Sorting())


def test_without_hidden_units_there_is_nothing_to_describe() -> None:
    with pytest.raises(ArchitectureError, match="no hidden units"):
        describe_module(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(ArchitectureError, match="no layer"):
        describe_module(nn.ReLU())


def test_folding_takes_batch_norms_into_the_layers_before_them() -> None:
    module = ready(Residual)
    found = describe_module(module)
    weights = {n: w.numpy() for n, w in module.state_dict().items() if w.is_floating_point()}
    changed = folded(weights, found)
    for norm in ("bn", "deep_bn"):
        np.testing.assert_array_equal(changed[f"{norm}.running_mean"], 0)
    assert [step.kind for step in found.steps if step.op == Op.NORM] == ["batch"] * 3


def test_units_that_are_seen_from_another_side_keep_their_places() -> None:
    module = ready(Transposed)
    found = describe_module(module)
    assert change_of(module, found, torch.randn(5, 4), "permuted") < 1e-11
    free = [group.size for group in found.groups.values() if group.gauge != "named"]
    assert free == [5]


class Program(nn.Module):
    """A network of random layers: each line reads values that were made before it."""

    def __init__(self, seed: int, *, space: bool) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self.space, self.lines = space, list[tuple[str, int, int]]()
        self.layers = nn.ModuleDict()
        self.shifts = nn.ParameterDict()
        self.again: list[str] = []
        made: dict[tuple[str, int, int], str] = {}
        widths = [3]
        names = ["map", "map", "function", "add", "add", "multiply", "shift", "stretch", "one"]
        names += ["batch", "layer", "slope"] + ["deep", "pool"] * space
        for number in range(1, int(rng.integers(4, 12))):
            kind = str(rng.choice(names))
            first = int(rng.integers(len(widths)))
            alike = [p for p, width in enumerate(widths) if width == widths[first]]
            self.lines.append((kind, first, int(rng.choice(alike))))
            widths.append(int(rng.choice([4, 5])) if kind == "map" else widths[first])
            known = (kind, widths[first], widths[-1])
            self.again.append(str(number))
            if known in made and rng.integers(4) == 0:
                self.again[-1] = made[known]  # one module in two places
            else:
                self.make(kind, str(number), widths[first], widths[-1], rng)
                made[known] = str(number)
        self.head = nn.Conv2d(widths[-1], 2, 1) if space else nn.Linear(widths[-1], 2)

    def make(self, kind: str, name: str, into: int, out: int, rng: np.random.Generator) -> None:
        bias = bool(rng.integers(2))
        flat: dict[str, Callable[[], nn.Module]] = {
            "map": lambda: nn.Linear(into, out, bias=bias),
            "batch": lambda: nn.BatchNorm1d(out),
            "layer": lambda: nn.LayerNorm(out),
            "slope": lambda: nn.PReLU(out if bias else 1),
        }
        spatial: dict[str, Callable[[], nn.Module]] = {
            "map": lambda: nn.Conv2d(into, out, 1, bias=bias),
            "batch": lambda: nn.BatchNorm2d(out),
            "deep": lambda: nn.Conv2d(out, out, 3, padding=1, groups=out, bias=bias),
            "pool": lambda: [nn.MaxPool2d, nn.AvgPool2d][int(bias)](3, 1, 1),
            "slope": flat["slope"],
        }
        functions = [nn.ReLU(), nn.Tanh(), nn.GELU(), nn.LeakyReLU(), nn.Sigmoid(), nn.Identity()]
        if kind == "function":
            self.layers[name] = functions[int(rng.integers(len(functions)))]
        elif kind in (made := spatial if self.space else flat):
            self.layers[name] = made[kind]()
        elif kind in ("shift", "stretch"):
            size = (out, 1, 1) if self.space else (out,)
            self.shifts[name] = nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for number, (kind, first, second) in enumerate(self.lines, 1):
            a, b, name = values[first], values[second], self.again[number - 1]
            if kind == "add":
                values.append(a + b)
            elif kind == "multiply":
                values.append(a * b)
            elif kind == "shift":
                values.append(a + self.shifts[name])
            elif kind == "stretch":
                values.append(a * self.shifts[name])
            elif kind == "one":
                values.append(a + 1)
            elif name in self.layers:
                values.append(self.layers[name](a))
            else:
                values.append(a)
        found: Tensor = self.head(values[-1])
        return found


@given(st.integers(0, 10**6), st.booleans(), st.sampled_from(list(SYMMETRIES)))
@settings(deadline=None, max_examples=40)
def test_whatever_is_built_computes_the_same(seed: int, space: bool, symmetry: str) -> None:
    torch.manual_seed(seed)
    module = ready(lambda: Program(seed, space=space))
    try:
        found = describe_module(module)
    except ArchitectureError as error:
        assume("no hidden units" not in str(error))
        raise
    inputs = torch.randn(2, 3, 3, 3) if space else torch.randn(4, 3)
    assert change_of(module, found, inputs, symmetry) < 1e-9
