"""What this installation can do, and what to install for the rest."""

import importlib.util
import json
import platform
import sqlite3
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from embedder.coding import shipped_card, shipped_coder
from embedder.readers import EXTRAS, READERS
from lineage.answers import tool_version

OURS = ("cli", "embedder", "index", "lineage")


def findings(settings: dict[str, tuple[Any, str]]) -> list[dict[str, str]]:
    """Return what was found, one record a line: what, state (`ok`, `missing`, `clash`), note.

    Args:
        settings: Name of a setting → its value and where that comes from.
    """
    found = [_line("model-lineage", "ok", f"{tool_version()}, Python {platform.python_version()}")]
    found += [
        _line(f"setting {name}", "ok", f"{value} ({origin})")
        for name, (value, origin) in settings.items()
    ]
    found.append(_names())
    found.append(_line("SQLite", "ok", sqlite3.sqlite_version))
    found.append(_search())
    found += [_encoder(), _function_encoder()]
    for name in ("numpy", "torch"):
        found.append(_package(name))
    for name in sorted(READERS):
        missing = [package for package in EXTRAS.get(name, ()) if not _installed(package)]
        if missing:
            cure = 'pip install "model-lineage[formats]"'
            found.append(_line(f"format {name}", "missing", f"needs {', '.join(missing)}: {cure}"))
        else:
            found.append(_line(f"format {name}", "ok", ""))
    return found


def _line(what: str, state: str, note: str) -> dict[str, str]:
    return {"what": what, "state": state, "note": note}


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _package(name: str) -> dict[str, str]:
    try:
        return _line(name, "ok", version(name))
    except PackageNotFoundError:
        return _line(name, "missing", f"pip install {name}")


def _search() -> dict[str, str]:
    if _installed("faiss"):
        note = "FAISS from 5,000 models, numpy below; exact, but for codes from 200,000"
        return _line("vector search", "ok", note)
    note = 'numpy, exact, to 100,000 models; for more: pip install "model-lineage[cpu]"'
    return _line("vector search", "ok", note)


def _encoder() -> dict[str, str]:
    """Say which encoder of identity codes is at work, and what it was trained on."""
    coder, card = shipped_coder(), shipped_card()
    note = f"encoder {coder.version}, trained on {card['models']:,} networks, {card['date']}"
    return _line("identity codes", "ok", note)


def _function_encoder() -> dict[str, str]:
    """Say which encoder of function codes is shipped, and what it was trained on."""
    text = files("embedder").joinpath("pretrained", "function.json").read_text("utf-8")
    card = json.loads(text)
    note = f"encoder {card['version']}, trained on {card['models']:,} networks, {card['date']}"
    return _line("function codes", "ok", note)


def _names() -> dict[str, str]:
    """Say whether another distribution has put files under one of our import names."""
    owners = packages_distributions()
    for name in OURS:
        others = sorted(set(owners.get(name, [])) - {"model-lineage"})
        if others:
            note = f"{name} also belongs to {', '.join(others)}: use an environment of its own"
            return _line("import names", "clash", note)
    home = Path(__file__).parent.parent
    for name in OURS:
        module = sys.modules.get(name) or importlib.util.find_spec(name)
        origin = getattr(module, "__file__", None) or getattr(module, "origin", None) or ""
        if home not in Path(origin).parents:
            return _line("import names", "clash", f"{name} is loaded from {origin}, not {home}")
    return _line("import names", "ok", "cli, embedder, index and lineage are this program's")
