"""What is loaded when: `lineage --help` must be quick, and a question pays for its own needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from command import ROOT
from conftest import Family

HEAVY = {"torch", "torch_geometric", "scipy", "networkx", "onnx", "h5py", "faiss", "pandas"}


def loaded_by(code: str, *arguments: str) -> set[str]:
    """Return the names of all modules that are loaded after some code has run."""
    code = f"import sys; {code}; import json; print(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def running(*arguments: str) -> set[str]:
    """Return what a command loads."""
    code = "import cli; cli.cli.main(sys.argv[1:], standalone_mode=False)"
    return loaded_by(code, *arguments)


def test_importing_the_command_line_loads_little_of_ours_and_nothing_heavy() -> None:
    modules = loaded_by("import cli") - loaded_by("pass")
    foreign = {name for name in packages(modules) if name not in sys.stdlib_module_names}
    known = {"cli", "click", "rich_click", "rich", "typing_extensions", "colorama"}
    assert foreign <= known | {"lineage"}
    assert {name for name in modules if name.startswith("lineage")} == {"lineage", "lineage.later"}


def test_importing_the_command_line_draws_no_bars() -> None:
    assert "rich.progress" not in loaded_by("import cli")


@pytest.mark.parametrize("arguments", [["--help"], ["parents", "--help"], ["completion", "bash"]])
def test_help_reads_no_weights_and_opens_no_catalogue(arguments: list[str]) -> None:
    found = packages(running(*arguments))
    assert not found & (HEAVY | {"numpy", "embedder", "index", "sqlite3"})


@pytest.mark.parametrize("command", ["compare", "parents", "add", "duplicates", "tree"])
def test_questions_about_safetensors_files_load_no_other_formats_libraries(
    command: str, family: Family, tmp_path: Path
) -> None:
    models = {
        "compare": [str(family.file("base-a")), str(family.file("chat"))],
        "parents": ["legal-int8.safetensors"],
        "add": [str(family.file("base-a"))],
    }
    catalogue = tmp_path / "c" if command == "add" else family.catalogue
    found = running(command, *models.get(command, []), "--catalogue", str(catalogue))
    # One of the family is reordered: scipy matches its units with those of its kin.
    needed = {"scipy"} if command in ("parents", "tree") else set()
    assert packages(found) & HEAVY <= needed
    assert "rich.progress" not in found


def test_most_strangers_are_told_without_pairing_their_units(family: Family) -> None:
    strangers = family.file("base-a"), family.file("twin-b")
    assert not packages(running("compare", *map(str, strangers))) & HEAVY
