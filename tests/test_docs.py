"""The documentation is true: its commands exist, its examples run, its tables are complete.

A block marked `console` is run: its lines that begin with `$ ` in a folder where `lineage demo` has
been run once, and what they print is compared with what the page shows. A block below the comment
`<!-- corpus -->` is run in the folder of the small real models that `make demo` uses. Run this file
as a program to bring the blocks up to date: `python tests/test_docs.py`.

What is compared are words and numbers, not the space between them; numbers may differ by a
twentieth, because the small family is trained on the machine that runs it, and times are not
compared. A line `...` stands for any lines.
"""

import ast
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import click
import pytest
from click.testing import CliRunner

from benchmarks.corpus.listed import demonstration, is_there
from cli import cli
from docs.demo import STEPS, lay_out
from docs.numbers import NUMBERS, TELLING, block_of
from docs.numbers import main as renew_all
from embedder.readers import READERS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WIDTH = "110"

FENCE = re.compile(
    r"^(?P<mark><!-- (?P<place>\w+) -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.M | re.S
)
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]


@dataclass
class Block:
    """One block of code on a page."""

    kind: str
    place: str
    body: str
    start: int
    end: int


def blocks_of(text: str) -> list[Block]:
    return [
        Block(m["kind"], m["place"] or "demo", m["body"], m.start("body"), m.end("body"))
        for m in FENCE.finditer(text)
    ]


# ------------------------------------------------------------------ running examples


@dataclass
class Shell:
    """As much of a shell as the examples use: our commands, `export`, `echo $?`, `cat`, `>`."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    code: int = 0

    def run(self, line: str) -> str:
        """Return what a command prints."""
        words = shlex.split(line, comments=True)
        if words[:1] == ["export"]:
            name, _, value = words[1].partition("=")
            self.variables[name] = value
            return ""
        if line == "echo $?":
            return f"{self.code}\n"
        if words[0] == "cat":
            return "".join((self.folder / name).read_text() for name in words[1:])
        if words[0] != "lineage":
            raise AssertionError(f"an example that cannot be run: {line}")
        words, target = (words[:-2], words[-1]) if ">" in words else (words, "")
        environment = {**os.environ, "COLUMNS": WIDTH, **self.variables}
        with chdir(self.folder), mock.patch.dict(os.environ, environment, clear=True):
            result = CliRunner().invoke(cli, words[1:], prog_name="lineage")
        self.code = result.exit_code
        if target:
            (self.folder / target).write_text(result.stdout)
            return result.stderr
        return result.output


def commands_of(body: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a block, as it is written, with what the page says it prints."""
    for part in re.split(r"^\$ ", body, flags=re.M)[1:]:
        lines = part.splitlines()
        count = next(i for i, line in enumerate(lines, 1) if not line.endswith("\\"))
        yield "\n".join(lines[:count]), "\n".join(lines[count:])


def same(shown: str, printed: str) -> bool:
    """Say whether a page shows what was printed."""
    return _same_lines(_lines(shown), _lines(printed))


def _lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()]


def _same_lines(shown: list[list[str]], printed: list[list[str]]) -> bool:
    for place, line in enumerate(shown):
        if line == ["..."]:
            rest = shown[place + 1 :]
            return any(
                _same_lines(rest, printed[start:]) for start in range(place, len(printed) + 1)
            )
        if place >= len(printed) or not _same_line(line, printed[place]):
            return False
    return len(shown) == len(printed)


def _same_line(shown: list[str], printed: list[str]) -> bool:
    return len(shown) == len(printed) and all(
        _same_word(word, other) or (shown[place + 1 : place + 2] == ["s"])
        for place, (word, other) in enumerate(zip(shown, printed, strict=True))
    )


NUMBER = re.compile(r"[-−]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


def _same_word(shown: str, printed: str) -> bool:
    if NUMBER.sub("#", shown) != NUMBER.sub("#", printed):
        return False
    ours, theirs = NUMBER.findall(shown), NUMBER.findall(printed)
    return all(_near(a, b) for a, b in zip(ours, theirs, strict=True))


def _near(shown: str, printed: str) -> bool:
    if shown == printed:
        return True
    if not any(mark in shown + printed for mark in ".e"):
        return False
    a, b = float(shown.replace(",", "")), float(printed.replace(",", ""))
    return abs(a - b) <= 0.05 * max(abs(a), abs(b), 0.1)


def differences(page: Path, place: str, folder: Path) -> Iterator[tuple[Block, str]]:
    """Run a page's examples; yield the blocks that show something else, and what they should."""
    shell = Shell(folder)
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.kind != "console" or block.place != place:
            continue
        fresh, right = [], True
        for command, shown in commands_of(block.body):
            printed = shell.run(command.replace("\\\n", " "))
            right = right and same(shown, printed)
            lines = [line.rstrip() for line in printed.splitlines()]
            fresh.append("\n".join([f"$ {command}", *lines]).rstrip() + "\n")
        if not right:
            yield block, "".join(fresh)


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    Shell(folder).run("lineage demo")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_examples_print_what_the_page_shows(page: Path, demo_folder: Path) -> None:
    for _, fresh in differences(page, "demo", demo_folder):
        pytest.fail(f"{page.name} should show:\n{fresh}")


def fetched() -> bool:
    """Say whether the models of `make demo` are there."""
    return all(is_there(model) for model in demonstration())


@pytest.mark.corpus
@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_examples_on_real_models_print_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    if "<!-- corpus -->" not in page.read_text(encoding="utf-8"):
        return
    if not fetched():
        pytest.skip("the models of `make demo` have not been fetched")
    with_real_models(tmp_path)
    for _, fresh in differences(page, "corpus", tmp_path):
        pytest.fail(f"{page.name} should show:\n{fresh}")


def with_real_models(folder: Path) -> Path:
    """Lay the models of `make demo` out in a folder and catalogue them."""
    lay_out(folder)
    Shell(folder).run("lineage add . --jobs 1")
    return folder


@pytest.mark.corpus
def test_the_demonstration_ends_as_it_should(tmp_path: Path) -> None:
    if not fetched():
        pytest.skip("the models of `make demo` have not been fetched")
    lay_out(tmp_path)
    shell = Shell(tmp_path)
    for _, command, expected in STEPS:
        shell.run(command)
        assert (command, shell.code) == (command, expected)


# ------------------------------------------------------------------ commands


def mentioned_commands(text: str) -> Iterator[str]:
    """Yield every command of ours on a page, from blocks and from code within lines."""
    for block in blocks_of(text):
        joined = block.body.replace("\\\n", " ")
        for line in joined.splitlines():
            found = re.match(r"\s*(?:\$ |- run: |run: )?(lineage [a-z].*)", line)
            if found and block.kind in ("console", "sh", "yaml"):
                yield found[1]
    outside = FENCE.sub("", text)
    yield from re.findall(r"`(lineage [a-z][^`]*)`", outside)


def problem_with(command: str) -> str:
    """Return what is wrong with a command line of ours; nothing if all is well."""
    words = shlex.split(re.split(r" [|>#]|&&|\|\|", command)[0])[1:]
    found = cli.commands.get(words[0])
    if isinstance(found, click.Group) and len(words) > 1:
        words = words[1:]
        found = found.get_command(click.Context(found), words[0])
    if found is None:
        return f"no command {words[0]}"
    options = {name: option for option in found.params for name in (*option.opts,)}
    for place, word in enumerate(words[1:], 1):
        if not word.startswith("-") or word in ("-h", "--help", "-"):
            continue
        name, _, value = word.partition("=")
        option = options.get(name)
        if option is None:
            return f"no option {name}"
        if isinstance(option.type, click.Choice):
            chosen = value or words[place + 1]
            if chosen not in option.type.choices and not chosen.isupper():
                return f"{name} has no choice {chosen}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_every_command_on_a_page_is_a_command(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wrong = {c: problem_with(c) for c in mentioned_commands(text) if problem_with(c)}
    assert not wrong


def test_every_command_is_described() -> None:
    text = "".join(
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/tour.md")
    )
    assert [name for name in cli.commands if f"lineage {name}" not in text] == []


# ------------------------------------------------------------------ columns and fields


def section(page: str, heading: str) -> str:
    """Return what stands below a heading, up to the next one of its level or above."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.search(rf"^(#+) `?{re.escape(heading)}`?$(.*?)(?=^#{{1,3}} |\Z)", text, re.M | re.S)
    assert found, f"{page} has no heading {heading}"
    return found[2]


def columns_of(function: ast.FunctionDef) -> set[str]:
    """Return the columns of the tables that a function makes."""
    tuples = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "columns":
            tuples.append(node.value)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Table" and node.args:
            tuples.append(node.args[0])
    found = [ast.literal_eval(node) for node in tuples if isinstance(node, ast.Tuple)]
    return {name for names in found for name in names}


TABLES = {
    before + function.name.removesuffix("_table"): columns_of(function)
    for file, before in (("lineage/tables.py", ""), ("lineage/zoo_answers.py", "zoo "))
    for function in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    if isinstance(function, ast.FunctionDef) and function.name.endswith("_table")
}
SECTIONS = {"relatives": "parents and children", "descent": "ancestors and descendants"}
SECTIONS |= {"plan": "add --dry-run"}


@pytest.mark.parametrize("table", TABLES)
def test_every_column_is_described(table: str) -> None:
    text = section("docs/columns.md", SECTIONS.get(table, table))
    assert TABLES[table]
    assert [name for name in sorted(TABLES[table]) if f"| `{name}` |" not in text] == []


ANSWERS = {
    "info": "lineage info base-a.safetensors",
    "add": "lineage add .",
    "add --dry-run": "lineage add . --dry-run",
    "list": "lineage list",
    "remove": "lineage remove base-pruned.safetensors",
    "check": "lineage check",
    "export": "lineage export family.lineage",
    "parents and children": "lineage parents legal-int8.safetensors",
    "ancestors and descendants": "lineage descendants legal.safetensors",
    "path": "lineage path legal-int8.safetensors chat-fp16.safetensors",
    "duplicates": "lineage duplicates",
    "tree": "lineage tree",
    "compare": "lineage compare base-a.safetensors twin-b.safetensors",
    "verify": "lineage verify legal-int8.safetensors --parent legal.safetensors",
    "doctor": "lineage doctor",
    "zoo build": "lineage zoo build zoo --only c00 --jobs 1",
    "zoo collect": "lineage zoo collect outside base-a.safetensors",
    "zoo list": "lineage zoo list zoo",
    "zoo describe": "lineage zoo describe zoo c00-000",
    "zoo export": "lineage zoo export zoo c00-000 c00-000.safetensors",
}
OPEN = ("dtypes", "declared", "design")
"""Fields whose own keys come from the models."""


def fields_of(value: Any, path: str = "") -> set[str]:
    """Return the paths of all fields of an answer, as `docs/columns.md` writes them."""
    if isinstance(value, list):
        return {found for item in value for found in fields_of(item, f"{path}[]")}
    if not isinstance(value, dict):
        return {path}
    found = {path} - {""}
    for key, inner in value.items():
        below = f"{path}.{key}".lstrip(".")
        found |= {below} if key in OPEN else fields_of(inner, below)
    return found


@pytest.fixture(scope="module")
def catalogued(demo_folder: Path) -> Shell:
    shell = Shell(demo_folder / "lineage-demo", {"LINEAGE_CATALOGUE": "catalogue"})
    shell.run("lineage add .")
    shell.run("lineage zoo build zoo --only c00 --jobs 1")
    return shell


@pytest.mark.parametrize("heading", ANSWERS)
def test_every_field_is_described(heading: str, catalogued: Shell) -> None:
    answer = json.loads(catalogued.run(f"{ANSWERS[heading]} --json"))
    text = section("docs/columns.md", heading) + section("docs/columns.md", "every answer")
    fields = {field.removesuffix("[]") for field in fields_of(answer)}
    documented = {name.removesuffix("[]") for name in re.findall(r"^\| `([^`]+)` \|", text, re.M)}
    assert sorted(fields - documented) == []


# ------------------------------------------------------------------ the rest


def test_every_reader_is_described() -> None:
    text = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    assert [name for name in READERS if f"| `{name}` |" not in text] == []


def anchors_of(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            wrong.append(target)
    assert wrong == []


def test_no_page_names_a_place_on_one_machine() -> None:
    files = [*PAGES, ROOT / "Makefile", ROOT / ".ci/run", ROOT / "docs/demo.py"]
    text = {file: file.read_text(encoding="utf-8") for file in [*files, ROOT / "constraints.txt"]}
    place = re.compile(r"(?<![\w.])/(?:work|root|home|tmp)/|extra-index-url|https?://[^ )]*simple")
    assert [file.name for file, content in text.items() if place.search(content)] == []


ACCUSING = re.compile(r"\b(stolen|stole|theft|fake|faked|plagiar\w*|provenance|original)\b", re.I)


def said_by(file: Path) -> Iterator[str]:
    """Yield the texts that a module may print: its strings, docstrings left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    silent = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in silent
        ):
            yield node.value


def test_no_answer_accuses() -> None:
    files = [ROOT / "cli.py", *sorted((ROOT / "lineage").glob("*.py"))]
    assert [text for file in files for text in said_by(file) if ACCUSING.search(text)] == []


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("name", NUMBERS)
def test_some_page_tells_the_last_numbers(name: str) -> None:
    pages = [page.read_text(encoding="utf-8") for page in TELLING]
    told = [found[0] for page in pages if (found := block_of(name).search(page))]
    assert told == [NUMBERS[name]()]


def main() -> None:
    """Bring the examples and the numbers of all pages up to date."""
    renew_all()
    with TemporaryDirectory() as name:
        folders = {"demo": Path(name) / "demo"}
        folders["demo"].mkdir()
        Shell(folders["demo"]).run("lineage demo")
        if fetched():
            folders["corpus"] = with_real_models(Path(name) / "corpus")
        for page in PAGES:
            for place, folder in folders.items():
                text = page.read_text(encoding="utf-8")
                for block, fresh in reversed(list(differences(page, place, folder))):
                    text = text[: block.start] + fresh + text[block.end :]
                    sys.stdout.write(f"{page.name}: a block was written anew\n")
                page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
