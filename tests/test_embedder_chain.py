"""Chains of layers, inferred from shapes: right for what torch runs, errors for what is none."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from embedder.architecture import Gauge, Op
from embedder.chain import infer
from embedder.describing import describe
from embedder.errors import ArchitectureError
from embedder.live import open_live
from embedder.symmetry import permuted
from networks import FAMILIES

WIDTHS = st.lists(st.integers(2, 9), min_size=3, max_size=6)
IMAGE = 4


def with_statistics(module: nn.Module, seed: int) -> nn.Module:
    """Return a module in double precision whose vectors are all away from their start."""
    torch.manual_seed(seed)
    for name, values in module.double().eval().state_dict().items():
        if values.is_floating_point():
            values.copy_(torch.rand(values.shape) + (0.5 if "var" in name else -0.3))
    return module


def change_of(module: nn.Module, inputs: torch.Tensor, *, hidden: bool = False) -> float:
    """Return the largest relative change of the output when the described units are permuted."""
    state = {n: w.numpy() for n, w in module.state_dict().items() if w.is_floating_point()}
    names = {name: f"t{place:03}" if hidden else name for place, name in enumerate(state)}
    found = describe({names[name]: values.shape for name, values in state.items()})
    weights = {names[name]: values for name, values in state.items()}
    moved = permuted(weights, found, np.random.default_rng(1))
    given = {name: torch.from_numpy(moved[names[name]].copy()) for name in state}
    with torch.no_grad():
        before = first(module(inputs.double()))
        after = first(torch.func.functional_call(module, given, (inputs.double(),)))
    return float((after - before).abs().max() / before.abs().max())


def first(found: object) -> torch.Tensor:
    found = found[0] if isinstance(found, tuple) else found
    assert isinstance(found, torch.Tensor)
    return found


def perceptron(widths: list[int], *, norm: str = "", bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for into, out in pairwise(widths[:-1]):
        layers.append(nn.Linear(into, out, bias=bias))
        layers += [nn.BatchNorm1d(out)] * (norm == "batch") + [nn.LayerNorm(out)] * (
            norm == "layer"
        )
        layers.append(nn.GELU())
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=bias))


def convolutional(widths: list[int], *, norm: bool, depthwise: bool, pooled: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for into, out in pairwise(widths[:-1]):
        layers.append(nn.Conv2d(into, out, 3, padding=1))
        layers += [nn.BatchNorm2d(out)] * norm + [nn.SiLU()]
        if depthwise:
            layers.append(nn.Conv2d(out, out, 3, padding=1, groups=out))
            layers += [nn.BatchNorm2d(out)] * norm + [nn.ReLU()]
    layers.append(nn.AdaptiveAvgPool2d(1 if pooled else 2))
    pixels = 1 if pooled else 4
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-2] * pixels, widths[-1]))


@given(WIDTHS, st.sampled_from(["", "batch", "layer"]), st.booleans(), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_a_perceptron_is_described_with_and_without_its_names(
    widths: list[int], norm: str, hidden: bool, seed: int
) -> None:
    module = with_statistics(perceptron(widths, norm=norm), seed)
    assert change_of(module, torch.randn(3, widths[0]), hidden=hidden) < 1e-12


@given(WIDTHS, *[st.booleans()] * 4)
@settings(deadline=None, max_examples=25)
def test_a_convolutional_network_is_described_with_and_without_its_names(
    widths: list[int], norm: bool, depthwise: bool, pooled: bool, hidden: bool
) -> None:
    network = convolutional(widths, norm=norm, depthwise=depthwise, pooled=pooled)
    inputs = torch.randn(2, widths[0], IMAGE, IMAGE)
    assert change_of(with_statistics(network, 0), inputs, hidden=hidden) < 1e-12


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("make", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_cells_are_described_in_any_order_of_their_tensors(
    make: Callable[..., nn.Module], layers: int
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = make(4, 6, num_layers=layers)
            self.head = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return first(self.head(first(self.cells(x))))

    module = with_statistics(Net(), 0)
    assert change_of(module, torch.randn(5, 2, 4)) < 1e-12
    shapes = {name: tuple(values.shape) for name, values in module.state_dict().items()}
    in_order = describe(shapes)
    by_name = describe(dict(sorted(shapes.items())))
    assert in_order.axes == by_name.axes
    sizes = [group.size for group in in_order.groups.values()]
    assert sizes == [4, *[6] * layers, 3]


def test_norms_that_are_listed_after_all_matrices_find_theirs() -> None:
    shapes = {"conv1.weight": (8, 3, 3, 3), "conv2.weight": (8, 8, 3, 3), "fc.weight": (5, 8)}
    words = ("weight", "bias", "running_mean", "running_var")
    shapes |= {f"bn{i}.{word}": (8,) for i in (1, 2) for word in words}
    for order in (shapes, dict(sorted(shapes.items()))):
        found = describe(order)
        for i in (1, 2):
            assert {axis and axis.group for w in words for axis in found.axes[f"bn{i}.{w}"]} == {
                f"units{i}"
            }
        assert found.steps[1].kind == "batch"


def test_a_live_module_and_numbers_above_nine_keep_their_order() -> None:
    module = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(4, 4), nn.ReLU())])
    found = describe(open_live(module))
    for order in (list(found.axes), [step.tensors["weight"] for step in found.steps]):
        weights = [name for name in order if name.endswith("weight")]
        assert weights == [f"{2 * place}.weight" for place in range(12)]
    by_name = dict(sorted((name, w.shape) for name, w in module.state_dict().items()))
    assert describe(by_name).steps == found.steps


def test_a_table_of_tokens_comes_first() -> None:
    found = describe({"embed.weight": (50, 8), "fc.weight": (3, 8), "fc.bias": (3,)})
    assert [step.op for step in found.steps] == ["embedding", "linear"]
    assert found.groups["inputs"].size == 50


def test_matrices_that_lie_as_in_times_out_are_seen_by_their_biases() -> None:
    found = describe({"w0": (4, 8), "b0": (8,), "w1": (8, 3), "b1": (3,)})
    assert [axis and axis.group for axis in found.axes["w0"]] == ["inputs", "units1"]
    assert all(step.turned for step in found.steps)
    assert found.confidence == 0.99


def test_where_nothing_tells_how_matrices_lie_the_confidence_is_halved() -> None:
    assert describe({"a": (8, 4), "b": (4, 8)}).confidence == pytest.approx(0.25)
    assert describe({"a": (8, 4), "a_bias": (8,), "b": (3, 8)}).confidence == 0.99


class Sum(nn.Module):
    """A perceptron whose hidden layers may add to each other."""

    def __init__(self, widths: list[int], *, residual: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            h = torch.tanh(layer(x))
            x = x + h if self.residual and x.shape == h.shape else h
        return x


def test_the_confidence_is_the_share_of_right_descriptions() -> None:
    rng = np.random.default_rng(0)
    right: dict[float, list[bool]] = {0.99: [], 0.5: []}
    for number in range(240):
        widths = rng.choice(np.arange(2, 12), size=5, replace=bool(number % 2)).tolist()
        module = with_statistics(Sum(widths, residual=bool(number // 2 % 2)), number)
        shapes = {f"t{place:02}": w.shape for place, w in enumerate(module.parameters())}
        confidence = describe(shapes).confidence
        right[confidence].append(change_of(module, torch.randn(3, widths[0]), hidden=True) < 1e-12)
    for confidence, found in right.items():
        assert len(found) > 50
        assert np.mean(found) >= confidence


def test_no_other_family_is_taken_for_a_chain_with_confidence() -> None:
    for make in FAMILIES.values():
        shapes = {f"t{place:03}": shape for place, shape in enumerate(make().shapes.values())}
        try:
            found = describe(shapes)
        except ArchitectureError:
            continue
        assert found.confidence <= 0.5


class TestBadInput:
    @pytest.mark.parametrize(
        ("shapes", "problem"),
        [
            ({"a": (8, 4), "b": (3, 7)}, "b: takes 7, and the 8 units before it do not fit"),
            ({"a": (8, 4), "b": (3, 0)}, "b: has no values"),
            ({"a": (8,)}, "there is no matrix"),
            ({}, "there is no matrix"),
            ({"a": (8, 4, 3), "v": (5,)}, "v: no layer has 5 units"),
            ({"a": (8, 4, 3, 3), "b": (6, 2, 3, 3)}, "b: takes 2, and the 8 units"),
            (
                {"a": (12, 3), "b": (12, 4), "c": (12,), "d": (12,), "e": (12,)},
                "e: a third bias of a",
            ),
            ({"r.weight_ih_l0_reverse": (8, 2)}, "run backwards"),
        ],
    )
    def test_what_is_no_chain_is_an_error(
        self, shapes: dict[str, tuple[int, ...]], problem: str
    ) -> None:
        with pytest.raises(ArchitectureError, match=problem):
            describe(shapes)

    def test_the_last_units_have_a_meaning(self) -> None:
        found = describe({"a": (8, 4), "a_b": (8,), "b": (3, 8)})
        assert found.groups["units2"].gauge == found.groups["inputs"].gauge == Gauge.NAMED


def test_a_word_tells_a_gain_from_an_offset_whatever_stands_around_it() -> None:
    words = ("beta", "gamma", "moving_mean", "moving_variance")
    norms = {f"b/b_3/{word}:0": (5,) for word in words}
    found = describe({"a/a_3/kernel:0": (5, 3), **norms, "c/c_3/kernel:0": (2, 5)})
    (norm,) = [step for step in found.steps if step.op == Op.NORM]
    roles = ("offset", "gain", "mean", "variance")
    assert norm.tensors == dict(zip(roles, norms, strict=True))


def test_a_single_number_is_no_vector_of_a_layer() -> None:
    sizes = {"scale": (1,), "a.weight": (5, 3), "a.bias": (5,), "b.weight": (2, 5)}
    found = describe(sizes)
    assert found.unexplained == ("scale",)
    assert list(found.axes) == ["a.weight", "a.bias", "b.weight"]
    narrow = describe({"a.weight": (1, 3), "a.bias": (1,), "b.weight": (2, 1)})
    assert narrow.steps[0].tensors["bias"] == "a.bias"


def test_modules_are_put_in_order_where_the_file_is_in_that_of_the_alphabet() -> None:
    shapes = {
        "classifier.0.bias": (6,),
        "classifier.0.weight": (6, 5),
        "features.0.weight": (7, 4),
        "features.2.weight": (5, 7),
    }
    found = describe(shapes)
    assert [step.tensors["weight"] for step in found.steps] == [
        "features.0.weight",
        "features.2.weight",
        "classifier.0.weight",
    ]
    several = {"b.weight": (6, 6), "c.weight": (6, 6), "a.weight": (3, 6), "d.weight": (6, 4)}
    with pytest.raises(ArchitectureError, match="several orders"):
        infer(dict(sorted(several.items())), in_any_order=True)
    with pytest.raises(ArchitectureError, match="do not fit"):
        describe({"first.weight": (6, 5), "other.weight": (7, 4), "some.weight": (9, 3)})


def test_many_modules_are_not_put_in_order() -> None:
    widths = dict(zip("bacdef", range(4, 10), strict=True))
    shapes = {f"{name}.weight": (width + 1, width) for name, width in widths.items()}
    with pytest.raises(ArchitectureError, match="do not fit"):
        infer(dict(sorted(shapes.items())), in_any_order=True)
    del shapes["f.weight"]
    found = infer(dict(sorted(shapes.items())), in_any_order=True)
    assert found.steps[0].tensors["weight"] == "b.weight"
