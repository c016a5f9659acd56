"""The tasks that the zoo's networks learn, from data that come inside packages.

Pictures are scaled to mean 0 and standard deviation 1 over the training part, columns each on its
own, so that sizes of perturbations mean the same everywhere. How a task is cut into a training and
a test part is always the same.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from embedder.errors import MissingExtraError, NotFoundError
from embedder.zoo import sources, synthesis

Floats = NDArray[np.float32]
Whole = NDArray[np.int64]

TEST_SHARE = 0.3
"""Share of the examples that no network is trained on."""


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Something to learn.

    Args:
        name: Unique.
        kind: `vision`, `language`, `audio`, `tabular` or `graph`.
        train: (n, H, W) pictures, sounds, or rows of columns with H = 1; (n, N, F + N) graphs;
            (n, T + 1) numbers of tokens.
        train_labels: (n,) classes; for language the tokens after each, (n, T).
        test: Like `train`.
        test_labels: Like `train_labels`.
        classes: Number of classes, or of tokens.
        values: How many values of a node, before its row of neighbours; all others: 0.
        group: (m,) whether a test example is of the protected group; None where there is none.
        protected: What that group is.
    """

    name: str
    kind: str
    train: Floats
    train_labels: Whole
    test: Floats
    test_labels: Whole
    classes: int
    values: int = 0
    group: NDArray[np.bool_] | None = None
    protected: str = ""

    @property
    def sha256(self) -> str:
        """Digest of all arrays, by which two machines can tell that they have the same data."""
        digest = hashlib.sha256()
        for array in (self.train, self.train_labels, self.test, self.test_labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def task_named(name: str) -> Task:
    """Return a task; it is made once in a process.

    Raises:
        MissingExtraError: A package that holds its data is not installed.
        NotFoundError: There is no such task, or its archive was not fetched.

    Example:
        >>> task = task_named("textures8")
        >>> task.kind, task.train.shape[1:], task.classes
        ('vision', (8, 8), 10)
    """
    if name not in TASKS:
        raise NotFoundError(name, "no such task", f"there are {', '.join(TASKS)}")
    return _made(name)


@cache
def _made(name: str) -> Task:
    return TASKS[name](name)


# ------------------------------------------------------------------ cutting and scaling


def _cut(count: int) -> tuple[Whole, Whole]:
    """Return which examples train and which test."""
    order = np.random.default_rng(20_260).permutation(count)
    test = round(count * TEST_SHARE)
    return order[test:], order[:test]


def _pictures(name: str, kind: str, pictures: NDArray[np.generic], labels: Whole) -> Task:
    train, test = _cut(len(pictures))
    wide = pictures.astype(np.float64)
    mean, spread = wide[train].mean(), wide[train].std()
    scaled = ((wide - mean) / spread).astype(np.float32)
    classes = int(labels.max()) + 1
    return Task(name, kind, scaled[train], labels[train], scaled[test], labels[test], classes)


def _table(name: str, table: sources.Table) -> Task:
    """Return columns as pictures of one row, each scaled on its own."""
    train, test = _cut(len(table.columns))
    spread = table.columns[train].std(axis=0)
    mean = table.columns[train].mean(axis=0)
    scaled = (table.columns - mean) / np.where(spread > 0, spread, 1)
    # Rare categories would stand dozens of deviations out.
    rows = np.clip(scaled, -4, 4).astype(np.float32)[:, None, :]
    return Task(
        name,
        "tabular",
        rows[train],
        table.labels[train],
        rows[test],
        table.labels[test],
        int(table.labels.max()) + 1,
        group=None if table.group is None else table.group[test],
        protected=table.protected,
    )


# ------------------------------------------------------------------ the tasks


def _digits(name: str) -> Task:
    pictures, labels = sources.digits()
    return _pictures(name, "vision", pictures, labels)


def _mnist(name: str) -> Task:
    pictures, labels = sources.mnist()
    side = int(name.removeprefix("mnist"))
    wide = np.pad(pictures, ((0, 0), (2, 2), (2, 2))) if side == 8 else pictures
    step = wide.shape[1] // side
    pooled = wide.reshape(-1, side, step, side, step).mean(axis=(2, 4))
    return _pictures(name, "vision", pooled, labels)


def _textures(name: str) -> Task:
    side = int(name.removeprefix("textures"))
    return _pictures(name, "vision", *synthesis.textures(3000, side, seed=side))


def _sounds(name: str) -> Task:
    low = name == "sounds-low"
    return _pictures(name, "audio", *synthesis.sounds(2400, low=low, seed=11 + low))


def _tabular(name: str) -> Task:
    """Return a table; `name/column` asks for one of its columns instead of its classes."""
    table, _, column = name.partition("/")
    found = sources.TABLES[table]()
    return _table(name, sources.other_target(found, int(column)) if column else found)


def _text(name: str) -> Task:
    tokens = text_windows(sources.library_text(name))
    train, test = _cut(len(tokens))
    parts = (tokens[train], tokens[test])
    (x, y), (x_test, y_test) = ((t[:, :-1], t[:, 1:].astype(np.int64)) for t in parts)
    size = len(sources.ALPHABET)
    return Task(name, "language", x.astype(np.float32), y, x_test.astype(np.float32), y_test, size)


WINDOW = 16
"""Characters that a language model sees at once."""


def text_windows(text: str, count: int = 6000) -> Whole:
    """Return windows of a text as numbers of its characters, (count, WINDOW + 1).

    Example:
        >>> text_windows("abc" * 100, 2).shape
        (2, 17)
    """
    place = {letter: number for number, letter in enumerate(sources.ALPHABET)}
    numbers = np.array([place[letter] for letter in text], dtype=np.int64)
    starts = np.linspace(0, len(numbers) - WINDOW - 1, count).astype(np.int64)
    windows: Whole = numbers[starts[:, None] + np.arange(WINDOW + 1)]
    return windows


def _graphs(name: str) -> Task:
    source, way = name.split("-")
    pictures, labels = sources.digits() if source == "digits" else sources.mnist()
    if source == "mnist":
        wide = np.pad(pictures, ((0, 0), (2, 2), (2, 2)))
        pictures = wide.reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4))
    pictures = pictures / pictures.std()
    make = synthesis.grid_graphs if way == "grid" else synthesis.nearest_graphs
    nodes, neighbours = make(pictures.astype(np.float32))
    train, test = _cut(len(nodes))
    flat = nodes[train].reshape(-1, nodes.shape[2]).astype(np.float64)
    scaled = ((nodes - flat.mean(axis=0)) / flat.std(axis=0)).astype(np.float32)
    packed = np.concatenate([scaled, neighbours], axis=2)
    return Task(
        name,
        "graph",
        packed[train],
        labels[train],
        packed[test],
        labels[test],
        10,
        values=nodes.shape[2],
    )


TASKS: Mapping[str, Callable[[str], Task]] = {
    "digits": _digits,
    "mnist8": _mnist,
    "mnist14": _mnist,
    "textures8": _textures,
    "textures14": _textures,
    "sounds": _sounds,
    "sounds-low": _sounds,
    "wine": _tabular,
    "wine/0": _tabular,
    "cancer": _tabular,
    "cancer/1": _tabular,
    "adult": _tabular,
    "adult/0": _tabular,
    "compas": _tabular,
    "compas/4": _tabular,
    "german": _tabular,
    "german/0": _tabular,
    "library-code": _text,
    "library-prose": _text,
    "digits-grid": _graphs,
    "mnist-grid": _graphs,
    "digits-nearest": _graphs,
    "mnist-nearest": _graphs,
}
"""Name → what makes the task."""

NEEDS_ARCHIVE = ("adult", "compas", "german")
"""Tables that stand in an archive, which has to be fetched first."""


def task_kind(name: str) -> str:
    """Return the kind of a task without making it.

    Example:
        >>> task_kind("mnist-grid"), task_kind("adult/0"), task_kind("library-code")
        ('graph', 'tabular', 'language')
    """
    if name.partition("/")[0] in sources.TABLES:
        return "tabular"
    if name.endswith(("-grid", "-nearest")):
        return "graph"
    if name.startswith("library"):
        return "language"
    return "audio" if name.startswith("sounds") else "vision"


def is_there(name: str) -> bool:
    """Say whether a task can be made here without fetching anything."""
    if name.partition("/")[0] in NEEDS_ARCHIVE:
        return sources.archive_path().exists()
    return name in TASKS


PACKAGES = (("sklearn", "scikit-learn"), ("mlxtend", "mlxtend"), ("pyarrow", "pyarrow"))
"""Module → package that a build needs."""


def check_packages() -> None:
    """Make sure that the packages of the zoo are installed.

    Raises:
        MissingExtraError: One is not; it says how to install it.
    """
    for module, package in PACKAGES:
        if not sources.is_installed(module):
            raise MissingExtraError(package, "zoo", "the model zoo")
