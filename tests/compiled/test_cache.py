"""Machine code is read from a directory that nobody but the user can write, whole, or not at all."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quantplug.compiled import cache

CODE = b"\x7fELF and more"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of loops, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "quantplug" / "loops"


def test_what_was_saved_is_loaded(home: Path) -> None:
    assert cache.load("a") is None
    assert cache.is_empty_of("a")

    cache.save("a", CODE)

    assert cache.load("a") == CODE
    assert not cache.is_empty_of("a")
    assert cache.is_empty_of("b")
    assert home.stat().st_mode & 0o777 == 0o700
    assert (home / "a").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in home.iterdir()] == ["a"]


def open_to_others(home: Path) -> None:
    home.chmod(0o770)


def of_another_place(home: Path) -> None:
    home.rename(home.with_name("elsewhere"))
    home.symlink_to(home.with_name("elsewhere"))


def with_a_file_open_to_others(home: Path) -> None:
    (home / "a").chmod(0o666)


def with_a_file_of_another_place(home: Path) -> None:
    (home / "a").rename(home / "b")
    (home / "a").symlink_to(home / "b")


def with_half_a_file(home: Path) -> None:
    content = (home / "a").read_bytes()
    (home / "a").write_bytes(content[:-1])


def with_an_empty_file(home: Path) -> None:
    (home / "a").write_bytes(b"")


def with_another_byte(home: Path) -> None:
    content = (home / "a").read_bytes()
    (home / "a").write_bytes(content[:-1] + b"!")


def with_a_pipe(home: Path) -> None:
    (home / "a").unlink()
    os.mkfifo(home / "a", 0o600)


def with_a_directory(home: Path) -> None:
    (home / "a").unlink()
    (home / "a").mkdir()


@pytest.mark.parametrize(
    "change",
    [
        open_to_others,
        of_another_place,
        with_a_file_open_to_others,
        with_a_file_of_another_place,
        with_half_a_file,
        with_an_empty_file,
        with_another_byte,
        with_a_pipe,
        with_a_directory,
    ],
)
def test_what_is_not_whole_or_not_the_users_alone_is_not_loaded(home: Path, change: Callable[[Path], None]) -> None:
    cache.save("a", CODE)
    change(home)

    assert cache.load("a") is None


@pytest.mark.parametrize("change", [open_to_others, of_another_place])
def test_a_directory_that_others_can_write_is_left_alone(home: Path, change: Callable[[Path], None]) -> None:
    cache.save("a", CODE)
    change(home)

    cache.save("b", CODE)

    assert not (home / "b").exists()


def test_another_users_directory_is_not_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with sudo, which keeps HOME."""
    cache.save("a", CODE)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)

    cache.save("b", CODE)

    assert cache.load("a") is None
    assert [path.name for path in home.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["not/absolute", ""])
def test_a_relative_cache_home_is_not_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    cache.save("a", CODE)

    assert (tmp_path / ".cache/quantplug/loops/a").exists()


def test_where_nothing_can_be_made_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))

    cache.save("a", CODE)

    assert cache.load("a") is None
    assert cache.is_empty_of("a")


def test_what_releases_of_old_have_left_is_dropped(home: Path) -> None:
    cache.save("old", CODE)
    cache.save("new", CODE)
    month_ago = time.time() - 31 * 24 * 3600
    os.utime(home / "old", (month_ago, month_ago))

    cache.save("newer", CODE)

    assert {path.name for path in home.iterdir()} == {"new", "newer"}
