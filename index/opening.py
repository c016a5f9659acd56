"""How the database of a catalogue is opened, and brought to the schema of this program."""

import os
import sqlite3
import time
from importlib.resources import files
from pathlib import Path

FILE = "catalogue.sqlite"
SCHEMA = 3
_ADDED = {2: "codes (model, encoder, code)", 3: "units (model, body)"}
"""Schema → the table that it adds."""
_BUSY_S = 30
_PAUSE_S = 0.02


def connected(path: Path, *, read_only: bool) -> sqlite3.Connection:
    """Return an open database; it is made if it is not there and may be written."""
    mode = "mode=rwc"
    if read_only:
        # A log beside it means that somebody else is writing, and SQLite must look into it.
        mode = "mode=ro" if path.with_name(f"{FILE}-wal").exists() else "immutable=1"
    address = f"{path.absolute().as_uri()}?{mode}"
    database = sqlite3.connect(address, uri=True, timeout=_BUSY_S, isolation_level=None)
    # Where a model lies may hold bytes that are no text.
    database.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
    return database


def begin_log(database: sqlite3.Connection) -> None:
    """Make the database write ahead; wait while another process is about to do the same.

    SQLite gives up at once here, and does not wait as it does for any other lock.
    """
    until = time.monotonic() + _BUSY_S
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorname.startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
            if not busy or time.monotonic() > until:
                raise
        time.sleep(_PAUSE_S)


def take_step(database: sqlite3.Connection, step: int) -> None:
    """Bring a database from one schema to the next."""
    script = files("index").joinpath(f"schema/{step:03}.sql").read_text(encoding="utf-8")
    # One script is one transaction, so two processes that start at once make one schema.
    try:
        database.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {step}; COMMIT;")
    except sqlite3.OperationalError as error:
        if database.in_transaction:
            database.rollback()
        if "already exists" not in str(error):
            raise


def do_without(database: sqlite3.Connection, step: int) -> None:
    """Stand in for what a later schema adds where nothing may be written: an empty table."""
    database.execute(f"CREATE TEMP TABLE {_ADDED[step]}")


def may_write(path: Path) -> bool:
    """Say whether the database, or one that is not there yet, can be written."""
    return os.access(path.parent, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))
