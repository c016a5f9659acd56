"""How Keras lays out its weights, in HDF5, in SavedModel variables and in TensorFlow.js.

Keras writes a dense kernel as in × out and a convolution's as space × in × out; we want
out × in × space. Which of these a variable is follows from its own name (`kernel`, `embeddings`),
from the class of its layer where a config is at hand, and else from its shape and that of the
bias beside it. An order of axes only turns a tensor; it never decides an answer.

A depthwise kernel, space × channels × multiplier, becomes channels × multiplier × space. Where the
multiplier is 1, as nearly always, that is the channels × 1 × space of other frameworks; else their
(channels · multiplier) × 1 × space holds the same values in the same order.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from embedder.checkpoint import Kind, kind_of
from embedder.encoding import Encoding, Plain

_KERNELS = frozenset(
    {"kernel", "recurrent_kernel", "pointwise_kernel", "depthwise_kernel"}
    | {"weights", "depthwise_weights", "pointwise_weights", "w", "filter"}
)
_BIASES = frozenset({"bias", "biases", "recurrent_bias", "b", "alpha"})
_NORMS = frozenset({"gamma", "beta"})
_STATISTICS = frozenset({"moving_mean", "moving_variance"})
_SCALES = frozenset({"kernel_scale", "embeddings_scale", "kernel_zero"})

_PLAIN_LAYER = ("kernel", "bias")
_CELL = ("kernel", "recurrent_kernel", "bias")
_DEPTHWISE = ("depthwise_kernel", "bias")
_SEPARABLE = ("depthwise_kernel", "pointwise_kernel", "bias")
_VARIABLES: dict[str, tuple[str, ...]] = {
    "Dense": _PLAIN_LAYER,
    "EinsumDense": _PLAIN_LAYER,
    "Conv1D": _PLAIN_LAYER,
    "Conv2D": _PLAIN_LAYER,
    "Conv3D": _PLAIN_LAYER,
    "Conv1DTranspose": _PLAIN_LAYER,
    "Conv2DTranspose": _PLAIN_LAYER,
    "Conv3DTranspose": _PLAIN_LAYER,
    "DepthwiseConv1D": _DEPTHWISE,
    "DepthwiseConv2D": _DEPTHWISE,
    "SeparableConv1D": _SEPARABLE,
    "SeparableConv2D": _SEPARABLE,
    "LSTMCell": _CELL,
    "GRUCell": _CELL,
    "SimpleRNNCell": _CELL,
    "LSTM": _CELL,
    "GRU": _CELL,
    "SimpleRNN": _CELL,
    "ConvLSTM2D": _CELL,
    "Embedding": ("embeddings",),
    "BatchNormalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "LayerNormalization": ("gamma", "beta"),
    "GroupNormalization": ("gamma", "beta"),
    "PReLU": ("alpha",),
}
"""Layer class → its variables in the order in which Keras 3 numbers them."""

_ATTENTION = ("query", "key", "value", "attention_output")
_CLASS_OF_NAME = {
    re.sub(r"(?<=.)(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])", "_", name).lower(): name
    for name in _VARIABLES
}
_CLASS_OF_NAME |= {name: "EinsumDense" for name in _ATTENTION}
_CLASS_OF_NAME |= {f"{name}_dense": "EinsumDense" for name in ("query", "key", "value", "output")}


def json_object(text: bytes | str) -> dict[str, Any]:
    """Return the object that a JSON text is; empty if it is none.

    Example:
        >>> json_object('{"a": 1}'), json_object("[")
        ({'a': 1}, {})
    """
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def layers_of(config: object) -> Iterator[tuple[str, str]]:
    """Yield (name, class) of all layers in a model's config, at any depth.

    Example:
        >>> list(layers_of({"class_name": "Dense", "config": {"name": "head"}}))
        [('head', 'Dense')]
    """
    waiting = [config]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting.extend(reversed(node))
        elif isinstance(node, dict):
            inner, kind = node.get("config"), node.get("class_name")
            if isinstance(inner, dict) and isinstance(kind, str):
                name = inner.get("name")
                if isinstance(name, str):
                    yield name, kind
            waiting.extend(
                value for value in reversed(node.values()) if isinstance(value, (dict, list))
            )


def lambda_limits(layers: Mapping[str, str]) -> list[str]:
    """Return what to say of the layers of a config that are code."""
    names = [name for name, kind in layers.items() if kind.rpartition(">")[2] == "Lambda"]
    if not names:
        return []
    some = ", ".join(repr(name) for name in names[:5]) + (", …" if names[5:] else "")
    return [f"holds a Lambda layer whose code was not run: {some}"]


def layer_class(path: str, layers: Mapping[str, str], *, label: str = "") -> str:
    """Return the class of the layer that a variable belongs to; empty if it cannot be told.

    Args:
        path: The variable's path in the file.
        layers: Layer name → class, from the config.
        label: The layer's own name, where the file keeps it beside the variables.

    Example:
        >>> layer_class("model_weights/head/head/kernel:0", {"head": "Dense"})
        'Dense'
        >>> layer_class("layers/separable_conv2d_3/vars/1", {})
        'SeparableConv2D'
    """
    segments = [label, *reversed(path.split("/")[:-1])]
    for known in (layers.get, _class_by_name):
        for segment in segments:
            found = known(segment)
            if found in _VARIABLES:
                return found
    return ""


def _class_by_name(segment: str) -> str | None:
    """Return the class that Keras names so by itself: `conv2d_transpose_4`."""
    return _CLASS_OF_NAME.get(re.sub(r"(_\d+)?(:0)?$", "", segment))


def variable_word(path: str, layer: str, *, shape: tuple[int, ...], siblings: int = 0) -> str:
    """Return what Keras calls a variable within its layer: `kernel`, `moving_mean`.

    Args:
        path: The variable's path in the file, which may end in a number only.
        layer: Class of its layer, or empty.
        shape: Its shape.
        siblings: Number of variables in its layer.

    Example:
        >>> variable_word("conv1/conv1/kernel:0", "", shape=(3, 3, 1, 8))
        'kernel'
        >>> variable_word("layers/dense/vars/1", "Dense", shape=(8,), siblings=2)
        'bias'
    """
    parent, _, last = path.rpartition("/")
    last = last.partition(":")[0]
    names = _VARIABLES.get(layer, ())
    if last.isdigit() and parent.rpartition("/")[2] == "vars":
        if layer == "BatchNormalization" and siblings < 4:
            names = names[4 - siblings :]  # without scale or offset; the statistics stay
        if len(last) < 3 and int(last) < len(names):
            return names[int(last)]
        if names:
            return last
        return "kernel" if len(shape) > 1 else "bias"
    if names == _DEPTHWISE and last == "kernel":
        return "depthwise_kernel"
    # The first versions of Keras wrote `dense_1_W`.
    return "kernel" if last.endswith("_W") else "bias" if last.endswith("_b") else last


def axes_of(
    word: str, shape: tuple[int, ...], layer: str, *, bias: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Return the order that brings a variable's axes to out × in × space; empty for none.

    Args:
        word: What Keras calls it: `kernel`.
        shape: Its shape as stored.
        layer: Class of its layer, or empty.
        bias: Shape of the bias of the same layer.

    Example:
        >>> axes_of("kernel", (3, 3, 16, 32), "Conv2D")
        (3, 2, 0, 1)
        >>> axes_of("kernel", (3, 3, 16, 1), "DepthwiseConv2D")
        (2, 3, 0, 1)
        >>> axes_of("embeddings", (1000, 16), "Embedding")
        ()
    """
    rank = len(shape)
    if word.lower() not in _KERNELS or not 2 <= rank <= 5:
        return ()
    if rank == 2:
        return () if layer == "Embedding" else (1, 0)
    if layer == "EinsumDense" or (bias is not None and len(bias) > 1):
        return ()  # heads are axes of their own
    space = tuple(range(rank - 2))
    out_first = word.startswith("depthwise") or layer.startswith("Depthwise")
    out_first |= layer.endswith("Transpose")
    if not layer and bias is not None and bias != shape[-1:]:
        # A bias has one value for each output: these are not the last axis but the one before
        # (transposed convolution), perhaps times the last (depthwise).
        out_first |= bias in (shape[-2:-1], (shape[-2] * shape[-1],))
    return (rank - 2, rank - 1, *space) if out_first else (rank - 1, rank - 2, *space)


def variable_kind(word: str, shape: tuple[int, ...], encoding: Encoding) -> Kind:
    """Return what a variable is for.

    Example:
        >>> variable_kind("bias", (2, 96), Plain("F32"))
        <Kind.BIAS: 'bias'>
    """
    if isinstance(encoding, Plain) and not encoding.is_float:
        return Kind.BUFFER
    for words, kind in (
        (_BIASES, Kind.BIAS),
        (_NORMS, Kind.NORM),
        (_STATISTICS, Kind.STATISTIC),
        (_SCALES, Kind.SCALE),
    ):
        if word in words:
            return kind
    return kind_of(word, shape, encoding)


def model_facts(config: object) -> dict[str, Any]:
    """Return what a model's config says of the whole: its class and its name."""
    if not isinstance(config, dict):
        return {}
    inner = config.get("config")
    name = inner.get("name") if isinstance(inner, dict) else None
    facts = {"model_class": config.get("class_name"), "model_name": name}
    return {key: value for key, value in facts.items() if isinstance(value, str)}
