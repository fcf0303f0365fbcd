"""The staging directory of an export: beside the destination, which is checked to be free; made visible by one rename.

An export that is killed leaves its finished files in a hidden directory beside the destination. The same export run
again keeps them and writes only the rest; another one refuses to touch them.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from quantplug.atomic import publish_directory, write_atomically
from quantplug.checkpoint.lock import take_lock
from quantplug.checkpoint.reader import INDEX_FILE
from quantplug.checkpoint.safetensors.writer import file_size, partial_path
from quantplug.errors import DestinationError, Offender, QuantplugError, WriteError
from quantplug.export.files.marks import is_as_marked
from quantplug.export.plan.types import ShardFile
from quantplug.formats import TensorSpec


def check_destination(export_dir: Path) -> None:
    """Refuses a directory that one rename cannot fill.

    Raises:
        DestinationError: It holds anything, is no directory or below a file, is a mount point (renaming over one fails)
            or the current directory (renaming over it leaves the process in one that is gone).
    """
    path, reason = export_dir, _obstacle(export_dir)
    for parent in export_dir.parents:
        if parent.exists() and not parent.is_dir():
            path, reason = parent, "exists and is not a directory"
    if reason is not None:
        raise DestinationError(
            "The export directory cannot be used.",
            [Offender(str(path), reason)],
            "Choose a directory that is new or empty; nothing is overwritten.",
        )


def _obstacle(export_dir: Path) -> str | None:
    if not export_dir.is_dir():
        return "exists and is not a directory" if export_dir.exists() or export_dir.is_symlink() else None
    if (export_dir / INDEX_FILE).exists():
        return "is not empty: it holds a checkpoint, and one that an export wrote is complete"
    if any(export_dir.iterdir()):
        return "is not empty"
    if export_dir.resolve().is_mount():
        return "is a mount point; choose a directory in it"
    if export_dir.samefile(Path.cwd()):
        return "is the current directory; choose a directory in it"
    return None


def unfinished_of(destination: Path) -> Path:
    """The hidden directory beside a destination in which an export to it grows, and which a killed one leaves."""
    resolved = destination.resolve()
    return resolved.with_name(f".{resolved.name}.partial")


class Staging:
    """The hidden directory beside the destination in which an export grows.

    All ranks make, lock and open it, each step together: a directory that a rank of another export may still write to
    is found before any rank claims it.

    Args:
        digest: Digest of the plan, which knows names, shapes, scales and files.
        fingerprint: Fingerprint of the weights that this rank holds.
        world_size: Number of ranks of this export.
    """

    def __init__(self, destination: Path, digest: str, fingerprint: str, rank: int, world_size: int) -> None:
        self.destination = destination.resolve()  # A rename would replace a link, not what it points to.
        self._root = unfinished_of(destination)
        # What becomes the checkpoint holds nothing else; what tells exports apart lies beside it.
        self.directory = self._root / "checkpoint"
        self._identity = {"digest": digest, "fingerprint": fingerprint}
        self._rank = rank
        self._world_size = world_size
        self._locks: list[int] = []
        self._made: list[Path] = []
        self._is_ours = False

    def require_space(self, sizes: Mapping[str, int]) -> None:
        """Finds before anything is packed that the disk does not hold all of it; what is there already counts.

        Args:
            sizes: Bytes of every file that is to be there in the end, by its path.

        Raises:
            WriteError: Names how much there is, and how much it takes.
        """
        needed = sum(max(0, nbytes - self._taken(name)) for name, nbytes in sizes.items())
        parent = next(parent for parent in self.directory.parents if parent.exists())
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise WriteError(
                "The disk has no room for the checkpoint.",
                [Offender(str(parent), f"has {free:,} bytes free of the {needed:,} needed")],
                "Make room, or choose another directory.",
            )

    def _taken(self, name: str) -> int:
        """Bytes of the disk that a file of an export, or what a killed one left of it, takes already."""
        path, taken = self.directory / name, 0
        for it in (path, partial_path(path)):
            with suppress(FileNotFoundError):
                found = it.stat()
                # In blocks of 512 bytes (stat(2)): an unfinished file has its full size, and holes for what is to come.
                taken += min(found.st_size, found.st_blocks * 512)
        return taken

    def make(self) -> None:
        """Makes the directory, by rank 0, which then knows what to remove if the export fails."""
        if self._rank == 0:
            # The nearest first, so that removing them in this order finds each one empty.
            self._made = [parent for parent in self.directory.parents if not parent.exists()]
            self.directory.mkdir(parents=True, exist_ok=True)

    def lock(self) -> None:
        """Keeps every other export out, until this rank closes it or ends.

        Raises:
            DestinationError: Ranks of another export still run; or the file system has no locks.
        """
        self._is_ours = not any(self._root.glob("rank-*.json"))  # No export ever got further than its locks.
        try:
            # Every rank has a lock of its own: a rank may outlive the one that started with it.
            self._locks.append(take_lock(self._lock_file(self._rank)))
            for path in self._locks_of_others() if self._rank == 0 else ():
                self._locks.append(take_lock(path))
        except BlockingIOError as error:
            self._is_ours = False
            raise self._refusal("is being written by an export that still runs") from error

    def open(self) -> None:
        """Claims the directory, or takes up what the same export left in it.

        Raises:
            DestinationError: It belongs to another export.
        """
        # One a rank: each vouches for the weights that it holds itself, and no rank knows the fingerprints of all.
        manifest = self._root / f"rank-{self._rank:05d}.json"
        identity = json.dumps(self._identity)
        left_by = manifest.read_text(encoding="utf-8") if manifest.exists() else None
        # Another export that has finished no file yet has nothing to lose: what it left is taken over.
        if left_by != identity and any(self.directory.glob("*.safetensors")):
            raise self._refusal("was left by an export of another model, config or topology")
        # Before the first file gets its name: a finished file always has a manifest that says whose it is.
        write_atomically(manifest, identity)
        self._is_ours = True

    def finished(self, files: Iterable[ShardFile], expected: Mapping[str, TensorSpec]) -> set[str]:
        """Names of the files that are complete and still hold what was written; others are written again.

        They got their final names only once they were on disk, but something may have happened to them since.
        """
        found = set()
        for file in files:
            path, size = self.directory / file.name, file_size([expected[name] for name in file.tensors])
            # The size first, as it costs nothing; the mark means to read all of the file.
            if path.is_file() and path.stat().st_size == size and is_as_marked(path):
                found.add(file.name)
        return found

    def discard_unless_resumable(self) -> None:
        """After a failure: leaves no trace, unless there are finished files to go on from."""
        # Final names alone: unfinished files end in `.part`.
        if not any(self.directory.glob("*.safetensors")):
            self.discard()

    @contextmanager
    def discarded_on(self, kind: type[QuantplugError]) -> Iterator[None]:
        """Around work that finished files are worth nothing after, if it ends in this error."""
        try:
            yield
        except kind:
            self.discard()
            raise

    def discard(self) -> None:
        """Leaves no trace, neither of files that are finished."""
        # One rank removes for all of them, and never what another export has left.
        if self._rank != 0 or not self._is_ours:
            return
        shutil.rmtree(self._root, ignore_errors=True)
        for parent in self._made:
            with suppress(OSError):  # Somebody else's by now, if it is not empty.
                parent.rmdir()

    def publish(self) -> None:
        """Makes the finished checkpoint visible under its name."""
        for path in (*self.directory.glob(".*.part"), *self.directory.glob("*.part")):
            path.unlink(missing_ok=True)  # What a kill left half-written.
        publish_directory(self.directory, self.destination)
        # Only now: while the rename may still fail, manifests keep another model's export from taking up these files.
        shutil.rmtree(self._root, ignore_errors=True)

    def close(self) -> None:
        """Lets go of the locks."""
        # Closing a descriptor lets go of its flock(2); so does the end of the process, however it ends.
        while self._locks:
            os.close(self._locks.pop())

    def _lock_file(self, rank: int) -> Path:
        return self._root / f"rank-{rank:05d}.lock"

    def _locks_of_others(self) -> list[Path]:
        """Those of ranks that this export has not: one that was killed may have had more, and some may still write."""
        own = {self._lock_file(rank) for rank in range(self._world_size)}
        return sorted(set(self._root.glob("rank-*.lock")) - own)

    def _refusal(self, reason: str) -> DestinationError:
        return DestinationError(
            "There is an unfinished export beside the export directory.",
            [Offender(str(self._root), reason)],
            "Remove that directory, or choose another export directory.",
        )
