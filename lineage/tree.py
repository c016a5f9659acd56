"""How catalogued models descend from each other: a forest of the nearest kin.

Models of equal tensors are one node. Each node's parent is chosen among its kin so that the whole
forest costs least (`lineage.arborescence`); a link costs its squared drift and the share of values
that only one of the two has. A link of known direction counts one way, one of unknown direction
both ways, and its edge says so. Families that are siblings get an ancestor that nobody has seen.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from index.catalogue import Entry
from lineage.arborescence import Edge as Arc
from lineage.arborescence import minimum_forest
from lineage.comparison import Comparison, distance_from_second
from lineage.direction import BACKWARD, FORWARD, UNKNOWN
from lineage.known import Known
from lineage.relatives import LISTED, find_relatives
from lineage.verdict import Relation

RESAMPLES = 100

ROOT_COST = 100.0
"""Cost of a node without a parent: more than any link, so that kin are always joined."""

UNSEEN = "unseen ancestor"


Links = dict[tuple[str, str], Comparison]


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


def build_tree(known: Known, entries: Sequence[Entry] | None = None) -> Tree:
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
    known: Known, nodes: Sequence[Node], entries: Sequence[Entry], node_of: dict[str, str]
) -> Links:
    """Return the kin pairs of nodes, each once, as comparisons of the first with the second."""
    by_name = {entry.name: entry for entry in entries}
    links: Links = {}
    for node in nodes:
        model = known.model(by_name[node.name])
        for found in find_relatives(model, known).found:
            other = node_of.get(found.first.name)
            if other is None or other == node.id or (node.id, other) in links:
                continue
            if found.relation in LISTED or found.relation is Relation.SIBLING:
                links.setdefault((other, node.id), found)
    return links


class _Forest:
    """Chooses each node's parent, and joins sibling families by unseen ancestors."""

    def __init__(self, nodes: Sequence[Node], links: Links) -> None:
        self._nodes = list(nodes)
        self._links = links
        self._unseen = 0

    def tree(self) -> Tree:
        edges = self._descent()
        edges += self._siblings(edges)
        edges = [replace(edge, support=self._support(edge, edges)) for edge in edges]
        order = {node.id: place for place, node in enumerate(self._nodes)}
        edges.sort(key=lambda edge: (order[edge.parent], edge.length or 0.0, edge.child))
        return Tree(tuple(self._nodes), tuple(edges))

    def _descent(self) -> list[Edge]:
        place = {node.id: number for number, node in enumerate(self._nodes)}
        arcs: list[Arc] = []
        made: list[Edge] = []
        for (first, second), found in sorted(self._links.items()):
            if found.relation is Relation.SIBLING:
                continue
            answer = found.direction.answer
            known = answer in (FORWARD, BACKWARD)
            for parent, child, against in ((first, second, BACKWARD), (second, first, FORWARD)):
                if answer == against:
                    continue
                # Ties go to the plainer operation, and to the parent that more is known to
                # descend from and that has the nearer kin.
                cost = _cost(found) + 1e-6 * len(found.verdict.operations)
                cost += 1e-3 * self._remoteness(parent) - 1e-4 * self._known_children(parent)
                arcs.append((place[parent], place[child], cost))
                length = found.verdict.distance if parent == first else distance_from_second(found)
                made.append(Edge(parent, child, found.relation, known, length, 1.0))
        chosen = minimum_forest(len(self._nodes), arcs, ROOT_COST)
        return [made[arc] for arc in chosen if arc >= 0]

    def _remoteness(self, node: str) -> float:
        """Return how far a node is on average from the kin that might as well be its parents."""
        costs = [
            _cost(found)
            for pair, found in self._links.items()
            if node in pair and found.direction.answer == UNKNOWN and _cost(found) > 0
        ]
        return float(np.mean(costs)) if costs else 1.0

    def _known_children(self, node: str) -> int:
        return sum(
            (found.direction.answer == FORWARD and first == node)
            or (found.direction.answer == BACKWARD and second == node)
            for (first, second), found in self._links.items()
        )

    def _siblings(self, edges: Sequence[Edge]) -> list[Edge]:
        """Return edges from unseen ancestors to the roots of families that are siblings."""
        parent = {edge.child: edge.parent for edge in edges}

        def root(node: str) -> str:
            while node in parent:
                node = parent[node]
            return node

        made = []
        siblings = [p for p, found in self._links.items() if found.relation is Relation.SIBLING]
        for first, second in sorted(siblings, key=lambda pair: (_cost(self._links[pair]), pair)):
            tops = root(first), root(second)
            if tops[0] == tops[1]:
                continue
            unseen = next((top for top in tops if top.startswith(UNSEEN)), "") or self._new_node()
            for top in tops:
                if top != unseen:
                    parent[top] = unseen
                    made.append(Edge(unseen, top, Relation.FINE_TUNE, True, None, 1.0))
        return made

    def _new_node(self) -> str:
        self._unseen += 1
        name = f"{UNSEEN} {self._unseen}"
        self._nodes.append(Node(name, name, observed=False))
        return name

    def _support(self, edge: Edge, edges: Sequence[Edge]) -> float:
        """Return the share of resamples of the tensors in which the edge stays in the forest.

        It does while no other link between the two sides that it joins is shorter.
        """
        pairs = ((edge.parent, edge.child), (edge.child, edge.parent))
        pair = next((found for found in pairs if found in self._links), None)
        if pair is None:
            return 1.0
        side = _side_of(edge, edges)
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


_PUT_IN_ORDER = 1e-3


def _cost(found: Comparison) -> float:
    """Return squared drift, and two for each share of values that only one of the two has.

    Two is the squared distance of strangers of equal norm. A pair whose units were put in order
    is a little dearer, so that of two equal copies the one in the same order is the nearer kin.
    """
    alone = _PUT_IN_ORDER if "reorder" in found.verdict.operations else 0.0
    matched = sum(pair.size for pair in found.measured.pairs)
    for model in (found.first, found.second):
        counted = sum(tensor.size for tensor in model.fingerprint.counted) or 1
        alone += max(0.0, 1 - matched / counted)
    # The product of both drifts is the same from either side, whichever norm is the larger.
    return (found.verdict.distance or 0.0) * (distance_from_second(found) or 0.0) + 2 * alone


def _side_of(edge: Edge, edges: Sequence[Edge]) -> set[str]:
    """Return the nodes that stay with the parent when an edge is cut."""
    around: dict[str, list[str]] = defaultdict(list)
    for other in edges:
        if other is not edge:
            around[other.parent].append(other.child)
            around[other.child].append(other.parent)
    found, queue = {edge.parent}, [edge.parent]
    while queue:
        for node in around[queue.pop()]:
            if node not in found:
                found.add(node)
                queue.append(node)
    return found


def _steps(found: Comparison) -> list[float]:
    return [p.difference / max(p.first_energy, 1e-30) for p in found.measured.pairs]
