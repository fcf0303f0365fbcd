"""The directory of a checkpoint: written beside its place, synced, renamed once; a rank that fails ends all alike."""

import os
import shutil
from collections.abc import Callable, Iterator
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
from quantplug.errors import CheckpointError, DestinationError, Offender
from quantplug.megatron import cpu
from quantplug.megatron.agreement import all_or_none

METADATA_FILE = "quantplug.json"
MODELOPT_STATE = "modelopt_state"


def write_directory(
    directory: Path, metadata: str, first_chunk: nn.Module, sharded_state: Callable[[], ShardedStateDict]
) -> None:
    """Writes a checkpoint; every rank must call it, and all end alike.

    Args:
        metadata: Content of `quantplug.json`.
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
        partial = directory.with_name(f".{directory.name}.partial")
        try:
            all_or_none(lambda: _begin(partial))
            _write(state, partial)
            save_sharded_modelopt_state([first_chunk], str(partial))
            all_or_none(lambda: _finish(partial, directory, metadata))
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
            [Offender("sharded_state_dict", str(error), rank=dist.get_rank())],
            "Import quantplug.plugins before the model is quantized; build every rank's model from one configuration.",
        ) from error


def _write(state: ShardedStateDict, partial: Path) -> None:
    """Megatron lets all ranks know when the files of one cannot be written, but tells only the first one why."""
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
            write_atomically(partial / METADATA_FILE, metadata)
            for path in _tree(partial):
                _sync(path)
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
