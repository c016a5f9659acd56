"""The function code is one of the function: no order, scale, sign or basis changes it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch_geometric.data import Data

from embedder.architecture import Architecture
from embedder.encoder import DIMENSION, Encoder, EncoderConfig, Standard
from embedder.encoder_input import batch_of, graph_data
from embedder.errors import ArchitectureError
from embedder.graph import weight_graph
from embedder.pooling import POOLINGS
from test_embedder_anchors import ARCHITECTURES, CHANGES, drawn, mlp
from test_embedder_graph import NORMED

ENCODERS = {pooling: Encoder(EncoderConfig(pooling=pooling)) for pooling in POOLINGS}


NETWORKS = {**ARCHITECTURES, "normed cnn": NORMED}


@pytest.fixture(params=NETWORKS)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return NETWORKS[request.param]


def data(architecture: Architecture, seed: int = 0) -> Data:
    return graph_data(weight_graph(drawn(architecture, seed), architecture))


def codes(encoder: Encoder, graphs: list[Data]) -> NDArray[np.float32]:
    with torch.no_grad():
        found: NDArray[np.float32] = encoder.eval()(batch_of(graphs)).codes.numpy()
    return found


class TestInvariance:
    @pytest.mark.parametrize("pooling", POOLINGS)
    @pytest.mark.parametrize("change", CHANGES)
    def test_no_symmetry_changes_the_code(
        self, architecture: Architecture, change: str, pooling: str
    ) -> None:
        weights = drawn(architecture)
        other = CHANGES[change](weights, architecture, np.random.default_rng(5))
        code = ENCODERS[pooling].code(weights, architecture)
        again = ENCODERS[pooling].code(other, architecture)
        assert np.linalg.norm(code) == pytest.approx(1, abs=1e-6)
        assert np.linalg.norm(code - again) < 1e-5

    def test_other_weights_have_another_code(self, architecture: Architecture) -> None:
        for encoder in ENCODERS.values():
            one, other = (encoder.code(drawn(architecture, seed), architecture) for seed in (0, 1))
            assert np.linalg.norm(one - other) > 1e-3

    def test_features_of_units_move_with_them(self) -> None:
        """f(π·W) = π·f(W)."""
        network = mlp("relu")
        weights = drawn(network)
        order = np.random.default_rng(1).permutation(30)
        other = dict(
            weights, a=weights["a"][order], ab=weights["ab"][order], b=weights["b"][:, order]
        )
        encoder = ENCODERS["mean"].eval()
        with torch.no_grad():
            before, after = (
                encoder.nodes(batch_of([graph_data(weight_graph(w, network))])).numpy()
                for w in (weights, other)
            )
        moved = np.concatenate([order, np.arange(30, 59)])
        np.testing.assert_allclose(after, before[moved], atol=1e-5)
        assert np.abs(after - before).max() > 0.1

    @pytest.mark.parametrize("change", ["rescaled", "flipped"])
    def test_without_the_gauge_a_scale_or_a_sign_shows(self, change: str) -> None:
        network = mlp("relu" if change == "rescaled" else "tanh")
        encoder = Encoder(EncoderConfig(gauge=False))
        weights = drawn(network)
        other = CHANGES[change](weights, network, np.random.default_rng(5))
        assert np.linalg.norm(encoder.code(weights, network) - encoder.code(other, network)) > 1e-3


class TestBatches:
    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_a_batch_gives_what_single_graphs_give(self, pooling: str) -> None:
        graphs = [data(architecture) for architecture in ARCHITECTURES.values()]
        together = codes(ENCODERS[pooling], graphs)
        alone = [codes(ENCODERS[pooling], [graph])[0] for graph in graphs]
        np.testing.assert_allclose(together, np.stack(alone), atol=2e-6)

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_a_graph_without_edges_has_a_code(
        self, pooling: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("embedder.graph.MOST_EDGES", 10)
        graph = data(mlp("relu"))
        assert graph.num_edges == 0
        assert np.isfinite(codes(ENCODERS[pooling], [graph])).all()


class TestSwitches:
    CONFIGS = (
        *(EncoderConfig(pooling=pooling) for pooling in POOLINGS),
        *(EncoderConfig(levels=(level,)) for level in ("micro", "meso", "macro")),
        EncoderConfig(rounds=0),
        EncoderConfig(attention=False),
        EncoderConfig(anchors=False),
    )

    def test_each_gives_codes_of_its_own(self) -> None:
        graph = data(mlp("relu"))
        found = np.stack([codes(Encoder(config), [graph])[0] for config in self.CONFIGS])
        apart = np.linalg.norm(found[:, None] - found[None, :], axis=2)
        assert apart[~np.eye(len(found), dtype=bool)].min() > 0.05

    @pytest.mark.parametrize("config", CONFIGS, ids=repr)
    def test_a_gradient_reaches_all_that_the_code_is_made_of(self, config: EncoderConfig) -> None:
        encoder = Encoder(
            replace(config, dropout=0, node_dropout=0, edge_dropout=0, noise=0)
        ).train()
        graphs = [data(ARCHITECTURES[name]) for name in ("mlp relu", "layer norm transformer")]
        codes, loss = encoder(batch_of(graphs))
        ((codes[0] * codes[1]).sum() + loss).backward()
        silent = {
            name.partition(".")[0]
            for name, values in encoder.named_parameters()
            if values.grad is None
        }
        unused = {"micro": "all_units", "meso": "numbers", "macro": "between"}
        allowed = {part for level, part in unused.items() if level not in config.levels}
        if "macro" not in config.levels:
            allowed |= {"between_norm", "after", "after_norm"}
        if config.levels == ("micro",):
            allowed |= {"pooling", "token_norm"}
        if not config.anchors:
            allowed.add("units")
        assert silent <= allowed

    def test_without_anchors_the_codes_of_units_do_not_matter(self) -> None:
        graph = data(mlp("relu"))
        encoder = Encoder(EncoderConfig(anchors=False))
        before = codes(encoder, [graph])
        graph.read = graph.read.flip(1)
        np.testing.assert_array_equal(codes(encoder, [graph]), before)
        assert (
            np.abs(
                codes(ENCODERS["mean"], [graph]) - codes(ENCODERS["mean"], [data(mlp("relu"))])
            ).max()
            > 1e-3
        )

    def test_training_leaves_units_and_edges_out(self) -> None:
        encoder, batch = Encoder(EncoderConfig()), batch_of([data(mlp("relu"))])
        torch.manual_seed(0)
        one, other = encoder.train()(batch).codes, encoder(batch).codes
        assert (one - other).abs().max() > 1e-3
        torch.manual_seed(0)
        torch.testing.assert_close(encoder(batch).codes, one)

    def test_noise_moves_the_codes_of_units_in_training_alone(self) -> None:
        still = EncoderConfig(dropout=0, node_dropout=0, edge_dropout=0, noise=0)
        graph = batch_of([data(mlp("relu"))])
        moving = Encoder(replace(still, noise=1)).train()
        assert (moving(graph).codes - moving(graph).codes).abs().max() > 1e-3
        resting = Encoder(still).train()
        torch.testing.assert_close(resting(graph).codes, resting(graph).codes)

    def test_the_seed_decides_where_training_starts(self) -> None:
        graph = data(mlp("relu"))
        one, again, other = (codes(Encoder(EncoderConfig(seed=s)), [graph]) for s in (0, 0, 1))
        np.testing.assert_array_equal(one, again)
        assert np.abs(one - other).max() > 0.01

    @pytest.mark.parametrize(
        "wrong",
        [
            {"pooling": "max"},
            {"levels": ()},
            {"levels": ("nano",)},
            {"width": 30},
            {"rounds": -1},
            {"node_dropout": 1.0},
            {"dropout": -0.1},
            {"noise": -1.0},
        ],
    )
    def test_a_configuration_without_meaning_is_refused(self, wrong: dict[str, object]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong)).rpartition("_")[2]):
            EncoderConfig(**wrong)  # type: ignore[arg-type]


class TestStandard:
    def test_what_was_fitted_has_mean_0_and_spread_1_after(self) -> None:
        values = torch.randn(200, 3) * torch.tensor([1.0, 30.0, 0.2]) + 7
        standard = Standard(3)
        standard.fit(values)
        found = standard(values)
        torch.testing.assert_close(found.mean(dim=0), torch.zeros(3), atol=1e-3, rtol=0)
        torch.testing.assert_close(found.std(dim=0), torch.ones(3), atol=2e-2, rtol=0)

    def test_a_number_that_never_varies_tells_no_rounding_error(self) -> None:
        standard = Standard(1)
        standard.fit(torch.ones(5, 1))
        assert standard(torch.full((1, 1), 1 + 1e-6)).abs().max() < 1e-4

    def test_what_is_far_away_counts_as_5_spreads(self) -> None:
        standard = Standard(1)
        standard.fit(torch.randn(100, 1))
        assert standard(torch.tensor([[1e9]])) == 5


class TestBadInput:
    def test_weights_that_are_not_finite(self) -> None:
        weights = drawn(mlp("relu"))
        weights["b"][0, 0] = np.inf
        with pytest.raises(ArchitectureError, match="b: holds values that are NaN or infinite"):
            ENCODERS["mean"].code(weights, mlp("relu"))

    def test_weights_of_zero_have_a_code(self) -> None:
        network = mlp("relu")
        weights = {name: np.zeros_like(w) for name, w in drawn(network).items()}
        for encoder in ENCODERS.values():
            code = encoder.code(weights, network)
            assert code.shape == (DIMENSION,)
            assert np.isfinite(code).all()

    def test_a_network_that_is_too_large_for_dense_clusters(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("embedder.pooling.MOST_DENSE", 58)
        with pytest.raises(ArchitectureError, match="at most 58 units, this one has 59"):
            ENCODERS["diff"].code(drawn(mlp("relu")), mlp("relu"))
