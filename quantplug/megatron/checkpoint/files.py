"""The directory of a checkpoint: written beside its place, synced, renamed once; a rank that fails ends all alike."""

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from modelopt.torch.opt.plugins.mcore_dist_checkpointing import save_sharded_modelopt_state
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from quantplug.atomic import write_atomically
from quantplug.checkpoint.torch_dist.files import OWN_FILE, Digests, digest_of, read_own_file, require_as_saved
from quantplug.errors import CheckpointError, DestinationError, Offender
from quantplug.megatron import cpu
from quantplug.megatron.agreement import all_or_none, gather_objects

# What Megatron, torch and pickle raise of a file that is not what it was: the bytes decide which of them.
DAMAGE = (
    CheckpointException,
    CheckpointingException,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    ImportError,
    RuntimeError,
    MemoryError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


def write_directory(
    directory: Path,
    metadata: Mapping[str, object],
    first_chunk: nn.Module,
    sharded_state: Callable[[], ShardedStateDict],
) -> None:
    """Writes a checkpoint; every rank must call it, and all end alike.

    Args:
        metadata: Content of `quantplug.json`, which gets the digests of all other files as `files`.
        first_chunk: Its ModelOpt state is that of all chunks.
        sharded_state: Makes what is to be written, without collectives.

    Raises:
        DestinationError: `directory` is not empty, is a file, or cannot be made.
        CheckpointError: Megatron finds the state inconsistent, or a file cannot be written.
    """
    all_or_none(lambda: _require_free(directory))
    with cpu.checkpointing(), results_within_process():
        state = all_or_none(sharded_state)
        require_consistent(state)
        # Beside its place, and so on the same file system: only there is a rename one step (rename(2)).
        partial = directory.with_name(f".{directory.name}.partial")
        try:
            all_or_none(lambda: _begin(partial))
            _write(state, partial)
            save_sharded_modelopt_state([first_chunk], str(partial))
            # After the last file but `quantplug.json`, so that every file it lists has its final content.
            digests = _merged(gather_objects(all_or_none(lambda: _digests_of_own(partial))))
            text = json.dumps({**metadata, "files": digests}, indent=2)
            all_or_none(lambda: _finish(partial, directory, text))
        # An interrupt too. One rank alone removes the tree; several would stumble over what another has just removed.
        except BaseException:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def results_within_process() -> Iterator[None]:
    """On while checkpoints are saved synchronously: what was written is told within this process.

    Megatron-Core tells it through a queue in a server process, for the sake of asynchronous saves, whose writer is
    another process. Every rank starts one such server at its first save, and it imports the caller's script and torch
    once more: ten seconds and 0.7 GB a rank, for a list of names and sizes. A queue that is there already is left alone
    and put back, so that asynchronous saves of the same program go on as they did.
    """
    of_all_processes = filesystem_async._results_queue
    filesystem_async._results_queue = SimpleQueue()
    try:
        yield
    finally:
        filesystem_async._results_queue = of_all_processes


def require_consistent(state: ShardedStateDict) -> None:
    """Megatron's own check that the shards of all ranks make up each tensor once. A collective.

    Within its save Megatron checks on rank 0 alone, while the others go on into the next collective and wait there.

    Raises:
        CheckpointError: With Megatron's reason, on every rank.
    """
    sharded, _ = save_preprocess(state, validate_access_integrity=False)
    _, shards_of_all = determine_global_metadata(sharded)
    all_or_none(lambda: _require_consistent(shards_of_all))


def _require_consistent(shards_of_all: list[list[object]]) -> None:
    try:
        validate_sharding_integrity(shards_of_all)
    except CheckpointingException as error:
        raise CheckpointError(
            "The shards of the ranks do not make up the tensors of a checkpoint.",
            [Offender("sharded_state_dict", str(error))],
            "Import quantplug.plugins before the model is quantized; build every rank's model from one configuration.",
        ) from error


def _write(state: ShardedStateDict, partial: Path) -> None:
    """Megatron lets all ranks know when the files of one cannot be written, but tells only the first one why."""
    # Kept until all ranks have met: raised at once, it would carry every rank's reason on the first rank alone.
    failure: CheckpointException | None = None
    try:
        dist_checkpointing.save(state, str(partial), validate_access_integrity=False)
    except CheckpointException as error:
        failure = error
    all_or_none(lambda: _refuse(failure))


def _refuse(failure: CheckpointException | None) -> None:
    if failure is not None:
        offenders = [Offender("*.distcp", str(reason), rank=rank) for rank, (reason, _) in failure.failures.items()]
        raise _unwritten(offenders) from failure


def _unwritten(offenders: list[Offender]) -> CheckpointError:
    return CheckpointError(
        "The checkpoint could not be written; nothing is left of it.",
        offenders,
        "Make room on the file system, or choose another directory.",
    )


def _require_free(directory: Path) -> None:
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise DestinationError(
            "A checkpoint is not written over something else.",
            [Offender(str(directory), "is not empty" if directory.is_dir() else "is a file")],
            "Choose a directory that does not exist yet, or remove this one.",
        )


def _begin(partial: Path) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise DestinationError(
                "The directory of the checkpoint cannot be made.",
                [Offender(str(partial), str(error))],
                "Choose a directory that can be written to.",
            ) from error


def _finish(partial: Path, directory: Path, metadata: str) -> None:
    if dist.get_rank() == 0:
        try:
            write_atomically(partial / OWN_FILE, metadata)
            # Content before the name: after a power cut a directory by the final name must not hold files without their
            # data.
            for path in _tree(partial):
                _sync(path)
            # Takes the place of an empty directory, and fails where something has been put into it meanwhile.
            partial.replace(directory)
            _sync(directory.parent)
        except OSError as error:
            raise _unwritten([Offender(str(directory), str(error))]) from error


def _tree(root: Path) -> Iterator[Path]:
    yield from sorted(root.rglob("*"))
    yield root


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_undamaged(directory: Path) -> None:
    """Refuses a checkpoint whose files are not what was saved. A collective.

    Every rank hashes its share of the files, where digests of them were saved; plain ModelOpt and trainers save none,
    and theirs are held to be complete only. Found before the first collective of a load, in which ranks would wait for
    one that stumbles.

    Raises:
        CheckpointError: Names every file.
    """
    digests: Digests = all_or_none(lambda: read_own_file(directory)).get("files", {})
    # Sorted, so that all ranks share out the same list and every file is hashed by exactly one of them.
    share = sorted(digests)[dist.get_rank() :: dist.get_world_size()]
    all_or_none(lambda: require_as_saved(directory, {name: digests[name] for name in share}))


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Around the reading of a file, without collectives.

    Raises:
        CheckpointError: For whatever the readers stumble over; names the file.
    """
    try:
        yield
    except DAMAGE as error:
        raise _damaged([Offender(str(path), said_of(error))]) from error


def said_of(error: BaseException) -> str:
    """One line of what a library says of damage."""
    # torch's own text has every rank's traceback in it; the first reason alone is what a line can hold.
    if isinstance(error, CheckpointException):
        error = next((reason for reason, _ in error.failures.values()), error)
    return f"cannot be read: {type(error).__name__}: {error}"[:500]


def _damaged(offenders: Sequence[Offender]) -> CheckpointError:
    return CheckpointError(
        "The checkpoint is damaged or incomplete.",
        offenders,
        "Copy it again from where it was saved, or save it again; then load it into a model that is built anew.",
    )


def refuse_damaged(directory: Path, failure: BaseException | None) -> None:
    """Raises CheckpointError for what a load stumbled over on this rank."""
    # torch gathers what ranks stumble over; what we have refused ourselves says it best.
    reasons = [reason for reason, _ in failure.failures.values()] if isinstance(failure, CheckpointException) else []
    for reason in (failure, *reasons):
        if isinstance(reason, CheckpointError):
            raise reason
    if failure is not None:
        raise _damaged([Offender(str(directory), said_of(failure))]) from failure


def _digests_of_own(directory: Path) -> dict[str, dict[str, object]]:
    """Digests of the files that this rank wrote, `__<rank>_<number>.distcp`; rank 0 takes all others as well."""
    rank = dist.get_rank()
    return {
        str(path.relative_to(directory)): _digest(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and _writer_of(path) == rank
    }


def _writer_of(path: Path) -> int:
    match = re.fullmatch(r"__(\d+)_\d+\.distcp", path.name)
    return int(match[1]) if match else 0


def _digest(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        return digest_of(file)


def _merged(digests: Sequence[Digests]) -> dict[str, object]:
    return {name: digest for of_rank in digests for name, digest in sorted(of_rank.items())}
