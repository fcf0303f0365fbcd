"""Moving packed slices to the ranks that write them: flat byte buckets, one typed collective each, no objects."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

import torch
import torch.distributed as dist

from quantplug.export.pipeline.buckets import Bucket
from quantplug.export.pipeline.pack import Packed, pack_in_groups
from quantplug.export.plan.pieces import BUCKET_BYTES, PIECES_IN_A_BUCKET, Piece, travel_specs
from quantplug.export.plan.source import ReadRows
from quantplug.formats import TensorSpec
from quantplug.mappings.layouts import ModelDimensions
from quantplug.topology import ShardAxis

GROUP_BYTES = BUCKET_BYTES // PIECES_IN_A_BUCKET
"""Bytes of rows that are packed at once where nothing else is said."""

_ALIGNMENT = 16  # Bytes at whose multiples each tensor of a bucket begins, so that they can be viewed as any type.

Groups = Mapping[ShardAxis, dist.ProcessGroup]
Slices = list[Sequence[torch.Tensor]]
"""The tensors that every rank that delivers a piece has sent of it, in slice order."""
Delivered = list[tuple[Piece, Slices]]
"""Pieces that this rank writes, each with what it has received of it."""


def pack_groups(pieces: Iterable[Piece], read: ReadRows, most: int = GROUP_BYTES) -> Iterator[list[Packed]]:
    """What a rank sends of pieces in turn, of whose weights it holds one slice; on the weights' device.

    In groups of what is packed at once, as `pack_in_groups`.

    Args:
        most: Bytes of rows that are packed at once.
    """
    return pack_in_groups(((piece, read(piece)) for piece in pieces), most)


def pack_pieces(pieces: Iterable[Piece], read: ReadRows, most: int = GROUP_BYTES) -> Iterator[Packed]:
    """As `pack_groups`, one piece after another."""
    return chain.from_iterable(pack_groups(pieces, read, most))


class PackedBucket:
    """A bucket of which this rank has packed its slices.

    Packing can fail and touches no other rank; `exchange` is the collective, and comes once all ranks have packed.
    """

    def __init__(self, bucket: Bucket, read: ReadRows, dims: ModelDimensions, rank: int, device: torch.device) -> None:
        self._bucket = bucket
        self._dims = dims
        self._place = bucket.ranks.index(rank)
        self._mine = [piece for piece in bucket.pieces if piece.task.owner == rank]
        # Bytes for each rank of the group, in slice order, as all_to_all takes them. Both sides compute them from the
        # plan, so that no sizes have to be exchanged first.
        self._send_sizes = [self._nbytes(self._owned_by(owner), self._place) for owner in bucket.ranks]
        self._received_sizes = [self._nbytes(self._mine, slice_index) for slice_index in range(len(bucket.ranks))]
        # Both here, not in the exchange: to run out of memory must be this rank's own failure, not a broken collective.
        self._send = torch.empty(sum(self._send_sizes), dtype=torch.uint8, device=device)
        # A rank by itself receives what it has packed: one buffer, and no collective.
        self._received = self._send
        if len(bucket.ranks) > 1:
            self._received = torch.empty(sum(self._received_sizes), dtype=torch.uint8, device=device)
        self._pack(read)

    def exchange(self, groups: Groups) -> Delivered:
        """Sends every slice to the rank that writes it. A collective of the bucket's ranks; can be called once."""
        if len(self._bucket.ranks) > 1:
            assert self._bucket.axis is not None
            dist.all_to_all_single(
                self._received,
                self._send,
                output_split_sizes=self._received_sizes,
                input_split_sizes=self._send_sizes,
                group=groups[self._bucket.axis],
            )
        del self._send  # What was sent need not outlive the exchange; where nothing was, `_received` keeps it.
        chunks = self._received.split(self._received_sizes)
        # What a rank has sent lies in its own chunk, piece after piece; it is regrouped piece by piece, slice after
        # slice.
        of_ranks = [list(self._unpack(chunk, slice_index)) for slice_index, chunk in enumerate(chunks)]
        return [(piece, list(slices)) for piece, *slices in zip(self._mine, *of_ranks, strict=True)]

    def _pack(self, read: ReadRows) -> None:
        """Fills what is sent, owner by owner. A flat buffer, as thousands of small tensors would fragment the heap."""
        offset = 0
        pieces = (piece for rank in self._bucket.ranks for piece in self._owned_by(rank))
        for _, packed in pack_pieces(pieces, read):
            for tensor in packed:
                # As bytes: one collective carries tensors of several types, and not every backend has FP8.
                data = tensor.contiguous().reshape(-1).view(torch.uint8)
                self._send[offset : offset + data.numel()].copy_(data)
                offset += aligned(data.numel())

    def _owned_by(self, rank: int) -> list[Piece]:
        return [piece for piece in self._bucket.pieces if piece.task.owner == rank]

    def _nbytes(self, pieces: Sequence[Piece], slice_index: int) -> int:
        """Bytes in a bucket of what slice number `slice_index` sends of some pieces."""
        return sum(aligned(spec.nbytes) for piece in pieces for spec in travel_specs(piece, slice_index, self._dims))

    def _unpack(self, data: torch.Tensor, slice_index: int) -> Iterator[list[torch.Tensor]]:
        offset = 0
        for piece in self._mine:
            tensors = []
            for spec in travel_specs(piece, slice_index, self._dims):
                tensors.append(typed_view(data[offset : offset + spec.nbytes], spec))
                offset += aligned(spec.nbytes)
            yield tensors


def typed_view(data: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Bytes of a bucket as the tensor they are: a view, of the spec's dtype and shape.

    They must begin at a multiple of the dtype's size, or torch refuses the view.
    """
    return data.view(spec.dtype).reshape(spec.shape)


def aligned(nbytes: int) -> int:
    """Bytes that a tensor of that many takes up in a bucket: rounded up to the alignment."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
