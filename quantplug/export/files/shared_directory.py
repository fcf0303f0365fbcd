"""Whether the export directory is one for all ranks: what rank 0 leaves there for a moment, every rank must see.

A disk of one node, or a relative path from another working directory, would otherwise show only at the end, when rank 0
does not find the files that the others have filled.
"""

import fcntl
import os
import platform
import re
from contextlib import nullcontext, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO

import torch.distributed as dist

from quantplug.checkpoint.disk_errors import disk_errors
from quantplug.checkpoint.lock import take_lock
from quantplug.errors import DestinationError, Offender
from quantplug.megatron.agreement import all_or_none, gather_objects


def require_shared(destination: Path, rank: int) -> None:
    """Refuses ranks whose export directory is another one than that of rank 0. A collective; leaves nothing behind.

    Raises:
        DestinationError: Names every such rank, its path and its host.
        WriteError: Rank 0 cannot make a file where the export directory is to be, or another rank cannot look there.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    destination = destination.resolve()
    mark = all_or_none(lambda: _leave_mark(destination) if rank == 0 else None)
    # Rank 0 holds the mark until the answers of all ranks are there: leaving the block removes it.
    with nullcontext() if mark is None else mark:
        # Everyone looks for what rank 0 has left; what the others bring to this gather is not used.
        left, target = gather_objects(("" if mark is None else mark.name, destination))[0]
        sees = all_or_none(lambda: _sees(destination, Path(left), target, rank))
        found = gather_objects((sees, destination, platform.node()))
    apart = [
        Offender(str(where), f"on host {host} is not the directory of rank 0 on host {found[0][2]}", rank=other)
        for other, (sees, where, host) in enumerate(found)
        if not sees
    ]
    if apart:
        raise DestinationError(
            "The ranks would export into different directories.",
            apart,
            "Choose a directory on a file system that all ranks share, and give every rank the same absolute path.",
        )


def _leave_mark(destination: Path) -> IO[bytes]:
    """An empty file in the nearest directory that exists, gone when closed.

    Its name was never there before, so that no network file system has an old answer for it.
    """
    nearest = next(parent for parent in destination.parents if parent.is_dir())
    with disk_errors(nearest):
        _remove_left_marks(nearest, destination.name)
        return _held(NamedTemporaryFile(dir=nearest, prefix=f".{destination.name}.", suffix=".mark"))


def _held(mark: IO[bytes]) -> IO[bytes]:
    """The mark, locked as long as it is open."""
    with suppress(OSError):  # Where there are no locks, the export itself says so, and where.
        fcntl.flock(mark.fileno(), fcntl.LOCK_EX)
    return mark


def _remove_left_marks(directory: Path, name: str) -> None:
    """Removes marks of exports to this name that were killed as they looked: nobody holds a lock on them."""
    pattern = re.compile(rf"\.{re.escape(name)}\.\w{{8}}\.mark")  # Of eight letters, as tempfile draws them.
    for path in [path for path in directory.iterdir() if pattern.fullmatch(path.name)]:
        with suppress(OSError):  # Another export still looks, or it is another user's.
            os.close(take_lock(path))
            path.unlink()


def _sees(destination: Path, mark: Path, target: Path, rank: int) -> bool:
    """Whether the mark that rank 0 left above its `target` stands at the same place above this rank's destination."""
    # Where the mark lies depends on which parents exist for rank 0. A rank that sees another disk may have other ones,
    # so it goes up as many steps as rank 0 did.
    below = target.relative_to(mark.parent)
    nearest = Path(*destination.parts[: -len(below.parts)])
    with disk_errors(nearest):
        return nearest / below == destination and (nearest / mark.name).exists()
