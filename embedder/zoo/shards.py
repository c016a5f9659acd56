"""How a zoo lies on the disk: shards of weights, and one table of everything else.

    FOLDER/zoo.json            size and seed; nothing else decides what is in it
    FOLDER/shards/NAME.safetensors   weights of one job, float32, named `MODEL/TENSOR`
    FOLDER/shards/NAME.parquet       the rows of its models
    FOLDER/models.parquet      all rows
    FOLDER/card.md             what is there, for people

Files appear under their names when they are whole. Weights are float32, because a copy that was
reordered or rescaled has to stay equal to the last bit, which half precision would not keep.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from embedder.architecture import Architecture, Axis, Gauge, Group, Op, Step
from embedder.errors import ArchitectureError, MalformedError, MissingExtraError, NotFoundError
from embedder.writing import write_whole
from embedder.zoo.data import task_kind
from embedder.zoo.designs import Config
from embedder.zoo.labels import NAMES
from embedder.zoo.member import Member
from embedder.zoo.nets import Array, architecture_of, from_json, to_json
from embedder.zoo.plan import Job, fold_of
from embedder.zoo.recipes import Recipe
from embedder.zoo.sources import is_installed

FORMAT = "lineage/zoo/1"
COLLECTED = "collected"
"""Role of models from outside."""
Row = dict[str, Any]

_TEXTS = (
    *("id", "shard", "role", "operation", "relation", "teacher", "family", "recipe_group"),
    *("population", "kind", "domain", "design", "factor", "split", "device", "start_law"),
    "declared",
)
_WHOLE = ("generation", "parameters", "start_seed", "fold")


def _arrow() -> Any:
    """Return pyarrow with its reader and writer of Parquet.

    Raises:
        MissingExtraError: It is not installed.
    """
    if not is_installed("pyarrow"):
        raise MissingExtraError("pyarrow", "zoo", "the model zoo")
    import pyarrow
    import pyarrow.parquet

    return pyarrow


def row_of(member: Member, job: Job, *, split: str, device: str) -> Row:
    """Return what the table holds of a member."""
    return {
        "id": member.id,
        "shard": job.name,
        "role": member.role,
        "operation": member.operation,
        "relation": member.relation,
        "parents": list(member.parents),
        "teacher": member.teacher,
        "family": member.family,
        "recipe_group": member.group,
        "fold": fold_of(member.group),
        "split": split,
        "factor": member.factor,
        "generation": member.generation,
        "drift": member.drift,
        "diverged": member.diverged,
        "population": job.population.name,
        "kind": member.config.kind,
        "domain": task_kind(member.recipe.task),
        "design": json.dumps(to_json(member.config)),
        "parameters": int(sum(values.size for values in member.weights.values())),
        "start_seed": member.start_seed,
        "start_law": member.start_law,
        "start_scale": member.start_scale,
        "device": device,
        **asdict(member.recipe),
        **{name: member.labels.get(name) for name in NAMES},
    }


def _schema(arrow: Any) -> Any:
    kinds: dict[str, Any] = {name: arrow.string() for name in _TEXTS}
    kinds |= {name: arrow.int64() for name in _WHOLE}
    kinds |= {"parents": arrow.list_(arrow.string()), "diverged": arrow.bool_()}
    kinds |= {name: arrow.float64() for name in ("drift", "start_scale", *NAMES)}
    plain = {str: arrow.string(), int: arrow.int64(), float: arrow.float64()}
    kinds |= {field.name: plain[field.type] for field in fields(Recipe)}  # type: ignore[index]
    return kinds


def tensors_of(members: Sequence[Member]) -> dict[str, Array]:
    """Return the weights of members as a shard names them."""
    return {
        f"{member.id}/{name}": values
        for member in members
        for name, values in member.weights.items()
    }


def write_shard(folder: Path, name: str, tensors: Mapping[str, Array], rows: Sequence[Row]) -> None:
    """Write weights and rows; the rows last, so that they tell that the shard is done."""
    place = folder / "shards"
    place.mkdir(parents=True, exist_ok=True)
    whole = {tensor: np.ascontiguousarray(values) for tensor, values in tensors.items()}
    write_whole(place / f"{name}.safetensors", lambda path: save_file(whole, path))
    _write_rows(place / f"{name}.parquet", rows)


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    arrow = _arrow()
    kinds = _schema(arrow)
    names = list(rows[0])
    table = arrow.Table.from_pylist(rows, arrow.schema([(name, kinds[name]) for name in names]))
    write_whole(path, lambda beside: arrow.parquet.write_table(table, beside, compression="zstd"))


def is_done(folder: Path, name: str) -> bool:
    """Say whether a shard is there."""
    place = folder / "shards"
    return all((place / f"{name}.{end}").exists() for end in ("safetensors", "parquet"))


def join_tables(folder: Path) -> list[Row]:
    """Write one table of the rows of all shards, and return them."""
    arrow = _arrow()
    parts = sorted((folder / "shards").glob("[!.]*.parquet"))
    if not parts:
        return []
    tables = [arrow.parquet.read_table(part) for part in parts]
    # Models from outside have other columns; every zoo has all of them.
    tables.append(arrow.schema(list(_schema(arrow).items())).empty_table())
    table = arrow.concat_tables(tables, promote_options="default")
    write_whole(
        folder / "models.parquet",
        lambda path: arrow.parquet.write_table(table, path, compression="zstd"),
    )
    rows: list[Row] = table.to_pylist()
    return rows


class Zoo:
    """A zoo that was built, or as much of it as is done.

    Example:
        >>> open_zoo(Path("nowhere"))
        Traceback (most recent call last):
        embedder.errors.NotFoundError: nowhere: no zoo is there; make one: lineage zoo build nowhere
    """

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        self.folder = folder
        self.rows = rows
        self._shards: dict[str, Any] = {}

    @cached_property
    def _by_id(self) -> dict[str, Row]:
        return {row["id"]: row for row in self.rows}

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def row(self, model: str) -> Row:
        """Return what is known of a model.

        Raises:
            NotFoundError: There is no such model.
        """
        if model not in self._by_id:
            raise NotFoundError(model, f"no such model in {self.folder}", "lineage zoo list")
        return self._by_id[model]

    def _design(self, model: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.row(model)["design"])
        return found

    def config(self, model: str) -> Config:
        """Return the design of a model that was made here.

        Raises:
            NotFoundError: There is no such model, or it comes from outside.
        """
        if self.row(model)["role"] == COLLECTED:
            raise NotFoundError(model, "comes from outside and has no design of ours")
        return from_json(self._design(model))

    def architecture(self, model: str) -> Architecture:
        """Return which axes of a model's tensors share units.

        Raises:
            ArchitectureError: A model from outside was taken without one.
        """
        if self.row(model)["role"] != COLLECTED:
            return architecture_of(self.config(model))
        facts = self._design(model)["architecture"]
        if facts is None:
            raise ArchitectureError(f"{model}: was taken without its architecture")
        return architecture_from(facts)

    def _names(self, model: str) -> Iterable[str]:
        if self.row(model)["role"] == COLLECTED:
            found: list[str] = self._design(model)["tensors"]
            return found
        return architecture_of(self.config(model)).axes

    def weights(self, model: str) -> dict[str, Array]:
        """Return name → values, float32; out × in × space, if it was made here.

        Raises:
            NotFoundError: There is no such model.
            MalformedError: The shard does not hold it.
        """
        shard = self.row(model)["shard"]
        names = self._names(model)
        if shard not in self._shards:
            path = self.folder / "shards" / f"{shard}.safetensors"
            try:
                self._shards[shard] = safe_open(path, framework="numpy")
            except FileNotFoundError as error:
                raise NotFoundError(path, "the shard is missing", "build the zoo again") from error
            except SafetensorError as error:
                raise MalformedError(path, f"no safetensors file ({error})") from error
        try:
            return {name: self._shards[shard].get_tensor(f"{model}/{name}") for name in names}
        except SafetensorError as error:
            raise MalformedError(shard, f"does not hold {model} ({error})") from error


def open_zoo(folder: Path) -> Zoo:
    """Open a zoo.

    Args:
        folder: Where it was built.

    Raises:
        NotFoundError: No zoo is there.
        MalformedError: Its table cannot be read.
        MissingExtraError: pyarrow is not installed.
    """
    arrow = _arrow()
    path = folder / "models.parquet"
    if not path.exists():
        raise NotFoundError(folder, "no zoo is there", f"make one: lineage zoo build {folder}")
    try:
        rows: list[Row] = arrow.parquet.read_table(path).to_pylist()
    except (arrow.ArrowInvalid, OSError) as error:
        raise MalformedError(path, f"no table of a zoo ({error})") from error
    return Zoo(folder, rows)


def architecture_from(facts: Mapping[str, Any]) -> Architecture:
    """Return the architecture that `dataclasses.asdict` wrote down.

    Example:
        >>> from embedder.architecture import Builder
        >>> mlp = Builder("mlp").input("in", 3).linear("w", "in", "out", 2, named=True).build()
        >>> architecture_from(json.loads(json.dumps(asdict(mlp)))) == mlp
        True
    """
    groups = {
        name: Group(**{**group, "gauge": Gauge(group["gauge"])})
        for name, group in facts["groups"].items()
    }
    axes = {
        name: tuple(None if axis is None else Axis(**axis) for axis in places)
        for name, places in facts["axes"].items()
    }
    steps = tuple(Step(**{**step, "op": Op(step["op"])}) for step in facts["steps"])
    rest = {"confidence": facts["confidence"], "unexplained": tuple(facts["unexplained"])}
    return Architecture(facts["family"], groups, axes, steps, **rest)


def read_facts(folder: Path) -> Mapping[str, Any]:
    """Return what `zoo.json` says; nothing if the folder holds no zoo.

    Raises:
        MalformedError: It is not JSON, or of another format.
    """
    path = folder / "zoo.json"
    if not path.exists():
        return {}
    try:
        facts: Any = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MalformedError(path, f"not JSON ({error})") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise MalformedError(path, f"not of the format {FORMAT}", "name a new folder")
    return facts
