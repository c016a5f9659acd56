"""`lineage tree` in every format, and the commands that walk along it."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx
import pytest

import cli
from cli import TREE_FORMATS
from command import answer_of, lineage
from conftest import Family

pytestmark = pytest.mark.usefixtures("somewhere")

Edges = set[tuple[str, str]]


@pytest.fixture
def edges(family: Family) -> Edges:
    """Return (parent, child) of every edge, from the JSON."""
    return {(edge["parent"], edge["child"]) for edge in tree_of(family)["edges"]}


@cache
def tree_of(family: Family) -> Any:
    return answer_of("tree", "--catalogue", family.catalogue)


@cache
def drawn(form: str, family: Family) -> str:
    done = lineage("tree", "--format", form, "--catalogue", family.catalogue)
    assert (done.code, done.err) == (0, "")
    return done.out


NEWICK_TOKEN = re.compile(r"'(?:[^']|'')*'|[(),;]|:[-+.\deE]+|[^\s'(),:;]+")


def parsed_newick(text: str) -> tuple[Edges, dict[str, float], list[str]]:
    """Return edges, lengths by child and roots of trees in Newick."""
    edges: Edges = set()
    lengths: dict[str, float] = {}

    def node(tokens: Iterator[str], token: str) -> tuple[str, str]:
        """Read one node; return its name and the token after it."""
        children = []
        if token == "(":
            while token in ("(", ","):
                child, token = node(tokens, next(tokens))
                children.append(child)
            assert token == ")"
            token = next(tokens)
        assert token not in ("(", ")", ",", ";"), "a node without a name"
        name = token[1:-1].replace("''", "'") if token.startswith("'") else token
        edges.update((name, child) for child in children)
        token = next(tokens)
        if token.startswith(":"):
            lengths[name] = float(token[1:])
            token = next(tokens)
        return name, token

    roots = []
    for line in text.splitlines():
        tokens = iter(NEWICK_TOKEN.findall(line))
        root, end = node(tokens, next(tokens))
        assert end == ";"
        assert next(tokens, None) is None
        roots.append(root)
    return edges, lengths, roots


class TestFormats:
    def test_newick_parses_back_to_the_same_tree(self, family: Family, edges: Edges) -> None:
        found, lengths, roots = parsed_newick(drawn("newick", family))
        assert found == edges
        assert set(roots).isdisjoint(child for _, child in edges)
        known = tree_of(family)["edges"]
        assert lengths == {e["child"]: pytest.approx(e["length"], rel=1e-5) for e in known}

    def test_nexus_holds_the_newick_trees(self, family: Family) -> None:
        nexus = drawn("nexus", family).splitlines()
        assert nexus[0] == "#NEXUS"
        assert nexus[1].upper() == "BEGIN TREES;"
        assert nexus[-1].upper() == "END;"
        trees = [line.partition("[&R] ")[2] for line in nexus if "TREE " in line and "=" in line]
        assert trees == drawn("newick", family).splitlines()

    def test_graphml_is_read_by_networkx(self, family: Family, edges: Edges) -> None:
        graph = networkx.parse_graphml(drawn("graphml", family))
        assert set(graph.edges) == edges
        assert {name for name, seen in graph.nodes(data="observed") if seen} <= set(family.names)
        assert all(0 <= float(found["support"]) <= 1 for *_, found in graph.edges(data=True))

    def test_svg_is_a_picture_with_every_name_in_it(self, family: Family, edges: Edges) -> None:
        picture = ET.fromstring(drawn("svg", family))
        space = "{http://www.w3.org/2000/svg}"
        assert picture.tag == f"{space}svg"
        texts = " ".join(text.text or "" for text in picture.iter(f"{space}text"))
        assert all(name in texts for name in family.names)
        assert len(list(picture.iter(f"{space}path"))) == len(edges)
        inside = float(picture.attrib["width"]), float(picture.attrib["height"])
        for dot in picture.iter(f"{space}circle"):
            assert 0 < float(dot.attrib["cx"]) < inside[0]
            assert 0 < float(dot.attrib["cy"]) < inside[1]

    def test_dot_has_every_edge(self, family: Family, edges: Edges) -> None:
        lines = drawn("dot", family).splitlines()
        assert lines[0] == "digraph lineage {"
        assert lines[-1] == "}"
        found = [re.match(r'\s*"(.*)" -> "(.*)" \[', line) for line in lines]
        assert {(match[1], match[2]) for match in found if match} == edges

    def test_mermaid_has_every_edge(self, family: Family, edges: Edges) -> None:
        first, *lines = drawn("mermaid", family).splitlines()
        assert first == "graph LR"
        nodes = [re.match(r'\s*(n\d+)\["(.*)"\]', line) for line in lines]
        names = {match[1]: match[2].partition(" = ")[0] for match in nodes if match}
        arrows = [re.match(r"\s*(n\d+) -(?:->|--)\|.+\| (n\d+)", line) for line in lines]
        assert {(names[m[1]], names[m[2]]) for m in arrows if m} == edges

    def test_text_names_every_model_once(self, family: Family) -> None:
        text = drawn("text", family)
        assert text == lineage("tree", "--catalogue", family.catalogue).out
        for name in family.names:
            assert text.count(name) == 1

    def test_names_with_marks_of_the_formats_do_no_harm(
        self, family: Family, tmp_path: Path
    ) -> None:
        odd = tmp_path / """it's <a> "b" & (c), [d]; e.safetensors"""
        odd.write_bytes(family.file("base-pruned").read_bytes())
        catalogue = ("--catalogue", tmp_path / "c")
        lineage("add", odd, family.file("base-a"), *catalogue)
        text = {form: lineage("tree", "--format", form, *catalogue).out for form in TREE_FORMATS}
        assert parsed_newick(text["newick"])[0] == {("base-a.safetensors", odd.name)}
        assert odd.name in networkx.parse_graphml(text["graphml"])
        assert odd.name in "".join(ET.fromstring(text["svg"]).itertext())
        assert odd.name in text["text"]
        assert odd.name.replace('"', '\\"') in text["dot"]
        assert "it's &lt;a&gt; #quot;b#quot; &amp; (c), [d]; e" in text["mermaid"]


class TestTree:
    def test_it_is_a_forest_over_all_models(self, family: Family, edges: Edges) -> None:
        nodes = tree_of(family)["nodes"]
        names = [name for node in nodes for name in (node["name"], *node["also"])]
        assert sorted(names) == family.names
        assert len({child for _, child in edges}) == len(edges)
        assert networkx.is_forest(networkx.DiGraph(sorted(edges)))

    def test_equal_tensors_are_one_node(self, family: Family) -> None:
        nodes = tree_of(family)["nodes"]
        (node,) = [node for node in nodes if node["also"]]
        assert {node["name"], *node["also"]} == {"base-a.safetensors", "base-copy.npz"}

    def test_what_is_known_of_the_descent_is_in_it(self, family: Family, edges: Edges) -> None:
        for parent, child in (
            ("legal.safetensors", "legal-int8.safetensors"),
            ("base-a.safetensors", "base-pruned.safetensors"),
            ("base-a.safetensors", "base-12-classes.safetensors"),
            ("chat.safetensors", "chat-fp16.safetensors"),
        ):
            assert (parent, child) in edges

    def test_a_stranger_stands_alone(self, family: Family, edges: Edges) -> None:
        assert "twin-b.safetensors" not in {name for edge in edges for name in edge}
        assert "twin-b.safetensors   no relative found" in drawn("text", family)

    def test_a_pattern_chooses_models(self, family: Family) -> None:
        nodes = answer_of("tree", "legal*", "--catalogue", family.catalogue)["nodes"]
        assert {node["name"] for node in nodes} == {n for n in family.names if n.startswith("leg")}


class TestWalks:
    def test_ancestors_are_those_of_the_tree(self, family: Family, edges: Edges) -> None:
        parent_of = {child: parent for parent, child in edges}
        expected, here = [], "legal-int8.safetensors"
        while here in parent_of:
            here = parent_of[here]
            expected.append(here)
        found = answer_of("ancestors", "legal-int8.safetensors", "--catalogue", family.catalogue)
        assert [step["model"] for step in found["ancestors"]] == expected
        assert [step["steps"] for step in found["ancestors"]] == list(range(1, len(expected) + 1))

    def test_descendants_are_those_of_the_tree(self, family: Family, edges: Edges) -> None:
        graph = networkx.DiGraph(sorted(edges))
        found = answer_of("descendants", "base-copy.npz", "--catalogue", family.catalogue)
        names = [step["model"] for step in found["descendants"]]
        assert set(names) == networkx.descendants(graph, "base-a.safetensors")
        assert len(names) == len(set(names))
        assert found["model"] == "base-a.safetensors"

    def test_a_path_leads_from_one_to_the_other(self, family: Family, edges: Edges) -> None:
        ends = ("chat-fp16.safetensors", "legal-int8.safetensors")
        steps = answer_of("path", *ends, "--catalogue", family.catalogue)["steps"]
        assert (steps[0]["from"], steps[-1]["to"]) == ends
        for step in steps:
            pair = {step["from"], step["to"]}
            assert pair in [set(edge) for edge in edges]
            assert step["parent"] in pair
        for here, there in pairwise(steps):
            assert here["to"] == there["from"]

    def test_no_path_leads_to_a_stranger(self, family: Family) -> None:
        ends = ("chat.safetensors", "twin-b.safetensors", "--catalogue", family.catalogue)
        found = answer_of("path", *ends)
        assert (found["joined"], found["steps"]) == (False, [])
        assert "No line of kin joins the two." in lineage("path", *ends).out

    def test_a_file_that_is_not_catalogued_has_no_place_in_the_tree(
        self, family: Family, tmp_path: Path
    ) -> None:
        other = tmp_path / "other.safetensors"
        other.write_bytes(family.file("chat").read_bytes())
        done = lineage("ancestors", other, "--catalogue", family.catalogue)
        assert done.code == cli.FAILED
        assert "not in the catalogue" in done.err
        assert "lineage add" in done.err
