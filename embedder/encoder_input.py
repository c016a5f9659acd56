"""What the function encoder is fed: weight graphs as batches, with numbers of each layer."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch_geometric.data import Batch, Data

from embedder.anchors import WIDTH
from embedder.graph import NODE_KINDS, SCALARS, WeightGraph
from embedder.tucker import SPECTRUM

Array: TypeAlias = NDArray[np.float64]

NODE_NUMBERS = SCALARS + SPECTRUM
_LEADING = 8
"""Singular values kept of a layer; three of four layers in the zoo have 10 units or more."""
LAYER_NUMBERS = 14 + _LEADING + len(NODE_KINDS)
_STRENGTH, _OWN, _DEPTH, _SIZE, _EVEN, _LEVEL, _CONSTANT = range(7)
"""Columns of a node's scalars, as `embedder.graph` puts them."""


def graph_data(graph: WeightGraph) -> Data:
    """Return a weight graph as torch-geometric wants it.

    Returns:
        With `read`, `reach` (nodes, 64) codes; `numbers` (nodes, 24) scalars and spectra; `even`
        (nodes,) whether a code stands for its negative too; `layer` (nodes,); `layers` (layers, 26)
        as `layer_numbers` gives them; `edge_index` (2, edges) and `edge_attr` (edges, 7).

    Example:
        >>> from embedder.architecture import Builder
        >>> from embedder.graph import weight_graph
        >>> b = Builder("mlp").input("in", 3).linear("a", "in", "h", 5, activation="relu")
        >>> mlp = b.linear("b", "h", "out", 2, named=True).build()
        >>> graph = weight_graph({"a": np.ones((5, 3)), "b": np.ones((2, 5))}, mlp)
        >>> data = graph_data(graph)
        >>> data.num_nodes, tuple(data.numbers.shape), tuple(data.layers.shape)
        (7, (7, 24), (2, 26))
    """
    numbers = np.concatenate([graph.scalars, graph.spectra], axis=1)
    return Data(
        read=torch.from_numpy(graph.forward),
        reach=torch.from_numpy(graph.backward),
        numbers=torch.from_numpy(numbers),
        even=torch.from_numpy(graph.scalars[:, _EVEN] > 0),
        layer=torch.from_numpy(graph.layer),
        layers=torch.from_numpy(layer_numbers(graph).astype(np.float32)),
        edge_index=torch.from_numpy(graph.edges),
        edge_attr=torch.from_numpy(graph.edge_features),
        num_nodes=len(graph.layer),
    )


def batch_of(graphs: Sequence[Data]) -> Batch:
    """Return several graphs as one, in which layers know their graph."""
    return Batch.from_data_list(list(graphs), follow_batch=["layers"])


def layer_numbers(graph: WeightGraph) -> Array:
    """Return what each layer is like as a whole.

    Returns:
        (layers, 26): log of its size, depth from 0 to 1, log of its mean strength, spread of its
        units' strengths and the largest, spread of how much they read, mean and spread of their
        cosines with the constant input, how alike they are in what they read and in what they do
        (lengths of the mean codes, 0 where codes stand for their negatives too), mean size of the
        edges into them and log of the fourth moment, effective rank of what they read and of what
        they do (of 64), the eight leading singular values of what they read, weighed by strength,
        over the norm of all; then the share of each kind of node.

    Source:
        Effective rank, exp(entropy of the squared singular values): Roy and Vetterli 2007, EUSIPCO.
    """
    starts = np.searchsorted(graph.layer, np.arange(int(graph.layer.max()) + 2))
    edges = _edge_numbers(graph, len(starts) - 1)
    found = []
    for number, (start, end) in enumerate(pairwise(starts)):
        scalars = graph.scalars[start:end].astype(np.float64)
        read, reach = graph.forward[start:end], graph.backward[start:end]
        strength = np.exp(scalars[:, _STRENGTH : _STRENGTH + 1])
        weighed = np.sqrt(_squares(read * strength)[:_LEADING])
        odd = float(scalars[0, _EVEN] == 0)
        found.append(
            [
                scalars[0, _SIZE],
                scalars[0, _DEPTH],
                scalars[0, _LEVEL],
                scalars[:, _STRENGTH].std(),
                scalars[:, _STRENGTH].max(),
                scalars[:, _OWN].std(),
                scalars[:, _CONSTANT].mean(),
                scalars[:, _CONSTANT].std(),
                odd * float(np.linalg.norm(read.mean(axis=0))),
                odd * float(np.linalg.norm(reach.mean(axis=0))),
                *edges[number],
                _effective_rank(_squares(read)),
                _effective_rank(_squares(reach)),
                *np.pad(weighed, (0, _LEADING - len(weighed))),
                *scalars[:, -len(NODE_KINDS) :].mean(axis=0),
            ]
        )
    return np.array(found)


def _edge_numbers(graph: WeightGraph, layers: int) -> Array:
    """Return mean size and log of the fourth moment of the edges into each layer, (layers, 2)."""
    into = graph.layer[graph.edges[1]]
    sizes = graph.edge_features[:, 1].astype(np.float64)
    count = np.maximum(np.bincount(into, minlength=layers), 1)
    mean, fourth = (np.bincount(into, sizes**k, minlength=layers) / count for k in (1, 4))
    return np.stack([mean, np.log1p(fourth)], axis=1)


def _squares(codes: NDArray[np.floating]) -> Array:
    """Return the squared singular values as shares of their sum, largest first."""
    wide = codes.astype(np.float64)
    gram = wide @ wide.T if len(wide) < wide.shape[1] else wide.T @ wide
    values = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)
    return np.asarray(values / max(float(values.sum()), 1e-300))


def _effective_rank(shares: Array) -> float:
    """Return exp(entropy) of shares, over the 64 numbers of a code; 0 for codes of zeros."""
    there = shares[shares > 0]
    return float(np.exp(-np.sum(there * np.log(there)))) / WIDTH if len(there) else 0.0
