"""Time the command line against a plain hash, and watch its memory.

    python -m benchmarks.speed            about three minutes on two cores, 2.3 GB of disk
    python -m benchmarks.speed --large    also 10 GB as ONNX: a minute and 1.1 GB more

Everything is run as a user runs it, as a program of its own; settings of BLAS threads are taken
off, so that their defaults count. Files are in the page cache for all that read them. Each number
is the median of the runs that the result names, and the machine was waited for until its load fell
below 1. It writes benchmarks/results/speed.json.

- *add, one large file*: `lineage add` into a new catalogue of 2 GB of bfloat16 in 129 tensors of a
  made-up transformer, with `--no-codes` and with identity codes, against `openssl dgst -sha256` and
  `sha256sum` of the same file in the same round. Memory is that of a run with codes: the largest
  sum over all processes of the command, looked at every 20 ms in a run of its own: proportional
  shares (PSS), and resident memory (RSS), which counts a page that two processes share twice.
- *add, many small files*: 1,000 safetensors files of 100 kB.
- *cold*: `lineage compare` of two files of a million parameters, kin and strangers, and
  `lineage --help`, started anew each time.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.machine import ROOT, load, spread, wait_until_idle, write_result
from benchmarks.made import external_onnx, large_transformer, small_files, two_millions

Json = dict[str, Any]

SEED = 11
ROUNDS = 3
COLD_RUNS = 10
UNDECIDED = 4
"""Exit code of a command that has run and could not decide."""

_LOOK_S = 0.02

TARGETS = {
    "add_large": "at most 2.5 times openssl",
    "add_large_codes": "at most 5 times openssl",
    "add_large_memory": "at most 600 MB",
    "add_small": "at least 100 files a second",
    "compare": "less than 1 s",
    "help": "less than 0.3 s",
}


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a program.

    Args:
        seconds: Wall time.
        cpu_seconds: Time of all cores, its child processes included.
    """

    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Memory:
    """The most memory that a program had with all its processes.

    Args:
        pss_bytes: Sum of proportional shares: a page that two processes share counts half in each.
        rss_bytes: Sum of resident memory.
    """

    pss_bytes: int
    rss_bytes: int

    def to_json(self) -> Json:
        """Return the rows of the result file."""
        return {
            "peak_pss_mb": round(self.pss_bytes / 1e6),
            "peak_rss_mb": round(self.rss_bytes / 1e6),
        }


def environment() -> dict[str, str]:
    """Return the environment of a user who has set nothing."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not re.match(r"LINEAGE_|(OPENBLAS|OMP|MKL)_NUM_THREADS$", name)
    }
    return {**kept, "PYTHONPATH": str(ROOT)}


def lineage(*arguments: object) -> list[str]:
    """Return the command line of a `lineage` command."""
    return [sys.executable, "-m", "cli", *map(str, arguments)]


def run(command: Sequence[str], folder: Path, **settings: str) -> Run:
    """Run a program and return how long it took.

    Args:
        command: The program and its arguments.
        folder: Where it runs.
        settings: Environment variables that it gets beside its user's.

    Raises:
        RuntimeError: It failed.
    """
    start = time.perf_counter()
    process = _started(command, folder, settings)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    _check(process)
    return Run(seconds, usage.ru_utime + usage.ru_stime)


def memory_of(command: Sequence[str], folder: Path) -> Memory:
    """Run a program and return how much memory it had at most; the watching slows it down."""
    process = _started(command, folder, {})
    root = psutil.Process(process.pid)
    pss = rss = 0
    while process.poll() is None:
        shares, resident = _memory_now(root)
        pss, rss = max(pss, shares), max(rss, resident)
        time.sleep(_LOOK_S)
    _check(process)
    return Memory(pss, rss)


def _started(
    command: Sequence[str], folder: Path, settings: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    nothing = subprocess.DEVNULL
    own = {**environment(), **settings}
    return subprocess.Popen(command, cwd=folder, env=own, stdout=nothing, stderr=nothing)


def _check(process: subprocess.Popen[bytes]) -> None:
    if process.returncode not in (0, UNDECIDED):
        raise RuntimeError(f"{process.args!r}: exit code {process.returncode}")


def _memory_now(root: psutil.Process) -> tuple[int, int]:
    """Return the sums of PSS and RSS over a process and all below it."""
    pss = rss = 0
    try:
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0, 0
    for process in tree:
        try:
            memory = process.memory_full_info()
        except psutil.Error:
            continue  # it has just ended
        pss, rss = pss + memory.pss, rss + memory.rss
    return pss, rss


def time_large_file(folder: Path) -> Json:
    """Add one large file and hash it, in turns."""
    file = large_transformer(folder / "large.safetensors", SEED)
    size = file.stat().st_size

    def add(number: object, *options: str) -> list[str]:
        return lineage("add", file, "--catalogue", folder / f"c{number}", *options)

    with file.open("rb") as stream:  # into the page cache
        while stream.read(1 << 24):
            pass
    load_before = wait_until_idle()
    runs: dict[str, list[Run]] = {"add": [], "add_codes": [], "openssl": [], "sha256sum": []}
    for number in range(ROUNDS):
        runs["openssl"].append(run(["openssl", "dgst", "-sha256", str(file)], folder))
        runs["sha256sum"].append(run(["sha256sum", str(file)], folder))
        runs["add"].append(run(add(number, "--no-codes"), folder))
        runs["add_codes"].append(run(add(f"-codes-{number}"), folder))
    single = run(add("-single", "--no-codes"), folder, OPENBLAS_NUM_THREADS="1")
    memory = memory_of(add("-watched"), folder)
    file.unlink()
    own, coded, openssl, sha256sum = (
        median(one.seconds for one in found) for found in runs.values()
    )
    return {
        "bytes": size,
        "load_before": load_before,
        **{name: spread([one.seconds for one in found]) for name, found in runs.items()},
        "cpu_seconds": {
            name: round(median(one.cpu_seconds for one in found), 2) for name, found in runs.items()
        },
        "add_with_one_blas_thread": round(single.seconds, 3),
        "times_openssl": round(own / openssl, 2),
        "times_openssl_with_codes": round(coded / openssl, 2),
        "times_sha256sum": round(own / sha256sum, 2),
        "bytes_a_second": round(size / own),
        **memory.to_json(),
    }


def time_external_onnx(folder: Path) -> Json:
    """Add a model of 10 GB, once, and hash its files."""
    model = external_onnx(folder / "onnx", SEED)
    parts = sorted(model.parent.glob("*.bin"))
    size = sum(part.stat().st_size for part in parts)
    load_before = wait_until_idle()
    hashed = run(["openssl", "dgst", "-sha256", *map(str, parts)], folder)
    added = run(lineage("add", model, "--catalogue", folder / "onnx-catalogue"), folder)
    memory = memory_of(lineage("add", model, "--catalogue", folder / "onnx-again"), folder)
    return {
        "bytes": size,
        "load_before": load_before,
        "add": round(added.seconds, 1),
        "openssl": round(hashed.seconds, 1),
        "cpu_seconds": {"add": round(added.cpu_seconds), "openssl": round(hashed.cpu_seconds)},
        "times_openssl": round(added.seconds / hashed.seconds, 2),
        **memory.to_json(),
    }


def time_small_files(folder: Path) -> Json:
    """Add a folder of many small files."""
    small = folder / "small"
    count = small_files(small, SEED)
    load_before = wait_until_idle()
    adds = [
        run(lineage("add", small, "--catalogue", folder / f"s{number}"), folder)
        for number in range(ROUNDS)
    ]
    again = run(lineage("add", small, "--catalogue", folder / "s0"), folder).seconds
    memory = memory_of(lineage("add", small, "--catalogue", folder / "s"), folder)
    own = median(add.seconds for add in adds)
    size = sum(file.stat().st_size for file in (folder / "s0").iterdir())
    return {
        "files": count,
        "load_before": load_before,
        "add": spread([add.seconds for add in adds]),
        "cpu_seconds": round(median(add.cpu_seconds for add in adds), 2),
        "files_a_second": round(count / own),
        "unchanged": round(again, 3),
        "catalogue_bytes_a_model": round(size / count),
        **memory.to_json(),
    }


def time_cold(folder: Path) -> Json:
    """Start the command line for one small question, many times."""
    base, child, stranger = two_millions(folder, SEED)
    nowhere = ("--catalogue", folder / "nowhere")
    commands = {
        "help": lineage("--help"),
        "compare kin": lineage("compare", base, child, *nowhere),
        "compare strangers": lineage("compare", base, stranger, *nowhere),
        "python alone": [sys.executable, "-c", "pass"],
    }
    load_before = wait_until_idle()
    result: Json = {"load_before": load_before}
    for name, command in commands.items():
        run(command, folder)  # compiles modules, and brings files into the page cache
        result[name] = spread([run(command, folder).seconds for _ in range(COLD_RUNS)])
    result["imports"] = {
        name: slowest_imports(commands[name], folder) for name in ("help", "compare kin")
    }
    return result


def slowest_imports(command: Sequence[str], folder: Path, most: int = 12) -> dict[str, float]:
    """Return module → milliseconds that importing it takes with all below it, the slowest first."""
    timed_command = [command[0], "-X", "importtime", *command[1:]]
    done = subprocess.run(
        timed_command, cwd=folder, env=environment(), capture_output=True, text=True
    )
    found = re.findall(r"import time:\s+\d+ \|\s+(\d+) \| +(\S+)", done.stderr)
    slowest = sorted(found, key=lambda entry: -int(entry[0]))[:most]
    return {name: round(int(micro) / 1000, 1) for micro, name in slowest}


def verdicts(result: Json) -> Json:
    """Return each target with what was reached and whether that is enough."""
    large, small, cold = result["add_large"], result["add_small"], result["cold"]
    compare = max(cold["compare kin"]["median"], cold["compare strangers"]["median"])
    reached = {
        "add_large": (large["times_openssl"], large["times_openssl"] <= 2.5),
        "add_large_codes": (
            large["times_openssl_with_codes"],
            large["times_openssl_with_codes"] <= 5,
        ),
        "add_large_memory": (large["peak_pss_mb"], large["peak_pss_mb"] <= 600),
        "add_small": (small["files_a_second"], small["files_a_second"] >= 100),
        "compare": (compare, compare < 1),
        "help": (cold["help"]["median"], cold["help"]["median"] < 0.3),
    }
    return {
        name: {"target": TARGETS[name], "reached": number, "met": met}
        for name, (number, met) in reached.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Time everything and write the result; return 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description="Time the command line."
    )
    parser.add_argument("--large", action="store_true", help="also 10 GB as ONNX")
    parser.add_argument("--folder", type=Path, help="where the files go for a while; default: temp")
    given = parser.parse_args(arguments)
    parts: dict[str, Callable[[Path], Json]] = {
        "add_large": time_large_file,
        "add_small": time_small_files,
        "cold": time_cold,
    }
    if given.large:
        parts["add_10_gb_onnx"] = time_external_onnx
    result: Json = {"seed": SEED, "load_at_start": load()}
    with tempfile.TemporaryDirectory(prefix="lineage-speed-", dir=given.folder) as made:
        for name, part in parts.items():
            start = time.perf_counter()
            result[name] = part(Path(made))
            seconds = time.perf_counter() - start
            print(f"{name} ({seconds:.0f} s): {result[name]}", flush=True)
    result = {"targets": verdicts(result), **result}
    for name, verdict in result["targets"].items():
        print(
            f"{'met' if verdict['met'] else 'MISSED':6} {name}: {verdict['reached']}, target "
            f"{verdict['target']}"
        )
    print(f"written to {write_result('speed', result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
