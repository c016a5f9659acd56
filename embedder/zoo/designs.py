"""The designs of the zoo's networks, each described for symmetries and weight graphs."""

from collections.abc import Callable
from dataclasses import dataclass

from embedder.architecture import Architecture, Builder, Gauge


@dataclass(frozen=True, slots=True)
class Config:
    """One design.

    Args:
        kind: `mlp`, `cnn`, `rnn`, `transformer` or `gnn`.
        inputs: Columns, values of a row, of a square or of a node; channels of a picture; tokens
            of a language model.
        classes: Outputs.
        widths: Units of each hidden layer or block.
        activation: Of the hidden units.
        norm: `batch` in a CNN; `layer` or `rms` (then with a gated product) in a transformer.
        residual: Whether a CNN adds its blocks to a stream.
        cell: `elman` or `gru`; in a GNN `gcn` or `sage`.
        heads: Of an attention.
        places: Positions of a transformer.
        patch: Side of the squares that a transformer reads; 0 for rows.
        causal: Whether it is a language model.
    """

    kind: str
    inputs: int
    classes: int
    widths: tuple[int, ...]
    activation: str = "relu"
    norm: str = ""
    residual: bool = False
    cell: str = ""
    heads: int = 0
    places: int = 0
    patch: int = 0
    causal: bool = False


def _mlp(config: Config) -> Architecture:
    builder = Builder("zoo-mlp").input("inputs", config.inputs)
    source = "inputs"
    for number, width in enumerate(config.widths):
        name, hidden = str(2 * number), f"hidden.{number}"
        builder.linear(
            f"{name}.weight",
            source,
            hidden,
            width,
            bias=f"{name}.bias",
            activation=config.activation,
        )
        source = hidden
    return _head(builder, config, source, str(2 * len(config.widths)))


def _head(builder: Builder, config: Config, source: str, name: str = "head") -> Architecture:
    bias = "" if config.norm == "rms" else f"{name}.bias"
    builder.linear(f"{name}.weight", source, "classes", config.classes, bias=bias, named=True)
    return builder.build()


def _convolution(
    builder: Builder, config: Config, source: str, target: str, name: str, norm: str, size: int
) -> None:
    """Add a convolution and its batch norm, or its bias if the design has no norm."""
    builder.linear(
        f"{name}.weight",
        source,
        target,
        size,
        bias="" if config.norm else f"{name}.bias",
        activation=config.activation,
        space=2,
        normed=bool(config.norm),
    )
    if config.norm:
        builder.norm(
            target,
            "batch",
            gain=f"{norm}.weight",
            offset=f"{norm}.bias",
            mean=f"{norm}.running_mean",
            variance=f"{norm}.running_var",
        )


def _cnn(config: Config) -> Architecture:
    builder = Builder("zoo-cnn").input("channels", config.inputs)
    if not config.residual:
        source = "channels"
        for number, width in enumerate(config.widths):
            target = f"hidden.{number}"
            names = (f"convs.{number}", f"norms.{number}")
            _convolution(builder, config, source, target, *names, width)
            source = target
        return _head(builder, config, source)
    _convolution(builder, config, "channels", "stream", "stem", "stem_norm", config.widths[0])
    for number, width in enumerate(config.widths):
        block = f"blocks.{number}"
        names = (f"{block}.conv1", f"{block}.norm1")
        _convolution(builder, config, "stream", f"{block}.hidden", *names, width)
        names = (f"{block}.conv2", f"{block}.norm2")
        _convolution(builder, config, f"{block}.hidden", "stream", *names, config.widths[0])
    return _head(builder, config, "stream")


def _rnn(config: Config) -> Architecture:
    builder = Builder("zoo-rnn").input("inputs", config.inputs)
    builder.recurrent(
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
        "inputs",
        "state",
        config.widths[0],
        kind=config.cell,
        bias="rnn.bias_ih_l0",
        recurrent_bias="rnn.bias_hh_l0",
    )
    return _head(builder, config, "state")


def _transformer(config: Config) -> Architecture:
    width, rms = config.widths[0], config.norm == "rms"
    builder = Builder("zoo-transformer").input("inputs", config.inputs)
    if config.causal:
        builder.embedding("tokens.weight", "inputs", "stream", width)
    else:
        bias = "" if rms else "embed.bias"
        builder.linear("embed.weight", "inputs", "stream", width, bias=bias, gauge=Gauge.ORDER)
    builder.input("positions", config.places)
    builder.embedding("position.weight", "positions", "stream", width)
    for number in range(len(config.widths)):
        _block(builder, config, f"blocks.{number}")
    offset = "" if rms else "norm.bias"
    kind = "rms" if rms else "layer"
    builder.norm("stream", kind, gain="norm.weight", offset=offset, target="read")
    return _head(builder, config, "read")


def _block(builder: Builder, config: Config, block: str) -> None:
    """Add attention and what mixes the channels, each before it is added to the stream."""
    width, rms = config.widths[0], config.norm == "rms"
    kind = "rms" if rms else "layer"
    for place in ("1", "2"):
        builder.norm(
            "stream",
            kind,
            gain=f"{block}.norm{place}.weight",
            offset="" if rms else f"{block}.norm{place}.bias",
            target=f"{block}.read{place}",
        )
        if place == "1":
            roles = ("query", "key", "value", "output")
            tensors = {role: f"{block}.attention.{role}.weight" for role in roles}
            if not rms:
                tensors |= {f"{role}_bias": f"{block}.attention.{role}.bias" for role in roles}
            builder.attention(
                tensors,
                f"{block}.read1",
                "stream",
                inside=f"{block}.heads",
                heads=config.heads,
                channels=width // config.heads,
            )
    read, hidden = f"{block}.read2", f"{block}.hidden"
    if rms:
        builder.gated(
            f"{block}.mlp.gate.weight",
            f"{block}.mlp.up.weight",
            f"{block}.mlp.down.weight",
            read,
            "stream",
            2 * width,
            inside=hidden,
            activation=config.activation,
        )
        return
    first, second = f"{block}.mlp.in", f"{block}.mlp.out"
    builder.linear(
        f"{first}.weight",
        read,
        hidden,
        2 * width,
        bias=f"{first}.bias",
        activation=config.activation,
    )
    builder.linear(f"{second}.weight", hidden, "stream", width, bias=f"{second}.bias")


def _gnn(config: Config) -> Architecture:
    builder = Builder("zoo-gnn").input("inputs", config.inputs)
    source = "inputs"
    for number, width in enumerate(config.widths):
        target, name = f"hidden.{number}", f"convs.{number}"
        if config.cell == "sage":
            builder.linear(
                f"{name}.self.weight", source, target, width, activation=config.activation
            )
            name = f"{name}.neighbour"
        builder.linear(
            f"{name}.weight",
            source,
            target,
            width,
            bias=f"{name}.bias",
            activation=config.activation,
        )
        source = target
    return _head(builder, config, source)


DESIGNS: dict[str, Callable[[Config], Architecture]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "rnn": _rnn,
    "transformer": _transformer,
    "gnn": _gnn,
}
"""Kind → what describes a design of it."""
