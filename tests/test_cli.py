"""The command line as a whole: exit codes, forms of output, streams, errors, options."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import cli
import schemas
from command import Done, answer_of, lineage, program
from conftest import Family
from lineage.engine import LineageEngine

pytestmark = pytest.mark.usefixtures("somewhere")

ASKED: dict[str, list[str]] = {
    "parents": ["parents", "legal-int8.safetensors"],
    "children": ["children", "base-a.safetensors"],
    "ancestors": ["ancestors", "legal-int8.safetensors"],
    "descendants": ["descendants", "legal.safetensors"],
    "path": ["path", "chat.safetensors", "legal.safetensors"],
    "duplicates": ["duplicates"],
    "tree": ["tree"],
    "compare": ["compare", "base-a.safetensors", "base-pruned.safetensors"],
    "verify": ["verify", "legal-int8.safetensors", "--parent", "legal.safetensors"],
    "list": ["list"],
    "doctor": ["doctor"],
    "info": ["info", "FILE"],
    "add": ["add", "FILE"],
    "plan": ["add", "FILE", "--dry-run"],
}
LISTS = {"compare": "tensors", "verify": "claims", "tree": "edges", "list": "models"} | {
    "doctor": "findings",
    "path": "steps",
    "plan": "models",
}
"""Kind of answer → its list, where that is not called like the answer."""
LONG = ["parents", "children", "descendants", "path", "tree", "compare", "list", "doctor"]


@cache
def asked(kind: str, family: Family, *options: str, catalogue: Path | None = None) -> Done:
    words = [str(family.file("chat")) if word == "FILE" else word for word in ASKED[kind]]
    return lineage(*words, *options, "--catalogue", catalogue or family.catalogue)


@pytest.fixture
def crowd(tmp_path: Path) -> Path:
    """Catalogue 25 models, more than a table for people shows."""
    rng = np.random.default_rng(0)
    for place in range(25):
        values = rng.normal(size=(8, 9)).astype(np.float32)
        save_file({"w": values}, tmp_path / f"m{place:02}.safetensors")
    with LineageEngine(str(tmp_path / "c"), create=True) as engine:
        engine.add([tmp_path], workers=1)
    return tmp_path / "c"


class TestForms:
    @pytest.mark.parametrize("kind", ASKED)
    def test_json_has_the_promised_form_and_nothing_beside_it(
        self, kind: str, family: Family, own_catalogue: Path
    ) -> None:
        done = asked(kind, family, "--json", catalogue=own_catalogue)
        schemas.check(done.answer, kind)
        assert done.code == 0
        assert done.err == ""
        assert len(done.lines) == 1

    @pytest.mark.parametrize("kind", LONG)
    def test_tsv_has_a_header_and_a_row_for_each_item(self, kind: str, family: Family) -> None:
        items = asked(kind, family, "--json").answer[LISTS.get(kind, kind)]
        header, *rows = asked(kind, family, "--tsv").lines
        assert len(rows) == len(items) > 0
        assert all(name == name.lower() for name in header.split("\t"))
        assert {row.count("\t") for row in rows} == {header.count("\t")}

    def test_tsv_keeps_all_digits_of_a_number(self, family: Family) -> None:
        parents = asked("parents", family, "--json").answer["parents"]
        header, *rows = asked("parents", family, "--tsv").lines
        column = header.split("\t").index("distance")
        assert [float(row.split("\t")[column]) for row in rows] == [p["distance"] for p in parents]

    @pytest.mark.parametrize("kind", ["parents", "children", "list", "tree", "path", "descendants"])
    def test_quiet_prints_names_only(self, kind: str, family: Family) -> None:
        done = asked(kind, family, "-q")
        assert done.lines
        assert set(done.lines) <= set(family.names)

    @pytest.mark.parametrize("kind", ["list", "tree"])
    def test_quiet_prints_every_name_once(self, kind: str, family: Family) -> None:
        assert sorted(asked(kind, family, "-q").lines) == family.names

    def test_quiet_prints_both_ends_of_a_path(self, family: Family) -> None:
        lines = asked("path", family, "-q").lines
        assert (lines[0], lines[-1]) == ("chat.safetensors", "legal.safetensors")

    def test_quiet_prints_nothing_where_there_is_nothing(self, family: Family) -> None:
        done = lineage("parents", "twin-b.safetensors", "-q", "--catalogue", family.catalogue)
        assert (done.code, done.out) == (0, "")

    @pytest.mark.parametrize("form", ["--json", "--tsv", "-q"])
    def test_only_tables_for_people_are_cut_without_a_limit(self, form: str, crowd: Path) -> None:
        done = lineage("list", form, "--catalogue", crowd)
        assert all(f"m{place:02}" in done.out for place in range(25))
        assert "more rows" not in done.out

    def test_a_table_for_people_says_that_it_is_cut(self, crowd: Path) -> None:
        done = lineage("list", "--catalogue", crowd)
        assert "m19" in done.out
        assert "m20" not in done.out
        assert "5 more rows; --limit N shows more, --tsv and --json all." in done.out
        assert "25 models." in done.out

    def test_a_limit_shows_more_than_the_usual_rows(self, crowd: Path) -> None:
        done = lineage("list", "--limit", "24", "--catalogue", crowd)
        assert "m23" in done.out
        assert "m24" not in done.out

    @pytest.mark.parametrize("kind", LONG)
    def test_a_limit_cuts_any_list_in_json(self, kind: str, family: Family) -> None:
        answer = asked(kind, family, "--json", "--limit", "1").answer
        schemas.check(answer, kind)
        assert len(answer[LISTS.get(kind, kind)]) == 1

    @pytest.mark.parametrize("limit", [0, 1, 3])
    def test_a_limit_cuts_every_form(self, limit: int, family: Family) -> None:
        cut = ("--limit", str(limit))
        assert len(asked("list", family, "--json", *cut).answer["models"]) == limit
        assert len(asked("list", family, "--tsv", *cut).lines) == 1 + limit
        assert len(asked("list", family, "-q", *cut).lines) == limit

    def test_a_limit_leaves_the_verdict_of_a_gate(self, family: Family) -> None:
        done = asked("verify", family, "--limit", "0", "--fail-on", "quantised", "--json")
        assert done.code == cli.GATE
        assert done.answer["claims"] == []


class TestOptions:
    def test_the_group_has_no_options_that_a_command_would_miss(self) -> None:
        assert {parameter.name for parameter in cli.cli.params} == {"version"}

    @pytest.mark.parametrize("name", sorted(cli.cli.commands))
    def test_every_command_explains_itself(self, name: str) -> None:
        done = lineage(name, "--help")
        assert done.code == 0
        assert "Usage" in done.out
        catalogue = any("--catalogue" in p.opts for p in cli.cli.commands[name].params)
        assert catalogue == (name not in ("demo", "completion", "zoo", "train", "evaluate"))

    def test_every_command_stands_in_a_group_of_the_help(self) -> None:
        shown = [name for group in cli._GROUPS.values() for name in group.split()]
        assert sorted(shown) == sorted(cli.cli.commands)

    def test_options_may_stand_before_or_after_the_arguments(self, family: Family) -> None:
        options = ["--json", "--limit", "2", "--catalogue", str(family.catalogue)]
        before = lineage("parents", *options, "legal.safetensors")
        after = lineage("parents", "legal.safetensors", *options)
        assert before.code == 0
        assert before == after

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_completion_prints_a_script_for_the_shell(self, shell: str) -> None:
        done = lineage("completion", shell)
        assert done.code == 0
        assert "_LINEAGE_COMPLETE" in done.out
        assert "lineage" in done.out

    def test_completion_of_another_shell_is_a_usage_error(self) -> None:
        assert lineage("completion", "tcsh").code == cli.USAGE


class TestExitCodes:
    def test_a_model_without_relatives_is_done(self, family: Family) -> None:
        done = lineage("parents", "twin-b.safetensors", "--catalogue", family.catalogue)
        assert done.code == cli.DONE
        assert "No relative of twin-b.safetensors" in done.out
        assert "among 10 models" in done.out

    def test_comparing_strangers_is_done(self, family: Family) -> None:
        done = lineage("compare", family.file("base-a"), family.file("twin-b"), "--json")
        assert done.code == cli.DONE
        assert (done.answer["relation"], done.answer["related"]) == ("unrelated", False)

    @pytest.mark.parametrize(
        "command",
        [
            ["parents", "nothing"],
            ["children", "nothing"],
            ["ancestors", "nothing"],
            ["descendants", "nothing"],
            ["path", "base-a.safetensors", "nothing"],
            ["compare", "base-a.safetensors", "nothing"],
            ["verify", "nothing"],
            ["info", "nothing"],
            ["remove", "nothing"],
            ["import", "nothing"],
        ],
        ids=lambda command: command[0],
    )
    def test_what_is_not_there_cannot_be_done(
        self, command: list[str], family: Family, own_catalogue: Path
    ) -> None:
        done = lineage(*command, "--catalogue", own_catalogue)
        assert done.code == cli.FAILED
        assert done.out == ""
        assert "nothing" in done.err
        assert "Traceback" not in done.err

    @pytest.mark.parametrize("command", ["list", "duplicates", "tree", "check", "parents x"])
    def test_a_catalogue_that_is_not_there_cannot_be_asked(self, command: str) -> None:
        done = lineage(*command.split(), "--catalogue", "nowhere")
        assert done.code == cli.FAILED
        assert "nowhere: there is no catalogue here" in done.err
        assert "lineage add MODEL… --catalogue nowhere" in done.err

    @pytest.mark.parametrize(
        "command",
        [
            ["parents"],
            ["no-such-command"],
            ["list", "--no-such-option"],
            ["list", "--limit", "-1"],
            ["list", "--limit", "many"],
            ["tree", "--format", "pdf"],
            ["verify", "x", "--fail-on", "refuted,refused"],
            ["verify", "x", "--allow", "everything"],
        ],
        ids=" ".join,
    )
    def test_a_wrong_command_is_a_usage_error(self, command: list[str]) -> None:
        done = lineage(*command)
        assert done.code == cli.USAGE
        assert done.out == ""
        schemas.check(lineage(*command, "--json").problem, "problem")

    def test_an_unknown_word_in_fail_on_is_named_with_those_that_are_known(self) -> None:
        done = lineage("verify", "x", "--fail-on", "refuted,refused", "--json")
        assert "refused is none of" in done.problem["detail"]
        assert "same-weights" in done.problem["detail"]

    @pytest.mark.parametrize("form", [[], ["--json"]])
    def test_an_interrupted_command_says_so(
        self, form: list[str], family: Family, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(LineageEngine, "entries", interrupt)
        done = lineage("list", *form, "--catalogue", family.catalogue)
        assert done.code == cli.INTERRUPTED
        assert done.out == ""
        assert cli.STOPPED in (done.problem["detail"] if form else done.err)


class TestErrors:
    @pytest.mark.parametrize(
        "command",
        [["parents", "legal-int"], ["info", "nothing"], ["list", "--catalogue", "gone://x"]],
        ids=" ".join,
    )
    def test_an_error_under_json_is_one_problem_on_stderr(
        self, command: list[str], family: Family
    ) -> None:
        catalogue = [] if "--catalogue" in command else ["--catalogue", str(family.catalogue)]
        done = lineage(*command, "--json", *catalogue)
        schemas.check(done.problem, "problem")
        assert done.code == cli.FAILED
        assert done.out == ""
        assert done.problem["exit_code"] == done.code
        assert len(done.err.splitlines()) == 1

    @pytest.mark.parametrize(
        ("typed", "meant"),
        [
            ("legal-int", "legal-int8.safetensors"),
            ("leagl-int8", "legal-int8.safetensors"),
            ("base-pruned", "base-pruned.safetensors"),
            ("twin_b.safetensors", "twin-b.safetensors"),
        ],
    )
    def test_an_unknown_name_gives_close_names_and_the_next_command(
        self, typed: str, meant: str, family: Family
    ) -> None:
        done = lineage("parents", typed, "--catalogue", family.catalogue)
        assert f"{typed}: not in the catalogue {family.catalogue}" in done.err
        assert meant in done.err.partition("close names:")[2]
        assert "lineage add PATH" in done.err

    def test_a_wrong_option_is_named(self) -> None:
        done = lineage("list", "--limit", "x", "--json")
        assert "--limit" in done.problem["detail"]
        assert done.problem["status"] == 400

    def test_a_catalogue_of_an_unknown_kind_names_the_known_ones(self) -> None:
        done = lineage("list", "--catalogue", "gone://here")
        assert "no catalogue has the scheme 'gone'; give a folder" in done.err

    def test_a_traceback_is_shown_on_demand_only(self, somewhere: Path) -> None:
        quiet = program("list", "--catalogue", "nowhere", cwd=somewhere)
        loud = program("list", "--catalogue", "nowhere", "--debug", cwd=somewhere)
        assert "Traceback" not in quiet.err
        assert "Traceback" in loud.err
        assert quiet.code == loud.code == cli.FAILED


class TestProgram:
    def test_it_works_from_any_folder(self, family: Family, tmp_path: Path) -> None:
        options = ["--json", "--catalogue", str(family.catalogue)]
        done = program("parents", "legal-int8.safetensors", *options, cwd=tmp_path)
        assert done.code == 0
        assert done.err == ""
        assert done.answer == answer_of(
            "parents", "legal-int8.safetensors", "--catalogue", family.catalogue
        )

    def test_a_gate_ends_with_its_code_and_its_report(self, family: Family) -> None:
        files = [str(family.file("legal")), "--parent", str(family.file("twin-b"))]
        done = program("verify", *files, "--json", cwd=family.folder)
        assert done.code == cli.GATE
        assert done.answer["claims"][0]["answer"] == "refuted"

    def test_no_progress_is_drawn_where_nobody_sees_it(
        self, family: Family, somewhere: Path
    ) -> None:
        done = program("add", str(family.folder), cwd=somewhere)
        assert done.code == 0
        assert done.err == ""
        assert (somewhere / "lineage-catalogue").is_dir()
