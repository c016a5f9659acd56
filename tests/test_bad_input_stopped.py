"""Runs that end too soon: Ctrl-C, kill -9, a full disk. What was finished is kept, whole."""

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

import cli
import schemas
from command import Done, answer_of, lineage, program, started
from refusals import assert_no_traceback

pytestmark = pytest.mark.usefixtures("somewhere")

COUNT = 300
"""Models enough for a run of several seconds, each so small that writing them takes none."""
FIRST = 3
"""Models that are waited for before a run is stopped."""
CATALOGUE = "lineage-catalogue"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write many small models."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    for place in range(COUNT):
        weights = {f"w{n}": rng.normal(size=(24, 30)).astype(np.float32) for n in range(6)}
        save_file(weights, folder / f"m{place:03}.safetensors")
    return folder


def until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something in a process that must not end before."""
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def catalogued() -> list[str]:
    return lineage("list", "-q").lines if Path(CATALOGUE, "catalogue.sqlite").exists() else []


@contextmanager
def adding(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Start a run over many models and wait until the first of them are kept."""
    process = started("add", str(folder), *options)
    try:
        until(lambda: len(catalogued()) >= FIRST, process)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)


def assert_finished_models_are_whole(count: int) -> None:
    assert FIRST <= count < COUNT
    checked = lineage("check")
    assert (checked.code, checked.out) == (cli.DONE, f"{count:,} models, 0 problems.\n")


def assert_a_second_run_adds_the_rest(folder: Path, count: int) -> None:
    answer = answer_of("add", folder, "--jobs", "1")
    assert len(answer["unchanged"]) == count
    assert len(answer["added"]) == COUNT - count
    assert len(catalogued()) == COUNT


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_keeps_what_was_finished_and_a_second_run_adds_the_rest(
    jobs: str, many: Path
) -> None:
    with adding(many, "--jobs", jobs) as process:
        # The terminal sends it to every process of the run.
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED
    assert out == ""
    assert err.strip() == cli.STOPPED
    count = len(catalogued())
    assert_finished_models_are_whole(count)
    assert_a_second_run_adds_the_rest(many, count)


def test_ctrl_c_under_json_is_a_problem_like_any_other(many: Path) -> None:
    with adding(many, "--jobs", "1", "--json") as process:
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    done = Done(process.returncode, out, err)
    assert (done.code, done.out) == (cli.INTERRUPTED, "")
    schemas.check(done.problem, "problem")
    assert done.problem["exit_code"] == cli.INTERRUPTED


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_killed_run_leaves_whole_models_and_no_process(jobs: str, many: Path) -> None:
    with adding(many, "--jobs", jobs) as process:
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait(timeout=60)
        # Nobody reads from them any more, so they must end by themselves.
        _, alive = psutil.wait_procs(workers, timeout=10)
        for worker in alive:
            worker.kill()
    assert alive == []
    assert bool(workers) == (jobs == "2")
    count = len(catalogued())
    assert_finished_models_are_whole(count)
    assert_a_second_run_adds_the_rest(many, count)


def test_a_worker_that_is_killed_loses_no_model_for_good(many: Path) -> None:
    with adding(many, "--jobs", "2", "--json") as process:
        for worker in psutil.Process(process.pid).children():
            if "--multiprocessing-fork" in worker.cmdline():
                worker.kill()
        out, err = process.communicate(timeout=60)
    done = Done(process.returncode, out, err)
    assert_no_traceback(done)
    assert done.code == cli.UNDECIDED
    lost = done.answer["failed"]
    assert all(model["model"] in model["reason"] for model in lost)
    assert all("run the same command again" in model["reason"] for model in lost)
    assert len(done.answer["added"]) + len(lost) == COUNT
    assert_finished_models_are_whole(len(done.answer["added"]))
    assert_a_second_run_adds_the_rest(many, len(done.answer["added"]))


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_a_full_disk_keeps_what_was_finished_and_says_what_to_do(
    form: list[str], many: Path
) -> None:
    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    done = program("add", str(many), "--jobs", "1", *form, before=small_disk)
    assert_no_traceback(done)
    assert (done.code, done.out) == (cli.FAILED, "")
    detail = done.problem["detail"] if form else done.err
    assert CATALOGUE in detail
    assert "what was finished before is kept" in detail
    assert "run the same command" in detail
    count = len(catalogued())
    assert_finished_models_are_whole(count)
    if form:
        assert_a_second_run_adds_the_rest(many, count)


def test_an_export_to_a_full_disk_leaves_no_half_file(many: Path, somewhere: Path) -> None:
    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    files = sorted(many.iterdir())[:20]
    lineage("add", *files, "--jobs", "1")
    done = program("export", "all", before=small_disk)
    assert (done.code, done.out) == (cli.FAILED, "")
    assert done.err.startswith("Error: all: ")
    assert "nothing was written" in done.err
    assert [file.name for file in somewhere.iterdir()] == [CATALOGUE]
