"""A file is either whole or not there, whatever stops its writer."""

from pathlib import Path

import pytest

from embedder.writing import write_encoder, write_text, write_whole


def half(path: Path) -> None:
    path.write_text("half")
    raise OSError("no space left")


def test_what_was_there_stays_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_text(path, "before")
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, half)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_all_may_read_an_encoder(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def save(beside: Path) -> None:
        beside.touch(mode=0o600)

    write_encoder(path, save)
    assert path.stat().st_mode & 0o777 == 0o644
