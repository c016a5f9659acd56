"""Which layer a constant of a graph ends up in, and how its axes lie there.

A file with a graph says what a tensor is for by who uses it; its name says nothing. The readers
of such formats make a `Dataflow` of their nodes, and follow each constant through everything that
is computed from constants alone (casts, transpositions, dequantisation) to the first node that
mixes it with an input: there it is a kernel, an offset, a norm.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from embedder.checkpoint import Kind, kind_of
from embedder.encoding import Encoding, Plain

Layout = tuple[int, ...] | None
"""For each axis of a value, the axis of the constant that it was; None where that was lost."""

NEW = -1
"""In a layout: an axis of length 1 that the constant does not have."""

ABSENT = 0
"""The number of an input that is not given."""

_MOST_STEPS = 1_000_000
"""Steps of all walks through a graph together. Real graphs take a few for each constant; a graph
made to be slow runs out of them, and its tensors are then told apart by shape."""


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """An operation of a graph.

    Args:
        op: Its type.
        inputs: Numbers of the values it takes; `ABSENT` for those not given.
        outputs: Numbers of the values it gives.
        source: The format's own record of it, for its attributes.
    """

    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    source: Any


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """A constant, or what was computed from it, as an input of a node."""

    node: Node
    place: int
    layout: Layout
    last: bool
    """Whether it ends here: the node mixes it with what is not constant, or takes it as an
    argument. Elsewhere it goes on through the node."""


@dataclass(frozen=True, slots=True)
class Role:
    """What a layer does with an input.

    Args:
        kind: What the tensor is for.
        order: Order of the axes, as the layer sees them, that makes out × in × space; empty if
            they lie so, or if that is not known.
    """

    kind: Kind
    order: tuple[int, ...] = ()


class Rules(Protocol):
    """What a format knows of its operations."""

    def is_argument(self, node: Node, place: int) -> bool:
        """Whether an input says how to do it (a shape, a scale), so that it does not go on."""

    def through(self, node: Node, place: int, layout: Layout, shape: tuple[int, ...]) -> Layout:
        """Return how the axes of a constant of a shape lie behind a node."""


@dataclass(eq=False)
class Dataflow:
    """The nodes of a graph with its subgraphs, and its constants, by number."""

    nodes: list[Node] = field(default_factory=list)
    constants: set[int] = field(default_factory=set)
    consumers: dict[int, list[tuple[Node, int]]] = field(default_factory=lambda: defaultdict(list))
    producers: dict[int, Node] = field(default_factory=dict)
    links: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Value → values that are the same seen from inside or outside a subgraph or function."""
    steps: int = 0

    def new_value(self) -> int:
        """Return a number that no other value has."""
        self._last_value += 1
        return self._last_value

    def add(self, node: Node) -> None:
        """Add a node."""
        self.nodes.append(node)
        for place, value in enumerate(node.inputs):
            if value != ABSENT:
                self.consumers[value].append((node, place))
        for value in node.outputs:
            self.producers[value] = node

    def link(self, value: int, same: int) -> None:
        """Say that `same` is what `value` is called elsewhere."""
        self.links[value].append(same)

    def find_static(self) -> None:
        """Find the values that are computed from constants alone; call it when all is added."""
        waiting = {id(node): len(set(node.inputs) - {ABSENT}) for node in self.nodes}
        sources: dict[int, int] = defaultdict(int)
        for others in self.links.values():
            for same in others:
                sources[same] += 1
        ready = deque(self.constants)
        while ready:
            value = ready.popleft()
            if value in self.static:
                continue
            self.static.add(value)
            for node in {id(node): node for node, _ in self.consumers.get(value, ())}.values():
                waiting[id(node)] -= 1
                if waiting[id(node)] == 0:
                    ready.extend(node.outputs)
            for same in self.links.get(value, ()):
                sources[same] -= 1
                if sources[same] == 0:
                    ready.append(same)

    def is_static(self, node: Node) -> bool:
        """Whether a node takes constants, and what is computed from them, only."""
        return all(value == ABSENT or value in self.static for value in node.inputs)

    def uses(self, value: int, shape: tuple[int, ...], rules: Rules) -> Iterator[Use]:
        """Yield the uses of a constant, nearest first, until nothing is left to follow.

        Args:
            value: The constant.
            shape: Its shape.
            rules: What the format knows of the nodes on the way.
        """
        start: tuple[int, Layout] = (value, tuple(range(len(shape))))
        waiting, seen = deque([start]), {start}

        def follow(value: int, layout: Layout) -> None:
            if (value, layout) not in seen:
                seen.add((value, layout))
                waiting.append((value, layout))

        while waiting:
            value, layout = waiting.popleft()
            for same in self.links.get(value, ()):
                follow(same, layout)
            for node, place in self.consumers.get(value, ()):
                self.steps += 1
                if self.steps > _MOST_STEPS:
                    return
                last = rules.is_argument(node, place) or not self.is_static(node)
                yield Use(node, place, layout, last)
                if not last:
                    behind = rules.through(node, place, layout, shape)
                    for output in node.outputs:
                        follow(output, behind)

    @property
    def gave_up(self) -> bool:
        """Whether the walks were stopped because they took too long."""
        return self.steps > _MOST_STEPS

    def __post_init__(self) -> None:
        self._last_value = ABSENT
        self.static: set[int] = set()


_WEIGHT_OF_KINDS = {
    Kind.WEIGHT: 6,
    Kind.NORM: 5,
    Kind.STATISTIC: 4,
    Kind.BIAS: 3,
    Kind.SCALE: 2,
    Kind.BUFFER: 1,
}


def strongest(found: list[tuple[Role, Layout]]) -> tuple[Role, Layout] | None:
    """Return the role that decides where a tensor has several: being a weight wins.

    Among equals the first whose axes are known wins, so that an embedding that is also an output
    layer lies as the embedding does.
    """
    return max(
        found,
        key=lambda item: (_WEIGHT_OF_KINDS[item[0].kind], item[1] is not None),
        default=None,
    )


def stored_order(role: Role, layout: Layout, axes: int) -> tuple[int, ...]:
    """Return a role's order in terms of the stored axes, empty if that is the stored order.

    Example:
        >>> stored_order(Role(Kind.WEIGHT, (1, 0)), (0, 1), 2)
        (1, 0)
        >>> stored_order(Role(Kind.WEIGHT, (1, 0)), (1, 0), 2)
        ()
    """
    if layout is None:
        return ()
    order = role.order if len(role.order) == len(layout) else tuple(range(len(layout)))
    found = [layout[axis] for axis in order if layout[axis] != NEW]
    # Axes that were dropped on the way have length 1: their place does not matter.
    found += [axis for axis in range(axes) if axis not in found]
    return () if found == list(range(axes)) else tuple(found)


def transposed(layout: tuple[int, ...], order: Sequence[int]) -> Layout:
    """Return a layout after `numpy.transpose` with an order of axes; None if it is none.

    Example:
        >>> transposed((0, 1, 2), (2, 0, 1))
        (2, 0, 1)
    """
    if sorted(order) != list(range(len(layout))):
        return None
    return tuple(layout[axis] for axis in order)


def reshaped(layout: tuple[int, ...], shape: tuple[int, ...], wanted: Sequence[int]) -> Layout:
    """Return a layout after a reshape that adds or drops axes of length 1, and does no more.

    Args:
        layout: How the axes of a constant lie.
        shape: Shape of the constant.
        wanted: Shape that the value is brought to.

    Example:
        >>> reshaped((0, 1), (7, 9), (1, 7, 9))
        (-1, 0, 1)
        >>> reshaped((0, 1), (7, 9), (63,)) is None
        True
    """
    kept = [axis for axis in layout if axis != NEW and shape[axis] != 1]
    long_axes = [place for place, length in enumerate(wanted) if length != 1]
    if [wanted[place] for place in long_axes] != [shape[axis] for axis in kept]:
        return None
    found = dict(zip(long_axes, kept, strict=True))
    return tuple(found.get(place, NEW) for place in range(len(wanted)))


def swapped_last(axes: int) -> tuple[int, ...]:
    """Return the order that swaps the last two axes: in × out to out × in.

    Example:
        >>> swapped_last(3)
        (0, 2, 1)
    """
    places = tuple(range(axes))
    return (*places[:-2], *places[:-3:-1]) if axes >= 2 else places


PLAIN_KINDS = {
    "B": Kind.BIAS,
    "N": Kind.NORM,
    "S": Kind.STATISTIC,
    "Q": Kind.SCALE,
    "I": Kind.BUFFER,
}
"""Letter in the readers' tables of layers → what an input with it is for, whatever its shape."""


def plain_role(letter: str, shape: tuple[int, ...]) -> Role | None:
    """Return the role of an input whose axes do not matter; None if it is a weight or unknown.

    `A` is added, `M` multiplied, `E` looked up: what they are for depends on the shape too. A
    matrix that is added (positions) or looked up (words) is trained; a row is an offset or gain.
    """
    if letter in PLAIN_KINDS:
        return Role(PLAIN_KINDS[letter])
    if letter not in ("A", "M", "E"):
        return None
    long_axes = sum(length != 1 for length in shape)
    if long_axes > 1:
        return Role(Kind.WEIGHT) if letter == "E" else None
    if letter == "E" or long_axes == 0:
        return Role(Kind.BUFFER)
    return Role(Kind.BIAS if letter == "A" else Kind.NORM)


def tensor_kind(
    name: str, shape: tuple[int, ...], encoding: Encoding, best: tuple[Role, Layout] | None
) -> tuple[Kind, tuple[int, ...]]:
    """Return the kind and the stored order of axes of a constant.

    Args:
        name: Its name, which decides nothing that is counted.
        shape: Its shape.
        encoding: Its encoding: whole numbers without a scale are never trained.
        best: The role that decides, as `strongest` gives it.
    """
    if best is None:
        long_axes = tuple(length for length in shape if length != 1)
        return kind_of(name, long_axes, encoding), ()
    role, layout = best
    axes = stored_order(role, layout, len(shape))
    whole = isinstance(encoding, Plain) and not encoding.is_float and not encoding.quantised
    return Kind.BUFFER if whole and role.kind is not Kind.SCALE else role.kind, axes
