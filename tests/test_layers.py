"""The arrows between packages point down, no package has a cycle, and no piece grows too long."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import networkx
import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "embedder": {"embedder"},
    "index": {"embedder", "index"},
    "lineage": {"embedder", "index", "lineage"},
}
OURS = {*MAY_IMPORT, "cli", "tests", "benchmarks"}
SOURCES = [file for package in MAY_IMPORT for file in sorted((ROOT / package).rglob("*.py"))]
ALL_SOURCES = [*SOURCES, ROOT / "cli.py"]
LONGEST_MODULE, LONGEST_CLASS, LONGEST_FUNCTION = 500, 300, 50
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc", "types", "tools", "base"}


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imported_packages(file: Path) -> set[str]:
    """Return which of our packages a file imports, late and type-checking imports too."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    direct = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    froms = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in direct | froms} & OURS


@pytest.mark.parametrize("file", SOURCES, ids=relative)
def test_imports_point_down(file: Path) -> None:
    assert imported_packages(file) <= MAY_IMPORT[file.relative_to(ROOT).parts[0]]


def test_nothing_of_ours_is_imported_by_a_relative_path() -> None:
    for file in ALL_SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), relative(file)


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_a_package_has_no_cycle(package: str) -> None:
    graph = grimp.build_graph(package, cache_dir=None, exclude_type_checking_imports=True)
    arrows: networkx.DiGraph[str] = networkx.DiGraph()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            arrows.add_edge(module, imported)
    cycles = [found for found in networkx.strongly_connected_components(arrows) if len(found) > 1]
    assert cycles == []


def test_the_layers_hold_for_import_linter_too() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    command = [str(linter), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", ALL_SOURCES, ids=relative)
def test_modules_classes_and_functions_stay_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_MODULE
    for node in definitions(ast.parse(text)):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        most = LONGEST_CLASS if isinstance(node, ast.ClassDef) else LONGEST_FUNCTION
        assert length <= most, f"{node.name} has {length} lines"


def definitions(
    tree: ast.Module,
) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_tests_stay_short_too() -> None:
    long = {
        relative(file): len(file.read_text(encoding="utf-8").splitlines())
        for file in (ROOT / "tests").rglob("*.py")
    }
    assert {name: lines for name, lines in long.items() if lines > LONGEST_MODULE} == {}


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [relative(file) for file in ALL_SOURCES if file.stem in VAGUE] == []


def test_only_the_command_line_prints_or_exits() -> None:
    for file in SOURCES:
        if file.stem == "hdf5_child":  # a program of its own, which answers on stdout
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("print", "sys.exit", "exit"), relative(file)
