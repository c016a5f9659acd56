"""From nested Python objects, as a pickle holds them, to a flat list of named tensors."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from embedder.checkpoint import Kind, Tensor
from embedder.errors import MalformedError, UnsupportedError
from embedder.readers.array_records import ArrayRecord, array_tensor
from embedder.readers.tensor_records import TensorRecord, Unreadable, record_tensor, text_of
from embedder.readers.unpickling import Bag, Table

_DEEPEST = 200
_LONGEST_NAME = 500
_MOST_LIMITS = 20

_OPTIMISER = re.compile(r"opt|opt_states?|optims?|optim_\w+|\w*optimi[sz]er\w*", re.IGNORECASE)
"""Keys under which trainers keep the optimiser's state."""

_MODULE_PARTS = frozenset({"_parameters", "_buffers", "_modules"})
"""Attributes in which a torch module keeps its weights; a state dict leaves them out of names."""


@dataclass
class Named:
    """What was found in a tree of objects.

    Args:
        tensors: Each tensor once, in the order of the file.
        aliases: Further name → first name, for tensors and whole branches that are shared.
        limits: What was not read, in words.
    """

    tensors: list[Tensor] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    limits: list[str] = field(default_factory=list)


def named_tensors(path: Path, root: object, file_bytes: int, *, prefix: str = "") -> Named:
    """Return the tensors in a tree of unpickled records.

    Args:
        path: The file, for messages.
        root: What the pickle holds.
        file_bytes: Size of the file, which bounds what an expanded tensor may claim.
        prefix: What stands before every name.

    Raises:
        CheckpointError: A tensor does not agree with its storage.
        UnsupportedError: There are tensors, and none that can be read.
    """
    walk = _Walk(path, file_bytes)
    walk.down(root, prefix)
    found = walk.found
    found.aliases.update(
        (name, first) for name, first in walk.shared.items() if first in walk.holders
    )
    unread = len(walk.unread)
    if unread and not found.tensors:
        raise UnsupportedError(path, walk.unread[0], "convert the model to plain tensors")
    found.limits += walk.unread[:_MOST_LIMITS]
    if unread > _MOST_LIMITS:
        found.limits.append(f"{unread - _MOST_LIMITS} further tensors were not read")
    return found


class _Walk:
    """A walk over a tree of records, each branch once, to a limited depth."""

    def __init__(self, path: Path, file_bytes: int) -> None:
        self._path, self._file_bytes = path, file_bytes
        self.found = Named()
        self.unread: list[str] = []
        self.shared: dict[str, str] = {}
        self.holders: set[str] = set()
        self._branches: dict[int, str] = {}
        self._views: dict[object, str] = {}
        self._cut = False

    def down(self, root: object, prefix: str) -> None:
        """Visit everything below a root, in order."""
        if not self._leaf(prefix or "tensor", root, False):
            self._branches[id(root)] = prefix
        open_branches = [(prefix, _is_optimiser_state(root), _children(root))]
        while open_branches:
            above, of_optimiser, children = open_branches[-1]
            key, child = next(children, (None, None))
            if key is None:
                open_branches.pop()
                continue
            name = f"{above}.{key}" if above and key else above or key
            if self._leaf(name, child, of_optimiser):
                self.holders.update(branch for branch, _, _ in open_branches)
            elif isinstance(child, _BRANCHES) and self._is_new(name, child, len(open_branches)):
                in_optimiser = of_optimiser or _is_optimiser_state(child) or is_optimiser_key(key)
                open_branches.append((name, in_optimiser, _children(child)))

    def _is_new(self, name: str, branch: object, depth: int) -> bool:
        first = self._branches.setdefault(id(branch), name)
        if first != name:
            if isinstance(branch, Table):
                self.shared[name] = first
            return False
        if depth >= _DEEPEST and not self._cut:
            self._cut = True
            self.found.limits.append(f"values nested deeper than {_DEEPEST} levels were not read")
        return depth < _DEEPEST

    def _leaf(self, name: str, value: object, of_optimiser: bool) -> bool:
        """Add a tensor; return False if the value is something else."""
        if isinstance(value, Unreadable):
            self.unread.append(f"tensor {name[:_LONGEST_NAME]!r} is {value.reason}")
            return True
        if not isinstance(value, TensorRecord | ArrayRecord):
            return False
        if isinstance(value, ArrayRecord) and value.objects is not None:
            return False
        if len(name) > _LONGEST_NAME:
            raise MalformedError(
                self._path, f"a tensor's name has {len(name):,} characters: {name[:60]!r}…"
            )
        identity = _identity(value)
        if identity in self._views:
            self.found.aliases[name] = self._views[identity]
            return True
        tensor = self._tensor(name, value)
        if tensor is not None:
            self._views[identity] = name
            kind = Kind.OPTIMISER if of_optimiser else tensor.kind
            self.found.tensors.append(replace(tensor, kind=kind))
        return True

    def _tensor(self, name: str, value: TensorRecord | ArrayRecord) -> Tensor | None:
        if isinstance(value, ArrayRecord):
            return array_tensor(self._path, name, value)
        try:
            return record_tensor(self._path, name, value, self._file_bytes)
        except UnsupportedError as error:
            self.unread.append(error.problem)
            return None


_BRANCHES = (Table, list, tuple, ArrayRecord)
_SCALARS = frozenset({int, float, str, bool, bytes, type(None)})
"""What most of a pickle consists of, and no tensor is below."""


def _identity(value: TensorRecord | ArrayRecord) -> object:
    """Return what two names of one tensor have in common: storage, place and axes."""
    if isinstance(value, ArrayRecord):
        return id(value)
    size, stride = value.size, value.stride
    if not (isinstance(size, tuple | list) and isinstance(stride, tuple | list)):
        return id(value)
    steps = [
        (step, places)
        for step, places in zip(stride, size, strict=False)
        if type(step) is int and type(places) is int and places != 1
    ]
    storage = value.storage
    where = storage.source if storage.source is not None else storage
    offset = value.offset if type(value.offset) is int else -1
    # Sorted, so that a transposed tie, as of an embedding and its decoder, is one tensor too.
    return id(where), offset, tuple(sorted(steps)), value.dtype, storage.class_name


def is_optimiser_key(key: str) -> bool:
    """Say whether a container under this key holds the optimiser's state.

    Example:
        >>> is_optimiser_key("optimizer_state_dict"), is_optimiser_key("model_state_dict")
        (True, False)
    """
    return len(key) < 100 and _OPTIMISER.fullmatch(key) is not None


def _is_optimiser_state(branch: object) -> bool:
    # `torch.optim.Optimizer.state_dict()` is a mapping with these two keys.
    if not isinstance(branch, Table):
        return False
    return branch.get("state") is not None and branch.get("param_groups") is not None


def _children(branch: object) -> Iterator[tuple[str, object]]:
    """Yield the members of a container, each with its part of the name, which may be empty.

    A part that several objects share, such as a state, is a member of its own with an empty name:
    so the walk meets it once.
    """
    if isinstance(branch, Bag):
        if branch.args:
            yield "args", branch.args
        yield from _placed(branch.states, unnamed=True)
    if isinstance(branch, Table):
        yield from _named(branch.pairs)
    elif isinstance(branch, ArrayRecord):
        yield from _placed(branch.objects or [], unnamed=branch.shape == ())
    elif isinstance(branch, list | tuple):
        # With __slots__ a state is a pair: the attributes in the dictionary, and the others.
        slots = len(branch) == 2 and all(part is None or type(part) is Table for part in branch)
        yield from _placed(branch, unnamed=slots)


def _placed(members: Sequence[object], *, unnamed: bool) -> Iterator[tuple[str, object]]:
    for place, child in enumerate(members):
        if type(child) not in _SCALARS:
            yield "" if unnamed else str(place), child


def _named(pairs: list[tuple[object, object]]) -> Iterator[tuple[str, object]]:
    """Yield the pairs with their keys as text; of equal keys the last holds."""
    named = {
        text_of(key)[: _LONGEST_NAME + 1] or f"#{place}": child
        for place, (key, child) in enumerate(pairs)
        if type(child) not in _SCALARS
    }
    for name, child in named.items():
        inside_module = name in _MODULE_PARTS and isinstance(child, Table)
        yield "" if inside_module else name, child
