"""Laws of symmetries: the function stays to float error, the weights do not, and the way back."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from attention_networks import gpt2, llama
from embedder.architecture import Architecture, Axis, Builder, Gauge
from embedder.errors import ArchitectureError
from embedder.rotation import rotated
from embedder.symmetry import (
    flipped,
    folded,
    multiplied,
    permuted,
    random_orders,
    reordered,
    rescaled,
)
from network import Network

Weights = dict[str, NDArray[np.floating]]
OPERATIONS: dict[str, Callable[[Weights, Architecture, np.random.Generator], Weights]] = {
    "permuted": permuted,
    "rescaled": rescaled,
    "flipped": flipped,
    "folded": lambda weights, architecture, rng: folded(weights, architecture),
    "rotated": rotated,
}
EXACT = {"float32": 1e-5, "float64": 1e-11}
"""Largest change of an output by the largest output. Measured over five seeds of all cases: 1.2e-6
and 5.5e-15."""


@dataclass
class Case:
    """A network, its description, and what may be done to it."""

    architecture: Architecture
    weights: Weights
    run: Callable[[Weights], NDArray[np.floating]]
    allows: str


def of_module(module: nn.Module, inputs: torch.Tensor, b: Builder, allows: str) -> Case:
    """Return a case of a live module, its statistics and gains away from their start."""
    torch.manual_seed(0)
    module = module.double().eval()
    weights = {name: value.numpy().copy() for name, value in module.state_dict().items()}
    rng = np.random.default_rng(0)
    for name, values in weights.items():
        if values.ndim == 1 and values.dtype == np.float64:
            weights[name] = rng.normal(scale=0.3, size=values.shape) + (1 if "bias" in name else 2)

    def run(changed: Weights) -> NDArray[np.floating]:
        given = {name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in changed.items()}
        kind = given[next(iter(given))].dtype
        with torch.no_grad():
            found = torch.func.functional_call(module.to(kind), given, (inputs.to(kind),))
        found = found[0] if isinstance(found, tuple) else found
        return np.asarray(found.numpy())

    return Case(b.build(), weights, run, allows)


def of_network(network: Network, b: Builder, allows: str) -> Case:
    return Case(b.build(), network.weights(), network.output, allows)


def mlp(activation: str, allows: str) -> Case:
    layers: dict[str, type[nn.Module]] = {
        "relu": nn.ReLU,
        "leaky_relu": nn.LeakyReLU,
        "tanh": nn.Tanh,
        "gelu": nn.GELU,
    }
    make = layers[activation]
    module = nn.Sequential(nn.Linear(5, 9), make(), nn.Linear(9, 7), make(), nn.Linear(7, 3))
    b = Builder("mlp").input("in", 5)
    b.linear("0.weight", "in", "h0", 9, bias="0.bias", activation=activation)
    b.linear("2.weight", "h0", "h1", 7, bias="2.bias", activation=activation)
    b.linear("4.weight", "h1", "out", 3, bias="4.bias", named=True)
    return of_module(module, torch.randn(4, 5), b, allows)


class Residual(nn.Module):
    """A stem, a residual block with batch norms, a depthwise one without, flattened pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 7, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(7)
        self.conv2 = nn.Conv2d(7, 6, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(6, eps=1e-3)
        self.deep, self.deep_norm = nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)
        self.plain = nn.Conv2d(6, 6, 3, groups=6)
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        h = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(x + self.norm2(self.conv2(h)))
        x = torch.relu(self.deep_norm(self.deep(x)))
        found: torch.Tensor = self.head(torch.relu(self.plain(x)).flatten(1))
        return found


def batch_norm(b: Builder, group: str, name: str, epsilon: float = 1e-5) -> None:
    b.norm(
        group,
        "batch",
        gain=f"{name}.weight",
        offset=f"{name}.bias",
        mean=f"{name}.running_mean",
        variance=f"{name}.running_var",
        epsilon=epsilon,
    )


def residual() -> Case:
    b, relu = Builder("cnn").input("in", 2), "relu"
    b.linear("stem.weight", "in", "x", 6, bias="stem.bias", activation=relu, space=2, normed=True)
    batch_norm(b, "x", "stem_norm")
    b.linear("conv1.weight", "x", "h", 7, activation=relu, space=2, normed=True)
    batch_norm(b, "h", "norm1")
    b.linear("conv2.weight", "h", "x", 6, bias="conv2.bias", space=2, normed=True)
    batch_norm(b, "x", "norm2", epsilon=1e-3)
    b.unitwise("deep.weight", "x", "d", bias="deep.bias", activation=relu)
    batch_norm(b, "d", "deep_norm")
    b.unitwise("plain.weight", "d", "p", bias="plain.bias", activation=relu, normed=False)
    b.linear("head.weight", "p", "out", 3, bias="head.bias", inner=4, named=True)
    return of_module(Residual(), torch.randn(2, 2, 6, 6), b, "permuted rescaled folded rotated")


def recurrent(kind: str, allows: str, activation: str = "") -> Case:
    cells: dict[str, Callable[[], nn.Module]] = {
        "elman": partial(nn.RNN, 4, 6, num_layers=2, nonlinearity=activation or "tanh"),
        "gru": partial(nn.GRU, 4, 6, num_layers=2),
        "lstm": partial(nn.LSTM, 4, 6, num_layers=2),
    }
    module = cells[kind]()
    b, source = Builder("rnn").input("in", 4), "in"
    for layer in range(2):
        b.recurrent(
            f"weight_ih_l{layer}",
            f"weight_hh_l{layer}",
            source,
            f"h{layer}",
            6,
            kind=kind,
            bias=f"bias_ih_l{layer}",
            recurrent_bias=f"bias_hh_l{layer}",
            activation=activation,
        )
        source = f"h{layer}"
    case = of_module(module, torch.randn(5, 2, 4), b, allows)
    # The last hidden units are the output here, so they have a meaning.
    groups = dict(case.architecture.groups)
    groups["h1"] = replace(groups["h1"], gauge=Gauge.NAMED)
    case.architecture = replace(case.architecture, groups=groups)
    return case


def llama_case(*, qkv_bias: bool, tied: bool, allows: str) -> Case:
    b = Builder("llama").input("tokens", 11)
    b.embedding("model.embed_tokens.weight", "tokens", "stream", 16)
    for i in range(2):
        p = f"model.layers.{i}"
        b.norm("stream", "rms", gain=f"{p}.input_layernorm.weight", target=f"a{i}")
        tensors = {
            role: f"{p}.self_attn.{role[0]}_proj.weight"
            for role in ("query", "key", "value", "output")
        }
        if qkv_bias:
            tensors |= {
                f"{role}_bias": f"{p}.self_attn.{role[0]}_proj.bias"
                for role in ("query", "key", "value")
            }
        b.attention(
            tensors,
            f"a{i}",
            "stream",
            inside=f"heads{i}",
            heads=4,
            channels=4,
            key_heads=2,
            rotary=True,
        )
        b.norm("stream", "rms", gain=f"{p}.post_attention_layernorm.weight", target=f"m{i}")
        gate, up, down = (f"{p}.mlp.{role}_proj.weight" for role in ("gate", "up", "down"))
        b.gated(gate, up, down, f"m{i}", "stream", 20, inside=f"f{i}")
    b.norm("stream", "rms", gain="model.norm.weight", target="last")
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    b.linear(head, "last", "words", 11, named=True)
    return of_network(llama(qkv_bias=qkv_bias, tied=tied), b, allows)


def layer_norm(b: Builder, name: str, target: str) -> None:
    b.norm("stream", "layer", gain=f"{name}.weight", offset=f"{name}.bias", target=target)


def gpt2_case() -> Case:
    b = Builder("gpt2").input("tokens", 11).input("positions", 77)
    b.embedding("transformer.wte.weight", "tokens", "stream", 12)
    b.embedding("transformer.wpe.weight", "positions", "stream", 12)
    for i in range(2):
        p = f"transformer.h.{i}"
        layer_norm(b, f"{p}.ln_1", f"a{i}")
        tensors = {
            "joint": f"{p}.attn.c_attn.weight",
            "joint_bias": f"{p}.attn.c_attn.bias",
            "output": f"{p}.attn.c_proj.weight",
            "output_bias": f"{p}.attn.c_proj.bias",
        }
        b.attention(
            tensors, f"a{i}", "stream", inside=f"heads{i}", heads=3, channels=4, turned=True
        )
        layer_norm(b, f"{p}.ln_2", f"m{i}")
        fc, proj = f"{p}.mlp.c_fc", f"{p}.mlp.c_proj"
        b.linear(
            f"{fc}.weight", f"m{i}", f"f{i}", 48, bias=f"{fc}.bias", activation="gelu", turned=True
        )
        b.linear(f"{proj}.weight", f"f{i}", "stream", 12, bias=f"{proj}.bias", turned=True)
    layer_norm(b, "transformer.ln_f", "last")
    b.linear("transformer.wte.weight", "last", "words", 11, named=True)
    return of_network(gpt2(), b, "permuted rescaled folded rotated")


CASES: dict[str, Callable[[], Case]] = {
    "relu": partial(mlp, "relu", "permuted rescaled"),
    "leaky relu": partial(mlp, "leaky_relu", "permuted rescaled"),
    "tanh": partial(mlp, "tanh", "permuted flipped"),
    "gelu": partial(mlp, "gelu", "permuted"),
    "residual": residual,
    "elman": partial(recurrent, "elman", "permuted flipped"),
    "elman relu": partial(recurrent, "elman", "permuted rescaled", activation="relu"),
    "gru": partial(recurrent, "gru", "permuted"),
    "lstm": partial(recurrent, "lstm", "permuted"),
    "llama": partial(
        llama_case, qkv_bias=False, tied=False, allows="permuted rescaled flipped folded rotated"
    ),
    "qwen tied": partial(
        llama_case, qkv_bias=True, tied=True, allows="permuted rescaled flipped folded rotated"
    ),
    "gpt2": gpt2_case,
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("operation", list(OPERATIONS))
@pytest.mark.parametrize("name", list(CASES))
def test_the_function_stays_and_the_weights_change_where_they_may(
    name: str, operation: str, dtype: str
) -> None:
    case = CASES[name]()
    weights = {tensor: values.astype(dtype) for tensor, values in case.weights.items()}
    before = case.run(weights)
    changed = OPERATIONS[operation](weights, case.architecture, np.random.default_rng(3))
    after = case.run(changed)
    assert np.abs(after - before).max() <= EXACT[dtype] * np.abs(before).max()
    assert {tensor: values.dtype for tensor, values in changed.items()} == {
        tensor: values.dtype for tensor, values in weights.items()
    }
    equal = all(np.array_equal(changed[tensor], weights[tensor]) for tensor in weights)
    assert equal == (operation not in case.allows.split())


@pytest.mark.parametrize("name", list(CASES))
def test_operations_compose(name: str) -> None:
    case, rng = CASES[name](), np.random.default_rng(5)
    weights = case.weights
    for operation in ("permuted", "rotated", "flipped", "rescaled", "permuted", "folded"):
        weights = OPERATIONS[operation](weights, case.architecture, rng)
    before = case.run(case.weights)
    assert np.abs(case.run(weights) - before).max() <= 1e-10 * np.abs(before).max()


@given(st.integers(0, 10**6), st.sampled_from(list(CASES)))
@settings(deadline=None, max_examples=20)
def test_two_orders_are_one_order_and_an_order_has_a_way_back(seed: int, name: str) -> None:
    case, rng = CASES[name](), np.random.default_rng(seed)
    first, second = (random_orders(case.architecture, rng) for _ in range(2))
    there = reordered(case.weights, case.architecture, first)
    both = reordered(there, case.architecture, second)
    joined = {group: first[group][second[group]] for group in first}
    same(both, reordered(case.weights, case.architecture, joined))
    back = {group: np.argsort(order) for group, order in first.items()}
    same(reordered(there, case.architecture, back), case.weights)


@given(st.integers(0, 10**6), st.sampled_from(["relu", "residual"]))
@settings(deadline=None, max_examples=20)
def test_scales_multiply_and_have_a_way_back(seed: int, name: str) -> None:
    case, rng = CASES[name](), np.random.default_rng(seed)
    scaling = [g for g, group in case.architecture.groups.items() if group.gauge == Gauge.SCALE]
    first, second = (
        {g: np.exp(rng.normal(size=case.architecture.groups[g].size)) for g in scaling}
        for _ in range(2)
    )
    there = multiplied(case.weights, case.architecture, first)
    both = multiplied(there, case.architecture, second)
    joined = {g: first[g] * second[g] for g in scaling}
    close(both, multiplied(case.weights, case.architecture, joined))
    back = {g: 1 / first[g] for g in scaling}
    close(multiplied(there, case.architecture, back), case.weights)


def same(a: Weights, b: Weights) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def close(a: Weights, b: Weights) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-12)


class TestFolding:
    def test_gains_before_blocks_become_one(self) -> None:
        case = CASES["llama"]()
        found = folded(case.weights, case.architecture)
        for name in case.weights:
            if "norm" in name:
                np.testing.assert_allclose(found[name], 1, rtol=1e-12)

    def test_a_batch_norm_becomes_its_offset_and_folding_again_does_nothing(self) -> None:
        case = residual()
        found = folded(case.weights, case.architecture)
        for norm in ("stem_norm", "norm1", "norm2", "deep_norm"):
            np.testing.assert_array_equal(found[f"{norm}.weight"], 1)
            np.testing.assert_array_equal(found[f"{norm}.running_mean"], 0)
        close(folded(found, case.architecture), found)

    def test_a_gain_that_the_table_of_tokens_would_take_stays(self) -> None:
        case = CASES["qwen tied"]()
        found = folded(case.weights, case.architecture)
        np.testing.assert_array_equal(found["model.norm.weight"], case.weights["model.norm.weight"])

    def test_gains_of_two_norms_that_are_added_stay(self) -> None:
        b = Builder("x").input("in", 2).linear("w", "in", "h", 3).linear("v", "in", "g", 3)
        b.norm("h", "layer", gain="a", target="sum")
        b.linear("u", "sum", "out", 2, named=True)
        found = b.build()
        again = replace(found.steps[2], tensors={"gain": "b"})
        found = replace(
            found, steps=(*found.steps, again), axes={**found.axes, "b": found.axes["a"]}
        )
        rng = np.random.default_rng(0)
        weights: Weights = {name: rng.normal(size=(3,)) for name in ("a", "b")}
        weights |= {"w": rng.normal(size=(3, 2)), "v": rng.normal(size=(3, 2))}
        weights["u"] = rng.normal(size=(2, 3))
        same(folded(weights, found), weights)

    def test_a_gain_of_zero_stays_zero(self) -> None:
        case = CASES["llama"]()
        gain = case.weights["model.layers.0.input_layernorm.weight"]
        gain[3] = 0
        found = folded(case.weights, case.architecture)
        assert found["model.layers.0.input_layernorm.weight"][3] == 0
        np.testing.assert_allclose(case.run(found), case.run(case.weights), rtol=1e-9)


def test_a_stream_turns_only_if_all_its_gains_can_be_folded() -> None:
    def table(name: str) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        case = CASES[name]()
        changed = rotated(case.weights, case.architecture, np.random.default_rng(0))
        word = "transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"
        return case.weights[word], changed[word]

    before, after = table("llama")
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(after @ after.T, before @ before.T, atol=1e-12)
    for name in ("qwen tied", "gpt2"):
        before, after = table(name)
        np.testing.assert_array_equal(before, after)


class TestBadInput:
    def test_another_shape_is_an_error(self) -> None:
        case = CASES["relu"]()
        case.weights["0.weight"] = case.weights["0.weight"][:, :4]
        with pytest.raises(ArchitectureError, match=r"0\.weight: axis 1 has 4 places"):
            permuted(case.weights, case.architecture, np.random.default_rng(0))

    def test_what_is_no_order_is_an_error(self) -> None:
        case = CASES["relu"]()
        with pytest.raises(ArchitectureError, match="h0: not an order of its 9 units"):
            reordered(case.weights, case.architecture, {"h0": np.zeros(9, int)})

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_what_is_no_number_does_not_spread(self, bad: float) -> None:
        case = CASES["llama"]()
        case.weights["lm_head.weight"][0, 0] = bad
        with pytest.raises(ArchitectureError, match=r"lm_head\.weight: holds NaN or infinity"):
            rotated(case.weights, case.architecture, np.random.default_rng(0))

    def test_no_values_are_an_error(self) -> None:
        case = CASES["relu"]()
        case.weights["4.bias"] = case.weights["4.bias"][:0]
        with pytest.raises(ArchitectureError, match=r"4\.bias: has no values"):
            permuted(case.weights, case.architecture, np.random.default_rng(0))


class TestBuilder:
    def test_what_a_layer_norm_reads_keeps_its_scale(self) -> None:
        b = Builder("x").input("in", 3).linear("w", "in", "h", 4)
        assert b.build().groups["h"].gauge == Gauge.SCALE
        assert b.norm("h", "layer", gain="g", target="n").build().groups["h"].gauge == Gauge.ORDER
        assert b.build().groups["n"].gauge == Gauge.SCALE

    def test_a_batch_norm_that_no_row_makes_room_for_fixes_the_scale(self) -> None:
        b = Builder("x").input("in", 3).linear("w", "in", "h", 4, activation="relu")
        assert b.norm("h", "batch", gain="g").build().groups["h"].gauge == Gauge.ORDER
        b = Builder("x").input("in", 3).linear("w", "in", "h", 4, activation="relu", normed=True)
        assert b.norm("h", "batch", gain="g").build().groups["h"].gauge == Gauge.SCALE

    def test_one_tensor_in_two_places_of_other_units_is_an_error(self) -> None:
        b = Builder("x").input("in", 3).linear("w", "in", "h", 3)
        with pytest.raises(ArchitectureError, match="w: two steps use it over different units"):
            b.linear("w", "h", "g", 3)

    def test_a_table_that_is_the_head_too_leaves_no_scale(self) -> None:
        architecture = CASES["qwen tied"]().architecture
        assert architecture.groups["last"].gauge == Gauge.ORDER
        assert architecture.axes["model.embed_tokens.weight"] == (Axis("tokens"), Axis("stream"))

    def test_a_norm_into_units_of_its_own_is_an_error(self) -> None:
        b = Builder("x").input("in", 3).linear("w", "in", "h", 4).linear("v", "in", "g", 4)
        with pytest.raises(ArchitectureError, match="g is there and has other units than h"):
            b.norm("h", "batch", gain="n", target="g")
