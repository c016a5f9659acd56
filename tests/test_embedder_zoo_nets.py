"""Networks of the zoo: they compute what PyTorch computes, and their descriptions are true."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embedder import rotation, symmetry
from embedder.architecture import Gauge
from embedder.zoo import layers
from embedder.zoo.designs import Config
from embedder.zoo.nets import architecture_of, forward, from_json, new_start, shapes_of, to_json
from embedder.zoo.plan import Population, populations

POPULATIONS = populations()
ONE_OF_EACH = POPULATIONS[:10]
Values = NDArray[np.floating[Any]]


def ids(population: Population) -> str:
    return population.name


def rough_start(config: Config, seed: int = 1) -> dict[str, Values]:
    """Return a start in float64 with no zero bias and no gain of 1, which would hide mistakes."""
    rng = np.random.default_rng(seed)
    start: dict[str, Values] = {}
    for name, values in new_start(config, seed).items():
        wide = values.astype(np.float64)
        start[name] = wide + rng.uniform(0.05, 0.3, wide.shape) if wide.ndim == 1 else wide
    return start


def inputs_of(config: Config, examples: int = 6) -> Tensor:
    rng = np.random.default_rng(2)
    if config.causal:
        return torch.from_numpy(rng.integers(0, config.inputs, (1, examples, config.places)))
    if config.kind == "gnn":
        nodes = rng.normal(size=(1, examples, 9, config.inputs))
        around = rng.random((1, examples, 9, 9))
        return torch.from_numpy(np.concatenate([nodes, around], axis=3))
    shape = {"mlp": (1, config.inputs), "rnn": (5, config.inputs)}.get(config.kind, (8, 8))
    if config.kind == "transformer" and not config.patch:
        shape = (config.places, config.inputs)
    return torch.from_numpy(rng.normal(size=(1, examples, *shape)))


def computed(config: Config, weights: Mapping[str, Values], x: Tensor) -> Values:
    wide = {
        name: torch.from_numpy(values[None].astype(np.float64)) for name, values in weights.items()
    }
    found: Values = forward(config, wide, x).numpy()
    return found


@pytest.mark.parametrize("population", POPULATIONS, ids=ids)
class TestEveryDesign:
    def test_its_description_fits_its_tensors(self, population: Population) -> None:
        start = new_start(population.config, 0)
        shapes = {name: values.shape for name, values in start.items()}
        assert shapes == shapes_of(population.config)
        architecture_of(population.config).check(shapes)

    def test_its_symmetries_keep_the_function(self, population: Population) -> None:
        config, rng = population.config, np.random.default_rng(3)
        start, x = rough_start(config), inputs_of(config)
        expected = computed(config, start, x)
        size = np.abs(expected).max()
        for change in (symmetry.permuted, symmetry.rescaled, symmetry.flipped, rotation.rotated):
            changed = change(start, architecture_of(config), rng)
            found = computed(config, changed, x)
            # Float64: the largest difference over all designs was 2e-15 of the largest output.
            assert np.abs(found - expected).max() <= 1e-12 * size, change.__name__

    def test_a_new_order_does_change_the_weights(self, population: Population) -> None:
        start = rough_start(population.config)
        made = architecture_of(population.config)
        changed = symmetry.permuted(start, made, np.random.default_rng(3))
        assert any(not np.array_equal(start[name], changed[name]) for name in start)

    def test_json_gives_it_back(self, population: Population) -> None:
        assert from_json(to_json(population.config)) == population.config


@pytest.mark.parametrize("population", ONE_OF_EACH, ids=ids)
def test_models_that_run_together_do_not_touch_each_other(population: Population) -> None:
    config = population.config
    starts = [rough_start(config, seed) for seed in (1, 2, 3)]
    stacked = {name: torch.from_numpy(np.stack([s[name] for s in starts])) for name in starts[0]}
    x = inputs_of(config)
    together = forward(config, stacked, x.expand(3, *x.shape[1:])).numpy()
    for place, start in enumerate(starts):
        np.testing.assert_allclose(together[place], computed(config, start, x)[0], atol=1e-12)


@pytest.mark.parametrize("law", ["uniform", "normal"])
def test_a_seed_decides_the_start(law: str) -> None:
    config = POPULATIONS[0].config
    first, again, other = (new_start(config, seed, law=law) for seed in (5, 5, 6))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["0.weight"], other["0.weight"])
    fan_in = first["0.weight"].shape[1]
    expected = 1 / (3 * fan_in) if law == "uniform" else 2 / fan_in
    assert first["0.weight"].var() == pytest.approx(expected, rel=0.1)


def test_the_scale_of_a_start_multiplies_its_weights_alone() -> None:
    config = POPULATIONS[0].config
    plain, double = new_start(config, 5), new_start(config, 5, scale=2)
    np.testing.assert_allclose(double["0.weight"], 2 * plain["0.weight"], rtol=1e-6)
    np.testing.assert_array_equal(double["0.bias"], plain["0.bias"])


# ------------------------------------------------------------------ PyTorch's own modules


def stacked(module: nn.Module) -> dict[str, Tensor]:
    return {name: value[None] for name, value in module.state_dict().items()}


def test_a_perceptron_is_that_of_pytorch() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(5, 4)
    found = forward(Config("mlp", 4, 3, (8,)), stacked(module), x[None, :, None])
    torch.testing.assert_close(found[0], module(x))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_a_convolution_and_its_derivative_are_those_of_pytorch(
    stride: int, size: tuple[int, int]
) -> None:
    module = nn.Conv2d(3, 5, 3, stride=stride, padding=1)
    x = torch.randn(2, 3, *size, requires_grad=True)
    expected = module(x)
    turned = x.detach().permute(0, 2, 3, 1)[None].requires_grad_(True)
    weights = stacked(module)
    found = layers.convolution(turned, weights["weight"], weights["bias"], stride)
    torch.testing.assert_close(found[0].permute(0, 3, 1, 2), expected)
    (ours,) = torch.autograd.grad(found.square().sum(), turned)
    (theirs,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(ours[0].permute(0, 3, 1, 2), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_and_its_memory_are_those_of_pytorch(training: bool) -> None:
    module = nn.BatchNorm1d(4)
    with torch.no_grad():
        for value in (module.weight, module.bias, module.running_mean, module.running_var):
            assert value is not None
            value.uniform_(0.5, 1.5)
    weights = {name: value.clone() for name, value in stacked(module).items()}
    module.train(training)
    x = torch.randn(9, 4)
    names = ("weight", "bias", "running_mean", "running_var")
    found = layers.batch_norm(x[None], *(weights[n] for n in names), training=training)
    torch.testing.assert_close(found[0], module(x))
    for name in names[2:]:
        torch.testing.assert_close(weights[name][0], module.state_dict()[name])


@pytest.mark.parametrize(("ours", "theirs"), [("elman", nn.RNN), ("gru", nn.GRU)])
def test_a_recurrent_net_is_that_of_pytorch(ours: str, theirs: type[nn.RNNBase]) -> None:
    module: Any = theirs(4, 6, batch_first=True)  # type: ignore[call-arg, arg-type]
    head = nn.Linear(6, 3)
    x = torch.randn(5, 7, 4)
    expected = head(module(x)[0][:, -1])
    weights = {f"rnn.{name}": value for name, value in stacked(module).items()}
    weights |= {f"head.{name}": value for name, value in stacked(head).items()}
    found = forward(Config("rnn", 4, 3, (6,), "tanh", cell=ours), weights, x[None])
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_that_of_pytorch(causal: bool) -> None:
    q, k, v = torch.randn(3, 5, 7, 8).unbind()
    query, key, value = (x.view(5, 7, 2, 4).transpose(1, 2) for x in (q, k, v))
    expected = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
    found = layers.attention(q[None], k[None], v[None], heads=2, causal=causal)
    torch.testing.assert_close(found[0], expected.transpose(1, 2).reshape(5, 7, 8))


def test_a_language_model_does_not_look_ahead() -> None:
    config = next(p.config for p in POPULATIONS if p.config.causal)
    start, x = rough_start(config), inputs_of(config)
    changed = x.clone()
    changed[..., 9:] = (changed[..., 9:] + 1) % config.inputs
    before, after = computed(config, start, x), computed(config, start, changed)
    np.testing.assert_array_equal(before[:, :, :9], after[:, :, :9])
    assert np.abs(before[:, :, 9:] - after[:, :, 9:]).max() > 0.01


def test_a_graph_net_does_not_see_the_order_of_nodes() -> None:
    for population in POPULATIONS:
        config = population.config
        if config.kind != "gnn":
            continue
        start, x = rough_start(config), inputs_of(config)
        order = np.random.default_rng(4).permutation(x.shape[2])
        width = config.inputs
        around = x[..., width:][:, :, order][..., order]
        turned = torch.cat([x[..., :width][:, :, order], around], dim=-1)
        np.testing.assert_allclose(
            computed(config, start, x), computed(config, start, turned), atol=1e-12
        )


def test_gauges_follow_the_activation() -> None:
    for activation, gauge in (("relu", Gauge.SCALE), ("tanh", Gauge.SIGN), ("gelu", Gauge.ORDER)):
        made = architecture_of(Config("mlp", 4, 3, (8,), activation))
        assert made.groups["hidden.0"].gauge is gauge
