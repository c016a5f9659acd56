"""Codes of hidden units are those of the function: no order, scale, sign or basis changes them."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from embedder.anchors import Units, anchored
from embedder.architecture import GATES, Architecture, Builder
from embedder.errors import ArchitectureError
from embedder.identity import DIMENSION, Tokens, features, untrained
from embedder.rotation import rotated
from embedder.symmetry import flipped, folded, permuted, rescaled
from embedder.unit_codes import root_of_moment, seeded

Weights = Mapping[str, NDArray[np.floating]]
Change = Callable[[Weights, Architecture, np.random.Generator], Weights]

CHANGES: dict[str, Change] = {
    "permuted": permuted,
    "rescaled": rescaled,
    "flipped": flipped,
    "rotated": rotated,
    "folded": lambda weights, architecture, rng: folded(weights, architecture),
}


def mlp(activation: str) -> Architecture:
    builder = Builder("mlp").input("in", 20)
    builder.linear("a", "in", "first", 30, bias="ab", activation=activation)
    builder.linear("b", "first", "second", 24, bias="bb", activation=activation)
    return builder.linear("c", "second", "out", 5, bias="cb", named=True).build()


def recurrent(kind: str) -> Architecture:
    builder = Builder(kind).input("in", 8)
    builder.recurrent("i", "h", "in", "units", 16, kind=kind, bias="ib", recurrent_bias="hb")
    return builder.linear("c", "units", "out", 5, named=True).build()


def residual_cnn() -> Architecture:
    builder = Builder("cnn").input("colours", 3)
    builder.linear("stem", "colours", "stream", 16, space=2, activation="relu", normed=True)
    builder.norm("stream", "batch", gain="gain", offset="offset", mean="mean", variance="var")
    builder.linear("one", "stream", "inner", 12, space=2, activation="relu", bias="one.bias")
    builder.linear("two", "inner", "stream", 16, space=2, bias="two.bias")
    # A block that ends in a norm of its own: what was in the stream before is not normed again.
    builder.linear("three", "stream", "stream", 16, space=2, normed=True)
    builder.norm(
        "stream", "batch", gain="3.gain", offset="3.offset", mean="3.mean", variance="3.var"
    )
    return builder.linear("c", "stream", "out", 5, inner=4, named=True).build()


def gated_transformer(head: str = "head") -> Architecture:
    builder = Builder("llama").input("tokens", 50).embedding("table", "tokens", "stream", 32)
    for layer in ("0", "1"):
        roles = {role: f"{layer}.{role}" for role in ("query", "key", "value", "output")}
        builder.norm("stream", "rms", gain=f"{layer}.gain", target=f"{layer}.in")
        inside, source = f"{layer}.heads", f"{layer}.in"
        builder.attention(
            roles, source, "stream", inside=inside, heads=4, channels=8, key_heads=2, rotary=True
        )
        builder.norm("stream", "rms", gain=f"{layer}.more.gain", target=f"{layer}.read")
        parts = (f"{layer}.gate", f"{layer}.up", f"{layer}.down")
        builder.gated(*parts, f"{layer}.read", "stream", 48, inside=f"{layer}.units")
    builder.norm("stream", "rms", gain="gain", target="last")
    return builder.linear(head, "last", "next", 50, named=True).build()


def layer_norm_transformer() -> Architecture:
    builder = Builder("gpt").input("tokens", 50).embedding("table", "tokens", "stream", 32)
    roles = {"joint": "qkv", "joint_bias": "qkv.bias", "output": "o", "output_bias": "o.bias"}
    builder.norm("stream", "layer", gain="a.gain", offset="a.offset", target="read")
    builder.attention(roles, "read", "stream", inside="heads", heads=4, channels=8)
    builder.norm("stream", "layer", gain="b.gain", offset="b.offset", target="again")
    builder.linear("up", "again", "units", 40, bias="up.bias", activation="gelu")
    builder.linear("down", "units", "stream", 32, bias="down.bias")
    return builder.linear("head", "stream", "next", 50, named=True).build()


ARCHITECTURES: dict[str, Architecture] = {
    **{f"mlp {activation}": mlp(activation) for activation in ("relu", "tanh", "gelu")},
    **{kind: recurrent(kind) for kind in GATES},
    "residual cnn": residual_cnn(),
    "gated transformer": gated_transformer(),
    "gated transformer whose head is its table": gated_transformer(head="table"),
    "layer norm transformer": layer_norm_transformer(),
}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


def drawn(architecture: Architecture, seed: int = 0) -> dict[str, NDArray[np.floating]]:
    """Return random weights: kernels are 3 × 3, gains about 1, variances positive."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, axes in architecture.axes.items():
        shape = [
            3 if axis is None else axis.before * architecture.groups[axis.group].size * axis.inner
            for axis in axes
        ]
        values = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        found[name] = np.exp(values / 4) if "gain" in name or "var" in name else values
    return found


CODER = untrained()


def code(weights: Weights, architecture: Architecture) -> NDArray[np.float32]:
    return CODER.code(anchored(weights, architecture))


class TestInvariance:
    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_no_symmetry_changes_the_code(
        self, architecture: Architecture, change: str, dtype: str
    ) -> None:
        weights = {name: w.astype(dtype) for name, w in drawn(architecture).items()}
        other = CHANGES[change](weights, architecture, np.random.default_rng(5))
        difference = np.linalg.norm(code(weights, architecture) - code(other, architecture))
        # The code is computed in float64 and kept in float32; weights in float32 add 6e-8 each.
        assert difference < (1e-5 if dtype == "float32" else 1e-6)

    def test_another_seed_is_no_copy(self, architecture: Architecture) -> None:
        first, second = (code(drawn(architecture, seed), architecture) for seed in (0, 1))
        assert first @ second < 0.8

    def test_a_small_step_stays_near(self, architecture: Architecture) -> None:
        weights, rng = drawn(architecture), np.random.default_rng(2)
        near = {
            name: w + 0.02 * np.abs(w).mean() * rng.normal(size=w.shape)
            for name, w in weights.items()
        }
        assert code(weights, architecture) @ code(near, architecture) > 0.98

    def test_codes_move_with_their_units(self) -> None:
        """Features of nodes are equivariant: f(π·W) = π·f(W)."""
        network = mlp("relu")
        weights = drawn(network)
        order = np.random.default_rng(1).permutation(30)
        other = dict(
            weights, a=weights["a"][order], ab=weights["ab"][order], b=weights["b"][:, order]
        )
        before, after = anchored(weights, network)[0], anchored(other, network)[0]
        np.testing.assert_allclose(after.forward, before.forward[order], atol=1e-12)
        np.testing.assert_allclose(after.backward, before.backward[order], atol=1e-12)

    def test_a_scale_moves_from_one_length_to_the_other(self) -> None:
        network = mlp("relu")
        weights = drawn(network)
        other = dict(weights, a=weights["a"] * 4, ab=weights["ab"] * 4, b=weights["b"] / 4)
        before, after = anchored(weights, network)[0], anchored(other, network)[0]
        np.testing.assert_allclose(after.read, before.read * 4)
        np.testing.assert_allclose(after.reach, before.reach / 4)
        np.testing.assert_allclose(after.forward, before.forward, atol=1e-12)

    def test_no_scale_makes_a_unit_die(self) -> None:
        """Found on a real network, in which some units had all but died: 1e-12 of the others."""
        network = mlp("relu")
        weights = drawn(network)
        factor = np.where(np.arange(30) == 4, 1e-14, 1.0)[:, None]
        other = dict(
            weights,
            a=weights["a"] * factor,
            ab=weights["ab"] * factor[:, 0],
            b=weights["b"] / factor[:, 0],
        )
        difference = np.linalg.norm(code(weights, network) - code(other, network))
        assert difference < 1e-6
        assert (anchored(other, network)[0].read > 0).all()


class TestStreams:
    @pytest.mark.parametrize("kind", ["gated transformer", "layer norm transformer"])
    def test_what_was_embedded_is_kept_as_its_second_moment(self, kind: str) -> None:
        network = ARCHITECTURES[kind]
        weights = drawn(network)
        (stream,) = [units for units in anchored(weights, network) if units.stream]
        assert stream.forward.shape == (64, 64)
        assert not stream.reach.any()
        # The table is tokens × channels, and each token has its own anchor.
        codes = seeded("inputs", 50).T @ weights["table"].reshape(50, -1)
        moment = codes @ codes.T
        np.testing.assert_allclose(
            stream.forward @ stream.forward, moment / np.trace(moment), atol=1e-10
        )

    def test_what_cannot_be_computed_is_nothing(self) -> None:
        for codes in (np.zeros((5, 64)), np.full((5, 64), np.inf)):
            assert not root_of_moment(codes)[0].any()


class TestTransposition:
    def test_backward_codes_are_forward_codes_of_the_transposed_path(
        self, architecture: Architecture
    ) -> None:
        """What units read, met with what they reach, is the same at every depth of a chain."""
        found = [
            units for units in anchored(drawn(architecture), architecture) if units.reach.any()
        ]
        assert all(np.isfinite(units.backward).all() for units in found)
        assert all((units.reach > 0).all() for units in found)

    def test_the_path_product_is_one_number_along_a_chain(self) -> None:
        """Without biases, Σ over the units of a layer of F ⊙ B is that of every other layer."""
        builder = Builder("mlp").input("in", 9)
        builder.linear("a", "in", "x", 7, activation="relu").linear("b", "x", "y", 8, space=1)
        network = builder.linear("c", "y", "out", 4, named=True).build()
        x, y, _ = anchored(drawn(network), network)
        products = [
            np.sum(u.forward * u.read[:, None] * u.backward * u.reach[:, None], axis=0)
            for u in (x, y)
        ]
        np.testing.assert_allclose(products[0], products[1], rtol=1e-9)


class TestFeatures:
    def test_equal_units_meet_and_others_do_not(self) -> None:
        rng = np.random.default_rng(0)
        units = rng.normal(size=(200, 64)).astype(np.float32)
        frequencies = (rng.normal(size=(64, 2048)) / 0.35).astype(np.float32)
        one, other = (
            features(
                "heads",
                Tokens(part, np.zeros(100, bool)),
                np.eye(64, dtype=np.float32),
                frequencies,
            )
            for part in (units[:100], units[100:])
        )
        # k(u, u) = 1 once in 100 pairs; strangers have ‖u − v‖² = 2 and k = e^(−1/.35²) = .0003.
        assert np.mean(one @ one.T) / 2048 == pytest.approx(0.01, abs=0.003)
        assert abs(np.mean(one @ other.T)) / 2048 < 0.002

    def test_an_even_code_is_that_of_its_negative(self) -> None:
        units = np.random.default_rng(1).normal(size=(9, 64)).astype(np.float32)
        frequencies = np.random.default_rng(2).normal(size=(64, 32)).astype(np.float32)
        one, other = (
            features(
                "heads", Tokens(part, np.ones(9, bool)), np.eye(64, dtype=np.float32), frequencies
            )
            for part in (units, -units)
        )
        np.testing.assert_allclose(one, other, atol=1e-12)


class TestBadInput:
    def test_a_value_that_is_not_finite(self) -> None:
        network = mlp("relu")
        weights = drawn(network)
        weights["b"][3, 4] = np.nan
        with pytest.raises(ArchitectureError, match="b: holds values that are NaN"):
            anchored(weights, network)

    def test_a_layer_without_units(self) -> None:
        network = Builder("mlp").input("in", 3).linear("a", "in", "out", 0, named=True).build()
        with pytest.raises(ArchitectureError, match="a: has no values"):
            anchored({"a": np.zeros((0, 3))}, network)

    def test_another_shape(self) -> None:
        weights = drawn(mlp("relu"))
        with pytest.raises(ArchitectureError, match="the model has no such tensor"):
            anchored({"a": weights["a"]}, mlp("relu"))

    def test_weights_of_zero_have_a_code(self) -> None:
        network = mlp("relu")
        weights = {name: np.zeros_like(w) for name, w in drawn(network).items()}
        units: list[Units] = anchored(weights, network)
        assert CODER.code(units).shape == (DIMENSION,)
        assert not CODER.code(units).any()
