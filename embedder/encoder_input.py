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
LAYER_NUMBERS = 6 + _LEADING + len(NODE_KINDS)
_STRENGTH, _OWN, _DEPTH, _SIZE, _EVEN = range(5)
"""Columns of a node's scalars, as `embedder.graph` puts them."""


def graph_data(graph: WeightGraph) -> Data:
    """Return a weight graph as torch-geometric wants it.

    Returns:
        With `read`, `reach` (nodes, 64) codes; `numbers` (nodes, 22) scalars and spectra; `even`
        (nodes,) whether a code stands for its negative too; `layer` (nodes,); `layers` (layers, 18)
        as `layer_numbers` gives them; `edge_index` (2, edges) and `edge_attr` (edges, 7).

    Example:
        >>> from embedder.architecture import Builder
        >>> from embedder.graph import weight_graph
        >>> b = Builder("mlp").input("in", 3).linear("a", "in", "h", 5, activation="relu")
        >>> mlp = b.linear("b", "h", "out", 2, named=True).build()
        >>> graph = weight_graph({"a": np.ones((5, 3)), "b": np.ones((2, 5))}, mlp)
        >>> data = graph_data(graph)
        >>> data.num_nodes, tuple(data.numbers.shape), tuple(data.layers.shape)
        (7, (7, 22), (2, 18))
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
        (layers, 18): log of its size, depth from 0 to 1, spread of its units' strengths, spread of
        how much they read, effective rank of what they read and of what they do (of 64), the eight
        leading singular values of what they read, weighed by strength, over the norm of all; then
        the share of each kind of node.

    Source:
        Effective rank, exp(entropy of the squared singular values): Roy and Vetterli 2007, EUSIPCO.
    """
    starts = np.searchsorted(graph.layer, np.arange(int(graph.layer.max()) + 2))
    found = []
    for start, end in pairwise(starts):
        scalars = graph.scalars[start:end].astype(np.float64)
        read, reach = graph.forward[start:end], graph.backward[start:end]
        strength = np.exp(scalars[:, _STRENGTH : _STRENGTH + 1])
        weighed = np.sqrt(_squares(read * strength)[:_LEADING])
        found.append(
            [
                scalars[0, _SIZE],
                scalars[0, _DEPTH],
                scalars[:, _STRENGTH].std(),
                scalars[:, _OWN].std(),
                _effective_rank(_squares(read)),
                _effective_rank(_squares(reach)),
                *np.pad(weighed, (0, _LEADING - len(weighed))),
                *scalars[:, -len(NODE_KINDS) :].mean(axis=0),
            ]
        )
    return np.array(found)


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
