"""Files that are broken, empty, odd or closed: what is said of them, and that the rest goes on."""

import json
import os
import resource
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import cli
from command import answer_of, lineage, program, without_privileges
from conftest import Family
from refusals import assert_no_traceback, assert_refused, assert_says, error_of

pytestmark = pytest.mark.usefixtures("somewhere")

HUGE = 1_000_000_000  # squared it is 10^18
MEMORY = 2 << 30


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Write a model that nothing is wrong with."""
    path = tmp_path / "good.safetensors"
    save_file({"w": normal(0, 40, 30), "v": normal(1, 20, 40)}, path)
    return path


def write_safetensors(path: Path, header: dict[str, Any] | bytes, content: bytes) -> Path:
    """Write a file of which any part may be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
    return path


def stored(shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


class TestBroken:
    def test_a_truncated_file(self, good: Path, tmp_path: Path) -> None:
        cut = tmp_path / "cut.gguf"
        writer = GGUFWriter(cut, "llama")
        writer.add_tensor("w", normal(0, 32, 64))
        writer.add_tensor("v", normal(1, 32, 64))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        cut.write_bytes(cut.read_bytes()[:-100])
        done = lineage("add", cut, "--json")
        assert done.code == cli.FAILED
        assert_says(done.answer["failed"][0]["reason"], cut, ("TRUNCATED", "get the file again"))
        # What is there is worth a look.
        assert lineage("info", cut).code == cli.UNDECIDED
        assert_says(error_of("compare", cut, good), cut, ("TRUNCATED",))

    def test_a_file_of_which_only_the_header_came_is_told_from_it(self, tmp_path: Path) -> None:
        cut = tmp_path / "cut.gguf"
        writer = GGUFWriter(cut, "llama")
        writer.add_tensor("w", normal(0, 32, 64))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        cut.write_bytes(cut.read_bytes()[:-100])
        done = lineage("info", cut)
        assert "TRUNCATED" in done.out + done.err

    def test_a_file_cut_within_its_header(self, good: Path, tmp_path: Path) -> None:
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(good.read_bytes()[:60])
        assert_refused(cut, "TRUNCATED", "get the file again", good=good)

    def test_a_header_that_promises_more_than_the_file_has(
        self, good: Path, tmp_path: Path
    ) -> None:
        header = {"w": stored([40, 30], 0, 4800)}
        path = write_safetensors(tmp_path / "short.safetensors", header, bytes(2000))
        assert_refused(path, "TRUNCATED", "promises 4,800 bytes", "has 2,000", good=good)

    def test_overlapping_tensors(self, good: Path, tmp_path: Path) -> None:
        header = {"w": stored([8, 8], 0, 256), "v": stored([8, 8], 128, 384)}
        path = write_safetensors(tmp_path / "overlap.safetensors", header, bytes(384))
        assert_refused(path, "'v'", "128", "256", good=good)

    def test_a_missing_shard_is_named_and_the_rest_is_read_on_demand(
        self, good: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "sharded"
        folder.mkdir()
        files = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
        for place, name in enumerate(files):
            save_file({f"w{place}": normal(place, 20, 30)}, folder / name)
        index = {"metadata": {}, "weight_map": {f"w{n}": name for n, name in enumerate(files)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / files[1]).unlink()
        done = lineage("add", folder, good, "--json")
        assert done.code == cli.UNDECIDED
        assert done.answer["added"] == [good.name]
        reason = done.answer["failed"][0]["reason"]
        assert_says(reason, folder, ("1 of 3 shards are missing", files[1], "--allow-partial"))
        seen = lineage("info", folder, "--json")
        assert seen.code == cli.UNDECIDED
        assert seen.answer["tensors"] == 2
        assert files[1] in " ".join(seen.answer["limits"])
        partial = lineage("add", folder, "--allow-partial", "--json")
        assert partial.answer["added"] == ["sharded"]
        assert files[1] in " ".join(partial.answer["limits"])

    @pytest.mark.parametrize("suffix", ["safetensors", "bin", "gguf", "onnx"])
    def test_an_empty_file(self, suffix: str, good: Path, tmp_path: Path) -> None:
        path = tmp_path / f"empty.{suffix}"
        path.touch()
        assert_refused(path, "the file is empty", "get it again", good=good)

    def test_a_file_without_tensors(self, good: Path, tmp_path: Path) -> None:
        path = tmp_path / "none.safetensors"
        save_file({}, path)
        assert_refused(path, "there is no weight in this safetensors file", good=good)

    def test_a_file_of_nothing_but_empty_tensors(self, good: Path, tmp_path: Path) -> None:
        path = tmp_path / "hollow.safetensors"
        save_file({"w": np.zeros((0, 30), np.float32)}, path)
        assert_refused(path, "there is no weight in this safetensors file", good=good)

    def test_a_file_that_no_reader_knows(self, good: Path, tmp_path: Path) -> None:
        path = tmp_path / "letter.safetensors"
        path.write_text("Dear reader, this is no model.")
        assert_refused(path, "no reader recognises its content", "lineage doctor", good=good)


class TestHugeShapes:
    """Sizes that a header claims are never believed: 10^18 values cost no memory and no time."""

    def write_all(self, folder: Path) -> list[Path]:
        body = bytes(2048)
        shape = [HUGE, HUGE]
        write_safetensors(
            folder / "promised.safetensors", {"w": stored(shape, 0, 4 * HUGE**2)}, body
        )
        write_safetensors(folder / "claimed.safetensors", {"w": stored(shape, 0, 2048)}, body)
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({HUGE}, {HUGE}), }}"
        header = text.encode().ljust(117) + b"\n"
        array = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + body
        (folder / "huge.npy").write_bytes(array)
        with zipfile.ZipFile(folder / "huge.npz", "w") as archive:
            archive.writestr("w.npy", array)
        torch.save({"w": torch.zeros(1).expand(HUGE, HUGE)}, folder / "expanded.pt")
        torch.save({"w": torch.zeros(1).expand(20_000, 20_000)}, folder / "smaller.pt")
        with h5py.File(folder / "chunked.h5", "w") as file:
            file.create_dataset("w", shape=(HUGE, HUGE), chunks=(1000, 1000), dtype="f4")
        name = struct.pack("<Q", 1) + b"w"
        tensor = name + struct.pack("<I2Q", 2, *shape) + struct.pack("<IQ", 0, 0)
        start = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor
        (folder / "huge.gguf").write_bytes(start + bytes(-len(start) % 32) + body)
        return sorted(folder.iterdir())

    def test_they_are_refused_within_little_memory(self, tmp_path: Path) -> None:
        folder = tmp_path / "huge"
        folder.mkdir()
        files = self.write_all(folder)

        def little_memory() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

        done = program("add", str(folder), "--jobs", "1", "--json", before=little_memory)
        assert_no_traceback(done)
        assert done.code == cli.FAILED
        assert done.err == ""
        assert done.answer["added"] == []
        reasons = {failed["model"]: failed["reason"] for failed in done.answer["failed"]}
        assert sorted(reasons) == [file.name for file in files]
        assert not [reason for reason in reasons.values() if "MemoryError" in reason]
        for name, reason in reasons.items():
            assert_says(reason, Path(name), ())
            assert any(
                word in reason
                for word in ("bytes", "a shape that no array can have", "beyond all measure")
            ), reason


class TestNotFinite:
    @pytest.fixture
    def spoiled(self, family: Family, tmp_path: Path) -> Path:
        """Write a child of base-a in which one tensor has NaN and infinity."""
        weights = load_file(family.file("legal"))
        weights["head.weight"][[3, 4, 5], 3] = np.nan, np.inf, -np.inf
        path = tmp_path / "spoiled.safetensors"
        save_file(weights, path)
        return path

    def test_the_model_is_added_and_the_tensor_is_named(self, spoiled: Path) -> None:
        done = program("add", str(spoiled), "--json")
        assert done.code in (cli.DONE, cli.UNDECIDED)
        assert done.answer["added"] == [spoiled.name]
        limit = f"{spoiled.name}: head.weight: 3 of 960 values are NaN or infinite; not counted"
        assert done.answer["limits"] == [limit]
        table = program("add", str(spoiled), "--catalogue", "other")
        assert limit in " ".join(table.out.split())

    def test_nothing_else_is_said_of_it(self, spoiled: Path) -> None:
        assert program("add", str(spoiled)).err == ""

    def test_it_is_still_compared_with_its_parent(self, spoiled: Path, family: Family) -> None:
        parent = family.file("base-a")
        done = program("compare", str(parent), str(spoiled), "--json")
        assert done.code == cli.DONE
        answer = done.answer
        assert (answer["relation"], answer["related"]) == ("fine-tune", True)
        assert [pair["a"] for pair in answer["tensors"]] == ["body.0.weight", "body.1.weight"]
        assert "head.weight" in [tensor["name"] for tensor in answer["not_counted"]["b"]]
        assert any("NaN or infinite" in limit for limit in answer["limits"])
        options = ("--json", "--catalogue", str(family.catalogue))
        parents = program("parents", str(spoiled), *options).answer["parents"]
        assert "base-a.safetensors" in [found["model"] for found in parents]

    def test_info_reads_no_values_and_so_no_harm(self, spoiled: Path, family: Family) -> None:
        whole = answer_of("info", family.file("legal"))
        assert answer_of("info", spoiled)["parameters"] == whole["parameters"]


class TestNames:
    def test_tensor_names_that_are_no_text(self, good: Path, tmp_path: Path) -> None:
        header = b'{"caf\xe9":{"dtype":"F32","shape":[20,40],"data_offsets":[0,3200]}}'
        path = write_safetensors(tmp_path / "odd.safetensors", header, normal(1, 20, 40).tobytes())
        assert answer_of("info", path)["parameters"] == 800
        answer = answer_of("compare", path, good)
        assert answer["relation"] == "part-of"
        assert answer["tensors"][0]["a"] == "caf�"
        assert "caf�" in lineage("compare", path, good).out
        assert answer_of("add", path, good)["added"] == [path.name, good.name]
        catalogued = answer_of("compare", path.name, good.name)
        assert catalogued["relation"] == "part-of"

    def test_tensor_names_that_json_writes_and_utf_8_cannot(
        self, good: Path, tmp_path: Path
    ) -> None:
        header = b'{"a\\ud800":{"dtype":"F32","shape":[20,40],"data_offsets":[0,3200]}}'
        path = write_safetensors(tmp_path / "odd.safetensors", header, normal(1, 20, 40).tobytes())
        answer = answer_of("add", path, good)
        assert answer["added"] == [path.name, good.name]

    def test_file_names_that_are_no_text(self, good: Path, tmp_path: Path) -> None:
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.safetensors"))
        shutil.copy(good, path)
        assert answer_of("info", path)["model"].endswith("/caf�.safetensors")
        assert answer_of("compare", path, good)["relation"] == "identical-file"
        assert answer_of("add", path, good)["added"] == ["caf�.safetensors", good.name]
        assert answer_of("add", path, good)["added"] == []
        assert lineage("list", "-q").lines == ["caf�.safetensors", good.name]
        # Its weights are found again, under its name and under its path.
        for given in ("caf�.safetensors", path):
            answer = answer_of("compare", given, good.name)
            assert answer["a"] == "caf�.safetensors"
            assert answer["tensors"][0]["exact"] is True
        done = program("list", "--json")
        assert [model["name"] for model in done.answer["models"]] == [
            "caf�.safetensors",
            good.name,
        ]
        assert lineage("remove", "caf�.safetensors").code == cli.DONE

    def test_a_name_that_is_not_there_and_no_text_is_not_found(self, good: Path) -> None:
        lineage("add", good)
        done = lineage("parents", os.fsdecode(b"caf\xe9"))
        assert done.code == cli.FAILED
        assert "caf�: not in the catalogue" in done.err

    def test_one_name_for_two_models_adds_neither(self, good: Path, tmp_path: Path) -> None:
        other = tmp_path / "other.safetensors"
        save_file({"w": normal(5, 40, 30)}, other)
        message = error_of("add", good, other, "--name", "both")
        assert message.startswith("both: one name for 2 models; nothing was added")
        assert lineage("list", "-q").out == ""

    def test_a_name_that_another_model_has_is_not_taken_from_it(
        self, good: Path, tmp_path: Path
    ) -> None:
        other = tmp_path / "other.safetensors"
        save_file({"w": normal(5, 40, 30)}, other)
        lineage("add", good, "--name", "mine")
        before = answer_of("list")
        message = error_of("add", other, "--name", "mine")
        assert message.startswith(f"mine: another model has this name, from {good}")
        assert "nothing was added" in message
        assert "lineage remove mine" in message
        assert answer_of("list") == before


class TestSeveral:
    @pytest.mark.parametrize("jobs", ["1", "2"])
    def test_three_broken_models_of_44_are_explained_and_41_added(
        self, jobs: str, tmp_path: Path
    ) -> None:
        folder = tmp_path / "zoo"
        folder.mkdir()
        for place in range(44):
            save_file({"w": normal(place, 16, 12)}, folder / f"m{place:02}.safetensors")
        content = (folder / "m05.safetensors").read_bytes()
        (folder / "m05.safetensors").write_bytes(content[:-10])
        (folder / "m20.safetensors").write_bytes(b"")
        (folder / "m43.safetensors").write_bytes(b"\x80\x02not a pickle")
        (folder / "README.md").write_text("No model, and nothing to report.")
        done = lineage("add", folder, "--jobs", jobs, "--json")
        assert done.code == cli.UNDECIDED
        assert len(done.answer["added"]) == 41
        failed = {item["model"]: item["reason"] for item in done.answer["failed"]}
        assert sorted(failed) == [f"m{n}.safetensors" for n in ("05", "20", "43")]
        assert all(name in reason for name, reason in failed.items())
        again = lineage("add", folder, "--jobs", jobs)
        assert again.code == cli.UNDECIDED
        assert "0 models added, 41 models unchanged, 3 models failed." in again.out
        assert lineage("check").code == cli.DONE

    def test_a_path_that_is_not_there_does_not_stop_the_others(self, good: Path) -> None:
        done = lineage("add", "gone.safetensors", good, "--json")
        assert done.code == cli.UNDECIDED
        assert done.answer["added"] == [good.name]
        (failed,) = done.answer["failed"]
        assert failed["reason"] == "gone.safetensors: no such file or folder; check the path"

    @pytest.mark.parametrize("command", ["info", "compare", "parents", "verify"])
    def test_a_folder_of_several_models_is_not_one(
        self, command: str, good: Path, tmp_path: Path
    ) -> None:
        lineage("add", good)
        folder = tmp_path / "several"
        folder.mkdir()
        for name in "ab":
            shutil.copy(good, folder / f"{name}.safetensors")
        more = (good,) if command == "compare" else ()
        message = error_of(command, folder, *more)
        assert_says(message, folder, ("it holds 2: a.safetensors, b.safetensors", "name one"))

    def test_a_folder_without_models_adds_none(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        done = lineage("add", tmp_path / "empty", "--json")
        assert done.answer["added"] == done.answer["failed"] == []
        assert_says(error_of("info", tmp_path / "empty"), tmp_path / "empty", ("holds 0",))


class TestPermissions:
    def test_a_file_that_may_not_be_read(self, good: Path, tmp_path: Path) -> None:
        closed = tmp_path / "closed.safetensors"
        shutil.copy(good, closed)
        closed.chmod(0)
        for command in (["info", str(closed)], ["compare", str(closed), str(good)]):
            done = program(*command, before=without_privileges)
            assert (done.code, done.out) == (cli.FAILED, "")
            assert f"{closed}: may not be read: permission denied" in done.err
        added = program("add", str(tmp_path), "--json", before=without_privileges)
        assert added.code == cli.UNDECIDED
        assert added.answer["added"] == [good.name]
        assert "permission denied" in added.answer["failed"][0]["reason"]

    @pytest.mark.parametrize("mode", [0o000, 0o400])
    def test_a_folder_that_may_not_be_searched_is_named(
        self, mode: int, good: Path, tmp_path: Path
    ) -> None:
        closed = tmp_path / "closed"
        closed.mkdir()
        shutil.copy(good, closed)
        closed.chmod(mode)
        try:
            done = program("add", str(tmp_path), "--json", before=without_privileges)
        finally:
            closed.chmod(0o700)
        assert done.code == cli.UNDECIDED
        assert done.answer["added"] == [good.name]
        (failed,) = done.answer["failed"]
        assert_says(failed["reason"], closed, ("permission denied",))

    def test_a_closed_file_beside_a_model_does_not_close_the_model(
        self, good: Path, tmp_path: Path
    ) -> None:
        note = tmp_path / "notes.json"
        note.write_text("{}")
        note.chmod(0)
        done = program("info", str(good), "--json", before=without_privileges)
        assert done.code == cli.DONE
        added = program("add", str(tmp_path), "--json", before=without_privileges)
        assert added.answer["added"] == [good.name]
