"""Files and directories that are complete or absent, whatever happens while they are written."""

import os
import tempfile
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8, by way of a temporary one beside it: fsync, rename, then fsync of the directory.

    Raises:
        OSError: The directory is missing or cannot be written; `path` is then as it was.
    """
    # In the same directory: a rename is one step only within a file system, and the name is one that no other writer
    # has.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        # Content before the name: some file systems write the rename first, and a power cut would leave an empty file.
        finish_file(Path(temporary))
        os.replace(temporary, path)  # noqa: PTH105
    # An interrupt must not leave the temporary file behind either.
    except BaseException:
        os.unlink(temporary)  # noqa: PTH108
        raise
    # The name is an entry of the directory, which a power cut could lose as well.
    sync_directory(path.parent)


def publish_directory(staging: Path, destination: Path) -> None:
    """Gives a finished directory its final name in one step; `destination` must be absent or an empty directory."""
    # First what the directory holds, then the name, then the entry of the name in its parent.
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
    # There is no way to read it but to set it. For that moment files that other threads make are open to all.
    mask = os.umask(0)
    os.umask(mask)
    return mask
