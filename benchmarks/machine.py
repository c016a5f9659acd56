"""What every result file says of where and when it was made."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"

IDLE_LOAD = 1.0
"""Load over the last minute below which a machine of two cores is idle enough to time on."""

_LONGEST_WAIT_S = 900


def described() -> dict[str, Any]:
    """Return date, commit and machine."""
    commit = _git("rev-parse", "--short", "HEAD")
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "changed_since": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "machine": {
            "processor": model,
            "cores": os.cpu_count(),
            "system": platform.platform(terse=True),
            "python": platform.python_version(),
            "numpy": version("numpy"),
        },
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def load() -> float:
    """Return the load of the machine over the last minute."""
    return round(os.getloadavg()[0], 2)


def wait_until_idle(most: float = IDLE_LOAD) -> float:
    """Wait until others leave the machine alone, a quarter of an hour at most; return the load."""
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while load() >= most and time.monotonic() < deadline:
        print(f"load {load()}: waiting for an idle machine", file=sys.stderr, flush=True)
        time.sleep(15)
    return load()


def spread(seconds: Sequence[float], digits: int = 3) -> dict[str, Any]:
    """Return median and extremes of repeated times, for a result file."""
    return {
        "median": round(median(seconds), digits),
        "least": round(min(seconds), digits),
        "most": round(max(seconds), digits),
        "runs": len(seconds),
    }


def read_result(name: str) -> dict[str, Any]:
    """Return what a result file holds beside the description of the machine; empty without one."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {key: value for key, value in found.items() if key not in _DESCRIBED}


_DESCRIBED = ("date", "commit", "changed_since", "machine")


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write a result file with the description of the machine; return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    text = json.dumps({**described(), **result}, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path
