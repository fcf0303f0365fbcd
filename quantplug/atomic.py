"""Files and directories that are complete or absent, whatever happens while they are written."""

import os
import tempfile
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8, by way of a temporary one beside it: fsync, then rename.

    Raises:
        OSError: The directory is missing or cannot be written; `path` is then as it was.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        finish_file(Path(temporary))
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        os.unlink(temporary)  # noqa: PTH108
        raise


def publish_directory(staging: Path, destination: Path) -> None:
    """Gives a finished directory its final name in one step; `destination` must be absent or an empty directory."""
    sync_directory(staging)
    staging.replace(destination)
    sync_directory(destination.parent)


def finish_file(path: Path) -> None:
    """Waits until a file's data is on disk, and gives it the mode of an ordinary new file.

    Temporary files, and safetensors' own, are readable by their owner alone; a server may run as somebody else.
    """
    path.chmod(0o666 & ~_umask())
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Waits until a directory's entries are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
