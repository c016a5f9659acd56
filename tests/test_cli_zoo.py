"""`lineage zoo` as people and scripts use it."""

from pathlib import Path

import pytest
from safetensors import safe_open

import cli
from command import answer_of, interrupted, lineage, started
from conftest import Family
from zoo_made import files_of

SMALL = ("--only", "c00", "--only", "f000")


def test_a_build_tells_its_progress_on_stderr_and_its_answer_on_stdout(tmp_path: Path) -> None:
    done = lineage("zoo", "build", tmp_path / "zoo", "--only", "c00", "--jobs", "1", "--json")
    assert done.code == 0, done.err
    assert (done.answer["models"], done.answer["made"]) == (11, ["c00"])
    assert done.answer["limits"] == []
    assert [line.split(",")[0] for line in done.err.splitlines()] == ["1/1 c00: 11 models"]


def test_a_second_build_makes_nothing_and_says_so(zoo_folder: Path) -> None:
    before = files_of(zoo_folder)
    done = lineage("zoo", "build", zoo_folder, *SMALL)
    assert (done.code, done.err) == (0, "")
    assert done.lines[-1] == f"45 models in {zoo_folder}; 0 shards made, 2 kept."
    assert files_of(zoo_folder) == before


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        (("--role", "child"), "role", "child"),
        (("--kind", "mlp"), "kind", "mlp"),
        (("--task", "mnist8"), "task", "mnist8"),
        (("--relation", "lora"), "relation", "lora"),
    ],
)
def test_a_filter_keeps_what_it_names_and_nothing_else(
    zoo_folder: Path, options: tuple[str, ...], name: str, value: str
) -> None:
    everything = answer_of("zoo", "list", zoo_folder)["models"]
    expected = [model for model in everything if model[name] == value]
    assert expected
    assert answer_of("zoo", "list", zoo_folder, *options)["models"] == expected


def test_a_family_is_its_base_and_what_descends_from_it(zoo_folder: Path) -> None:
    base = answer_of("zoo", "list", zoo_folder, "--role", "copy")["models"][0]["id"]
    family = answer_of("zoo", "describe", zoo_folder, base)["made"]["family"]
    names = lineage("zoo", "list", zoo_folder, "--family", family, "-q").lines
    assert {base, family} <= set(names)
    for name in names:
        assert answer_of("zoo", "describe", zoo_folder, name)["made"]["family"] == family


def test_parents_and_children_name_each_other(zoo_folder: Path) -> None:
    for model in answer_of("zoo", "list", zoo_folder, "--role", "child")["models"]:
        made = answer_of("zoo", "describe", zoo_folder, model["id"])["made"]
        for parent in made["parents"]:
            assert model["id"] in answer_of("zoo", "describe", zoo_folder, parent)["children"]


def test_an_exported_model_is_read_and_says_who_it_is(zoo_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "one.safetensors"
    answer = answer_of("zoo", "export", zoo_folder, "c00-003", target)
    assert answer_of("info", target)["parameters"] == answer["parameters"]
    with safe_open(target, framework="numpy") as file:
        header = file.metadata()
    assert header["id"] == "c00-003"
    assert header["factor"] == answer_of("zoo", "describe", zoo_folder, "c00-003")["made"]["factor"]


def test_a_file_that_is_there_is_not_written_over(zoo_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("mine")
    done = lineage("zoo", "export", zoo_folder, "c00-003", target)
    assert done.code == cli.FAILED
    assert "is there already" in done.err
    assert target.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("describe", "ZOO", "c00-999"), cli.FAILED, "no such model"),
        (("export", "ZOO", "c00-003", "ZOO/no/such.safetensors"), cli.FAILED, "no folder"),
        (("list", "NOWHERE"), cli.FAILED, "lineage zoo build"),
        (("build", "ZOO", "--size", "slice"), cli.FAILED, "holds a zoo of size sample"),
        (("build", "ZOO", "--only", "z99"), cli.FAILED, "no shard z99"),
        (("build", "ZOO", "--size", "huge"), cli.USAGE, "huge"),
        (("list", "ZOO", "--role", "king"), cli.USAGE, "king"),
        (("grow", "ZOO"), cli.USAGE, "grow"),
    ],
)
def test_what_is_wrong_is_said(
    zoo_folder: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    names = {"ZOO": str(zoo_folder), "NOWHERE": str(tmp_path / "nowhere")}
    given = [
        argument.replace("ZOO", names["ZOO"]).replace("NOWHERE", names["NOWHERE"])
        for argument in arguments
    ]
    done = lineage("zoo", *given, "--json")
    assert done.code == code
    assert words in done.problem["detail"]
    assert "Traceback" not in done.err


def test_ctrl_c_keeps_what_was_finished(zoo_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "zoo"
    arguments = ("zoo", "build", folder, *SMALL, "--only", "f001", "--jobs", "2")
    process = started(*arguments)
    assert process.stderr is not None
    first = process.stderr.readline()
    assert first.startswith("1/3 ")
    done = interrupted(process)
    assert done.code == cli.INTERRUPTED
    assert "run the same command to go on" in done.err
    assert "Traceback" not in done.err
    shard = first.split()[1].rstrip(":")
    kept = files_of(folder)
    assert kept[f"{shard}.safetensors"] == files_of(zoo_folder)[f"{shard}.safetensors"]
    assert lineage("zoo", "list", folder).code == 0


def test_models_from_outside_are_listed_with_their_family(family: Family, tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    answer = answer_of("zoo", "collect", zoo, family.file("base-a"))
    (taken,) = answer["added"]
    (listed,) = answer_of("zoo", "list", zoo, "--role", "collected")["models"]
    assert (listed["id"], listed["kind"]) == (taken["id"], taken["kind"])
    made = answer_of("zoo", "describe", zoo, taken["id"])["made"]
    assert made["population"] == taken["model"] == "base-a.safetensors"
    done = lineage("zoo", "collect", zoo, family.file("base-a"))
    assert done.lines[-1] == "0 models taken, 1 there already."
