import os
import stat
from pathlib import Path

import pytest

from quantplug.atomic import finish_file, publish_directory, write_atomically


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "report.json"

    write_atomically(path, "first")
    write_atomically(path, "zweite Fassung: ü")

    assert path.read_bytes() == "zweite Fassung: ü".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_others_may_read_it_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "report.json", "text")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "report.json").stat().st_mode) == 0o640


@pytest.mark.parametrize("fault", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, fault, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")

    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "nowhere" / "report.json", "text")


def test_a_directory_takes_its_name_whole(tmp_path: Path) -> None:
    staging, destination = tmp_path / "staging", tmp_path / "checkpoint"
    staging.mkdir()
    (staging / "file").write_text("text")
    destination.mkdir()  # Empty: it may be there already.

    publish_directory(staging, destination)

    assert (destination / "file").read_text() == "text"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_a_finished_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch(mode=0o600)
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    finish_file(path)
    assert path.stat().st_mode == ordinary.stat().st_mode
