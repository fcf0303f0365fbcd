import os
import stat
from pathlib import Path

import pytest

from quantplug.atomic import finish_file, staged_directory, write_atomically


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


def test_a_directory_appears_whole_and_readable(tmp_path: Path) -> None:
    destination = tmp_path / "new" / "checkpoint"
    with staged_directory(destination) as staging:
        (staging / "file").write_text("text")
        assert not destination.exists()

    assert (destination / "file").read_text() == "text"
    assert [entry.name for entry in destination.parent.iterdir()] == ["checkpoint"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(destination.stat().st_mode) == 0o777 & ~mask


def test_an_empty_directory_may_be_there_already(tmp_path: Path) -> None:
    destination = tmp_path / "checkpoint"
    destination.mkdir()
    with staged_directory(destination) as staging:
        (staging / "file").write_text("text")
    assert (destination / "file").exists()


@pytest.mark.parametrize("fault", [OSError, KeyboardInterrupt])
def test_a_directory_that_fails_leaves_no_trace(tmp_path: Path, fault: type[BaseException]) -> None:
    def fill() -> None:
        with staged_directory(tmp_path / "checkpoint") as staging:
            (staging / "file").write_text("half")
            raise fault

    with pytest.raises(fault):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_finished_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch(mode=0o600)
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    finish_file(path)
    assert path.stat().st_mode == ordinary.stat().st_mode
