"""Object files of loops, in a directory of the user's cache that nobody else can write.

What is loaded from there is run: so the directory and each file must be the user's own and closed to others, as OpenSSH
asks of its keys, or they are not used. All is done through the opened directory, so that a name that is turned to
another place meanwhile changes nothing. A file is complete or absent, and named for all that its code depends on: any
number of processes, ranks and releases can use it at once.
"""

import hashlib
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_DIGEST_BYTES = hashlib.sha256().digest_size
_KEPT_SECONDS = 30 * 24 * 3600
"""How long a file is kept; releases that are gone have left some behind. To compile one again takes seconds."""

_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def load(name: str) -> bytes | None:
    """A file's content; None where there is none that is whole and the user's own."""
    with suppress(OSError), _directory() as directory:
        # Not waiting for the other end if it is a pipe.
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        with os.fdopen(file, "rb") as opened:
            _require_own(os.fstat(file))
            content = opened.read()
        digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(code).digest() == digest:
            return code
    return None


def save(name: str, code: bytes) -> None:
    """Puts a file there; where that cannot be, nothing happens."""
    with suppress(OSError), _directory() as directory:
        _drop_old(directory)
        # A name that no other process has, so that none sees a part of it.
        partial = f".{name}.{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(partial, flags, 0o600, dir_fd=directory), "wb") as opened:
            # After a power cut a file may be empty, or hold anything: the digest tells, so that no sync is waited for.
            opened.write(hashlib.sha256(code).digest() + code)
        os.rename(partial, name, src_dir_fd=directory, dst_dir_fd=directory)


def is_empty_of(beginning: str) -> bool:
    """Whether no file's name begins so."""
    with suppress(OSError), _directory() as directory, os.scandir(directory) as entries:
        return not any(entry.name.startswith(beginning) for entry in entries)
    return True


@contextmanager
def _directory() -> Iterator[int]:
    """The opened directory, made where it is missing.

    Raises:
        OSError: There is none that is the user's alone.
    """
    path = _cache_home() / "quantplug" / "loops"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    directory = os.open(path, _DIRECTORY)
    try:
        _require_own(os.fstat(directory))
        yield directory
    finally:
        os.close(directory)


def _cache_home() -> Path:
    """As the XDG Base Directory Specification says, which takes no relative path."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:  # A user that the system does not know.
        raise OSError("there is no home directory") from error


def _require_own(found: os.stat_result) -> None:
    if found.st_uid != os.geteuid() or found.st_mode & _OTHERS:
        raise PermissionError("it is not the user's alone")


def _drop_old(directory: int) -> None:
    oldest = time.time() - _KEPT_SECONDS
    with os.scandir(directory) as entries:
        old = [entry.name for entry in entries if entry.stat(follow_symlinks=False).st_mtime < oldest]
    for name in old:
        os.unlink(name, dir_fd=directory)
