"""Settings, and where each comes from: flags beat the environment, which beats files.

A file is `lineage.toml`, or the table `[tool.lineage]` of `pyproject.toml`, in the folder that the
command runs in.
"""

import os
import tomllib
from pathlib import Path
from typing import Any

from embedder.errors import ModelLineageError

DEFAULTS: dict[str, Any] = {"catalogue": "lineage-catalogue"}


class SettingsError(ModelLineageError, ValueError):
    """A settings file is not what it should be."""


def read_settings(folder: Path) -> dict[str, tuple[Any, str]]:
    """Return each setting with its value and where that comes from.

    Raises:
        SettingsError: A file is not TOML, or holds a setting that we do not know.

    Example:
        >>> read_settings(Path("/nonexistent"))["catalogue"]
        ('lineage-catalogue', 'default')
    """
    settings = {name: (value, "default") for name, value in DEFAULTS.items()}
    for file, keys in (("pyproject.toml", ("tool", "lineage")), ("lineage.toml", ())):
        for name, value in _table(folder / file, keys).items():
            if name not in DEFAULTS:
                known = ", ".join(DEFAULTS)
                raise SettingsError(f"{folder / file}: unknown setting {name!r}; known: {known}")
            settings[name] = (value, str(folder / file))
    for name in DEFAULTS:
        value = os.environ.get(f"LINEAGE_{name.upper()}")
        if value:
            settings[name] = (value, f"LINEAGE_{name.upper()}")
    return settings


def _table(file: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found: Any = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        if keys:
            return {}  # somebody else's file
        raise SettingsError(f"{file}: not TOML ({error})") from error
    for key in keys:
        found = found.get(key, {}) if isinstance(found, dict) else {}
    return found if isinstance(found, dict) else {}
