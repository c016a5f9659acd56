"""The command line as tests run it: in this process, or as a program of its own."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

import cli

ROOT = Path(__file__).parent.parent
Argument = str | bytes | Path


@dataclass(frozen=True)
class Done:
    """What became of a command."""

    code: int
    out: str
    err: str

    @property
    def answer(self) -> Any:
        """What `--json` printed."""
        return json.loads(self.out)

    @property
    def problem(self) -> Any:
        """The error that `--json` printed."""
        return json.loads(self.err)

    @property
    def lines(self) -> list[str]:
        """What was printed, by line."""
        return self.out.splitlines()


def lineage(*arguments: Argument) -> Done:
    """Run a command in this process, with warnings as errors."""
    found = CliRunner().invoke(cli.cli, [os.fsdecode(argument) for argument in arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return Done(found.exit_code, found.stdout, found.stderr)


def answer_of(*arguments: Argument) -> Any:
    """Return what a command that succeeds prints with `--json`."""
    done = lineage(*arguments, "--json")
    assert done.code == 0, done.err
    return done.answer


def started(
    *arguments: Argument, cwd: Path | None = None, before: Callable[[], None] | None = None
) -> subprocess.Popen[str]:
    """Start a command as a program, in a session of its own so that signals reach only it."""
    environment = {name: value for name, value in os.environ.items() if "LINEAGE" not in name}
    environment |= {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "cli", *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="surrogateescape",
        start_new_session=True,
        preexec_fn=before,
    )


def program(
    *arguments: Argument, cwd: Path | None = None, before: Callable[[], None] | None = None
) -> Done:
    """Run a command as a program and wait for it.

    Args:
        arguments: Of the command.
        cwd: Where it runs.
        before: Called in the new process before the program starts.
    """
    with started(*arguments, cwd=cwd, before=before) as process:
        out, err = process.communicate(timeout=60)
    return Done(process.returncode, out, err)


def without_privileges() -> None:
    """Let file permissions bind root too, as they bind everybody else.

    For `before`: capabilities to override them are taken from the set that a program may get.
    """
    if os.geteuid() == 0:
        library = ctypes.CDLL(None, use_errno=True)
        drop_from_bounding_set, override, read_search = 24, 1, 2
        for capability in (override, read_search):
            if library.prctl(drop_from_bounding_set, capability, 0, 0, 0) != 0:
                raise OSError(ctypes.get_errno(), "permissions would not bind")


def interrupted(process: subprocess.Popen[str]) -> Done:
    """Press Ctrl-C in the terminal of a program and wait for it."""
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return Done(process.returncode, out, err)
