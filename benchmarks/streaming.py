"""How fast and in how much memory large models are coded.

    python -m benchmarks.streaming          up to 7 billion parameters: about three minutes
    python -m benchmarks.streaming --ten    also 10 billion
    python -m benchmarks.streaming --plot   only draw what was measured last

Transformers of bfloat16 as ONNX, whose data files are hard links to one random file of 1 GB, and
one of safetensors, whose attention is followed head by head. Each is opened, described and coded
in a process of its own with one BLAS thread, as workers have it; blocks are multiplied in two
threads. Before it the process codes the smallest, so that what is imported and loaded once for all
models is not counted; how long that takes is `once`. Bytes of a model count once, though most are
read twice and come from the page cache. Memory is what a process of its own has for itself (USS),
looked at every 20 ms; looking takes .08 of a core at 500 MB, so the processes that are timed are
not looked at. The machine was waited for until its load fell below 1.5; the load beside each row
says whether it stayed so.

`limit_bytes_a_second` is how fast two threads read such blocks, widen them and multiply them with
64 codes, and do nothing else, measured between the runs: machines are not always equally fast.
`share_of_limit` is what of it was reached, by `bytes_read`. It writes
benchmarks/results/streaming.json, and draws what a parameter costs beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from benchmarks.machine import (
    RESULTS,
    ROOT,
    load,
    read_result,
    spread,
    wait_until_idle,
    write_result,
)
from benchmarks.made import TransformerShape, bfloat16_file, large_transformer, transformer_onnx
from embedder.coding import identity_code, units_of
from embedder.opening import open_checkpoint
from embedder.unit_codes import WIDTH

Json = dict[str, Any]

SEED = 13
IDLE_LOAD = 1.5
_LOOK_S = 0.02
BLOCK = (256, 4096)
"""Rows and columns of the blocks by which the limit is measured."""

SHAPES = {
    "1e6": TransformerShape(128, 344, 4, 1000, 4),
    "1e7": TransformerShape(256, 688, 10, 4000, 4),
    "1e8": TransformerShape(768, 2064, 11, 16_000, 12),
    "1e9": TransformerShape(2048, 5504, 17, 32_000, 16),
    "7e9": TransformerShape(4096, 11_008, 32, 32_000, 32),
}
LARGEST = {"1e10": TransformerShape(5120, 13_824, 31, 32_000, 40)}

TARGETS = {
    "bytes_a_second": "at least 0.8 GB/s for 7 billion parameters",
    "peak_private_mb": "under 600 MB for 7 billion parameters",
}


def code(model: Path) -> Json:
    """Code one model, and return how long it took."""
    process = psutil.Process()
    read = process.io_counters().read_chars
    start, cpu = time.perf_counter(), time.process_time()
    with open_checkpoint(model) as checkpoint:
        vector = identity_code(units_of(checkpoint)).vector
        parameters = checkpoint.parameters
        stored = sum(tensor.storage.size_bytes for tensor in checkpoint.tensors)
    return {
        "parameters": parameters,
        "bytes": stored,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "bytes_read": process.io_counters().read_chars - read,
        "first": [round(float(number), 5) for number in vector[:4]],
    }


def limit(values: Path) -> float:
    """Return how many bytes a second two threads read, widen and multiply with 64 codes."""
    rows, columns = BLOCK
    codes = np.random.default_rng(SEED).normal(size=(columns, WIDTH)).astype(np.float32)
    size = 2 * rows * columns
    starts = range(0, values.stat().st_size - size + 1, size)

    def work(first: int) -> None:
        wide = np.empty(rows * columns, np.uint32)
        with values.open("rb", buffering=0) as stream, np.errstate(all="ignore"):
            for start in starts[first::2]:
                stream.seek(start)
                raw = np.frombuffer(stream.read(size), np.uint16)
                np.left_shift(raw, 16, out=wide, dtype=np.uint32)
                wide.view(np.float32).reshape(rows, columns) @ codes

    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    return len(starts) * size / (time.perf_counter() - start)


def run(model: Path, before: Path, *, watched: bool = False) -> Json:
    """Code one model and then another in a process of their own, and tell of the other.

    Its memory is watched, or it is left alone.
    """
    command = [sys.executable, "-m", "benchmarks.streaming", "--code", str(before), str(model)]
    settings = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True
    )
    peak, child = 0, psutil.Process(process.pid)
    while watched and process.poll() is None:
        try:
            peak = max(peak, child.memory_full_info().uss)
        except psutil.Error:
            break  # it has just ended
        time.sleep(_LOOK_S)
    said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{command}: exit code {process.returncode}")
    once, found = json.loads(said)
    return {**found, "once": once["seconds"], "peak_private_mb": round(peak / 1e6)}


def row_of(model: Path, warm: Path, values: Path, *, wait: bool) -> Json:
    """Return the row of one model: memory in one run, then the median time of three others."""
    before = wait_until_idle(IDLE_LOAD) if wait else load()
    first = run(model, warm, watched=True)
    runs, limits = [], [limit(values)]
    for _ in range(3):
        runs.append(run(model, warm))
        limits.append(limit(values))
    seconds = median(one["seconds"] for one in runs)
    parameters, size = first["parameters"], first["bytes"]
    return {
        "parameters": parameters,
        "bytes": size,
        "load_before": before,
        "load_after": load(),
        "once": spread([one["once"] for one in runs]),
        "seconds": spread([one["seconds"] for one in runs]),
        "cpu_seconds": round(median(one["cpu_seconds"] for one in runs), 2),
        "nanoseconds_a_parameter": round(1e9 * seconds / parameters, 2),
        "bytes_a_second": round(size / seconds),
        "bytes_read": first["bytes_read"],
        "limit_bytes_a_second": round(median(limits)),
        "share_of_limit": round(first["bytes_read"] / seconds / median(limits), 2),
        "peak_private_mb": first["peak_private_mb"],
        "same_code_each_time": len({str(one["first"]) for one in (first, *runs)}) == 1,
    }


def draw(result: Json) -> Path:
    """Draw the seconds of all cores that a parameter takes, by the size of a model."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = [row for row in result.values() if isinstance(row, dict) and "parameters" in row]
    onnx = sorted(rows[:-1], key=lambda row: int(row["parameters"]))  # the last is safetensors
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for chosen, label, mark in ((onnx, "ONNX", "o-"), (rows[-1:], "safetensors", "s")):
        sizes = [row["parameters"] for row in chosen]
        costs = [1e9 * row["cpu_seconds"] / row["parameters"] for row in chosen]
        axes.loglog(sizes, costs, mark, label=label)
    axes.set(xlabel="parameters", ylabel="ns of a core a parameter", ylim=(1, 300))
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    path = RESULTS / "streaming.svg"
    # Nothing in the picture may differ from one drawing to the next of the same numbers.
    with rc_context({"svg.hashsalt": "streaming"}):
        figure.savefig(path, metadata={"Date": None})
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Time everything and write the result; return 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.streaming", description="Time the codes of large models."
    )
    parser.add_argument("--ten", action="store_true", help="also 10 billion parameters")
    parser.add_argument("--busy", action="store_true", help="do not wait for an idle machine")
    parser.add_argument("--only", help="one size, printed and not written")
    parser.add_argument("--folder", type=Path, help="where the files go for a while; default: temp")
    parser.add_argument("--plot", action="store_true", help="only draw what was measured last")
    parser.add_argument("--code", type=Path, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.code:
        print(json.dumps([code(model) for model in given.code]))
        return 0
    if given.plot:
        print(f"drawn in {draw(read_result('streaming'))}")
        return 0
    shapes = {**SHAPES, **(LARGEST if given.ten else {})}
    rows: Json = {}
    with tempfile.TemporaryDirectory(prefix="lineage-streaming-", dir=given.folder) as made:
        folder = Path(made)
        values = bfloat16_file(folder / "values.bin", SEED)
        warm = transformer_onnx(folder / "warm", SHAPES["1e6"], values)
        for name in [given.only] if given.only else shapes:
            if name in shapes:
                model = transformer_onnx(folder / name, shapes[name], values)
                rows[name] = row_of(model, warm, values, wait=not given.busy)
                print(name, rows[name], flush=True)
        if given.only in (None, "safetensors"):
            model = large_transformer(folder / "model.safetensors", SEED)
            rows["safetensors"] = row_of(model, warm, values, wait=not given.busy)
            print("safetensors", rows["safetensors"], flush=True)
    if given.only:
        return 0
    largest = rows["7e9"]
    reached = {
        "bytes_a_second": (largest["bytes_a_second"], largest["bytes_a_second"] >= 0.8e9),
        "peak_private_mb": (largest["peak_private_mb"], largest["peak_private_mb"] < 600),
    }
    targets = {
        name: {"target": TARGETS[name], "reached": number, "met": met}
        for name, (number, met) in reached.items()
    }
    print(f"written to {write_result('streaming', {'seed': SEED, 'targets': targets, **rows})}")
    print(f"drawn in {draw(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
