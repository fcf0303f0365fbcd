"""Files and directories that are complete or absent, whatever happens while they are written."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Writes a UTF-8 text file by way of a temporary one beside it: fsync, then rename.

    Raises:
        OSError: The directory is missing or cannot be written; `path` is then as it was.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        finish_file(Path(temporary))
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        os.unlink(temporary)  # noqa: PTH108
        raise


@contextmanager
def staged_directory(destination: Path) -> Iterator[Path]:
    """Gives a hidden sibling to write into; one rename to `destination` on success, no trace of it on any failure.

    Missing parents are made. `destination` must be absent, an empty directory, or a link to one.
    """
    destination = destination.resolve()  # A rename would replace a link, not what it points to.
    made = [parent for parent in destination.parents if not parent.exists()]
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=destination.parent))
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would hide it from others
        sync_directory(staging)
        staging.replace(destination)
        sync_directory(destination.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # Somebody else's by now, if it is not empty.
                parent.rmdir()
        raise


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
