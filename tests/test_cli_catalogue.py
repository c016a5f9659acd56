"""Commands that fill and keep a catalogue: add, list, remove, check, export, import."""

import os
import shutil
import sqlite3
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import cli
import schemas
from command import answer_of, lineage
from conftest import Family
from index.opening import FILE

pytestmark = pytest.mark.usefixtures("somewhere")


def written(path: Path, seed: int = 0) -> Path:
    """Write a small model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).normal(size=(16, 12)).astype(np.float32)
    save_file({"w": values}, path)
    return path


def names(catalogue: Path | str) -> list[str]:
    return lineage("list", "-q", "--catalogue", catalogue).lines


class TestAdd:
    def test_a_second_run_reads_nothing_again(self, family: Family) -> None:
        first = answer_of("add", family.folder)
        again = answer_of("add", family.folder)
        assert sorted(first["added"]) == sorted(again["unchanged"]) == family.names
        assert first["unchanged"] == again["added"] == first["failed"] == again["failed"] == []

    def test_a_changed_file_is_read_again_and_takes_its_own_place(self, tmp_path: Path) -> None:
        files = [written(tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate("ab")]
        lineage("add", tmp_path)
        before = {m["name"]: m["sha256"] for m in answer_of("list")["models"]}
        written(files[0], seed=9)
        answer = answer_of("add", tmp_path)
        after = {m["name"]: m["sha256"] for m in answer_of("list")["models"]}
        assert (answer["added"], answer["unchanged"]) == (["a.safetensors"], ["b.safetensors"])
        assert after["a.safetensors"] != before["a.safetensors"]
        assert after["b.safetensors"] == before["b.safetensors"]

    def test_another_spelling_of_a_path_is_the_same_model(
        self, somewhere: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written(somewhere / "m.safetensors")
        (somewhere / "sub").mkdir()
        assert answer_of("add", "m.safetensors", "--catalogue", "c")["added"] == ["m.safetensors"]
        monkeypatch.chdir(somewhere / "sub")
        for spelling in ("../m.safetensors", "../sub/../m.safetensors", somewhere):
            answer = answer_of("add", spelling, "--catalogue", "../c")
            assert (answer["added"], answer["unchanged"]) == ([], ["m.safetensors"])

    def test_a_path_given_twice_is_read_once(self, somewhere: Path) -> None:
        written(somewhere / "m" / "a.safetensors")
        answer = answer_of("add", "m", "m/a.safetensors", "m/../m")
        assert answer["added"] == ["a.safetensors"]
        assert names("lineage-catalogue") == ["a.safetensors"]

    def test_models_of_one_name_in_two_folders_keep_apart(self, somewhere: Path) -> None:
        for seed, place in enumerate(("one", "two")):
            written(somewhere / place / "model.safetensors", seed)
        answer = answer_of("add", "one", "two")
        assert answer["added"] == ["model.safetensors", "two/model.safetensors"]
        assert answer_of("add", "one", "two")["unchanged"] == answer["added"]

    def test_names_are_paths_below_the_given_folder(self, somewhere: Path) -> None:
        written(somewhere / "zoo" / "a" / "b" / "m.safetensors")
        assert answer_of("add", "zoo")["added"] == ["a/b/m.safetensors"]

    def test_the_folder_that_one_stands_in_has_a_name(
        self, somewhere: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written(somewhere / "my-model" / "model.safetensors")
        (somewhere / "my-model" / "config.json").write_text('{"model_type": "x"}')
        monkeypatch.chdir(somewhere / "my-model")
        assert answer_of("add", ".", "--catalogue", "../c")["added"] == ["my-model"]

    def test_a_chosen_name_is_used_and_may_be_used_again_for_the_same_model(
        self, somewhere: Path
    ) -> None:
        written(somewhere / "m.safetensors")
        for _ in range(2):
            assert answer_of("add", "m.safetensors", "--name", "org/model")["added"] == [
                "org/model"
            ]
        assert names("lineage-catalogue") == ["org/model"]

    def test_a_dry_run_says_what_would_be_read_and_reads_and_writes_nothing(
        self, family: Family, somewhere: Path
    ) -> None:
        before = {file: file.stat().st_atime_ns for file in family.folder.iterdir()}
        answer = answer_of("add", family.folder, "--dry-run")
        schemas.check(answer, "plan")
        assert sorted(model["name"] for model in answer["models"]) == family.names
        assert answer["bytes"] == sum(file.stat().st_size for file in family.folder.iterdir())
        assert answer["seconds"] >= 0
        assert {model["format"] for model in answer["models"]} == {"safetensors", "npz"}
        assert list(somewhere.iterdir()) == []
        assert set(before) == set(family.folder.iterdir())
        table = lineage("add", family.folder, "--dry-run").out
        assert "Would read 11 of 11 models" in table
        assert "Nothing was read." in table

    def test_a_dry_run_knows_what_has_not_changed(
        self, family: Family, own_catalogue: Path, tmp_path: Path
    ) -> None:
        new = written(tmp_path / "new.safetensors")
        content = (own_catalogue / FILE).read_bytes()
        options = ("--dry-run", "--catalogue", own_catalogue)
        answer = answer_of("add", family.folder, new, *options)
        assert [model["name"] for model in answer["models"]] == ["new.safetensors"]
        assert sorted(answer["unchanged"]) == family.names
        assert (own_catalogue / FILE).read_bytes() == content

    def test_a_member_of_an_archive_is_known_by_name_wherever_one_stands(
        self, somewhere: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = [written(somewhere / f"{name}.safetensors", seed) for seed, name in enumerate("ab")]
        with zipfile.ZipFile("two.zip", "w") as archive:
            for file in files:
                archive.write(file, file.name)
        member = "two.zip!b.safetensors"
        assert answer_of("add", member, "b.safetensors")["added"] == [member, "b.safetensors"]
        assert answer_of("add", member)["unchanged"] == [member]
        (somewhere / "sub").mkdir()
        monkeypatch.chdir(somewhere / "sub")
        for given in (member, f"../{member}"):
            answer = answer_of("parents", given, "--catalogue", "../lineage-catalogue")
            assert answer["model"] == member
            assert [found["relation"] for found in answer["parents"]] == ["same-tensors"]

    def test_many_models_are_read_by_several_processes_with_the_same_outcome(
        self, family: Family, tmp_path: Path
    ) -> None:
        for stem in ("x", "y"):
            shutil.copytree(family.folder, tmp_path / "many" / stem)
        answers = [
            answer_of("add", tmp_path / "many", "--jobs", jobs, "--catalogue", f"c{jobs}")
            for jobs in ("1", "2")
        ]
        assert sorted(answers[0]["added"]) == sorted(answers[1]["added"])
        alone, together = (answer_of("list", "--catalogue", f"c{jobs}") for jobs in "12")
        for model in (*alone["models"], *together["models"]):
            del model["added_at"]
        assert alone["models"] == together["models"]


class TestList:
    def test_it_tells_what_each_model_is(self, family: Family) -> None:
        models = answer_of("list", "--catalogue", family.catalogue)["models"]
        assert [model["name"] for model in models] == family.names
        for model in models:
            file = family.folder / model["name"]
            assert model["bytes"] == file.stat().st_size
            assert model["location"] == str(file)
            assert len(model["sha256"]) == 64

    def test_a_pattern_chooses(self, family: Family) -> None:
        done = lineage("list", "*.npz", "-q", "--catalogue", family.catalogue)
        assert done.lines == ["base-copy.npz"]


class TestRemove:
    def test_a_removed_model_is_forgotten_and_its_file_stays(
        self, family: Family, own_catalogue: Path
    ) -> None:
        done = lineage("remove", "chat.safetensors", "--catalogue", own_catalogue)
        assert done.code == cli.DONE
        assert "The files stay." in done.out
        assert "chat.safetensors" not in names(own_catalogue)
        assert family.file("chat").is_file()

    def test_all_are_removed_or_none(self, own_catalogue: Path) -> None:
        before = names(own_catalogue)
        done = lineage(
            "remove", "chat.safetensors", "cat.safetensors", "--catalogue", own_catalogue
        )
        assert done.code == cli.FAILED
        assert "cat.safetensors: not in the catalogue" in done.err
        assert names(own_catalogue) == before


class TestCheck:
    def test_a_whole_catalogue_has_no_problems(self, family: Family) -> None:
        done = lineage("check", "--catalogue", family.catalogue)
        assert (done.code, done.out) == (0, "11 models, 0 problems.\n")
        answer = answer_of("check", "--catalogue", family.catalogue)
        assert (answer["models"], answer["problems"]) == (11, [])

    def test_a_damaged_record_and_one_of_another_method_are_named(
        self, own_catalogue: Path
    ) -> None:
        with sqlite3.connect(own_catalogue / FILE) as database:
            database.execute(
                "UPDATE models SET fingerprint = x'00' WHERE name = 'chat.safetensors'"
            )
            database.execute("UPDATE models SET method = 99 WHERE name = 'legal.safetensors'")
        database.close()
        done = lineage("check", "-q", "--catalogue", own_catalogue)
        assert done.code == cli.UNDECIDED
        assert [line for line in done.lines if "chat.safetensors" in line]
        assert [line for line in done.lines if "legal.safetensors" in line and "method 99" in line]
        assert len(done.lines) == 2


class TestTransfer:
    def test_an_export_is_imported_with_everything(
        self, family: Family, own_catalogue: Path, somewhere: Path
    ) -> None:
        lineage("parents", "legal-int8.safetensors", "--catalogue", own_catalogue)
        sent = lineage("export", "all.lineage", "--catalogue", own_catalogue)
        assert sent.code == cli.DONE
        assert sent.lines[-1].split() == ["all.lineage", "11"]
        got = answer_of("import", "all.lineage", "--catalogue", "new")
        assert (len(got["added"]), got["unchanged"]) == (11, [])
        assert (
            answer_of("list", "--catalogue", "new")["models"]
            == answer_of("list", "--catalogue", family.catalogue)["models"]
        )
        for command in ("parents legal-int8.safetensors", "duplicates"):
            found, known = (
                answer_of(*command.split(), "--catalogue", place)
                for place in ("new", family.catalogue)
            )
            assert {**found, "catalogue": ""} == {**known, "catalogue": ""}
        assert [file.name for file in somewhere.glob("*.part*")] == []

    def test_a_second_import_adds_nothing_and_changes_nothing(self, own_catalogue: Path) -> None:
        lineage("export", "all.lineage", "--catalogue", own_catalogue)
        before = answer_of("list", "--catalogue", own_catalogue)
        again = answer_of("import", "all.lineage", "--catalogue", own_catalogue)
        assert (again["added"], len(again["unchanged"])) == ([], 11)
        assert answer_of("list", "--catalogue", own_catalogue) == before

    def test_an_export_without_paths_names_no_folder_of_this_machine(
        self, family: Family, somewhere: Path
    ) -> None:
        options = ("--redact-paths", "--catalogue", family.catalogue)
        assert lineage("export", "all.lineage", *options).code == 0
        content = Path("all.lineage").read_bytes()
        assert os.fsencode(family.folder) not in content
        assert os.fsencode(family.folder.parent) not in content
        lineage("import", "all.lineage", "--catalogue", "new")
        assert {m["location"] for m in answer_of("list", "--catalogue", "new")["models"]} == {""}
        # Without the weights the fingerprints still answer.
        parents = answer_of("parents", "legal-int8.safetensors", "--catalogue", "new")["parents"]
        assert parents[0]["model"] == "legal.safetensors"

    def test_a_file_that_is_there_is_never_overwritten(
        self, family: Family, somewhere: Path
    ) -> None:
        (somewhere / "mine").write_text("mine")
        done = lineage("export", "mine", "--catalogue", family.catalogue)
        assert done.code == cli.FAILED
        assert "mine: is there already; nothing was written; choose another name" in done.err
        assert (somewhere / "mine").read_text() == "mine"

    def test_an_export_to_a_folder_that_is_not_there_names_the_file(self, family: Family) -> None:
        done = lineage("export", "no/such/file", "--catalogue", family.catalogue)
        assert done.code == cli.FAILED
        assert "no/such/file" in done.err
        assert "nothing was written" in done.err

    @pytest.mark.parametrize("content", [b"", b"text", b"SQLite format 3\0" + bytes(2000)])
    def test_a_file_that_is_no_export_adds_nothing(self, content: bytes, somewhere: Path) -> None:
        (somewhere / "x").write_bytes(content)
        done = lineage("import", "x", "--catalogue", "new")
        assert done.code == cli.FAILED
        assert "x: not an exported catalogue" in done.err
        assert names("new") == []

    def test_a_damaged_record_of_an_export_is_named_with_the_file(
        self, own_catalogue: Path
    ) -> None:
        lineage("export", "x", "--catalogue", own_catalogue)
        with sqlite3.connect("x") as database:
            database.execute("UPDATE models SET fingerprint = x'00' WHERE name LIKE 'legal-v2%'")
        database.close()
        done = lineage("import", "x", "--catalogue", "new")
        assert done.code == cli.FAILED
        assert done.err.startswith("Error: x: legal-v2.safetensors:")
