"""Descriptions of well-known families: steps with names of tensors, in one JSON file a family.

A file names a few tensors that it `knows`, by the ends of their names, so that any prefix may
stand before them, and then the steps in the order of the forward pass. In a name, `{p}` is the
prefix, `{o}` the prefix without its last part, `{b}` the block that is repeated and `{i}` its
number. `let` gives a word a meaning, `if` looks whether a tensor is there.

Sizes come from the shapes. Heads come from the config, from a table of rotary positions, or from
what the family usually has.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

from embedder.architecture import Architecture, Builder, Gauge
from embedder.errors import ArchitectureError

Shapes = Mapping[str, tuple[int, ...]]
Config = Mapping[str, Any]

_USUAL_HEADS = 0.8
"""Confidence where heads are taken to be the family's usual ones: that is right for 62 of the 70
published configs that the tests list, and its tables were made from them."""

_UNDECLARED = 0.9
"""Confidence where no config names the family. Of nine families with Llama's tensor names or part
of them, eight compute the same or are told by their tensors, and Gemma adds one to each gain."""

_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_ACTIVATIONS = ("hidden_act", "activation_function", "hidden_activation", "activation")
_GAIN, _OFFSET = ("weight", "gamma"), ("bias", "beta")


@cache
def families() -> tuple[Mapping[str, Any], ...]:
    """Return the families that are shipped, in the order of their files."""
    folder = files("embedder").joinpath("architectures")
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".json"))
    return tuple(json.loads(folder.joinpath(name).read_text("utf-8")) for name in names)


def prefixes_of(family: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """Return what stands before the names that a family knows, for each model of it in there."""
    found = []
    for known in (family["knows"], family.get("knows_old", family["knows"])):
        for name in shapes:
            prefix = name.removesuffix(known[0])
            at_part = prefix == "" or prefix.endswith(".")
            if name.endswith(known[0]) and at_part and all(prefix + k in shapes for k in known):
                found.append(prefix)
    return sorted(set(found))


def fill(family: Mapping[str, Any], shapes: Shapes, prefix: str, config: Config) -> Architecture:
    """Return a family's description with the names and sizes of one model.

    Args:
        family: One of `families()`.
        shapes: Name → shape.
        prefix: What stands before the names.
        config: The declared config; may be empty.

    Raises:
        ArchitectureError: A tensor is missing or does not fit, or the config says that it is of
            another family or has other heads than the shapes allow.
    """
    declared = config.get("model_type")
    if declared is not None and declared not in family["model_types"]:
        raise ArchitectureError(f"the config says {declared}, not {family['family']}")
    filling = _Filling(family, shapes, config)
    outer = prefix[:-1].rpartition(".")[0]
    activation = next((str(config[key]) for key in _ACTIVATIONS if config.get(key)), "")
    filling.words |= {
        "p": prefix,
        "o": f"{outer}." if outer else "",
        "activation": _plain_activation(activation or family["activation"]),
    }
    filling.run(family["steps"])
    return filling.finish(1.0 if declared else _UNDECLARED)


def _plain_activation(name: str) -> str:
    """Return our word for an activation of a config; approximations are taken for the function."""
    return "gelu" if "gelu" in name else {"swish": "silu"}.get(name, name)


@dataclass
class _Filling:
    """Goes through a family's steps and tells them to a builder."""

    family: Mapping[str, Any]
    shapes: Shapes
    config: Config
    words: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    headed: bool = False
    heads_known: bool = True

    def __post_init__(self) -> None:
        self.builder = Builder(self.family["family"])
        self.kinds: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "input": self.input,
            "embedding": self.embedding,
            "linear": self.linear,
            "unitwise": self.unitwise,
            "norm": self.norm,
            "slopes": self.slopes,
            "gated": self.gated,
            "attention": self.attention,
            "repeat": self.repeat,
            "let": self.let,
            "if": self.branch,
            "if_as_many": self.branch,
            "outputs": self.output,
        }

    def run(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Tell steps to the builder."""
        for step in steps:
            self.kinds[next(iter(step))](step)

    def finish(self, confidence: float) -> Architecture:
        """Return what was told, its last units named if no head reads them."""
        built = self.builder.build()
        built.check(self.shapes)
        groups = dict(built.groups)
        for name in self.outputs if not self.headed else ():
            if name in groups:
                groups[name] = replace(groups[name], gauge=Gauge.NAMED)
        left = [
            name
            for name, shape in self.shapes.items()
            if name not in built.axes and shape and not name.endswith(tuple(self.family["ignored"]))
        ]
        every = sum(math.prod(self.shapes[name]) for name in (*built.axes, *left))
        share = sum(math.prod(self.shapes[name]) for name in built.axes) / max(every, 1)
        confidence *= share * (1 if self.heads_known else _USUAL_HEADS)
        return replace(built, groups=groups, confidence=confidence, unexplained=tuple(sorted(left)))

    def word(self, step: Mapping[str, Any], key: str, default: str = "") -> str:
        """Return a step's word, filled in."""
        return str(step.get(key, default)).format_map(self.words)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that has to be there."""
        if name not in self.shapes:
            raise ArchitectureError(f"{name}: the model has no such tensor")
        if 0 in self.shapes[name]:
            raise ArchitectureError(f"{name}: has no values, its shape is {self.shapes[name]}")
        return self.shapes[name]

    def length(self, name: str, axis: int) -> int:
        """Return the number of places on an axis of a tensor that has to be there."""
        shape = self.shape(name)
        if not -len(shape) <= axis < len(shape):
            raise ArchitectureError(f"{name}: has {len(shape)} axes, and axis {axis} is needed")
        return shape[axis]

    def there(self, module: str, *endings: str) -> str:
        """Return the name of a module's tensor, empty if there is none."""
        mark = "" if module.endswith("_") else "."
        return next((n for e in endings if (n := f"{module}{mark}{e}") in self.shapes), "")

    def input(self, step: Mapping[str, Any]) -> None:
        """Name inputs, as many as a tensor has rows or columns."""
        if "columns_of" in step:
            size = self.length(self.word(step, "columns_of"), 1)
        else:
            size = self.length(self.word(step, "rows_of"), -2)
        self.sizes[step["input"]] = size
        self.builder.input(step["input"], size)

    def embedding(self, step: Mapping[str, Any]) -> None:
        """Add a table."""
        name, target = self.word(step, "embedding"), self.word(step, "to")
        lead, size = len(self.shape(name)) - 2, self.length(name, -1)
        self.sizes.setdefault(target, size)
        self.builder.embedding(name, self.word(step, "from"), target, size, lead=lead)

    def linear(self, step: Mapping[str, Any]) -> None:
        """Add a matrix or convolution, or the other tensor that serves where there is none."""
        module = self.word(step, "linear")
        found = self.there(module, "weight")
        name = found or self.there(self.word(step, "or"), "weight") or f"{module}.weight"
        target, turned = self.word(step, "to"), bool(step.get("turned"))
        size = self.length(name, 1 if turned else 0)
        biases = [word.format_map(self.words) for word in step.get("bias", ())]
        bias = next((b for b in biases if b in self.shapes), "") or self.there(module, "bias")
        self.sizes.setdefault(target, size)
        self.headed |= bool(step.get("named"))
        source, flattened = self.word(step, "from"), bool(step.get("flattened"))
        self.builder.linear(
            name,
            source,
            target,
            size,
            bias=bias,
            activation=self.word(step, "activation", "linear"),
            named=bool(step.get("named")),
            space=len(self.shape(name)) - 2,
            inner=self.length(name, 1) // max(self.sizes[source], 1) if flattened else 1,
            channels_last=flattened,
            normed=bool(step.get("normed")),
            turned=turned,
        )

    def slopes(self, step: Mapping[str, Any]) -> None:
        """Add the slopes of a leaky ReLU, one for each unit."""
        name = f"{self.word(step, 'slopes')}.weight"
        self.shape(name)
        self.builder.slopes(name, self.word(step, "of"))

    def unitwise(self, step: Mapping[str, Any]) -> None:
        """Add a depthwise convolution."""
        module, source, target = (self.word(step, key) for key in ("unitwise", "from", "to"))
        shape = self.shape(f"{module}.weight")
        self.sizes[target] = self.length(f"{module}.weight", 0)
        self.builder.unitwise(
            f"{module}.weight",
            source,
            target,
            bias=self.there(module, "bias"),
            activation=self.word(step, "activation", "linear"),
            space=len(shape) - 2,
        )

    def norm(self, step: Mapping[str, Any]) -> None:
        """Add a norm, if it has a gain."""
        module, source = self.word(step, "norm"), self.word(step, "from")
        gain = self.there(module, *_GAIN)
        self.shape(gain or f"{module}.weight")
        target = self.word(step, "to")
        if target:
            self.sizes[target] = self.sizes[source]
        self.builder.norm(
            source,
            step["kind"],
            gain=gain,
            offset=self.there(module, *_OFFSET),
            mean=self.there(module, "running_mean"),
            variance=self.there(module, "running_var"),
            target=target,
        )

    def gated(self, step: Mapping[str, Any]) -> None:
        """Add a gated map."""
        gate, up, output = (name.format_map(self.words) for name in step["gated"])
        self.builder.gated(
            gate,
            up,
            output,
            self.word(step, "from"),
            self.word(step, "to"),
            self.length(gate, 0),
            inside=self.word(step, "inside"),
            activation=self.word(step, "activation"),
        )

    def attention(self, step: Mapping[str, Any]) -> None:
        """Add attention, with as many heads as is known or usual."""
        tensors = {}
        for role, module in step["attention"].items():
            filled = module.format_map(self.words)
            tensors[role] = self.there(filled, "weight") or f"{filled}.weight"
            if bias := self.there(filled, "bias"):
                tensors[f"{role}_bias"] = bias
        normed = [self.there(m.format_map(self.words), "weight") for m in step.get("normed", ())]
        gains = [name for name in normed if name]
        place = 1 if step.get("turned") else 0
        if "joint" in tensors:
            queries = keys = self.length(tensors["joint"], place) // 3
        else:
            queries, keys = (self.length(tensors[role], place) for role in ("query", "key"))
        # Where positions turn some channels alone, their table does not tell how many there are.
        tables = [s for n, s in self.shapes.items() if n.endswith(".rotary_emb.inv_freq") and s]
        told = 0 if step.get("fixed") or not tables else 2 * tables[0][-1]
        told = self.length(gains[0], 0) if gains else told
        heads, channels = self.heads(queries, keys, told)
        if keys % channels or heads % max(keys // channels, 1):
            raise ArchitectureError(
                f"{tensors.get('key', tensors.get('joint'))}: {keys} rows of keys are no heads of "
                f"{channels} channels for {heads} heads of queries"
            )
        self.builder.attention(
            tensors,
            self.word(step, "from"),
            self.word(step, "to"),
            inside=self.word(step, "inside"),
            heads=heads,
            channels=channels,
            key_heads=keys // channels,
            rotary=bool(step.get("rotary")),
            turned=bool(step.get("turned")),
            fixed=bool(step.get("fixed")),
            by_head=bool(step.get("by_head")),
            gains=gains,
        )

    def heads(self, rows: int, keys: int, told: int) -> tuple[int, int]:
        """Return the number of heads and the channels of each, which a tensor may have told."""
        heads = next((self.config[key] for key in _HEADS if self.config.get(key)), None)
        channels = self.config.get("head_dim")
        if isinstance(heads, int) and heads > 0:
            channels = rows // heads
        elif told:
            channels = told
        elif not (isinstance(channels, int) and channels > 0):
            self.heads_known = False
            usual = self.family.get("channels_by_width", {})
            channels = math.gcd(usual.get(str(rows), self.family["channels"]), rows, keys)
        if (
            not channels
            or not rows
            or rows % channels
            or (isinstance(heads, int) and heads * channels != rows)
        ):
            raise ArchitectureError(f"{rows} rows of queries are no {heads or 'whole'} heads")
        return rows // channels, channels

    def repeat(self, step: Mapping[str, Any]) -> None:
        """Run steps for each block that there is."""
        name, number = step.get("as", "i"), int(step.get("from", 0))
        while True:
            self.words[name] = str(number)
            block = self.word(step, "repeat")
            if not any(tensor.startswith(f"{block}.") for tensor in self.shapes):
                return
            self.words["b"] = block
            self.run(step["steps"])
            number += 1

    def let(self, step: Mapping[str, Any]) -> None:
        """Give words a meaning."""
        for name, meaning in step["let"].items():
            self.words[name] = meaning.format_map(self.words)

    def branch(self, step: Mapping[str, Any]) -> None:
        """Run steps if a tensor is there, or has as many rows as a group has units."""
        if "if" in step:
            holds = self.word(step, "if") in self.shapes
        else:
            name, group = (word.format_map(self.words) for word in step["if_as_many"])
            holds = self.length(name, 0) == self.sizes[group]
        self.run(step["steps"] if holds else step.get("else", ()))

    def output(self, step: Mapping[str, Any]) -> None:
        """Note which units are the output where there is no head."""
        self.outputs = tuple(name.format_map(self.words) for name in step["outputs"])
