"""A tree as text: for people, for tree viewers, for graph tools."""

from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from lineage.drawing import to_svg
from lineage.tree import Edge, Node, Tree

if TYPE_CHECKING:
    import networkx


def to_text(tree: Tree) -> str:
    """Return the forest drawn with lines, one node a line.

    Models without kin come last, one a line.
    """
    lines: list[str] = []
    alone = [node for node in tree.roots if not tree.children_of(node.id)]
    for root in tree.roots:
        if root not in alone:
            lines.append(_label(root))
            lines += _branches(tree, root, "")
    lines += [f"{_label(node)}   no relative found" for node in alone]
    return "\n".join(lines)


def _branches(tree: Tree, node: Node, indent: str) -> list[str]:
    lines = []
    edges = tree.children_of(node.id)
    nodes = {found.id: found for found in tree.nodes}
    for place, edge in enumerate(edges):
        last = place == len(edges) - 1
        child = nodes[edge.child]
        lines.append(f"{indent}{'└── ' if last else '├── '}{_label(child)}   {_words(edge)}")
        lines += _branches(tree, child, indent + ("    " if last else "│   "))
    return lines


def _label(node: Node) -> str:
    name = node.name if node.observed else f"({node.name})"
    return f"{name} = {' = '.join(node.also)}" if node.also else name


def _words(edge: Edge) -> str:
    drift = "" if edge.length is None else f", drift {edge.length:.3g}"
    return f"{edge.relation}{drift}{'' if edge.known else ', direction unknown'}"


def to_newick(tree: Tree) -> str:
    """Return the forest in Newick, one tree a line.

    Raises:
        ValueError: A node has several parents, which Newick cannot say.

    Source:
        The Newick standard of 1986, as Olsen wrote it down in 1990.
    """
    for node in tree.nodes:
        if len(tree.parents_of(node.id)) > 1:
            raise ValueError(f"{node.name} has several parents; use GraphML, DOT or JSON")
    return "\n".join(f"{_newick(tree, root.id)};" for root in tree.roots)


def _newick(tree: Tree, node: str, length: float | None = None) -> str:
    children = tree.children_of(node)
    inner = ",".join(_newick(tree, edge.child, edge.length) for edge in children)
    name = "'" + node.replace("'", "''") + "'"
    tail = "" if length is None else f":{length:.6g}"
    return f"({inner}){name}{tail}" if children else f"{name}{tail}"


def to_nexus(tree: Tree) -> str:
    """Return the forest in NEXUS, with a TREES block (Maddison et al. 1997)."""
    trees = to_newick(tree).splitlines()
    body = "\n".join(f"  TREE family_{place} = [&R] {text}" for place, text in enumerate(trees, 1))
    return f"#NEXUS\nBEGIN TREES;\n{body}\nEND;"


def to_dot(tree: Tree) -> str:
    """Return the graph in Graphviz's language."""
    lines = ["digraph lineage {", "  rankdir=LR;", "  node [shape=box];"]
    for node in tree.nodes:
        style = "" if node.observed else ", style=dashed"
        lines.append(f"  {_quoted(node.id)} [label={_quoted(_label(node))}{style}];")
    for edge in tree.edges:
        style = "" if edge.known else ", dir=none"
        lines.append(
            f"  {_quoted(edge.parent)} -> {_quoted(edge.child)} "
            f"[label={_quoted(str(edge.relation))}{style}];"
        )
    return "\n".join([*lines, "}"])


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'


def to_mermaid(tree: Tree) -> str:
    """Return the graph for Mermaid, as Markdown pages show it."""
    ids = {node.id: f"n{place}" for place, node in enumerate(tree.nodes)}
    lines = ["graph LR"]
    for node in tree.nodes:
        text = escape(_label(node), {'"': "#quot;"})
        lines.append(f'  {ids[node.id]}["{text}"]')
    for edge in tree.edges:
        arrow = "-->" if edge.known else "---"
        lines.append(f"  {ids[edge.parent]} {arrow}|{edge.relation}| {ids[edge.child]}")
    return "\n".join(lines)


def to_graph(tree: Tree) -> "networkx.DiGraph[str]":
    """Return the tree as a networkx graph, with the fields of its JSON as attributes."""
    import networkx  # .1 s, so only where it is used

    graph: networkx.DiGraph[str] = networkx.DiGraph()
    for node in tree.nodes:
        graph.add_node(node.id, name=node.name, observed=node.observed, also=", ".join(node.also))
    for edge in tree.edges:
        length = {} if edge.length is None else {"length": edge.length}
        graph.add_edge(
            edge.parent,
            edge.child,
            relation=str(edge.relation),
            direction="known" if edge.known else "unknown",
            support=edge.support,
            **length,
        )
    return graph


def to_graphml(tree: Tree) -> str:
    """Return the graph in GraphML (Brandes et al. 2002)."""
    import networkx

    return "\n".join(networkx.generate_graphml(to_graph(tree)))


FORMATS = {
    "text": to_text,
    "newick": to_newick,
    "nexus": to_nexus,
    "graphml": to_graphml,
    "dot": to_dot,
    "mermaid": to_mermaid,
    "svg": to_svg,
}
"""Name of a format → function from a tree to text."""
