"""What the command line must do with a model that cannot be read, whatever is wrong with it."""

from pathlib import Path

import cli
import schemas
from command import Argument, Done, lineage


def assert_refused(path: Path, *words: str, good: Path, beside: Path | None = None) -> None:
    """Hold `add`, `info` and `compare` to what they owe of a model that cannot be read.

    Args:
        path: The model.
        words: What the message must say, besides where.
        good: A model that can be read.
        beside: Where a program of the file's would have left something.
    """
    catalogue = Path("refused-catalogue")
    known = ("--catalogue", catalogue)
    added = lineage("add", path, good, *known, "--json")
    schemas.check(added.answer, "add")
    assert added.code == cli.UNDECIDED
    # The one that can be read is added, the other is explained.
    assert added.answer["added"] + added.answer["unchanged"] == [good.name]
    (failed,) = added.answer["failed"]
    assert_says(failed["reason"], path, words)
    assert lineage("list", "-q", *known).lines == [good.name]
    assert lineage("check", *known).code == cli.DONE

    table = lineage("add", path, *known)
    assert table.code == cli.FAILED
    assert "0 models added, 0 models unchanged, 1 model failed." in table.out
    assert "Nothing was added; mend the rest and run the same command." in table.out

    for command in (("info", path), ("compare", path, good), ("compare", good, path)):
        assert_says(error_of(*command, *known), path, words)
    assert beside is None or not beside.exists()


def error_of(*arguments: Argument) -> str:
    """Return the error of a command that prints nothing else, the same for people and as JSON."""
    done = lineage(*arguments)
    told = lineage(*arguments, "--json")
    assert done.code == told.code == cli.FAILED, (done, told)
    assert done.out == told.out == ""
    schemas.check(told.problem, "problem")
    detail: str = told.problem["detail"]
    assert done.err == f"Error: {detail}\n"
    return detail


def assert_says(message: str, path: Path, words: tuple[str, ...]) -> None:
    assert path.name in message, "where"
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert "\n" not in message


def assert_no_traceback(done: Done) -> None:
    assert "Traceback" not in done.out + done.err
