"""Finished tensors from their owners to the receivers: one flat byte segment an owner, one typed transfer each."""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

from quantplug.export.base import ExportTask
from quantplug.export.gather import aligned, typed_view
from quantplug.formats import TensorSpec


class BroadcastBucket:
    """The output tensors of a few consecutive tasks of the plan, as a receiver gets them.

    Args:
        tasks: Tasks of the plan, in its order.
        rank: This rank, which fills what it owns.
        receivers: The ranks that get it all, in order.
        world_size: Number of ranks.
        device: Where the bytes travel.
    """

    def __init__(
        self, tasks: Sequence[ExportTask], rank: int, receivers: Sequence[int], world_size: int, device: torch.device
    ) -> None:
        self._rank = rank
        self._receivers = receivers
        self._everyone = len(receivers) == world_size
        self._places: dict[str, tuple[int, int, TensorSpec]] = {}
        sizes: dict[int, int] = {}
        for task in tasks:
            for spec in (spec for part in task.outputs for spec in part.tensors):
                self._places[spec.name] = (task.owner, sizes.setdefault(task.owner, 0), spec)
                sizes[task.owner] += aligned(spec.nbytes)
        self._segments = {
            owner: torch.empty(size, dtype=torch.uint8, device=device)
            for owner, size in sorted(sizes.items())
            if owner == rank or rank in receivers
        }
        self._owners = sorted(sizes)

    def fill(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes tensors that this rank owns."""
        for name, tensor in tensors:
            self._bytes(name).copy_(tensor.contiguous().reshape(-1).view(torch.uint8))

    def exchange(self) -> None:
        """Brings every segment to every receiver. A collective of all ranks."""
        if self._everyone:
            if not dist.is_initialized() or dist.get_world_size() == 1:
                return
            works = [dist.broadcast(self._segments[owner], src=owner, async_op=True) for owner in self._owners]
        else:
            transfers = list(self._transfers())
            works = dist.batch_isend_irecv(transfers) if transfers else []
        for work in works:
            work.wait()

    def tensor(self, name: str) -> torch.Tensor:
        """One of the tensors, in memory of its own, so that it does not keep the bucket alive."""
        _, _, spec = self._places[name]
        return typed_view(self._bytes(name), spec).clone()

    def _bytes(self, name: str) -> torch.Tensor:
        owner, start, spec = self._places[name]
        return self._segments[owner][start : start + spec.nbytes]

    def _transfers(self) -> Iterator[dist.P2POp]:
        """What this rank sends and receives where only some ranks receive: those who do not need bytes get none."""
        for owner in self._owners:
            for receiver in self._receivers:
                if owner == receiver or self._rank not in (owner, receiver):
                    continue
                operation, peer = (dist.isend, receiver) if self._rank == owner else (dist.irecv, owner)
                yield dist.P2POp(operation, self._segments[owner], peer)
