"""A catalogue as one file, and back: to move it, to share it, to merge two."""

import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np

from embedder.vector import DIMENSION
from index.errors import CatalogueError
from index.opening import FILE, SCHEMA
from index.sqlite import SqliteCatalogue


def export_catalogue(catalogue: SqliteCatalogue, target: Path, *, redact: bool = False) -> int:
    """Write all models of a catalogue to one file; return how many.

    The file is an SQLite database. It is written beside the target and renamed when it is whole.

    Args:
        catalogue: What to write.
        target: The file; it must not be there yet.
        redact: Leave out where the models lie on this machine.

    Raises:
        CatalogueError: The target is there already, or cannot be written.
    """
    if target.exists():
        raise CatalogueError(
            f"{target}: is there already; nothing was written; choose another name"
        )
    part = target.with_name(target.name + ".part")
    try:
        part.unlink(missing_ok=True)
        catalogue.copy_to(part)
        with closing(sqlite3.connect(part)) as copy, copy:
            copy.execute("DELETE FROM measurements")
            if redact:
                copy.execute("UPDATE models SET location = '', stamp = ''")
            (count,) = copy.execute("SELECT count(*) FROM models").fetchone()
        with closing(sqlite3.connect(part)) as copy:
            copy.execute("VACUUM")
        part.rename(target)
    except (sqlite3.DatabaseError, OSError) as error:
        part.unlink(missing_ok=True)
        raise CatalogueError(f"{target}: {error}; nothing was written") from error
    return int(count)


def import_catalogue(catalogue: SqliteCatalogue, source: Path) -> tuple[list[str], list[str]]:
    """Add the models of an exported file to a catalogue, each in a transaction of its own.

    Args:
        catalogue: Where they go.
        source: A file that `export_catalogue` wrote.

    Returns:
        Names that were added, and names that were there already; of these nothing is changed.

    Raises:
        CatalogueError: The file is no export.
    """
    with tempfile.TemporaryDirectory() as folder:
        # A copy, because SQLite writes beside what it opens.
        try:
            shutil.copy(source, Path(folder) / FILE)
            with closing(sqlite3.connect(Path(folder) / FILE)) as copy:
                (version,) = copy.execute("PRAGMA user_version").fetchone()
        except (sqlite3.DatabaseError, OSError) as error:
            raise CatalogueError(f"{source}: not an exported catalogue ({error})") from error
        if not 1 <= version <= SCHEMA:
            raise CatalogueError(
                f"{source}: not an exported catalogue of this version of the program"
            )
        with SqliteCatalogue(folder) as other:
            other.url = str(source)  # what its errors name
            added, kept = [], []
            known = {entry.name for entry in catalogue.entries()}
            for entry in other.entries():
                if entry.name in known:
                    kept.append(entry.name)
                    continue
                fingerprint = other.fingerprint(entry.id)
                vector = fingerprint.vector
                if vector.shape != (DIMENSION,) or not np.isfinite(vector).all():
                    raise CatalogueError(f"{source}: {entry.name}: its vector is damaged")
                catalogue.add(entry, fingerprint, other.code(entry.id))
                added.append(entry.name)
    return added, kept
