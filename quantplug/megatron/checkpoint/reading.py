"""Megatron's own load, of an index and of objects that we have read first, so that nothing in a checkpoint runs.

Megatron-Core and torch unpickle `.metadata`, and every object entry of a `.distcp` file, without asking what is in it.
Here they get an index made of what `read_index` found, and objects that were read with `weights_only`, proved to be
tensors, and pickled again by us. `common.pt` is not read. Tensors torch itself reads with `weights_only`.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from quantplug.errors import CheckpointError, Offender
from quantplug.megatron.checkpoint.files import DAMAGE
from quantplug.megatron.releases.replaced import replaced

_OF_TE = "extra_state"


@contextmanager
def of_index(metadata: Metadata) -> Iterator[None]:
    """On while Megatron loads: its reader has this index, and does not read another."""

    def reader(checkpoint_dir: str | Path, **unused: Any) -> FileSystemReader:
        return _Reader(checkpoint_dir, metadata)

    with replaced(torch_strategy, "_get_filesystem_reader", reader):
        yield


class _Reader(FileSystemReader):
    """torch's reader of the files that an index names, whose index is given."""

    def __init__(self, directory: str | Path, metadata: Metadata) -> None:
        super().__init__(directory)
        self._metadata = metadata

    # Without the arguments of the base class: they are for indices of one rank each, which Megatron does not write.
    def read_metadata(self) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        return super().read_data(plan, _TensorsAlone(planner))


class _TensorsAlone(LoadPlanner):
    """Between a reader and a planner: objects reach the planner as tensors that we have pickled."""

    def __init__(self, planner: LoadPlanner) -> None:
        self._planner = planner

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        place, buffer = read_item.storage_index, io.BytesIO()
        torch.save([_of_quantizers_alone(place, it) for it in _tensors(place, value)], buffer)
        buffer.seek(0)
        self._planner.load_bytes(read_item, buffer)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self._planner.resolve_tensor(read_item)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self._planner.commit_tensor(read_item, tensor)

    # A reader asks for none of these; the planner itself has done them.
    def set_up_planner(self, *of_planner: Any, **named: Any) -> None:
        self._planner.set_up_planner(*of_planner, **named)

    def create_local_plan(self) -> LoadPlan:
        return self._planner.create_local_plan()

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return self._planner.create_global_plan(global_plan)

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return self._planner.finish_plan(central_plan)


def _tensors(place: MetadataIndex, value: io.BytesIO) -> list[torch.Tensor]:
    """The tensors in an object entry: a pickled list of what each of its shards has, which may be nothing."""
    objects = _harmless(place, value)
    if not isinstance(objects, list) or not all(it is None or isinstance(it, torch.Tensor) for it in objects):
        raise _refused(place, "holds something else than tensors")
    return [torch.empty(0, dtype=torch.uint8) if it is None else it for it in objects]


def _harmless(place: MetadataIndex, pickled: io.BytesIO) -> object:
    """Unpickled by torch's reader of tensors and plain containers, which makes nothing else and runs nothing."""
    try:
        return torch.load(pickled, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise _refused(place, f"cannot be read as tensors: {error}") from error


def _refused(place: MetadataIndex, reason: str) -> CheckpointError:
    return CheckpointError(
        "An object in the checkpoint is not what a load takes; nothing of it has been run.",
        [Offender(place.fqn, reason.partition("\n")[0])],
        "Copy the checkpoint again from where it was saved, and do not use it if that does not help.",
    )


def _of_quantizers_alone(place: MetadataIndex, state: torch.Tensor) -> torch.Tensor:
    """An extra state [bytes] with ModelOpt's settings alone, or empty where there are none.

    Transformer Engine's own, of training in FP8, is a pickle within; of a model that is exported it says nothing.
    """
    if not state.numel():
        return state
    decoded = _harmless(place, io.BytesIO(state.numpy().tobytes()))
    if not isinstance(decoded, dict):
        raise _refused(place, "holds something else than the settings of quantizers")
    if _OF_TE in decoded:
        decoded[_OF_TE] = torch.empty(0, dtype=torch.uint8)
    buffer = io.BytesIO()
    torch.save(decoded, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
