"""How catalogued models descend from each other: a forest of the nearest kin.

Models of equal tensors are one node. Every node is joined to its nearest kin (a minimum spanning
forest on the drift between them, Kruskal 1956); siblings get an ancestor that nobody has seen. Each
component is then rooted where the fewest known directions are contradicted, and edges whose
direction is not known say so.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from index.catalogue import Entry
from index.search import ModelIndex
from lineage.comparison import Comparison
from lineage.direction import BACKWARD, FORWARD
from lineage.models import known_model
from lineage.relation import Relation
from lineage.relatives import LISTED, find_relatives

RESAMPLES = 100


@dataclass(frozen=True, slots=True)
class Node:
    """One model of the tree.

    Args:
        id: Unique in the tree.
        name: Its name; made up for an ancestor that nobody has seen.
        observed: Whether it is in the catalogue.
        also: Other names of the same tensors.
    """

    id: str
    name: str
    observed: bool = True
    also: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Edge:
    """One step of descent.

    Args:
        parent: Id of the earlier node.
        child: Id of the later node.
        relation: What was done.
        known: Whether the direction is known, or follows from the rooting alone.
        length: Drift ‖Y − X‖ / ‖X‖; None where an end is unseen.
        support: Share of resamples of the tensors in which these two stay nearest kin.
    """

    parent: str
    child: str
    relation: Relation
    known: bool
    length: float | None
    support: float


@dataclass(frozen=True, slots=True)
class Tree:
    """A forest of models; merges would have several parents."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]

    def parents_of(self, node: str) -> list[Edge]:
        """Return the edges that lead to a node."""
        return [edge for edge in self.edges if edge.child == node]

    def children_of(self, node: str) -> list[Edge]:
        """Return the edges that lead from a node, in the order of the tree."""
        return [edge for edge in self.edges if edge.parent == node]

    @property
    def roots(self) -> list[Node]:
        """Return the nodes that no edge leads to."""
        children = {edge.child for edge in self.edges}
        return [node for node in self.nodes if node.id not in children]

    def named(self, name: str) -> Node | None:
        """Return the node that a model's name stands for."""
        return next((n for n in self.nodes if name == n.name or name in n.also), None)


def build_tree(known: ModelIndex, entries: Sequence[Entry] | None = None) -> Tree:
    """Return the family trees of catalogued models.

    Args:
        known: The catalogue's index.
        entries: The models to draw; all if None.
    """
    chosen = list(known.catalogue.entries()) if entries is None else list(entries)
    nodes = _nodes(chosen)
    node_of = {name: node.id for node in nodes for name in (node.name, *node.also)}
    links = _links(known, nodes, chosen, node_of)
    return _Forest(nodes, links).tree()


def _nodes(entries: Iterable[Entry]) -> list[Node]:
    by_content: dict[bytes, list[str]] = defaultdict(list)
    for entry in entries:
        by_content[entry.content].append(entry.name)
    groups = sorted(sorted(names) for names in by_content.values())
    return [Node(names[0], names[0], True, tuple(names[1:])) for names in groups]


def _links(
    known: ModelIndex, nodes: Sequence[Node], entries: Sequence[Entry], node_of: dict[str, str]
) -> dict[tuple[str, str], Comparison]:
    """Return the kin pairs of nodes, each once, as comparisons of the first with the second."""
    by_name = {entry.name: entry for entry in entries}
    links: dict[tuple[str, str], Comparison] = {}
    for node in nodes:
        model = known_model(by_name[node.name], known.catalogue)
        for found in find_relatives(model, known).found:
            other = node_of.get(found.first.name)
            if other is None or other == node.id or (node.id, other) in links:
                continue
            if found.relation in LISTED or found.relation is Relation.SIBLING:
                links.setdefault((other, node.id), found)
    return links


class _Forest:
    """Joins nodes by their nearest kin, and roots what is joined."""

    def __init__(self, nodes: Sequence[Node], links: dict[tuple[str, str], Comparison]) -> None:
        self._nodes = list(nodes)
        self._links = links
        self._group = {node.id: node.id for node in nodes}
        self._edges: list[Edge] = []
        self._unseen: dict[str, str] = {}  # observed node → its unseen parent

    def tree(self) -> Tree:
        for pair in sorted(self._links, key=self._length):
            self._join(pair)
        self._edges = [replace(edge, support=self._support(edge)) for edge in self._edges]
        return Tree(tuple(self._nodes), tuple(self._rooted()))

    def _length(self, pair: tuple[str, str]) -> tuple[float, tuple[str, str]]:
        return (self._links[pair].verdict.distance or 0.0, pair)

    def _root(self, node: str) -> str:
        while self._group[node] != node:
            node = self._group[node]
        return node

    def _join(self, pair: tuple[str, str]) -> None:
        first, second = pair
        if self._root(first) == self._root(second):
            return
        found = self._links[pair]
        if found.relation is Relation.SIBLING:
            self._join_siblings(pair)
        else:
            direction = found.direction.answer
            parent, child = (second, first) if direction == BACKWARD else (first, second)
            known = direction in (FORWARD, BACKWARD)
            self._edges.append(
                Edge(parent, child, found.relation, known, found.verdict.distance, 1.0)
            )
        self._group[self._root(first)] = self._root(second)

    def _join_siblings(self, pair: tuple[str, str]) -> None:
        first, second = pair
        unseen = self._unseen.get(first) or self._unseen.get(second)
        if unseen is None:
            unseen = f"unseen ancestor {len(set(self._unseen.values())) + 1}"
            self._nodes.append(Node(unseen, unseen, observed=False))
            self._group[unseen] = self._root(first)
        for node in pair:
            if self._unseen.get(node) != unseen:
                self._unseen[node] = unseen
                # Half of the squared distance lies on either side for equal siblings.
                self._edges.append(Edge(unseen, node, Relation.FINE_TUNE, True, None, 1.0))

    def _support(self, edge: Edge) -> float:
        """Return the share of resamples of the tensors in which the edge stays in the forest.

        It does while no other link between the two sides that it joins is shorter.
        """
        pair = next(
            (p for p in ((edge.parent, edge.child), (edge.child, edge.parent)) if p in self._links),
            None,
        )
        if pair is None:
            return 1.0
        side = self._side_of(edge)
        own = _steps(self._links[pair])
        rivals = [
            _steps(found)
            for other, found in self._links.items()
            if other != pair and (other[0] in side) != (other[1] in side)
        ]
        rivals = [rival for rival in rivals if len(rival) == len(own)]
        if not own or not rivals:
            return 1.0
        rng = np.random.default_rng(0)
        drawn = rng.integers(0, len(own), (RESAMPLES, len(own)))
        sums = np.array([own, *rivals])[:, drawn].sum(axis=2)  # (1 + rivals, resamples)
        return float(np.mean(sums[0] <= sums[1:].min(axis=0)))

    def _side_of(self, edge: Edge) -> set[str]:
        """Return the nodes that stay with the parent when an edge is cut."""
        around: dict[str, list[Edge]] = defaultdict(list)
        for other in self._edges:
            if other is not edge:
                around[other.parent].append(other)
                around[other.child].append(other)
        return set(_reached(edge.parent, around))

    def _rooted(self) -> list[Edge]:
        """Return the edges, those of unknown direction turned away from the best root."""
        around: dict[str, list[Edge]] = defaultdict(list)
        for edge in self._edges:
            around[edge.parent].append(edge)
            around[edge.child].append(edge)
        done: set[str] = set()
        result = []
        for node in (node.id for node in self._nodes):
            if node in done or not around[node]:
                continue
            members = _reached(node, around)
            done |= set(members)
            # Fewest contradicted directions; then the node with the most kin around it.
            best = min(
                members,
                key=lambda root: (_contradicted(root, around), -len(around[root]), root),
            )
            result += _turned(best, around)
        return result


def _steps(found: Comparison) -> list[float]:
    return [p.difference / max(p.first_energy, 1e-30) for p in found.measured.pairs]


def _reached(start: str, around: dict[str, list[Edge]]) -> list[str]:
    found, queue = [start], [start]
    while queue:
        node = queue.pop()
        for edge in around[node]:
            other = edge.child if edge.parent == node else edge.parent
            if other not in found:
                found.append(other)
                queue.append(other)
    return found


def _away_from(root: str, around: dict[str, list[Edge]]) -> list[tuple[Edge, str, str]]:
    """Return each edge with its nearer and its farther end, seen from a root."""
    seen, queue, result = {root}, [root], []
    while queue:
        node = queue.pop(0)
        for edge in around[node]:
            other = edge.child if edge.parent == node else edge.parent
            if other not in seen:
                seen.add(other)
                queue.append(other)
                result.append((edge, node, other))
    return result


def _contradicted(root: str, around: dict[str, list[Edge]]) -> int:
    return sum(edge.known and edge.parent != near for edge, near, _ in _away_from(root, around))


def _turned(root: str, around: dict[str, list[Edge]]) -> list[Edge]:
    return [
        edge if edge.known else replace(edge, parent=near, child=far)
        for edge, near, far in _away_from(root, around)
    ]
