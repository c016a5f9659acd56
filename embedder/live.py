"""A model that lives in memory, as a checkpoint: torch, Keras, Flax, or plain arrays.

Models are recognised by what they can do, so no framework is imported here; a tensor's own
methods turn it into bytes. Weights on the CPU are not copied. Change the model, and the
checkpoint's numbers change too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedder.checkpoint import Checkpoint, Kind, Tensor, kind_of, tensor_of
from embedder.encoding import NAME_OF, PLAIN, Affine, Encoding, Plain
from embedder.errors import CheckpointError, EmptyModelError, UnsupportedError
from embedder.readers.keras_layout import axes_of, layer_class, variable_kind, variable_word
from embedder.readers.nested import is_optimiser_key
from embedder.storage import MemoryStorage

_DEEPEST = 100
_QUANTISED = {"qint8": "I8", "quint8": "U8", "qint32": "I32"}


def open_live(model: object, name: str = "live") -> Checkpoint:
    """Return a model in memory as a checkpoint.

    Args:
        model: A `torch.nn.Module` (so also a transformers model), a Keras model, a Flax model or
            its parameters, a state dict, or any nesting of mappings and sequences of arrays.
        name: What to call it in answers.

    Raises:
        EmptyModelError: No array is in it.
        UnsupportedError: An array is of a type that we cannot decode.
        CheckpointError: It is a mapping that holds itself.

    Example:
        >>> model = {"dense": {"weight": np.ones((2, 3), np.float32)}}
        >>> [tensor.name for tensor in open_live(model).tensors]
        ['dense.weight']
    """
    found = _Found(name)
    state_dict = getattr(model, "state_dict", None)
    weights = getattr(model, "weights", None)
    params = getattr(model, "params", None)
    if callable(state_dict):
        kind = "live torch"
        found.walk(state_dict(), "")
    elif isinstance(weights, list | tuple) and all(map(_is_variable, weights)):
        kind = "live keras"
        for variable in weights:
            found.keras(variable)
    else:
        kind = "live arrays"
        found.walk(params if isinstance(params, Mapping) else model, "")
    if not found.tensors:
        raise EmptyModelError(name, f"there are no arrays in this {type(model).__name__}")
    return Checkpoint(
        location=name,
        format=kind,
        tensors=tuple(found.tensors),
        declared=_declared(model),
        limits=found.limits,
        aliases=found.aliases,
    )


@dataclass
class _Found:
    """Tensors collected so far from a live model."""

    location: str
    tensors: list[Tensor] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    limits: list[str] = field(default_factory=list)
    _seen: dict[object, str] = field(default_factory=dict)

    def walk(self, node: object, name: str, *, depth: int = 0, optimiser: bool = False) -> None:
        """Collect the arrays below a node; names are joined with dots."""
        if depth > _DEEPEST:
            raise CheckpointError(self.location, f"nested deeper than {_DEEPEST} levels at {name}")
        node = _unwrapped(node)
        if _is_array(node):
            self.add(name, node, optimiser=optimiser)
            return
        for key, child in _members(node):
            self.walk(
                child,
                f"{name}.{key}" if name else key,
                depth=depth + 1,
                optimiser=optimiser or (is_optimiser_key(key) and not _is_array(child)),
            )

    def add(self, name: str, array: Any, *, optimiser: bool = False) -> None:
        """Add one array, unless it is one that has been added under another name."""
        identity = _identity(array)
        first = self._seen.setdefault(identity, name)
        if first != name:
            self.aliases[name] = first
            return
        tensor = _tensor(self.location, name, array)
        if tensor is None:
            return
        word = name.rpartition(".")[2]
        if word == "kernel":  # Flax and Keras: (space ×) in × out
            tensor = replace(tensor, axes=axes_of(word, tensor.shape, ""))
        self.tensors.append(replace(tensor, kind=Kind.OPTIMISER) if optimiser else tensor)

    def keras(self, variable: Any) -> None:
        """Add a Keras variable, whose layer says how its axes lie."""
        path = str(getattr(variable, "path", None) or variable.name)
        tensor = _tensor(self.location, path, _unwrapped(variable))
        if tensor is None:
            return
        layer = layer_class(path, {})
        word = variable_word(path, layer, shape=tensor.shape)
        kind = variable_kind(word, tensor.shape, tensor.encoding)
        axes = axes_of(word, tensor.shape, layer)
        self.tensors.append(replace(tensor, kind=kind, axes=axes))


def _unwrapped(node: Any) -> object:
    """Return the array in a variable of Keras or Flax, or the node itself."""
    if _is_array(node) or isinstance(node, Mapping | list | tuple):
        return node
    value = getattr(node, "value", node)
    if callable(value):  # TensorFlow's variables give their value on a call
        value = node.numpy() if callable(getattr(node, "numpy", None)) else node
    return value


def _is_array(node: object) -> bool:
    return isinstance(getattr(node, "shape", None), tuple) and hasattr(node, "dtype")


def _is_variable(node: object) -> bool:
    return hasattr(node, "shape") and (hasattr(node, "path") or hasattr(node, "name"))


def _members(node: object) -> Iterator[tuple[str, object]]:
    if isinstance(node, Mapping):
        yield from ((str(key), child) for key, child in node.items())
    elif isinstance(node, tuple) and hasattr(node, "_fields"):  # a named tuple, as JAX likes
        yield from zip(node._fields, node, strict=True)
    elif isinstance(node, list | tuple):
        yield from ((str(place), child) for place, child in enumerate(node))


def _identity(array: Any) -> object:
    """Return what tied arrays have in common."""
    if hasattr(array, "data_ptr") and _is_dense(array) and not _is_quantised(array):
        place = array.data_ptr()
        if place:
            return (
                place,
                str(array.dtype),
                tuple(sorted(zip(array.stride(), array.shape, strict=True))),
            )
    return id(array)


def _is_dense(array: Any) -> bool:
    return str(array.layout) == "torch.strided" and array.device.type != "meta"


def _is_quantised(array: Any) -> bool:
    return bool(getattr(array, "is_quantized", False))


def _tensor(location: str, name: str, array: Any) -> Tensor | None:
    """Return an array as a tensor, None if it holds no numbers."""
    if hasattr(array, "detach"):
        return _torch_tensor(location, name, array)
    values: NDArray[Any] = np.asarray(array)
    if values.dtype.kind in "OSUmM":
        return None
    if values.dtype.newbyteorder("=") not in NAME_OF:
        raise UnsupportedError(location, f"{name} is of type {values.dtype}, not decoded yet")
    return tensor_of(name, values)


def _torch_tensor(location: str, name: str, array: Any) -> Tensor | None:
    """Return a torch tensor over its own bytes, so that bfloat16 and float8 pass through too."""
    if not _is_dense(array):
        raise UnsupportedError(
            location, f"{name} is a {array.layout} tensor on {array.device}", "make it dense"
        )
    array = array.detach().cpu()
    shape = tuple(array.shape)
    encoding: Encoding
    if _is_quantised(array):
        plain = _QUANTISED.get(str(array.dtype).removeprefix("torch."))
        if plain is None:
            raise UnsupportedError(location, f"{name} is of type {array.dtype}, not decoded yet")
        encoding = _affine(plain, shape, array)
        array = array.int_repr()
    else:
        plain = _plain_of(array)
        if plain is None:
            raise UnsupportedError(location, f"{name} is of type {array.dtype}, not decoded yet")
        encoding = Plain(plain)
    storage = MemoryStorage(_bytes_of(array))
    return Tensor(name, shape, encoding, storage, kind_of(name, shape, encoding))


def _plain_of(array: Any) -> str | None:
    """Return our name of a torch type, by the name of numpy's or ml_dtypes' type."""
    name = str(array.dtype).removeprefix("torch.")
    return next((plain for plain, dtype in PLAIN.items() if dtype.name == name), None)


def _bytes_of(array: Any) -> NDArray[Any]:
    """Return the numbers of a torch tensor in the order of its axes, or their bytes."""
    flat = array.resolve_conj().contiguous().reshape(-1)
    if flat.numel() and not flat.dtype.is_complex:
        # numpy does not know bfloat16; the type of bytes is asked of a tensor, not of torch.
        flat = flat.view(flat[:0].byte().dtype)
    numbers: NDArray[Any] = flat.numpy() if flat.numel() else np.empty(0, np.uint8)
    return numbers


def _affine(plain: str, shape: tuple[int, ...], array: Any) -> Affine:
    if "per_channel" in str(array.qscheme()):
        scale = array.q_per_channel_scales().numpy()
        zero = array.q_per_channel_zero_points().numpy()
        axis = int(array.q_per_channel_axis())
    else:
        scale, zero, axis = np.array([array.q_scale()]), np.array([array.q_zero_point()]), 0
    return Affine(plain, shape, scale.astype(np.float32), zero.astype(np.float32), axis)


def _declared(model: object) -> dict[str, Any]:
    """Return what a transformers model's config says, with the class of the model."""
    declared: dict[str, Any] = {"class": f"{type(model).__module__}.{type(model).__qualname__}"}
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if callable(to_dict):
        found = to_dict()
        if isinstance(found, dict):
            declared["config"] = found
    return declared
