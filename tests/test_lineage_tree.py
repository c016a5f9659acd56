"""Family trees: a known pedigree comes back; drawings and exchange formats say the same."""

import xml.etree.ElementTree as ET
from pathlib import Path
from random import Random

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from kinship import network, stepped
from lineage.arborescence import minimum_forest
from lineage.engine import LineageEngine
from lineage.formats import FORMATS, to_graph
from lineage.simulate import make_family
from lineage.tree import Edge, Node, Tree
from lineage.verdict import Relation


class TestArborescence:
    @given(st.integers(2, 9), st.integers(0, 10**6), st.sampled_from([0.5, 2.0, 10.0]))
    @settings(deadline=None, max_examples=150)
    def test_it_costs_what_networkx_finds(self, nodes: int, seed: int, root: float) -> None:
        random = Random(seed)
        edges: list[tuple[int, int, float]] = []
        for _ in range(random.randint(1, 30)):
            parent, child = random.sample(range(nodes), 2)
            edges.append((parent, child, random.choice([random.random(), random.randint(0, 3)])))
        parents = minimum_forest(nodes, edges, root)
        cost = sum(edges[place][2] if place >= 0 else root for place in parents)
        graph: nx.MultiDiGraph[object] = nx.MultiDiGraph()
        for parent, child, weight in edges:
            graph.add_edge(parent, child, weight=weight)
        for node in range(nodes):
            graph.add_edge("root", node, weight=root)
        best = nx.minimum_spanning_arborescence(graph)
        expected = sum(data["weight"] for _, _, data in best.edges(data=True))
        assert cost == pytest.approx(expected)

    @given(st.integers(2, 30), st.integers(0, 10**6))
    @settings(deadline=None, max_examples=50)
    def test_no_node_descends_from_itself(self, nodes: int, seed: int) -> None:
        random = Random(seed)
        edges = []
        for _ in range(4 * nodes):
            parent, child = random.sample(range(nodes), 2)
            edges.append((parent, child, random.random()))
        parents = minimum_forest(nodes, edges, 100.0)
        for start in range(nodes):
            seen, node = set(), start
            while parents[node] >= 0:
                assert node not in seen
                seen.add(node)
                node = edges[parents[node]][0]

    def test_without_edges_every_node_is_a_root(self) -> None:
        assert minimum_forest(3, [], 1.0) == [-1, -1, -1]


def tree_of(folder: Path) -> Tree:
    with LineageEngine(str(folder / "catalogue"), create=True) as engine:
        assert not engine.add([folder], workers=1).failed
        return engine.tree()


def undirected(tree: Tree) -> set[frozenset[str]]:
    return {frozenset((Path(e.parent).stem, Path(e.child).stem)) for e in tree.edges}


class TestPedigrees:
    def test_the_simulated_family_comes_back(self, tmp_path: Path) -> None:
        births, strangers = make_family(tmp_path)
        tree = tree_of(tmp_path)
        drawn = undirected(tree)
        for birth in births:
            if birth.relation is not Relation.SAME_TENSORS:
                assert frozenset((birth.parent, birth.child)) in drawn, birth
        for edge in tree.edges:
            if edge.known:
                truth = {(Path(edge.parent).stem, Path(edge.child).stem)}
                assert truth & {(birth.parent, birth.child) for birth in births}
        loners = {Path(node.name).stem for node in tree.roots if not tree.children_of(node.id)}
        assert loners == {stranger.child for stranger in strangers}
        (copy,) = [node for node in tree.nodes if node.also]
        assert {copy.name, *copy.also} == {"base-a.safetensors", "base-copy.npz"}

    @pytest.mark.parametrize("seed", [1, 2, 3])
    def test_a_random_pedigree_of_fine_tunes_comes_back(self, tmp_path: Path, seed: int) -> None:
        random = Random(seed)
        weights = {"m0": network(seed, (80, 64, 60, 10))}
        truth = set()
        for place in range(1, 9):
            parent = f"m{random.randrange(place)}"
            child = f"m{place}"
            weights[child] = stepped(
                weights[parent], random.uniform(0.02, 0.05), 100 * seed + place
            )
            truth.add(frozenset((parent, child)))
        for name, values in weights.items():
            save_file(values, tmp_path / f"{name}.safetensors")
        assert undirected(tree_of(tmp_path)) == truth

    def test_siblings_get_an_ancestor_that_nobody_has_seen(self, tmp_path: Path) -> None:
        base = network(1, (80, 64, 60, 10))
        for seed in (2, 3, 4):
            save_file(stepped(base, 0.05, seed), tmp_path / f"m{seed}.safetensors")
        tree = tree_of(tmp_path)
        (unseen,) = [node for node in tree.nodes if not node.observed]
        assert {edge.child for edge in tree.children_of(unseen.id)} == {
            f"m{seed}.safetensors" for seed in (2, 3, 4)
        }


TREE = Tree(
    (
        Node("a", "a"),
        Node("b's <b>", "b's <b>", True, ("copy & co",)),
        Node("c", "c"),
        Node("unseen ancestor 1", "unseen ancestor 1", observed=False),
    ),
    (
        Edge("a", "b's <b>", Relation.FINE_TUNE, False, 0.125, 0.5),
        Edge("b's <b>", "c", Relation.QUANTISED, True, None, 1.0),
    ),
)


class TestFormats:
    def test_newick_is_what_the_standard_says(self) -> None:
        assert FORMATS["newick"](TREE) == "(('c')'b''s <b>':0.125)'a';\n'unseen ancestor 1';"

    def test_newick_refuses_a_merge_instead_of_dropping_a_parent(self) -> None:
        merge = Tree(TREE.nodes, (*TREE.edges, Edge("a", "c", Relation.MERGE, True, None, 1.0)))
        with pytest.raises(ValueError, match="c has several parents"):
            FORMATS["newick"](merge)

    def test_graphml_comes_back_through_networkx(self) -> None:
        graph = nx.parse_graphml(FORMATS["graphml"](TREE))
        assert set(graph.edges) == {("a", "b's <b>"), ("b's <b>", "c")}
        assert graph.edges["a", "b's <b>"]["direction"] == "unknown"
        assert graph.edges["a", "b's <b>"]["length"] == 0.125
        assert nx.is_directed_acyclic_graph(to_graph(TREE))

    def test_a_picture_escapes_names_and_dashes_what_is_not_known(self) -> None:
        picture = ET.fromstring(FORMATS["svg"](TREE))
        texts = [text.text or "" for text in picture.iter("{http://www.w3.org/2000/svg}text")]
        assert any("b's <b> = copy & co" in text for text in texts)
        paths = list(picture.iter("{http://www.w3.org/2000/svg}path"))
        assert sum("stroke-dasharray" in path.attrib for path in paths) == 1

    @pytest.mark.parametrize("name", ["text", "nexus", "dot", "mermaid"])
    def test_every_format_names_every_model(self, name: str) -> None:
        text = FORMATS[name](TREE)
        for node in TREE.nodes:
            plain = node.name.replace("'", "''") if name == "nexus" else node.name
            escaped = plain.replace("<", "&lt;").replace(">", "&gt;")
            assert plain in text or escaped in text

    def test_the_drawing_says_what_is_not_known(self) -> None:
        assert FORMATS["text"](TREE).splitlines() == [
            "a",
            "└── b's <b> = copy & co   fine-tune, drift 0.125, direction unknown",
            "    └── c   quantised",
            "(unseen ancestor 1)   no relative found",
        ]


def test_pedigree_weights_differ() -> None:
    # The pedigrees above rest on steps that are independent of each other.
    base = network(1)
    one, two = (stepped(base, 0.05, seed)["0.weight"] - base["0.weight"] for seed in (2, 3))
    cosine = np.sum(one * two) / np.linalg.norm(one) / np.linalg.norm(two)
    assert abs(cosine) < 0.1
