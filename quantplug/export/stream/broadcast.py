"""Finished tensors from their owners to the receivers: one flat byte segment an owner, one typed transfer each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from quantplug.export.pipeline.gather import aligned, typed_view
from quantplug.export.plan.types import PartOutput, TensorRows
from quantplug.formats import TensorSpec


@dataclass(frozen=True)
class _BufferSpan:
    """Where a tensor's bytes are: in which buffer, and from which byte on."""

    buffer: int
    start: int
    spec: TensorSpec


@dataclass(frozen=True)
class _Segment:
    """Bytes of a buffer that one rank owns and the receivers get."""

    owner: int
    buffer: int
    start: int
    stop: int


class BroadcastBucket:
    """The output tensors of a few consecutive parts of the plan, as a receiver gets them.

    Args:
        parts: Parts of the plan, in its order, each with the rank that owns it.
        rank: This rank, which fills what it owns.
        receivers: The ranks that get it all, in order.
        world_size: Number of ranks.
        device: Where the bytes travel.
        together: Whether all that a rank owns travels as one segment; otherwise each tensor has memory of its own,
            which a receiver is given without a copy. So it is for tensors that several ranks own experts of.
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
        self._spans: dict[str, _BufferSpan] = {}
        self._sizes: list[int] = []
        self._segments = self._owned_together(parts) if together else self._owned_apart(parts)
        self._buffers: dict[int, torch.Tensor] = {}

    def _owned_together(self, parts: Sequence[tuple[int, PartOutput]]) -> list[_Segment]:
        """One buffer an owner, with all of its tensors."""
        owners = sorted({owner for owner, _ in parts})
        for buffer, owner in enumerate(owners):
            self._sizes.append(0)
            for spec in (spec for of_part, part in parts if of_part == owner for spec in part.tensors):
                # One behind the other, each where a view of its type may begin.
                self._spans[spec.name] = _BufferSpan(buffer, self._sizes[-1], spec)
                self._sizes[-1] += aligned(spec.nbytes)
        return [_Segment(owner, buffer, 0, self._sizes[buffer]) for buffer, owner in enumerate(owners)]

    def _owned_apart(self, parts: Sequence[tuple[int, PartOutput]]) -> list[_Segment]:
        """One buffer a tensor; experts of a tensor of all experts are segments of it, one behind the other."""
        segments: list[_Segment] = []
        for owner, part in parts:
            for spec in part.tensors:
                # The first expert makes the buffer of all of them.
                if spec.name not in self._spans:
                    self._spans[spec.name] = _BufferSpan(len(self._sizes), 0, spec)
                    self._sizes.append(spec.nbytes)
                nbytes, buffer = part.nbytes(spec), self._spans[spec.name].buffer
                # A scale of all experts has its bytes with the first of them, and none with the others.
                start = part.placement.expert * nbytes if part.placement else 0
                if nbytes:
                    segments.append(_Segment(owner, buffer, start, start + nbytes))
        # In the order of the bytes, not of the plan: experts of one owner that lie side by side become one transfer.
        return _merged(sorted(segments, key=lambda segment: (segment.buffer, segment.start)))

    def allocate(self) -> None:
        """Makes room for all that this rank owns or receives, as far as there is none yet."""
        for segment in self._segments:
            # Here, where ranks can still agree that one of them has run out of memory, and not amid the collective.
            if segment.owner == self._rank or self._rank in self._receivers:
                self._buffer(segment.buffer)

    def fill(self, rows: TensorRows) -> None:
        """Takes rows of a tensor that this rank owns."""
        span = self._spans[rows.name]
        data = rows.data.contiguous().reshape(-1).view(torch.uint8)
        # Bytes a row, times the rows before it. A tensor without axes has row 0 alone.
        start = rows.first * (span.spec.nbytes // span.spec.shape[0]) if rows.first else 0
        self._bytes(span)[start : start + data.numel()].copy_(data)

    def exchange(self) -> None:
        """Brings every segment to every receiver. A collective of all ranks, which all have allocated."""
        if self._everyone:
            if not dist.is_initialized() or dist.get_world_size() == 1:
                return
            # All of them are begun, in the same order on every rank, before one is waited for: small transfers overlap.
            works = [
                dist.broadcast(self._data(segment), src=segment.owner, async_op=True) for segment in self._segments
            ]
        else:
            # As one batch, so that NCCL matches sends and receives of all peers at once; one after another they could
            # wait for each other in a ring.
            transfers = list(self._transfers())
            works = dist.batch_isend_irecv(transfers) if transfers else []
        for work in works:
            work.wait()

    def tensor(self, name: str, is_last_use: bool) -> torch.Tensor:
        """One of the tensors, in memory of its own, so that it does not keep the bucket alive.

        Args:
            is_last_use: Whether it will not be asked for again: then the bucket need not keep it.
        """
        span = self._spans[name]
        tensor = typed_view(self._bytes(span), span.spec)
        if self._together or not is_last_use:
            return tensor.clone()
        del self._buffers[span.buffer]
        return tensor

    def _buffer(self, number: int) -> torch.Tensor:
        if number not in self._buffers:
            self._buffers[number] = torch.empty(self._sizes[number], dtype=torch.uint8, device=self._device)
        return self._buffers[number]

    def _bytes(self, span: _BufferSpan) -> torch.Tensor:
        return self._buffer(span.buffer)[span.start : span.start + span.spec.nbytes]

    def _data(self, segment: _Segment) -> torch.Tensor:
        return self._buffers[segment.buffer][segment.start : segment.stop]

    def _transfers(self) -> Iterator[dist.P2POp]:
        """What this rank sends and receives where only some ranks receive: those who do not need bytes get none.

        Segments and receivers come in one order on all ranks, so that the sends of a pair of ranks meet their receives.
        """
        for segment in self._segments:
            for receiver in self._receivers:
                if segment.owner == receiver or self._rank not in (segment.owner, receiver):
                    continue
                sends = self._rank == segment.owner
                operation, peer = (dist.isend, receiver) if sends else (dist.irecv, segment.owner)
                yield dist.P2POp(operation, self._data(segment), peer)


def _merged(segments: Sequence[_Segment]) -> list[_Segment]:
    """Segments of one owner that follow each other in a buffer as one."""
    merged: list[_Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if last and (last.owner, last.buffer, last.stop) == (segment.owner, segment.buffer, segment.start):
            merged[-1] = replace(last, stop=segment.stop)
        else:
            merged.append(segment)
    return merged
