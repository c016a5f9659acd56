"""Three ways from the units of a network to tokens of its layers, each free of order.

*mean* takes the mean of each layer, each unit weighed by attention. *sag* keeps the half of each
layer that scores highest and takes their mean (SAGPool). *diff* assigns the units of the whole
network softly to clusters, which take the place of layers (DiffPool).

Sources:
    SAGPool: Lee, Lee, Kang 2019, ICML. DiffPool: Ying et al. 2018, NeurIPS. Attention as a mean:
    Li et al. 2016, ICLR.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch_geometric.nn import GraphConv, SAGPooling, dense_diff_pool
from torch_geometric.nn.aggr import AttentionalAggregation, MeanAggregation
from torch_geometric.nn.dense import DenseSAGEConv
from torch_geometric.utils import to_dense_adj, to_dense_batch

from embedder.errors import ArchitectureError

POOLINGS = ("mean", "sag", "diff")

CLUSTERS = 8
"""Clusters of DiffPool; the middle network of the zoo has 3 layers, the deepest 10."""
MOST_DENSE = 4096
"""Nodes above which DiffPool is refused: their adjacency alone takes 64 MiB."""


class Nodes(NamedTuple):
    """Units of several networks, one after another.

    Args:
        features: (nodes, width).
        layer: (nodes,) which layer of the batch.
        graph: (nodes,) which network of the batch.
        edges: (2, edges).
        layers: (layers, 26) numbers of each layer.
        layer_graph: (layers,) which network a layer is in.
        graphs: How many networks.
    """

    features: Tensor
    layer: Tensor
    graph: Tensor
    edges: Tensor
    layers: Tensor
    layer_graph: Tensor
    graphs: int


class Tokens(NamedTuple):
    """Layers, or clusters, of several networks.

    Args:
        features: (networks, tokens, width).
        numbers: (networks, tokens, 26).
        there: (networks, tokens) false where a network has fewer.
        loss: What training should make small besides; 0 for *mean* and *sag*.
    """

    features: Tensor
    numbers: Tensor
    there: Tensor
    loss: Tensor


def pooling_of(name: str, width: int) -> nn.Module:
    """Return a pooling by its name: a module from `Nodes` to `Tokens`."""
    kinds: dict[str, type[nn.Module]] = {"mean": _Mean, "sag": _Selected, "diff": _Clusters}
    return kinds[name](width)


class _Mean(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weighed = AttentionalAggregation(nn.Linear(width, 1))

    def forward(self, nodes: Nodes) -> Tokens:
        means = self.weighed(nodes.features, nodes.layer, dim_size=len(nodes.layers))
        return _by_layer(means, nodes)


class _Selected(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # tanh, the usual choice, gives 1.0 to every score above 9 and leaves the selection to
        # the order of the units; a mean over neighbours and softsign keep scores apart.
        self.select: Any = SAGPooling(
            width, ratio=0.5, GNN=GraphConv, nonlinearity=nn.functional.softsign, aggr="mean"
        )
        self.mean = MeanAggregation()

    def forward(self, nodes: Nodes) -> Tokens:
        kept, _, _, layer, _, _ = self.select(nodes.features, nodes.edges, batch=nodes.layer)
        return _by_layer(self.mean(kept, layer, dim_size=len(nodes.layers)), nodes)


class _Clusters(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.assign = GraphConv(width, CLUSTERS, aggr="mean")
        self.mix = DenseSAGEConv(width, width)

    def forward(self, nodes: Nodes) -> Tokens:
        dense, there = to_dense_batch(nodes.features, nodes.graph, batch_size=nodes.graphs)
        if dense.shape[1] > MOST_DENSE:
            raise ArchitectureError(
                f"DiffPool takes networks of at most {MOST_DENSE} units, this one has "
                f"{dense.shape[1]}; use an encoder with another pooling"
            )
        scores, _ = to_dense_batch(
            self.assign(nodes.features, nodes.edges), nodes.graph, batch_size=nodes.graphs
        )
        adjacency = to_dense_adj(
            nodes.edges, nodes.graph, max_num_nodes=dense.shape[1], batch_size=nodes.graphs
        ).clamp(max=1)
        sums, coarse, link, entropy = dense_diff_pool(dense, adjacency, scores, there)
        share = scores.softmax(dim=-1) * there[:, :, None]
        mass = share.sum(dim=1)[:, :, None].clamp(min=1e-6)
        numbers, _ = to_dense_batch(nodes.layers[nodes.layer], nodes.graph, batch_size=nodes.graphs)
        return Tokens(
            features=self.mix(sums / mass, coarse),
            numbers=share.transpose(1, 2) @ numbers / mass,
            there=torch.ones(nodes.graphs, CLUSTERS, dtype=torch.bool),
            loss=link + entropy,
        )


def _by_layer(means: Tensor, nodes: Nodes) -> Tokens:
    """Return one token for each layer."""
    features, there = to_dense_batch(means, nodes.layer_graph, batch_size=nodes.graphs)
    numbers, _ = to_dense_batch(nodes.layers, nodes.layer_graph, batch_size=nodes.graphs)
    return Tokens(features, numbers, there, means.new_zeros(()))
