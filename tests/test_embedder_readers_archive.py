"""Zip archives with a model in them."""

import io
import json
import stat
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from embedder.errors import CheckpointError, MalformedError, NotFoundError, RefusedError
from embedder.opening import open_checkpoint
from hostile import claim_to_unpack_to
from reader_contract import WEIGHTS, ReaderContract, Weights

MODEL = save(dict(WEIGHTS))
PARAMETERS = sum(values.size for values in WEIGHTS.values())


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


class TestArchive(ReaderContract):
    def write(self, folder: Path, weights: Weights) -> Path:
        members = {"m/model.safetensors": save(dict(weights)), "m/README.md": b"text"}
        return write_zip(folder / "model.zip", members)


def test_the_temporary_folder_is_removed_when_the_model_is_closed(
    tmp_path: Path, own_temporary_folder: Path
) -> None:
    path = write_zip(tmp_path / "x.zip", {"model.safetensors": MODEL})
    with open_checkpoint(path) as checkpoint:
        assert list(own_temporary_folder.iterdir())
        assert checkpoint.files == (path,)
        assert checkpoint.location == str(path)
        assert checkpoint.format == "safetensors"
    assert not list(own_temporary_folder.iterdir())


def test_a_folder_in_an_archive_is_opened_as_the_folder_would_be(tmp_path: Path) -> None:
    config = json.dumps({"model_type": "bert"}).encode()
    members = {"model.safetensors": MODEL, "config.json": config, "1_Pooling/config.json": b"{}"}
    with open_checkpoint(write_zip(tmp_path / "x.zip", members)) as checkpoint:
        assert checkpoint.parameters == PARAMETERS
        assert checkpoint.declared["config"] == {"model_type": "bert"}


def test_one_of_several_models_is_opened_by_its_member(
    tmp_path: Path, own_temporary_folder: Path
) -> None:
    other = save({"w": np.ones((2, 2), np.float32)})
    path = write_zip(tmp_path / "x.zip", {"a/one.safetensors": MODEL, "b/two.safetensors": other})
    with pytest.raises(
        CheckpointError, match=r"2 models in this archive: a/one\.safetensors, b/.*"
    ):
        open_checkpoint(path)
    with open_checkpoint(Path(f"{path}!b/two.safetensors")) as checkpoint:
        assert checkpoint.parameters == 4
        assert checkpoint.location == f"{path}!b/two.safetensors"
    with open_checkpoint(Path(f"{path}!a")) as checkpoint:
        assert checkpoint.parameters == PARAMETERS
    with pytest.raises(NotFoundError, match=r"no member 'c'; it has a/one\.safetensors"):
        open_checkpoint(Path(f"{path}!c"))
    assert not list(own_temporary_folder.iterdir())


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/tmp/evil", "..\\evil", "C:\\evil", "c:evil"]
)
def test_a_member_that_climbs_out_is_refused_before_anything_is_unpacked(
    tmp_path: Path, own_temporary_folder: Path, name: str
) -> None:
    path = write_zip(tmp_path / "x.zip", {"model.safetensors": MODEL, name: b"evil"})
    with pytest.raises(RefusedError, match="outside its folder; nothing was unpacked"):
        open_checkpoint(path)
    assert not list(own_temporary_folder.iterdir())
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_are_refused(tmp_path: Path, kind: int) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("model.safetensors", MODEL)
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(RefusedError, match="'link' is a link or a device"):
        open_checkpoint(tmp_path / "x.zip")


def test_a_bomb_is_refused_from_its_directory(tmp_path: Path, own_temporary_folder: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"model.safetensors": MODEL, "zeros": bytes(1000)})
    claim_to_unpack_to(path, 2_000_000_000)
    with pytest.raises(RefusedError, match=r"would unpack to 2,000,\d+,\d+: an archive bomb"):
        open_checkpoint(path)
    assert not list(own_temporary_folder.iterdir())


def test_an_archive_in_an_archive_is_refused(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("model.safetensors", MODEL)
    path = write_zip(tmp_path / "x.zip", {"inner.zip": inner.getvalue()})
    with pytest.raises(RefusedError, match="an archive inside the archive is not opened"):
        open_checkpoint(path)


def test_an_archive_without_a_model_says_so(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"README.md": b"hello"})
    with pytest.raises(NotFoundError, match="there is no model in this archive"):
        open_checkpoint(path)


def test_errors_inside_name_the_member_not_the_temporary_folder(
    tmp_path: Path, own_temporary_folder: Path
) -> None:
    path = write_zip(tmp_path / "x.zip", {"m/model.safetensors": MODEL[:-4]})
    with pytest.raises(MalformedError, match=r"x\.zip!m/model\.safetensors: TRUNCATED") as caught:
        open_checkpoint(path)
    assert str(own_temporary_folder) not in str(caught.value)
    assert not list(own_temporary_folder.iterdir())


def test_a_member_whose_content_is_damaged_is_an_error_of_ours(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"model.safetensors": MODEL})
    content = bytearray(path.read_bytes())
    content[200:240] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"member 'model\.safetensors' cannot be unpacked"):
        open_checkpoint(path)
