"""A table as text: drawn for people, or tab-separated for scripts."""

import io
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Table:
    """Columns, rows, and lines for people.

    Args:
        columns: Names of the columns; the first is what `-q` prints, if there are no `names`.
        rows: Values, in the order of the columns.
        closing: What to say below the table.
        opening: What to say above it.
        names: What `-q` prints where no column holds all names.
        whole: Whether people always see all rows.
    """

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]
    closing: str = ""
    opening: str = ""
    names: Sequence[str] | None = None
    whole: bool = False


SHOWN_ROWS = 20
"""Rows of a table that people see without asking for more."""


def rendered(
    table: Table, answer: dict[str, Any], *, form: str | None = None, limit: int | None = None
) -> str:
    """Return an answer as text.

    Args:
        table: It as a table.
        answer: It as JSON, cut already.
        form: `json`, `tsv`, `names`, or None for people.
        limit: Rows to cut the table to; None leaves `tsv` and `names` complete.
    """
    if form == "json":
        return json.dumps(answer, ensure_ascii=False)
    cut = table if limit is None else replace(table, rows=table.rows[:limit])
    if form == "tsv":
        return to_tsv(cut)
    if form == "names":
        first = [str(row[0]) for row in cut.rows]
        return "\n".join(first if table.names is None else table.names[:limit])
    return to_text(cut, SHOWN_ROWS if limit is None and not table.whole else None)


def to_text(table: Table, most: int | None) -> str:
    """Return the table as people read it, cut after so many rows, which it then says.

    Args:
        table: What to show.
        most: Rows that are shown; all if None.
    """
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    width = max(shutil.get_terminal_size((120, 24)).columns, 60)
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, highlight=False)
    shown = table.rows[:most]
    if shown:
        grid = Grid(box=None, pad_edge=False, header_style="bold")
        for name in table.columns:
            grid.add_column(name.upper(), overflow="fold")
        for row in shown:
            grid.add_row(*(Text(_short(value)) for value in row))
        console.print(grid)
    lines = [table.opening, buffer.getvalue().rstrip()]
    if len(shown) < len(table.rows):
        left = len(table.rows) - len(shown)
        noun = "row" if left == 1 else "rows"
        lines.append(f"{left:,} more {noun}; --limit N shows more, --tsv and --json all.")
    lines.append(table.closing)
    return "\n".join(line for line in lines if line)


_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text without what UTF-8 cannot say and what would steer a terminal.

    Bytes of a name that are no text, and control characters, become U+FFFD.

    Example:
        >>> printable("caf" + chr(0xDCE9)) == "caf" + chr(0xFFFD)
        True
    """
    return _UNPRINTABLE.sub("\ufffd", text)


def number(value: Any) -> str:
    """Return a value as people read it.

    Example:
        >>> number(0.98213), number(3e-12), number(12345), number(None)
        ('0.9821', '3e-12', '12,345', '')
    """
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4f}".rstrip("0").rstrip(".")
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+").replace(".0e", "e")


_SHA256 = re.compile("[0-9a-f]{64}")


def _short(value: Any) -> str:
    """Return a value as a cell; a SHA-256 is cut to what tells two apart."""
    text = number(value)
    return f"{text[:12]}…" if _SHA256.fullmatch(text) else text


def to_tsv(table: Table) -> str:
    """Return the table as tab-separated text with a header; numbers keep all digits."""
    lines = ["\t".join(table.columns)]
    for row in table.rows:
        cells = ("" if value is None else str(value) for value in row)
        lines.append("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in cells))
    return "\n".join(lines)
