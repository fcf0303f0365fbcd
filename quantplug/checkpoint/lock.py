"""A lock that keeps two exports out of one directory, and that ends with its process, however that ends."""

import errno
import fcntl
import os
from pathlib import Path

from quantplug.errors import DestinationError, Offender

# What flock(2) fails with where there are no locks: Lustre mounted without them, NFS without its lock service, FUSE.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def take_lock(path: Path) -> int:
    """The descriptor of a file that is now locked; closing it lets go.

    Raises:
        BlockingIOError: Another process holds the lock.
        DestinationError: The file system has no locks.
        OSError: The file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in _NO_LOCKS:
            raise
        mount, kind = _file_system(path)
        raise DestinationError(
            "The export directory is on a file system without file locks, so that two exports could mix their files.",
            [Offender(str(mount), f"{kind} file system: {error.strerror}")],
            "Have it mounted with locks (Lustre: option flock; NFS: with its lock service, without nolock), or choose "
            "an export directory on another file system that all ranks share.",
        ) from error
    return descriptor


def _file_system(path: Path) -> tuple[Path, str]:
    """Where the file system of a path is mounted, and of which kind it is (proc(5), /proc/self/mounts)."""
    mount = next(parent for parent in path.resolve().parents if parent.is_mount())
    lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    # The last one mounted at a place hides those below it.
    kinds = {point: kind for _, point, kind, *_ in map(str.split, lines)}
    return mount, kinds.get(str(mount).replace(" ", r"\040"), "unknown")
