"""The weight graph is one of the function: neither order nor scale of units changes it."""

import numpy as np
import pytest

from embedder.architecture import Architecture, Builder
from embedder.errors import ArchitectureError
from embedder.graph import EDGE_ROLES, NODE_KINDS, SCALARS, WeightGraph, weight_graph
from embedder.symmetry import flipped, permuted, rescaled
from test_embedder_anchors import ARCHITECTURES, Change, drawn, mlp


def normed_cnn() -> Architecture:
    builder = Builder("normed").input("colours", 3)
    for name, source, size in (("a", "colours", 12), ("b", "a", 9)):
        builder.linear(
            f"{name}.weight", source, name, size, space=2, activation="relu", normed=True
        )
        builder.norm(
            name, "batch", gain=f"{name}.gain", offset=f"{name}.offset", variance=f"{name}.var"
        )
    return builder.linear("c", "b", "out", 5, named=True).build()


NORMED = normed_cnn()


def told(graph: WeightGraph) -> np.ndarray:
    """Return one row for each edge with all that its ends and itself say, in an order of values."""
    first, second = graph.edges
    rows = np.concatenate(
        [graph.edge_features, graph.scalars[first], graph.scalars[second]], axis=1
    )
    return rows[np.lexsort(np.round(rows, 3).T)]


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


class TestInvariance:
    def test_no_order_scale_or_sign_changes_an_edge(self, architecture: Architecture) -> None:
        weights, rng = drawn(architecture), np.random.default_rng(3)
        other = permuted(
            flipped(rescaled(weights, architecture, rng), architecture, rng), architecture, rng
        )
        before, after = weight_graph(weights, architecture), weight_graph(other, architecture)
        assert before.edges.shape == after.edges.shape
        # Rows whose rounded values tie may change places; sums of each column do not.
        for a, b in ((before.edge_features, after.edge_features), (before.scalars, after.scalars)):
            np.testing.assert_allclose(np.sort(a, axis=0), np.sort(b, axis=0), atol=2e-4)
        assert told(before).shape == told(after).shape

    def test_a_norm_after_a_layer_takes_its_scale_along(self) -> None:
        weights, rng = drawn(NORMED), np.random.default_rng(3)
        before = weight_graph(weights, NORMED)
        after = weight_graph(rescaled(weights, NORMED, rng), NORMED)
        np.testing.assert_allclose(before.edge_features, after.edge_features, atol=1e-5)
        np.testing.assert_allclose(before.scalars, after.scalars, atol=1e-5)

    @pytest.mark.parametrize("change", [rescaled, flipped])
    def test_without_the_gauge_a_scale_or_a_sign_shows(self, change: Change) -> None:
        network = mlp("relu" if change is rescaled else "tanh")
        weights = drawn(network)
        other = change(weights, network, np.random.default_rng(3))
        before, after = (weight_graph(w, network, gauge=False) for w in (weights, other))
        assert np.abs(before.edge_features - after.edge_features).max() > 0.1
        again = permuted(weights, network, np.random.default_rng(3))
        moved = weight_graph(again, network, gauge=False)
        np.testing.assert_allclose(
            np.sort(before.edge_features, axis=0), np.sort(moved.edge_features, axis=0), atol=1e-5
        )

    def test_edges_go_along_when_units_change_places(self) -> None:
        network = mlp("relu")
        weights = drawn(network)
        order = np.random.default_rng(1).permutation(30)
        other = dict(
            weights, a=weights["a"][order], ab=weights["ab"][order], b=weights["b"][:, order]
        )
        before, after = weight_graph(weights, network), weight_graph(other, network)
        moved = np.concatenate([order, np.arange(30, 59)])
        found = {
            (int(i), int(j)): w
            for (i, j), w in zip(after.edges.T, after.edge_features[:, 0], strict=True)
        }
        back = np.argsort(moved)
        for (i, j), weight in zip(before.edges.T, before.edge_features[:, 0], strict=True):
            assert found[int(back[i]), int(back[j])] == pytest.approx(weight, rel=1e-5)


class TestContent:
    def test_every_layer_has_its_nodes(self, architecture: Architecture) -> None:
        graph = weight_graph(drawn(architecture), architecture)
        nodes = len(graph.forward)
        assert graph.scalars.shape == (nodes, SCALARS)
        assert (graph.scalars[:, -len(NODE_KINDS) :].sum(axis=1) == 1).all()
        assert graph.edges.size == 0 or graph.edges.max() < nodes
        assert np.isfinite(graph.scalars).all()
        heads = graph.scalars[:, -len(NODE_KINDS) + NODE_KINDS.index("head")] == 1
        assert (graph.spectra.any(axis=1) == heads).all()
        assert np.isfinite(graph.edge_features).all()

    @pytest.mark.parametrize(
        ("name", "roles"),
        [
            ("mlp relu", {"linear"}),
            ("gru", {"linear", "recurrent"}),
            ("gated transformer", {"path"}),
            ("layer norm transformer", {"path"}),
        ],
    )
    def test_edges_say_what_ties_their_ends(self, name: str, roles: set[str]) -> None:
        graph = weight_graph(drawn(ARCHITECTURES[name]), ARCHITECTURES[name])
        used = graph.edge_features[:, -len(EDGE_ROLES) :].sum(axis=0)
        assert {role for role, edges in zip(EDGE_ROLES, used, strict=True) if edges} == roles

    def test_an_edge_of_a_chain_is_its_share_of_the_path(self) -> None:
        """Without biases, edges into a unit times the codes they come from add up to its code."""
        network = mlp("relu")
        weights = drawn(network)
        for bias in ("ab", "bb", "cb"):
            weights[bias] = np.zeros_like(weights[bias])
        graph = weight_graph(weights, network)
        first, second = graph.edges
        middle = (graph.layer[first] == 0) & (graph.layer[second] == 1)
        sums = np.zeros_like(graph.forward)
        np.add.at(
            sums, second[middle], graph.edge_features[middle, :1] * graph.forward[first[middle]]
        )
        found = sums[graph.layer == 1]
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        np.testing.assert_allclose(found, graph.forward[graph.layer == 1], atol=1e-5)

    def test_a_graph_that_is_too_large_has_nodes_alone(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("embedder.graph.MOST_EDGES", 100)
        graph = weight_graph(drawn(mlp("relu")), mlp("relu"))
        assert graph.edges.shape == (2, 0)
        assert len(graph.forward) == 30 + 24 + 5


def test_a_model_without_hidden_units_is_refused() -> None:
    empty = Architecture("nothing", {}, {}, ())
    with pytest.raises(ArchitectureError, match="no hidden units"):
        weight_graph({}, empty)
