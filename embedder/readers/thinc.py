"""thinc, the library below spaCy: `model` files of versions 7 (spaCy 2) and 8 (spaCy 3).

Both are MessagePack with arrays as the package msgpack-numpy writes them: a map with `nd`, `type`,
`shape` and `data`. Version 7 has a list `weights` of nodes, version 8 the lists `nodes`, `params`
and `shims` in parallel. Arrays are read where they lie in the file.

thinc writes W as out × in. A maxout layer's out × pieces × in becomes out × in × pieces, and the
parser's lower layer, features × out × pieces × in, becomes out × in × features × pieces.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedder.checkpoint import Checkpoint, Kind, Tensor, kind_of
from embedder.encoding import PLAIN, Plain
from embedder.errors import MalformedError, UnsupportedError
from embedder.readers.messagepack import Run, Tree, read_tree
from embedder.readers.stored import check_shape, stored_tensor
from embedder.readers.views import Swapped
from embedder.storage import OpenFile, Storage

_TYPES = {dtype.str[1:]: name for name, dtype in PLAIN.items() if dtype.kind in "fiubc"}
_AXES = {("W", 3): (0, 2, 1), ("W", 4): (1, 3, 0, 2)}
_KINDS = {"b": Kind.BIAS, "pad": Kind.BIAS, "G": Kind.NORM}
"""`pad` stands in the place of a missing feature's product with W: an offset, like b."""


def open_thinc(path: Path, *, allow_partial: bool = False) -> Checkpoint:
    """Open a `model` file of spaCy or thinc; `allow_partial` changes nothing.

    Raises:
        MalformedError: It is not what thinc writes, or is nested without measure.
        TruncatedError: It ends before its arrays do.
        UnsupportedError: A type of numbers that we do not know.
    """
    file = OpenFile(path)
    try:
        tree = read_tree(file)
        if not isinstance(tree, dict):
            raise _malformed(path, "is not a map")
        limits: list[str] = []
        version = 7 if "weights" in tree else 8
        found = _version_7(path, tree) if version == 7 else _version_8(path, tree, limits)
        tensors = tuple(_tensor(path, name, array) for name, array in found)
    except BaseException:
        file.close()
        raise
    return Checkpoint(
        location=str(path),
        format="thinc",
        tensors=tensors,
        files=(path,),
        declared={"thinc": version},
        limits=limits,
        open_files=[file],
    )


def _version_7(path: Path, tree: dict[str, Tree]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (node/parameter, array) of a file of thinc 7."""
    for place, node in enumerate(_list(path, tree, "weights")):
        for parameter in _list(path, node, "params"):
            name = parameter.get("name") if isinstance(parameter, dict) else None
            value = parameter.get("value") if isinstance(parameter, dict) else None
            if not isinstance(name, Run) or not isinstance(value, dict):
                raise _malformed(path, f"a parameter of node {place} has no name and value")
            yield f"{place}/{name.text()}", value


def _version_8(
    path: Path, tree: dict[str, Tree], limits: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (node/parameter, array) of a file of thinc 8; models of other libraries go to limits.

    A parameter that was never set is None.
    """
    names = [
        node["name"].text() if isinstance(node, dict) and isinstance(node.get("name"), Run) else ""
        for node in _list(path, tree, "nodes")
    ]
    for place, shims in enumerate(_list(path, tree, "shims")):
        if shims:
            name = names[place] if place < len(names) else ""
            limits.append(f"node {place} {name!r} holds a model of another library, not read")
    for place, parameters in enumerate(_list(path, tree, "params")):
        if not isinstance(parameters, dict):
            raise _malformed(path, f"the parameters of node {place} are not a map")
        label = names[place] if place < len(names) else ""
        for name, value in parameters.items():
            if isinstance(value, dict):
                yield f"{place}.{label}/{name}", value
            elif value is not None:
                raise _malformed(path, f"parameter {name!r} of node {place} is not an array")


def _tensor(path: Path, name: str, array: dict[str, Any]) -> Tensor:
    """Return the tensor over an array as msgpack-numpy writes it."""
    kind, shape, content = array.get("type"), array.get("shape", []), array.get("data")
    if not (isinstance(kind, Run) and isinstance(shape, list) and isinstance(content, Run)):
        raise _malformed(path, f"array {name!r} has no plain type, shape and data")
    check_shape(path, name, shape)
    text = kind.text()
    stored = _TYPES.get(text[1:]) if text[:1] in ("<", ">", "|") else None
    if stored is None:
        raise UnsupportedError(
            path, f"array {name!r} holds {text!r:.40}, which we cannot decode", "convert it"
        )
    storage: Storage = content.storage(f"array {name!r}")
    encoding = Plain(stored)
    if text[0] == ">":
        storage = Swapped(storage, encoding.unit_bytes // (2 if stored[0] == "C" else 1))
    word = name.rpartition("/")[2]
    guess = kind_of(word, tuple(shape), encoding)
    return stored_tensor(
        path,
        name,
        shape,
        encoding=encoding,
        storage=storage,
        kind=_KINDS.get(word, guess) if encoding.is_float else guess,
        axes=_AXES.get((word, len(shape)), ()),
    )


def _list(path: Path, node: Tree, key: str) -> list[Any]:
    found = node.get(key) if isinstance(node, dict) else None
    if not isinstance(found, list):
        raise _malformed(path, f"has no list {key!r} where thinc writes one")
    return found


def _malformed(path: Path, problem: str) -> MalformedError:
    return MalformedError(path, problem, "get the file again")
