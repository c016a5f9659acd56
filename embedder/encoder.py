"""The function encoder: from the weight graph of a network to a code of what it does.

Three levels. *Micro*: each unit gets random features of its codes, which training then moves, and
hears from the units that feed it and that it feeds, by attention. *Meso*: the units of a layer
become one token (`embedder.pooling`), with numbers of the layer as a whole. *Macro*: the tokens of
a network attend to each other; their mean and the last one, that of the outputs, are kept. The code
joins what the three levels say.

Its input has neither order nor scale (`embedder.graph`), so nothing in here has to be equivariant
by design beyond what every graph network is. Where a unit may change its sign, its codes enter as
cosines and as products of one with the other, and its edges without sign.

The code is of unit length: codes are compared by their inner product, as identity codes are, and
the heads that predict properties read nothing that is not stored.

Sources:
    Attention on graphs: Brody, Alon, Yahav 2022, ICLR (GATv2). Random features: Rahimi and Recht
    2007, NeurIPS; learned ones: Li et al. 2021, NeurIPS.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GATv2Conv, GINEConv
from torch_geometric.nn.aggr import AttentionalAggregation
from torch_geometric.utils import dropout_edge, subgraph

from embedder.anchors import WIDTH
from embedder.architecture import Architecture
from embedder.encoder_input import LAYER_NUMBERS, NODE_NUMBERS, batch_of, graph_data
from embedder.graph import EDGE_FEATURES, weight_graph
from embedder.pooling import POOLINGS, Nodes, pooling_of

DIMENSION = 128
"""Numbers of a code."""
LEVELS = ("micro", "meso", "macro")

_FREQUENCIES = 64
"""Random features of each kind that a unit starts with."""


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """What an encoder is made of.

    Args:
        width: Numbers of a unit, and of a layer.
        rounds: Of messages, along the weights and against them in turn; 0 for none.
        heads: Of each attention; they share the width.
        pooling: `mean`, `sag` or `diff`.
        levels: Which of micro, meso and macro enter the code.
        anchors: Whether units have codes, or only numbers.
        gauge: Whether scales and signs are taken out of the graph.
        attention: Whether messages are weighed by attention, or all alike.
        dropout: Share of what the dense parts hold that training leaves out.
        node_dropout: Share of units that training leaves out.
        edge_dropout: Share of edges that training leaves out. Half of them also halves the time.
        noise: Largest length of what training adds to a code of unit length, drawn as codes vary.
            Measured on recipes held back (400 steps without messages): 0 tells the gap with an R²
            of −.18 and the calibration error with −.12; 1 with .02 and .12.
        seed: Of the values that training starts from.

    Raises:
        ValueError: A value that has no meaning.
    """

    width: int = 64
    rounds: int = 2
    heads: int = 4
    pooling: str = "mean"
    levels: tuple[str, ...] = LEVELS
    anchors: bool = True
    gauge: bool = True
    attention: bool = True
    dropout: float = 0.1
    node_dropout: float = 0.1
    edge_dropout: float = 0.5
    noise: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling {self.pooling!r}; we have {', '.join(POOLINGS)}")
        if not self.levels or not set(self.levels) <= set(LEVELS):
            raise ValueError(f"levels {self.levels}; choose some of {', '.join(LEVELS)}")
        if self.rounds < 0 or self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(
                f"width {self.width}, rounds {self.rounds}, heads {self.heads}; the width must be "
                "a multiple of the heads, and none may be negative"
            )
        if not all(
            0 <= share < 1 for share in (self.dropout, self.node_dropout, self.edge_dropout)
        ):
            raise ValueError("a dropout is a share below 1")
        if self.noise < 0:
            raise ValueError(f"noise {self.noise}; it is a length, 0 for none")


class Encoded(NamedTuple):
    """What an encoder says of a batch.

    Args:
        codes: (networks, 128) of unit length.
        loss: () what training should make small besides, from the pooling.
    """

    codes: Tensor
    loss: Tensor


class Encoder(nn.Module):
    """Turns weight graphs into function codes.

    Args:
        config: What it is made of.

    Example:
        >>> from embedder.architecture import Builder
        >>> b = Builder("mlp").input("in", 3).linear("a", "in", "h", 5, activation="relu")
        >>> mlp = b.linear("b", "h", "out", 2, named=True).build()
        >>> rng = np.random.default_rng(0)
        >>> w = {"a": rng.normal(size=(5, 3)), "b": rng.normal(size=(2, 5))}
        >>> encoder = Encoder(EncoderConfig())
        >>> before = encoder.code(w, mlp)
        >>> w["a"], w["b"] = 2 * w["a"][::-1], w["b"][:, ::-1] / 2
        >>> before.shape, bool(np.allclose(encoder.code(w, mlp), before, atol=1e-5))
        ((128,), True)
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.of_units, self.of_layers = Standard(NODE_NUMBERS), Standard(LAYER_NUMBERS)
            self.units = _UnitFeatures(config)
            self.rounds = nn.ModuleList(_Round(config) for _ in range(config.rounds))
            self.all_units = AttentionalAggregation(nn.Linear(width, 1))
            self.pooling = pooling_of(config.pooling, width)
            self.numbers = nn.Sequential(
                nn.Linear(LAYER_NUMBERS, width), nn.GELU(), nn.Linear(width, width)
            )
            self.token_norm = nn.LayerNorm(width)
            self.between = nn.MultiheadAttention(width, config.heads, batch_first=True)
            self.between_norm = nn.LayerNorm(width)
            self.after = nn.Sequential(
                nn.Linear(width, 2 * width),
                nn.GELU(),
                nn.Dropout(config.dropout),
                nn.Linear(2 * width, width),
            )
            self.after_norm = nn.LayerNorm(width)
            said = sum(2 if level == "macro" else 1 for level in config.levels)
            self.join = nn.Sequential(
                nn.Linear(said * width, 2 * DIMENSION),
                nn.GELU(),
                nn.Dropout(config.dropout),
                nn.Linear(2 * DIMENSION, DIMENSION),
            )

    def standardise(self, graphs: Sequence[Data]) -> None:
        """Take mean and spread of all numbers from some graphs, before training."""
        for standard, name in ((self.of_units, "numbers"), (self.of_layers, "layers")):
            standard.fit(torch.cat([graph[name] for graph in graphs]))

    def forward(self, batch: Batch) -> Encoded:
        """Return the codes of a batch of graphs (`embedder.encoder_input.batch_of`)."""
        kept = torch.ones(batch.num_nodes, dtype=torch.bool)
        if self.training:
            kept = torch.rand(batch.num_nodes) >= self.config.node_dropout
        layer = batch.layer + batch.layers_ptr[batch.batch]
        edges, numbers = subgraph(
            kept, batch.edge_index, batch.edge_attr, relabel_nodes=True, num_nodes=len(kept)
        )
        features = self._exchange(self._units(batch)[kept], edges, numbers)
        graphs = int(batch.num_graphs)
        nodes = Nodes(
            features,
            layer[kept],
            batch.batch[kept],
            edges,
            self.of_layers(batch.layers),
            batch.layers_batch,
            graphs,
        )
        said, loss = self._levels(nodes)
        joined = self.join(torch.cat([said[level] for level in self.config.levels], dim=1))
        return Encoded(nn.functional.normalize(joined, dim=1), loss)

    def nodes(self, batch: Batch) -> Tensor:
        """Return the features of all units after the exchange of messages, (nodes, width)."""
        return self._exchange(self._units(batch), batch.edge_index, batch.edge_attr)

    def _units(self, batch: Batch) -> Tensor:
        found: Tensor = self.units(batch, self.of_units(batch.numbers))
        return found

    def _exchange(self, features: Tensor, edges: Tensor, numbers: Tensor) -> Tensor:
        for number, exchange in enumerate(self.rounds):
            ways = edges.flip(0) if number % 2 else edges
            features = exchange(features, ways, numbers)
        return features

    def _levels(self, nodes: Nodes) -> tuple[dict[str, Tensor], Tensor]:
        """Return what each level says, (networks, width), and the loss of the pooling."""
        tokens = self.pooling(nodes)
        features = tokens.features
        if "meso" in self.config.levels:
            features = features + self.numbers(tokens.numbers)
        features = self.token_norm(features)
        heard, _ = self.between(
            features, features, features, key_padding_mask=~tokens.there, need_weights=False
        )
        heard = self.between_norm(features + heard)
        heard = self.after_norm(heard + self.after(heard))
        last = heard[torch.arange(nodes.graphs), tokens.there.sum(dim=1) - 1]
        said = {
            "micro": self.all_units(nodes.features, nodes.graph, dim_size=nodes.graphs),
            "meso": _mean(features, tokens.there),
            "macro": torch.cat([_mean(heard, tokens.there), last], dim=1),
        }
        return said, tokens.loss

    @torch.no_grad()
    def code(
        self, weights: Mapping[str, NDArray[np.floating]], architecture: Architecture
    ) -> NDArray[np.float32]:
        """Return the function code of one network, (128,) float32 of unit length.

        Raises:
            ArchitectureError: As `embedder.graph.weight_graph`; or DiffPool with too many units.
        """
        graph = weight_graph(weights, architecture, gauge=self.config.gauge)
        was = self.training
        self.eval()
        found = self(batch_of([graph_data(graph)])).codes[0]
        self.train(was)
        return np.asarray(found.numpy(), np.float32)


class Standard(nn.Module):
    """Numbers against their mean and spread, at most 5 spreads away.

    Args:
        size: How many there are.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mean, self.spread = nn.Buffer(torch.zeros(size)), nn.Buffer(torch.ones(size))

    def fit(self, values: Tensor) -> None:
        """Take mean and spread of these, (many, size)."""
        self.mean.copy_(values.mean(dim=0))
        # A number that hardly varies would tell rounding errors.
        self.spread.copy_(values.std(dim=0).clamp(min=0.05))

    def forward(self, values: Tensor) -> Tensor:
        """Return the numbers in spreads from the mean."""
        return ((values - self.mean) / self.spread).clamp(-5, 5)


class _UnitFeatures(nn.Module):
    """What a unit is before it hears from others, (nodes, width)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.anchors, self.noise = config.anchors, config.noise
        # Frequencies for codes of unit length, as a kernel of width 1 draws them: training sets
        # their lengths.
        self.read = nn.Parameter(torch.randn(WIDTH, _FREQUENCIES))
        self.reach = nn.Parameter(torch.randn(WIDTH, _FREQUENCIES))
        self.pairs = nn.Parameter(torch.randn(2, WIDTH, _FREQUENCIES))
        size = NODE_NUMBERS + (5 * _FREQUENCIES if config.anchors else 0)
        self.mix = nn.Linear(size, config.width)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, batch: Batch, numbers: Tensor) -> Tensor:
        found = [numbers]
        if self.anchors:
            odd = ~batch.even[:, None]
            code, back = batch.read, batch.reach
            if self.training and self.noise:
                strength = self.noise * torch.rand(int(batch.num_graphs))[batch.batch, None]
                code, back = _moved(code, strength), _moved(back, strength)
            read, reach = code @ self.read, back @ self.reach
            both = (code @ self.pairs[0]) * (back @ self.pairs[1])
            found += [read.cos(), read.sin() * odd, reach.cos(), reach.sin() * odd, both]
        said: Tensor = self.norm(nn.functional.gelu(self.mix(torch.cat(found, dim=1))))
        return said


def _moved(codes: Tensor, strength: Tensor) -> Tensor:
    """Return codes moved as codes vary, of unit length again; zeros stay zeros."""
    # Training further moves codes in the directions in which they vary anyway, and differences of
    # two of them have that covariance.
    other = torch.randint(len(codes), (2, len(codes)))
    step = (codes[other[0]] - codes[other[1]]) / 2**0.5
    moved = nn.functional.normalize(codes + strength * step, dim=1)
    return moved * codes.any(dim=1, keepdim=True)


class _Round(nn.Module):
    """One exchange of messages along edges."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.dropout = config.edge_dropout
        self.convolution: Any = (
            GATv2Conv(width, width // heads, heads, edge_dim=EDGE_FEATURES, add_self_loops=False)
            if config.attention
            else GINEConv(nn.Linear(width, width), edge_dim=EDGE_FEATURES, aggr="mean")
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor, edges: Tensor, numbers: Tensor) -> Tensor:
        if self.training and self.dropout:
            edges, kept = dropout_edge(edges, p=self.dropout)
            numbers = numbers[kept]
        heard = nn.functional.gelu(self.convolution(features, edges, numbers))
        said: Tensor = self.norm(features + heard)
        return said


def _mean(features: Tensor, there: Tensor) -> Tensor:
    """Return the mean over the tokens that are there, (networks, width)."""
    weights = there[:, :, None].to(features.dtype)
    return (features * weights).sum(dim=1) / weights.sum(dim=1)
