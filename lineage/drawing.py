"""A tree as an SVG picture: one line a model, descent from left to right."""

from collections.abc import Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape

from lineage.tree import Edge, Node, Tree

_LINE = 26
_STEP = 34
_MARGIN = 16
_CHARACTER = 7.2  # of 12 px monospace

_COLOURS = {
    "identical-file": "#6b7280",
    "same-tensors": "#6b7280",
    "same-weights": "#6b7280",
    "quantised": "#b45309",
    "pruned": "#b45309",
    "extended": "#047857",
    "part-of": "#7c3aed",
    "fine-tune": "#1d4ed8",
}
_OTHER = "#374151"


@dataclass(frozen=True, slots=True)
class _Placed:
    node: Node
    depth: int
    line: int
    edge: Edge | None
    parent_line: int


def to_svg(tree: Tree) -> str:
    """Return the forest as an SVG document that needs nothing else.

    Dashed lines are edges whose direction is not known; hollow dots are unseen ancestors. Kinds
    of descent have a word beside them, so that colour is never the only sign.
    """
    placed = list(_placed(tree))
    widest = max((_text_end(found) for found in placed), default=0)
    width, height = int(widest) + 2 * _MARGIN, _LINE * len(placed) + 2 * _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="monospace" font-size="12">',
        "<title>Family tree of models</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for found in placed:
        parts += _drawn(found)
    return "\n".join([*parts, "</svg>"])


def _placed(tree: Tree) -> Iterator[_Placed]:
    nodes = {node.id: node for node in tree.nodes}
    line = 0

    def descend(node: Node, depth: int, edge: Edge | None, parent_line: int) -> Iterator[_Placed]:
        nonlocal line
        own = line
        yield _Placed(node, depth, own, edge, parent_line)
        line += 1
        for step in tree.children_of(node.id):
            yield from descend(nodes[step.child], depth + 1, step, own)

    # Families first, models without kin last.
    for root in sorted(tree.roots, key=lambda node: not tree.children_of(node.id)):
        yield from descend(root, 0, None, 0)


def _place(depth: int, line: int) -> tuple[float, float]:
    return _MARGIN + depth * _STEP + 6, _MARGIN + line * _LINE + _LINE / 2


def _words(found: _Placed) -> str:
    node = found.node
    name = " = ".join((node.name, *node.also)) if node.observed else f"({node.name})"
    if found.edge is None:
        return name
    drift = "" if found.edge.length is None else f" {found.edge.length:.3g}"
    return f"{name}   {found.edge.relation}{drift}"


def _text_end(found: _Placed) -> float:
    return _place(found.depth, 0)[0] + 10 + _CHARACTER * len(_words(found))


def _drawn(found: _Placed) -> Iterator[str]:
    x, y = _place(found.depth, found.line)
    colour = _COLOURS.get(str(found.edge.relation), _OTHER) if found.edge else _OTHER
    if found.edge is not None:
        px, py = _place(found.depth - 1, found.parent_line)
        dash = "" if found.edge.known else ' stroke-dasharray="4 3"'
        yield (
            f'<path d="M{px:g} {py + 5:g} V{y:g} H{x - 5:g}" fill="none" stroke="{colour}"{dash}/>'
        )
    fill = colour if found.node.observed else "#ffffff"
    yield f'<circle cx="{x:g}" cy="{y:g}" r="4" fill="{fill}" stroke="{colour}"/>'
    yield f'<text x="{x + 10:g}" y="{y + 4:g}" fill="#111827">{escape(_words(found))}</text>'
