"""The mark by which ranks find out whether they see one directory; on real ranks in tests/distributed."""

from pathlib import Path

import pytest

from quantplug.export.files.shared_directory import _leave_mark


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_marks_of_exports_that_were_killed_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.abcd_123.mark").touch()
    with _leave_mark(tmp_path / "out") as mark:
        assert names(tmp_path) == [Path(mark.name).name]
    assert names(tmp_path) == []


@pytest.mark.parametrize("other", [".out.v1.abcd_123.mark", ".outer.abcd_123.mark", ".out.mark", "out.abcd_123.mark"])
def test_nothing_else_is_removed(other: str, tmp_path: Path) -> None:
    (tmp_path / other).write_text("mine")
    with _leave_mark(tmp_path / "out"):
        pass
    assert names(tmp_path) == [other]


def test_nor_is_the_mark_of_an_export_that_still_looks(tmp_path: Path) -> None:
    with _leave_mark(tmp_path / "out") as first, _leave_mark(tmp_path / "out") as second:
        assert names(tmp_path) == sorted(Path(mark.name).name for mark in (first, second))
    assert names(tmp_path) == []
