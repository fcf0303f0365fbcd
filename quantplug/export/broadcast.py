"""Finished tensors from their owners to the receivers: one flat byte segment an owner, one typed transfer each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from quantplug.export.base import PartOutput
from quantplug.export.gather import aligned, typed_view
from quantplug.export.join import Rows
from quantplug.formats import TensorSpec


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes are: in which segment, and from which byte on."""

    segment: int
    start: int
    spec: TensorSpec


class BroadcastBucket:
    """The output tensors of a few consecutive parts of the plan, as a receiver gets them.

    Args:
        parts: Parts of the plan, in its order, each with the rank that owns it.
        rank: This rank, which fills what it owns.
        receivers: The ranks that get it all, in order.
        world_size: Number of ranks.
        device: Where the bytes travel.
        together: Whether all that a rank owns travels as one segment; otherwise each tensor is one, which a receiver
            is given without a copy.
    """

    def __init__(
        self,
        parts: Sequence[tuple[int, PartOutput]],
        rank: int,
        receivers: Sequence[int],
        world_size: int,
        device: torch.device,
        together: bool = True,
    ) -> None:
        self._rank = rank
        self._receivers = receivers
        self._everyone = len(receivers) == world_size
        self._device = device
        self._together = together
        self._places: dict[str, _Place] = {}
        self._owners: list[int] = []
        self._sizes: list[int] = []
        for owner, spec in sorted(((owner, spec) for owner, part in parts for spec in part.tensors), key=_owner):
            if not (together and self._owners and self._owners[-1] == owner):
                self._owners.append(owner)
                self._sizes.append(0)
            self._places[spec.name] = _Place(len(self._sizes) - 1, self._sizes[-1], spec)
            self._sizes[-1] += aligned(spec.nbytes) if together else spec.nbytes
        self._segments: dict[int, torch.Tensor] = {}

    def allocate(self) -> None:
        """Makes room for all that this rank owns or receives, as far as there is none yet."""
        for segment, owner in enumerate(self._owners):
            if owner == self._rank or self._rank in self._receivers:
                self._segment(segment)

    def fill(self, rows: Rows) -> None:
        """Takes rows of a tensor that this rank owns."""
        place = self._places[rows.name]
        data = rows.data.contiguous().reshape(-1).view(torch.uint8)
        start = rows.first * (place.spec.nbytes // place.spec.shape[0]) if rows.first else 0
        self._bytes(place)[start : start + data.numel()].copy_(data)

    def exchange(self) -> None:
        """Brings every segment to every receiver. A collective of all ranks, which all have allocated."""
        if self._everyone:
            if not dist.is_initialized() or dist.get_world_size() == 1:
                return
            works = [
                dist.broadcast(self._segments[segment], src=owner, async_op=True)
                for segment, owner in enumerate(self._owners)
            ]
        else:
            transfers = list(self._transfers())
            works = dist.batch_isend_irecv(transfers) if transfers else []
        for work in works:
            work.wait()

    def tensor(self, name: str, is_last_use: bool) -> torch.Tensor:
        """One of the tensors, in memory of its own, so that it does not keep the bucket alive.

        Args:
            is_last_use: Whether it will not be asked for again: then the bucket need not keep it.
        """
        place = self._places[name]
        tensor = typed_view(self._bytes(place), place.spec)
        if self._together or not is_last_use:
            return tensor.clone()
        del self._segments[place.segment]
        return tensor

    def _segment(self, number: int) -> torch.Tensor:
        if number not in self._segments:
            self._segments[number] = torch.empty(self._sizes[number], dtype=torch.uint8, device=self._device)
        return self._segments[number]

    def _bytes(self, place: _Place) -> torch.Tensor:
        return self._segment(place.segment)[place.start : place.start + place.spec.nbytes]

    def _transfers(self) -> Iterator[dist.P2POp]:
        """What this rank sends and receives where only some ranks receive: those who do not need bytes get none."""
        for segment, owner in enumerate(self._owners):
            for receiver in self._receivers:
                if owner == receiver or self._rank not in (owner, receiver):
                    continue
                operation, peer = (dist.isend, receiver) if self._rank == owner else (dist.irecv, owner)
                yield dist.P2POp(operation, self._segments[segment], peer)


def _owner(owned: tuple[int, TensorSpec]) -> int:
    return owned[0]
