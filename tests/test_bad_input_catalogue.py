"""Catalogues that are damaged, of another time, or not to be written."""

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

import cli
from command import answer_of, lineage, program, without_privileges
from conftest import Family
from index.opening import FILE
from index.sqlite import SqliteCatalogue
from refusals import error_of

pytestmark = pytest.mark.usefixtures("somewhere")

QUESTIONS = (
    ["list"],
    ["parents", "chat.safetensors"],
    ["children", "chat.safetensors"],
    ["duplicates"],
    ["tree"],
    ["ancestors", "chat.safetensors"],
    ["compare", "chat.safetensors", "legal.safetensors"],
    ["verify", "chat.safetensors", "--parent", "base-a.safetensors"],
)


def spoil(catalogue: Path, how: str) -> None:
    content = (catalogue / FILE).read_bytes()
    if how == "text":
        content = b"This was a catalogue once. " * 500
    elif how == "cut":
        content = content[: len(content) // 3]
    else:  # a page of a table, in the middle
        middle = len(content) // 2 // 4096 * 4096
        content = content[:middle] + b"\xff" * 8192 + content[middle + 8192 :]
    (catalogue / FILE).write_bytes(content)


class TestDamaged:
    @pytest.mark.parametrize("how", ["text", "cut"])
    def test_every_question_says_that_it_is_damaged_and_what_to_do(
        self, how: str, family: Family, own_catalogue: Path
    ) -> None:
        spoil(own_catalogue, how)
        content = (own_catalogue / FILE).read_bytes()
        for question in (*QUESTIONS, ["check"], ["add", str(family.file("chat"))]):
            done = lineage(*question, "--catalogue", own_catalogue)
            assert done.code == cli.FAILED, question
            assert done.out == ""
            assert str(own_catalogue) in done.err
            assert "it is damaged" in done.err
            assert "nothing was changed" in done.err
            assert "import an export of it, or add the models to a new catalogue" in done.err
        assert (own_catalogue / FILE).read_bytes() == content

    def test_a_damaged_page_is_found_and_nothing_breaks(
        self, family: Family, own_catalogue: Path
    ) -> None:
        spoil(own_catalogue, "page")
        checked = lineage("check", "--catalogue", own_catalogue)
        assert checked.code in (cli.UNDECIDED, cli.FAILED)
        assert "damaged" in checked.out + checked.err
        for question in QUESTIONS:
            done = lineage(*question, "--catalogue", own_catalogue)
            assert done.code in (cli.DONE, cli.FAILED, cli.UNDECIDED)

    def test_one_damaged_record_names_itself_and_the_cure(
        self, family: Family, own_catalogue: Path
    ) -> None:
        with sqlite3.connect(own_catalogue / FILE) as database:
            database.execute(
                "UPDATE models SET fingerprint = x'00' WHERE name = 'chat.safetensors'"
            )
        database.close()
        done = lineage("parents", "chat-fp16.safetensors", "--catalogue", own_catalogue)
        assert done.code == cli.FAILED
        assert "lineage remove chat.safetensors, then lineage add its file" in done.err
        lineage("remove", "chat.safetensors", "--catalogue", own_catalogue)
        lineage("add", family.file("chat"), "--catalogue", own_catalogue)
        assert lineage("check", "--catalogue", own_catalogue).code == cli.DONE

    def test_a_vector_of_the_wrong_length_names_its_model(self, own_catalogue: Path) -> None:
        with sqlite3.connect(own_catalogue / FILE) as database:
            database.execute("UPDATE models SET vector = x'0000' WHERE name = 'chat.safetensors'")
        database.close()
        message = error_of("parents", "legal.safetensors", "--catalogue", own_catalogue)
        assert "chat.safetensors: its vector is damaged" in message
        assert "lineage remove chat.safetensors, then lineage add its file" in message
        (problem,) = lineage("check", "-q", "--catalogue", own_catalogue).lines
        assert "chat.safetensors" in problem

    def test_an_empty_file_in_its_place_is_filled_as_a_new_catalogue(
        self, family: Family, somewhere: Path
    ) -> None:
        # A process that was killed as it began leaves this.
        (somewhere / "c").mkdir()
        (somewhere / "c" / FILE).touch()
        assert answer_of("list", "--catalogue", "c")["models"] == []
        assert lineage("add", family.file("chat"), "--catalogue", "c").code == cli.DONE


def made_older(catalogue: Path, schema: int, *without: str) -> None:
    """Bring a catalogue back to an earlier schema, which lacks some tables."""
    with sqlite3.connect(catalogue / FILE) as database:
        for table in without:
            database.execute(f"DROP TABLE {table}")
        database.execute(f"PRAGMA user_version = {schema}")
    database.close()


class TestOtherVersions:
    def test_a_catalogue_of_another_schema_is_not_touched(
        self, family: Family, own_catalogue: Path
    ) -> None:
        with sqlite3.connect(own_catalogue / FILE) as database:
            database.execute("PRAGMA user_version = 7")
        database.close()
        content = (own_catalogue / FILE).read_bytes()
        for command in (*QUESTIONS, ["add", str(family.file("chat"))], ["check"], ["export", "x"]):
            done = lineage(*command, "--catalogue", own_catalogue)
            assert done.code == cli.FAILED, command
            assert "schema 7, here 3" in done.err
            assert "nothing was changed; add the models to a new catalogue" in done.err
        assert (own_catalogue / FILE).read_bytes() == content

    def test_a_catalogue_from_before_identity_codes_is_read_and_goes_on(
        self, family: Family, own_catalogue: Path
    ) -> None:
        made_older(own_catalogue, 1, "units", "codes")
        before = answer_of("parents", "legal-int8.safetensors", "--catalogue", own_catalogue)[
            "parents"
        ]
        assert before
        done = lineage("add", family.file("chat"), "--name", "again", "--catalogue", own_catalogue)
        assert done.code == cli.DONE
        assert lineage("check", "--catalogue", own_catalogue).code == cli.DONE
        with SqliteCatalogue(str(own_catalogue)) as catalogue:
            assert catalogue.code(catalogue.get("again").id) is not None

    def test_codes_from_before_units_are_told_and_made_anew(
        self, family: Family, own_catalogue: Path
    ) -> None:
        made_older(own_catalogue, 2, "units")
        limits = answer_of("parents", "chat.safetensors", "--catalogue", own_catalogue)["limits"]
        assert any("have an identity code of another encoder" in limit for limit in limits)
        assert lineage("add", family.folder, "--catalogue", own_catalogue).code == cli.DONE
        assert lineage("check", "--catalogue", own_catalogue).code == cli.DONE
        with SqliteCatalogue(str(own_catalogue)) as catalogue:
            assert catalogue.units([catalogue.get("chat.safetensors").id])

    def test_models_of_another_method_are_read_again_by_the_next_add(
        self, family: Family, own_catalogue: Path
    ) -> None:
        with sqlite3.connect(own_catalogue / FILE) as database:
            database.execute("UPDATE models SET method = 99 WHERE name LIKE 'chat%'")
        database.close()
        answer = answer_of("add", family.folder, "--catalogue", own_catalogue)
        assert sorted(answer["added"]) == ["chat-fp16.safetensors", "chat.safetensors"]
        assert lineage("check", "--catalogue", own_catalogue).code == cli.DONE


class TestReadOnly:
    @pytest.fixture(params=["folder", "file"])
    def closed(self, request: pytest.FixtureRequest, own_catalogue: Path) -> Iterator[Path]:
        """Return a catalogue in a folder, or a file, that may be read and not written."""
        (own_catalogue / FILE).chmod(0o444)
        if request.param == "folder":
            own_catalogue.chmod(0o555)
        yield own_catalogue
        own_catalogue.chmod(0o755)

    def test_questions_are_answered_all_the_same(self, closed: Path, family: Family) -> None:
        options = ("--json", "--catalogue", str(closed))
        content = (closed / FILE).read_bytes()
        for question in (["list"], ["parents", "legal-int8.safetensors"]):
            done = program(*question, *options, before=without_privileges)
            assert done.code == cli.DONE, done.err
            known = answer_of(*question, "--catalogue", family.catalogue)
            assert {**done.answer, "catalogue": ""} == {**known, "catalogue": ""}
        assert (closed / FILE).read_bytes() == content

    def test_a_change_is_refused_and_says_what_to_do(self, closed: Path, family: Family) -> None:
        before = answer_of("list", "--catalogue", closed)
        new = shutil.copy(family.file("chat"), Path.cwd() / "new.safetensors")
        for command in (["add", str(new)], ["remove", "chat.safetensors"]):
            options = ("--catalogue", str(closed))
            done = program(*command, *options, before=without_privileges)
            assert (done.code, done.out) == (cli.FAILED, "")
            assert str(closed) in done.err
            assert "nothing was changed; name a folder that you may write to" in done.err
        assert answer_of("list", "--catalogue", closed) == before

    def test_a_catalogue_that_may_not_be_read_is_an_error(self, own_catalogue: Path) -> None:
        (own_catalogue / FILE).chmod(0)
        done = program("list", "--catalogue", str(own_catalogue), before=without_privileges)
        assert (done.code, done.out) == (cli.FAILED, "")
        assert str(own_catalogue) in done.err
        assert "name a folder that you may read" in done.err

    def test_a_folder_that_may_not_be_made_is_an_error(
        self, family: Family, somewhere: Path
    ) -> None:
        closed = somewhere / "closed"
        closed.mkdir(mode=0o555)
        options = ("--catalogue", str(closed / "new"))
        done = program("add", str(family.file("chat")), *options, before=without_privileges)
        assert (done.code, done.out) == (cli.FAILED, "")
        assert "Permission denied; nothing was changed" in done.err
        assert list(closed.iterdir()) == []

    def test_a_file_where_the_catalogue_should_be_is_an_error(
        self, family: Family, somewhere: Path
    ) -> None:
        (somewhere / "file").write_text("mine")
        done = lineage("add", family.file("chat"), "--catalogue", "file")
        assert done.code == cli.FAILED
        assert done.err.startswith("Error: file: ")
        assert (somewhere / "file").read_text() == "mine"
