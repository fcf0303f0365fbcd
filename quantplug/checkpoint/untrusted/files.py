"""Files of a directory that somebody else wrote: which of them are read at all, and how much of each.

A checkpoint is downloaded. Whatever stands in it for a file may be a pipe or a device that never ends, a link to a file
that its author wants to see published, or JSON that is made to exhaust memory. One reader serves every command, so that
what is refused for one is refused for all.
"""

import json
import os
import stat
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any

from quantplug.errors import Offender, SourceError

# Larger than any that is known: the index of a model of 200,000 tensors has 25 MB, a tokenizer.json 35 MB.
MOST_JSON_BYTES = 256 * 2**20
# A config nests four or five levels deep. Python's own parser and writer recurse, and would run out of stack.
_MOST_JSON_DEPTH = 100

OUTSIDE = "is a link to a file outside of the directory"
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def name_problem(name: object) -> str | None:
    """Why something cannot be the name of a file in a directory or below it; None where it can.

    Names are POSIX paths as an index gives them: `model-00001.safetensors`, `transformer/model.safetensors`.
    """
    if not isinstance(name, str) or not name:
        return "is not the name of a file"
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or not parts:
        return "is not the name of a file in this directory"
    return None


def file_problem(directory: Path, name: str) -> str | None:
    """Why a file of a directory is not read; None where it is a regular file that can be.

    Args:
        name: Its path below the directory.
    """
    if (problem := name_problem(name)) is not None:
        return problem
    path = directory / name
    try:
        if leaves(directory, path):
            return OUTSIDE
        os.close(_open(path))
    except OSError as error:
        return _reason(error)
    return None


def leaves(directory: Path, path: Path) -> bool:
    """Whether a path below a directory leads out of it by links.

    The cache of huggingface_hub is made of such links, from `models--*/snapshots/<commit>/` into `models--*/blobs/`:
    they stay within one model, and are followed.
    """
    root, real = (Path(os.path.realpath(it)) for it in (directory, path))  # Unlike `resolve`, follows rings, too.
    if real.is_relative_to(root):
        return False
    snapshots, model = root.parent, root.parent.parent
    is_cache = snapshots.name == "snapshots" and model.name.startswith("models--")
    return not (is_cache and real.parent == model / "blobs")


def open_file(directory: Path, name: str) -> BufferedReader:
    """Opens a regular file of a directory.

    Raises:
        SourceError: It is absent, no regular file, outside of the directory, or may not be read.
    """
    problem = file_problem(directory, name)
    if problem is not None:
        raise unreadable(directory / name, problem)
    try:
        return os.fdopen(_open(directory / name), "rb")
    except OSError as error:
        raise unreadable(directory / name, _reason(error)) from error


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a directory.

    Raises:
        SourceError: It is not a file that is read; or too large, too deep, no JSON, or no object.
    """
    path = directory / name
    with open_file(directory, name) as file:
        content = file.read(MOST_JSON_BYTES + 1)
    if len(content) > MOST_JSON_BYTES:
        raise unreadable(path, f"has more than {MOST_JSON_BYTES} bytes")
    try:
        # As text: of bytes Python's parser reads UTF-16, and a mark of byte order, at which all others stop.
        value = json.loads(content.decode())
        if b"\\ud" in content.lower():
            # Half of a surrogate pair, which JSON can spell and no file can hold; the error is a ValueError.
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise unreadable(path, "is not JSON that can be read: it nests too deep") from error
    except ValueError as error:  # UnicodeDecodeError is one, too.
        raise unreadable(path, f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise unreadable(path, "is not a JSON object")
    if _is_deep(value):
        raise unreadable(path, f"nests more than {_MOST_JSON_DEPTH} levels deep")
    return value


def unreadable(path: Path, reason: str) -> SourceError:
    return SourceError(
        "A file of the checkpoint cannot be read.",
        [Offender(str(path), reason)],
        "Fetch or save the checkpoint again; links must stay within its directory.",
    )


def _open(path: Path) -> int:
    """The descriptor of a regular file.

    Opening a pipe would wait for its writer, and opening a device may do something: neither is opened. What has taken
    the place of the file since is found by `fstat`, and O_NONBLOCK keeps that from waiting, too.
    """
    _require_regular(path.stat().st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(f"is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file")


def _reason(error: OSError) -> str:
    """What the operating system says; it says "Permission denied" of what is there and may not be read."""
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    return str(error) if error.strerror is None else f"cannot be read: {error.strerror}"


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(_MOST_JSON_DEPTH):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]
        if not level:
            return False
    return True
