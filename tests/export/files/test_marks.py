"""A finished file that something happened to is not taken for finished."""

import os
from pathlib import Path

import pytest

from quantplug.export.files.marks import is_as_marked, leave_mark

SIZES = [0, 1, 7, 8, 8 * 1024 * 512 - 1, 8 * 1024 * 512, 8 * 1024 * 512 + 9]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "checkpoint").mkdir()
    return tmp_path / "checkpoint" / "model.safetensors"


@pytest.mark.parametrize("size", SIZES)
def test_a_flipped_bit_anywhere_is_found(size: int, file: Path) -> None:
    content = bytearray(os.urandom(size))
    file.write_bytes(content)
    leave_mark(file, file)
    assert is_as_marked(file)
    for place in {0, size // 2, size - 1} if size else ():
        changed = content.copy()
        changed[place] ^= 0x10
        file.write_bytes(changed)
        assert not is_as_marked(file)


def test_a_lost_or_added_byte_is_found(file: Path) -> None:
    file.write_bytes(bytes(4097))
    leave_mark(file, file)
    for size in (4096, 4098):
        file.write_bytes(bytes(size))
        assert not is_as_marked(file)


def test_exchanged_blocks_are_found(file: Path) -> None:
    first, second = os.urandom(4096), os.urandom(4096)
    file.write_bytes(first + second)
    leave_mark(file, file)
    file.write_bytes(second + first)
    assert not is_as_marked(file)


def test_without_a_mark_or_a_file_nothing_is_finished(file: Path) -> None:
    assert not is_as_marked(file)
    file.write_bytes(b"content")
    assert not is_as_marked(file)
    leave_mark(file, file)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    target = file.rename(file.with_name("other"))
    file.symlink_to(target)
    assert not is_as_marked(file)
