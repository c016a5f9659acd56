"""Flax: nested maps in MessagePack whose leaves are arrays, as `flax.serialization` writes them.

An array is extension type 1: again MessagePack, of shape, name of the type, and bytes. Arrays over
a gigabyte are cut into flat chunks. Arrays are read where they lie in the file, in slices.

Flax writes a dense kernel as in × out and a convolution's as space × in × out.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedder.checkpoint import Checkpoint, Kind, Tensor, kind_of
from embedder.encoding import PLAIN, Plain
from embedder.errors import MalformedError, UnsupportedError
from embedder.readers.messagepack import Run, Tree, read_tree
from embedder.readers.stored import check_shape, stored_tensor
from embedder.storage import JoinedStorage, OpenFile, Storage

_ARRAY, _SCALAR = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
_TYPES = {dtype.name: name for name, dtype in PLAIN.items()}
_OPTIMISERS = frozenset({"opt_state", "optimizer", "optimizer_state", "ema", "ema_params"})
_STATISTICS = frozenset({"batch_stats"})
_HEADS = frozenset({"query", "key", "value", "out"})
_NO_ORDER: tuple[int, ...] = ()


def open_flax(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open a Flax file, such as `flax_model.msgpack`; `allow_partial` changes nothing.

    Raises:
        MalformedError: It is not what Flax writes, or is nested without measure.
        TruncatedError: It ends before its arrays do.
        UnsupportedError: A type of numbers that we do not know.
    """
    file = OpenFile(path)
    try:
        tree = read_tree(file)
        if not isinstance(tree, dict):
            raise MalformedError(path, "is not a map of arrays", "get the file again")
        arrays = list(_arrays(path, tree))
        siblings = dict(arrays)
        tensors = tuple(_tensor(path, name, array, siblings=siblings) for name, array in arrays)
    except BaseException:
        file.close()
        raise
    return Checkpoint(
        location=str(path), format="flax", tensors=tensors, files=(path,), open_files=[file]
    )


class _Array:
    """An array where it lies: its shape, its type and its bytes."""

    __slots__ = ("encoding", "shape", "storage")

    def __init__(self, shape: tuple[int, ...], encoding: Plain, storage: Storage) -> None:
        self.shape, self.encoding, self.storage = shape, encoding, storage


def _arrays(path: Path, tree: dict[str, Tree]) -> Iterator[tuple[str, _Array]]:
    """Yield (path/in/the/tree, array) in the order of the file."""
    waiting: list[tuple[str, Tree]] = [("", tree)]
    while waiting:
        name, node = waiting.pop()
        if isinstance(node, dict) and _CHUNKED in node:
            yield name, _joined(path, name, node)
        elif isinstance(node, dict):
            inner = [(f"{name}/{key}" if name else key, value) for key, value in node.items()]
            waiting.extend(reversed(inner))
        elif isinstance(node, list):
            waiting.extend(
                (f"{name}/{place}", value) for place, value in reversed(list(enumerate(node)))
            )
        elif isinstance(node, Run) and node.code in (_ARRAY, _SCALAR):
            yield name, _array(path, name, node)


def _array(path: Path, name: str, run: Run) -> _Array:
    """Return the array that an extension holds."""
    found = run.inside()
    if not (
        isinstance(found, list)
        and len(found) == 3
        and isinstance(found[0], list)
        and isinstance(found[1], Run)
        and isinstance(found[2], Run)
    ):
        raise MalformedError(
            path, f"array {name!r} is not a list of shape, type and bytes", "get the file again"
        )
    shape, kind, content = found
    check_shape(path, name, shape)
    stored = _TYPES.get(kind.text())
    if stored is None:
        raise UnsupportedError(
            path, f"array {name!r} holds {kind.text()!r:.40}, which we cannot decode", "convert it"
        )
    return _Array(tuple(shape), Plain(stored), content.storage(f"array {name!r}"))


def _joined(path: Path, name: str, node: dict[str, Tree]) -> _Array:
    """Return an array that was cut into flat chunks, numbered `0`, `1`, ….

    Raises:
        MalformedError: Shape or chunks are missing, or the chunks are not of one type.
    """
    shape, chunks = _numbered(node.get("shape")), _numbered(node.get("chunks"))
    if shape is None or not chunks:
        raise MalformedError(path, f"array {name!r} has no shape and chunks", "get the file again")
    parts = [
        _array(path, f"{name}/{place}", chunk)
        for place, chunk in enumerate(chunks)
        if isinstance(chunk, Run)
    ]
    if len(parts) != len(chunks) or len({part.encoding for part in parts}) != 1:
        raise MalformedError(
            path, f"the chunks of array {name!r} are not arrays of one type", "get the file again"
        )
    check_shape(path, name, shape)
    return _Array(tuple(shape), parts[0].encoding, JoinedStorage([part.storage for part in parts]))


def _numbered(node: Tree) -> list[Any] | None:
    """Return the values of a map with the keys `0`, `1`, …, which stands for a tuple."""
    if not isinstance(node, dict):
        return None
    found = [node.get(str(place)) for place in range(len(node))]
    return None if None in found else found


def _tensor(path: Path, name: str, array: _Array, *, siblings: dict[str, _Array]) -> Tensor:
    top, last = name.partition("/")[0], name.rpartition("/")[2]
    bias = siblings.get(f"{name.rpartition('/')[0]}/bias")
    if top in _OPTIMISERS:
        kind, axes = Kind.OPTIMISER, _NO_ORDER
    else:
        kind = _kind(name, last, array)
        axes = (
            _axes(name, array.shape, bias.shape if bias else None)
            if last == "kernel"
            else _NO_ORDER
        )
    return stored_tensor(
        path,
        name,
        array.shape,
        encoding=array.encoding,
        storage=array.storage,
        kind=kind,
        axes=axes,
    )


def _kind(name: str, last: str, array: _Array) -> Kind:
    if array.encoding.is_float:
        if name.partition("/")[0] in _STATISTICS:
            return Kind.STATISTIC
        if last == "bias" and math.prod(array.shape) > 1:
            return Kind.NORM if "norm" in name.lower() else Kind.BIAS
        if last == "scale":
            return Kind.NORM
    return kind_of(name, array.shape, array.encoding)


def _axes(name: str, shape: tuple[int, ...], bias: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the order that brings a kernel to out × in × space.

    Example:
        >>> _axes("params/Conv_0/kernel", (3, 3, 16, 32), (32,))
        (3, 2, 0, 1)
        >>> _axes("params/attention/query/kernel", (64, 4, 16), (4, 16))
        ()
    """
    rank = len(shape)
    if rank == 2:
        return (1, 0)
    if not 3 <= rank <= 5:
        return ()
    if bias is not None and len(bias) > 1:
        # Layers stacked by `scan` have a bias each; else these are the heads of an attention.
        stacked = rank == 3 and bias == (shape[0], shape[2]) and bias != shape[1:]
        return (0, 2, 1) if stacked else ()
    if rank == 3 and name.split("/")[-2:-1] and name.split("/")[-2] in _HEADS:
        return ()
    return (rank - 1, rank - 2, *range(rank - 2))
