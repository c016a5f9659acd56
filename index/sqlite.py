"""The default catalogue: a folder with one SQLite database, which users can open themselves.

Every change is one transaction, and the journal is a write-ahead log, so a process that is killed
leaves whole models and no parts of one.
"""

import difflib
import json
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from embedder.errors import MalformedError
from embedder.fingerprint import METHOD, Fingerprint
from embedder.identity import DIMENSION as CODE_DIMENSION
from embedder.identity import IdentityCode, Tokens
from embedder.matching import packed, unpacked
from embedder.record import from_bytes, to_bytes
from embedder.vector import DIMENSION
from index.catalogue import Entry
from index.errors import CatalogueError, NotCataloguedError
from index.opening import FILE, SCHEMA, begin_log, connected, do_without, may_write, take_step

_COLUMNS = (
    "name, location, format, sha256, content, identity, parameters, size_bytes, adapter, method, "
    "added_at, stamp, declared, id"
)
_INSERT = (
    f"INSERT INTO models ({_COLUMNS}, vector, fingerprint) "
    f"VALUES (?, CAST(? AS TEXT), {', '.join('?' * 14)})"
)
_KEPT = "what was finished before is kept"
_MEND = "move it away, then import an export of it, or add the models to a new catalogue"
_CURES = {
    "FULL": f"{_KEPT}; free some space, then run the same command",
    "IOERR": f"{_KEPT}; see whether the disk is full, then run the same command",
    "BUSY": f"another process holds it; {_KEPT}; run the same command again",
    "READONLY": "nothing was changed; name a folder that you may write to with --catalogue",
    "CANTOPEN": "nothing was changed; name a folder that you may read with --catalogue",
    "NOTADB": f"it is damaged, or no catalogue; nothing was changed; {_MEND}",
    "CORRUPT": f"it is damaged; nothing was changed; {_MEND}",
}
"""SQLite's name of an error → what became of the rest, and what to do."""


class SqliteCatalogue:
    """A catalogue in one folder.

    Args:
        url: The folder, with or without `file://`.
        create: Make it if it is not there.

    Raises:
        CatalogueError: There is none, or it cannot be opened.

    Example:
        >>> import tempfile
        >>> with SqliteCatalogue(tempfile.mkdtemp() + "/c", create=True) as catalogue:
        ...     len(catalogue)
        0
    """

    def __init__(self, url: str, *, create: bool = False) -> None:
        self.url = url
        self.folder = Path(url.removeprefix("file://"))
        path = self.folder / FILE
        with self._errors():
            if not path.is_file() and not create:
                raise CatalogueError(
                    f"{url}: there is no catalogue here; make one with: lineage add MODEL… "
                    f"--catalogue {url}"
                )
            # Questions are answered where nothing may be written: on a shared or read-only disk.
            self._read_only = not create and not may_write(path)
            if not self._read_only:
                self.folder.mkdir(parents=True, exist_ok=True)
            self._database = connected(path, read_only=self._read_only)
        try:
            with self._errors():
                self._prepare()
        except BaseException:
            self._database.close()
            raise

    def _prepare(self) -> None:
        self._database.execute("PRAGMA foreign_keys = ON")
        if not self._read_only:
            begin_log(self._database)
            self._database.execute("PRAGMA synchronous = NORMAL")
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA:
            raise CatalogueError(
                f"{self.url}: made by a later version of this program (schema {version}, here "
                f"{SCHEMA}); nothing was changed; add the models to a new catalogue"
            )
        take = do_without if self._read_only else take_step
        for step in range(version + 1, SCHEMA + 1):
            take(self._database, step)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise CatalogueError(f"{self.url}: {error}; {_cure_of(error)}") from error
        except OSError as error:
            raise CatalogueError(
                f"{self.url}: {error.strerror or error}; {_CURES['READONLY']}"
            ) from error

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """Run one transaction that changes something."""
        with self._errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("UPDATE generation SET value = value + 1")
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def __len__(self) -> int:
        """Return the number of models."""
        with self._errors():
            (count,) = self._database.execute("SELECT count(*) FROM models").fetchone()
            return int(count)

    def add(
        self, entry: Entry, fingerprint: Fingerprint, code: IdentityCode | None = None
    ) -> Entry:
        """Remember a model, in place of one of the same name; return it with its number."""
        with self._change() as database:
            database.execute("DELETE FROM models WHERE name = ?", (entry.name,))
            cursor = database.execute(_INSERT, _row_of(entry, fingerprint))
            model = cursor.lastrowid
            _insert_parts(database, int(model or 0), fingerprint, code)
        return replace(entry, id=int(model or 0))

    def remove(self, name: str) -> None:
        """Forget a model and all that belongs to it.

        Raises:
            NotCataloguedError: No model has that name.
        """
        entry = self.get(name)
        with self._change() as database:
            database.execute("DELETE FROM models WHERE id = ?", (entry.id,))
            database.execute(
                "DELETE FROM measurements WHERE ? IN (first, second) "
                "AND NOT EXISTS (SELECT 1 FROM models WHERE identity = ?)",
                (entry.identity, entry.identity),
            )

    def get(self, name: str) -> Entry:
        """Return the model of a name.

        Raises:
            NotCataloguedError: No model has that name.
        """
        found = self._select("WHERE name = CAST(? AS TEXT)", (_bytes_of(name),))
        if found:
            return found[0]
        with self._errors():
            names = [row[0] for row in self._database.execute("SELECT name FROM models")]
        raise NotCataloguedError(name, self.url, _close_names(name, names))

    def by_id(self, ids: Sequence[int]) -> list[Entry]:
        """Return models by number, in the given order."""
        marks = ", ".join("?" * len(ids))
        found = {entry.id: entry for entry in self._select(f"WHERE id IN ({marks})", tuple(ids))}
        return [found[model] for model in ids if model in found]

    def find(self, *, location: str = "", sha256: str = "", content: bytes = b"") -> list[Entry]:
        """Return the models with all the given properties, in the order of their names."""
        wanted = {
            "location = CAST(? AS TEXT)": _bytes_of(location),
            "sha256 = ?": sha256,
            "content = ?": content,
        }
        given = {test: value for test, value in wanted.items() if value}
        where = " AND ".join(given) or "1"
        return self._select(f"WHERE {where} ORDER BY name", tuple(given.values()))

    def entries(self) -> Iterator[Entry]:
        """Yield all models in the order of their names."""
        yield from self._select("ORDER BY name", ())

    def _select(self, rest: str, values: tuple[object, ...]) -> list[Entry]:
        with self._errors():
            rows = self._database.execute(f"SELECT {_COLUMNS} FROM models {rest}", values)
            return [_entry(row) for row in rows]

    def fingerprint(self, model: int) -> Fingerprint:
        """Return a model's fingerprint.

        Raises:
            CatalogueError: There is no such model, or its fingerprint is of another method.
        """
        with self._errors():
            row = self._database.execute(
                "SELECT fingerprint, name FROM models WHERE id = ?", (model,)
            ).fetchone()
        if row is None:
            raise CatalogueError(f"{self.url}: no model has the number {model}")
        try:
            return from_bytes(row[0])
        except MalformedError as error:
            raise CatalogueError(f"{self.url}: {row[1]}: {error}; {_again(row[1])}") from error

    def vectors(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the numbers of all models and their vectors, (n,) and (n, 1024)."""
        with self._errors():
            rows = self._database.execute(
                "SELECT id, vector FROM models WHERE method = ? ORDER BY id", (METHOD,)
            )
            return _stacked(self._database, rows, self.url, DIMENSION)

    def code(self, model: int) -> IdentityCode | None:
        """Return a model's identity code, if it has one."""
        with self._errors():
            row = self._database.execute(
                "SELECT encoder, code FROM codes WHERE model = ?", (model,)
            ).fetchone()
        if row is None:
            return None
        units = self.units([model]).get(model, {})
        return IdentityCode(row[0], np.frombuffer(row[1], "<f4"), units)

    def units(self, models: Sequence[int]) -> dict[int, Mapping[str, Tokens]]:
        """Return model → its units that are matched; models that have none are left out.

        Raises:
            CatalogueError: Those of a model are damaged; it says which.
        """
        marks = ", ".join("?" * len(models))
        with self._errors():
            rows = self._database.execute(
                "SELECT id, name, body FROM units JOIN models ON model = id "
                f"WHERE model IN ({marks})",
                tuple(models),
            ).fetchall()
        return {model: _units_from(body, name, self.url) for model, name, body in rows}

    def codes(self, encoder: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the numbers of models and their codes by one encoder, (n,) and (n, 256)."""
        with self._errors():
            rows = self._database.execute(
                "SELECT model, code FROM codes WHERE encoder = ? ORDER BY model", (encoder,)
            )
            return _stacked(self._database, rows, self.url, CODE_DIMENSION)

    def encoders(self) -> dict[str, int]:
        """Return encoder → how many models have a code by it."""
        with self._errors():
            rows = self._database.execute("SELECT encoder, count(*) FROM codes GROUP BY encoder")
            return {str(encoder): int(count) for encoder, count in rows}

    def sharing(self, keys: Sequence[bytes]) -> dict[int, int]:
        """Return model → values that it holds in tensors with one of these keys."""
        shared: dict[int, int] = {}
        with self._errors():
            for first in range(0, len(keys), 500):  # SQLite allows 999 values in a statement
                some = keys[first : first + 500]
                marks = ", ".join("?" * len(some))
                for model, size in self._database.execute(
                    f"SELECT model, sum(size) FROM keys WHERE key IN ({marks}) GROUP BY model",
                    tuple(some),
                ):
                    shared[model] = shared.get(model, 0) + size
        return shared

    def generation(self) -> int:
        """Return a number that goes up with every change."""
        with self._errors():
            (value,) = self._database.execute("SELECT value FROM generation").fetchone()
            return int(value)

    def measurement(self, first: bytes, second: bytes, method: int) -> str | None:
        """Return what was measured between two identities, if it was."""
        with self._errors():
            row = self._database.execute(
                "SELECT body FROM measurements WHERE first = ? AND second = ? AND method = ?",
                (first, second, method),
            ).fetchone()
        return None if row is None else str(row[0])

    def remember(self, first: bytes, second: bytes, method: int, body: str) -> None:
        """Remember what was measured between two identities, where that may be written."""
        if self._read_only:
            return
        with self._errors():
            self._database.execute(
                "INSERT OR REPLACE INTO measurements VALUES (?, ?, ?, ?)",
                (first, second, method, body),
            )

    def check(self) -> list[str]:
        """Return what is wrong with the catalogue, in sentences; nothing if all is well."""
        with self._errors():
            damage = self._database.execute("PRAGMA integrity_check").fetchall()
            rows = self._database.execute(
                "SELECT id, name, method, length(vector) FROM models"
            ).fetchall()
        found = [f"the database is damaged: {line}" for (line,) in damage if line != "ok"]
        return found + [problem for row in rows for problem in _problems(self, *row)]

    def copy_to(self, target: Path) -> None:
        """Write the whole database to another file.

        Raises:
            sqlite3.DatabaseError: It cannot be read, or the file not be written.
        """
        self._database.execute("VACUUM INTO CAST(? AS TEXT)", (_bytes_of(str(target)),))

    def close(self) -> None:
        """Close it; a second call does nothing."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _insert_parts(
    database: sqlite3.Connection, model: int, fingerprint: Fingerprint, code: IdentityCode | None
) -> None:
    """Write what a model is found by beside its vector: keys of tensors, code and units."""
    sizes: dict[bytes, int] = {}
    for tensor in fingerprint.counted:
        if tensor.summary.norm > 0:
            sizes[tensor.key] = sizes.get(tensor.key, 0) + tensor.size
    database.executemany(
        "INSERT INTO keys (key, model, size) VALUES (?, ?, ?)",
        [(key, model, size) for key, size in sizes.items()],
    )
    if code is not None:
        vector = code.vector.astype("<f4").tobytes()
        database.execute("INSERT INTO codes VALUES (?, ?, ?)", (model, code.encoder, vector))
    if code is not None and code.units:
        database.execute("INSERT INTO units VALUES (?, ?)", (model, packed(code.units)))


def _problems(
    catalogue: SqliteCatalogue, model: int, name: str, method: int, length: int
) -> Iterator[str]:
    """Yield what is wrong with a model, by its row."""
    if method != METHOD:
        yield (
            f"{name}: its fingerprint was made by method {method}, this program uses "
            f"{METHOD}; add it again"
        )
        return
    if length != 4 * DIMENSION:
        yield f"{name}: its vector is damaged; {_again(name)}"
    try:
        catalogue.fingerprint(model)
        catalogue.units([model])
    except CatalogueError as error:
        yield str(error)


def _row_of(entry: Entry, fingerprint: Fingerprint) -> tuple[object, ...]:
    """Return the values of a row of models, in the order of its columns."""
    return (
        entry.name,
        _bytes_of(entry.location),
        entry.format,
        entry.sha256,
        entry.content,
        entry.identity,
        entry.parameters,
        entry.size_bytes,
        int(entry.adapter),
        entry.method,
        entry.added_at,
        entry.stamp,
        json.dumps(entry.declared, default=str),
        None,
        fingerprint.vector.astype("<f4").tobytes(),
        to_bytes(fingerprint),
    )


def _cure_of(error: sqlite3.DatabaseError) -> str:
    # Names look like SQLITE_IOERR_WRITE; errors of Python's own module have none.
    words = f"{getattr(error, 'sqlite_errorname', '')}_".split("_")
    return _CURES.get(words[1], _KEPT)


def _stacked(
    database: sqlite3.Connection, rows: Iterable[tuple[int, bytes]], url: str, width: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return numbers and vectors, (n,) and (n, width), of rows of number and vector.

    Rows are taken as they come: a list of a million would take as much memory again.
    """
    numbers, joined = array("q"), bytearray()
    for number, vector in rows:
        if len(vector) != 4 * width:
            [(name,)] = database.execute("SELECT name FROM models WHERE id = ?", (number,))
            raise CatalogueError(f"{url}: {name}: its vector is damaged; {_again(name)}")
        numbers.append(number)
        joined += vector
    vectors = np.frombuffer(joined, "<f4").reshape(len(numbers), width)
    vectors.flags.writeable = False
    return np.array(numbers, np.int64), vectors


def _units_from(body: bytes, name: str, url: str) -> Mapping[str, Tokens]:
    try:
        return unpacked(body)
    except ValueError as error:
        raise CatalogueError(f"{url}: {name}: its units are damaged; {_again(name)}") from error


def _again(name: str) -> str:
    return f"make it anew: lineage remove {name}, then lineage add its file"


def _bytes_of(text: str) -> bytes:
    """Return a text as bytes, for SQL's CAST: it may hold bytes that are no text."""
    return text.encode("utf-8", "surrogateescape")


def _close_names(name: str, names: Sequence[str]) -> list[str]:
    """Return up to three names that somebody may have meant, with or without their suffix."""
    by_word = {word: found for found in names for word in (PurePath(found).stem, found)}
    near = [by_word[word] for word in difflib.get_close_matches(name, list(by_word), 6)]
    near += [found for found in names if name and name in found]
    return list(dict.fromkeys(near))[:3]


def _entry(row: tuple[Any, ...]) -> Entry:
    found = dict(zip(_COLUMNS.split(", "), row, strict=True))
    found["adapter"] = bool(found["adapter"])
    found["declared"] = json.loads(found["declared"])
    return Entry(**found)
