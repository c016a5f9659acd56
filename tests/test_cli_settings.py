"""Where settings come from, `doctor`, `info`, and the demonstration."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

import cli
import schemas
from command import answer_of, lineage
from conftest import Family
from lineage.demo import MADE

pytestmark = pytest.mark.usefixtures("somewhere")


class TestCatalogue:
    """Flags beat the environment, which beats lineage.toml, which beats pyproject.toml."""

    SOURCES = ("default", "pyproject.toml", "lineage.toml", "LINEAGE_CATALOGUE", "--catalogue")

    @pytest.mark.parametrize("strongest", range(len(SOURCES)))
    def test_the_strongest_source_wins_and_doctor_names_it(
        self, strongest: int, somewhere: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flag: list[str] = []
        if strongest >= 1:
            text = '[tool.lineage]\ncatalogue = "from-1"\n'
            (somewhere / "pyproject.toml").write_text(text)
        if strongest >= 2:
            (somewhere / "lineage.toml").write_text('catalogue = "from-2"\n')
        if strongest >= 3:
            monkeypatch.setenv("LINEAGE_CATALOGUE", "from-3")
        if strongest >= 4:
            flag = ["--catalogue", "from-4"]
        expected = f"from-{strongest}" if strongest else "lineage-catalogue"
        answer = answer_of("doctor", *flag)
        (note,) = [f["note"] for f in answer["findings"] if f["what"] == "setting catalogue"]
        assert answer["catalogue"] == expected
        assert note.startswith(f"{expected} (")
        assert self.SOURCES[strongest] in note
        assert f"{expected}: there is no catalogue here" in lineage("list", *flag).err

    def test_models_go_where_the_settings_say(self, family: Family, somewhere: Path) -> None:
        (somewhere / "lineage.toml").write_text('catalogue = "kept/here"\n')
        lineage("add", family.file("chat"))
        assert (somewhere / "kept" / "here" / "catalogue.sqlite").is_file()

    @pytest.mark.parametrize(
        ("text", "problem"),
        [("catalogue = ", "not TOML"), ('katalogue = "x"', "unknown setting 'katalogue'")],
    )
    def test_a_wrong_settings_file_is_named(self, text: str, problem: str, somewhere: Path) -> None:
        (somewhere / "lineage.toml").write_text(text)
        done = lineage("list")
        assert done.code == cli.FAILED
        assert "lineage.toml" in done.err
        assert problem in done.err

    @pytest.mark.parametrize("text", ["not toml at all", "tool = 3", "[tool]\nlineage = 3"])
    def test_the_pyproject_file_of_another_project_does_no_harm(
        self, text: str, somewhere: Path
    ) -> None:
        (somewhere / "pyproject.toml").write_text(text)
        assert answer_of("doctor")["catalogue"] == "lineage-catalogue"


class TestDoctor:
    def test_it_names_formats_packages_and_their_state(self) -> None:
        found = {f["what"]: f for f in answer_of("doctor")["findings"]}
        for name in ("model-lineage", "import names", "SQLite", "vector search", "numpy"):
            assert found[name]["state"] == "ok"
        assert {"format safetensors", "format gguf", "format onnx"} <= set(found)
        assert {f["state"] for f in found.values()} <= {"ok", "missing", "clash"}

    def test_people_see_all_of_it(self) -> None:
        table = lineage("doctor").out
        assert "format zip" in table
        assert "more row" not in table


def gguf_file(path: Path) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_name("a model")
    for place in range(2):
        values = np.random.default_rng(place).normal(size=(32, 64)).astype(np.float32)
        writer.add_tensor(f"blk.{place}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TestInfo:
    def test_it_counts_what_the_header_says(self, family: Family) -> None:
        file = family.file("base-a")
        answer = answer_of("info", file)
        assert answer["format"] == "safetensors"
        assert answer["bytes"] == file.stat().st_size
        assert answer["tensors"] == 6
        assert answer["parameters"] == 64 * 96 + 96 + 96 * 96 + 96 + 96 * 10 + 10
        assert answer["dtypes"] == {"F32": 6}
        assert answer["limits"] == []

    def test_it_needs_no_catalogue_and_makes_none(self, family: Family, somewhere: Path) -> None:
        lineage("info", family.file("base-a"))
        assert list(somewhere.iterdir()) == []

    def test_quiet_prints_the_model(self, family: Family) -> None:
        assert lineage("info", family.file("chat"), "-q").lines == [str(family.file("chat"))]

    def test_a_truncated_gguf_file_is_told_from_its_header(self, tmp_path: Path) -> None:
        whole = gguf_file(tmp_path / "m.gguf")
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole.read_bytes()[:-4000])
        done = lineage("info", cut, "--json")
        schemas.check(done.answer, "info")
        assert done.code == cli.UNDECIDED
        assert done.answer["format"] == "gguf"
        assert done.answer["declared"]["metadata"]["general.name"] == "a model"
        assert any("2 tensors, 4,096 values" in limit for limit in done.answer["limits"])
        assert any("TRUNCATED" in limit for limit in done.answer["limits"])
        assert "TRUNCATED" in lineage("info", cut).out

    def test_a_truncated_safetensors_file_is_told_from_its_header(
        self, family: Family, tmp_path: Path
    ) -> None:
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(family.file("base-a").read_bytes()[:-4000])
        done = lineage("info", cut, "--json")
        assert done.code == cli.UNDECIDED
        assert any("TRUNCATED" in limit for limit in done.answer["limits"])

    def test_a_file_cut_in_its_header_is_an_error(self, family: Family, tmp_path: Path) -> None:
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(family.file("base-a").read_bytes()[:100])
        done = lineage("info", cut)
        assert (done.code, done.out) == (cli.FAILED, "")
        assert "TRUNCATED: the header promises" in done.err
        assert "get the file again" in done.err


class TestDemo:
    def test_it_makes_indexes_and_draws_a_family_with_every_relation_right(
        self, somewhere: Path
    ) -> None:
        done = lineage("demo")
        assert done.code == 0
        assert "Made 11 small models in lineage-demo" in done.out
        assert "9 of 9 relations right, 0 strangers called kin" in done.out
        assert "twin-b.safetensors   no relative found" in done.out
        folder = somewhere / "lineage-demo"
        assert {file.name for file in folder.iterdir()} == MADE
        # Its next commands work as they stand.
        commands = [line.partition("lineage ")[2] for line in done.lines if " lineage " in line]
        assert len(commands) == 2
        for command in commands:
            assert lineage(*command.split()).code == 0
        again = lineage("demo")
        assert again.code == 0
        assert {file.name for file in folder.iterdir()} == MADE

    @pytest.mark.parametrize(
        "kept", ["notes.txt", "catalogue/notes.txt", "base-a.safetensors", "sub/x.safetensors"]
    )
    def test_a_folder_with_something_else_in_it_is_left_as_it_is(
        self, kept: str, somewhere: Path
    ) -> None:
        file = somewhere / "mine" / kept
        file.parent.mkdir(parents=True)
        file.write_text("mine")
        done = lineage("demo", "mine")
        assert done.code == cli.FAILED
        assert "mine: holds something else; nothing was changed; name a new folder" in done.err
        assert [f for f in (somewhere / "mine").rglob("*") if f.is_file()] == [file]
        assert file.read_text() == "mine"

    def test_a_file_of_ones_own_beside_an_earlier_demonstration_is_kept(
        self, somewhere: Path
    ) -> None:
        folder = somewhere / "mine"
        (folder / "catalogue").mkdir(parents=True)
        for name in ("legal.safetensors", "my-own.safetensors"):
            (folder / name).write_text("mine")
        assert lineage("demo", "mine").code == cli.FAILED
        assert (folder / "my-own.safetensors").read_text() == "mine"
        assert (folder / "legal.safetensors").read_text() == "mine"

    def test_a_file_in_its_place_is_left_as_it_is(self, somewhere: Path) -> None:
        (somewhere / "file").write_text("mine")
        assert lineage("demo", "file").code == cli.FAILED
        assert (somewhere / "file").read_text() == "mine"
