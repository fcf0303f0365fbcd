"""Moving packed slices to the ranks that write them: flat byte buckets, one typed collective each, no objects."""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from quantplug.export.base import ExportTask, Held
from quantplug.export.pack import pack_slice, travel_specs
from quantplug.export.schedule import Bucket
from quantplug.formats import TensorSpec
from quantplug.mappings.base import ParamKey
from quantplug.mappings.layouts import ModelDimensions
from quantplug.topology import ShardAxis

_ALIGNMENT = 16  # Of each tensor in a bucket, so that its bytes can be viewed as any type.

Groups = Mapping[ShardAxis, dist.ProcessGroup]
Delivered = list[tuple[ExportTask, list[list[torch.Tensor]]]]
"""Tasks that this rank writes, each with what `pack_slice` gave on every rank that delivers it."""


class PackedBucket:
    """A bucket of which this rank has packed its slices.

    Packing can fail and touches no other rank; `exchange` is the collective, and comes once all ranks have packed.
    """

    def __init__(self, bucket: Bucket, held: Held, dims: ModelDimensions, rank: int, device: torch.device) -> None:
        self._bucket = bucket
        self._rank = rank
        self._specs = {task.source.key: travel_specs(task, dims) for task in bucket.tasks}
        self._own: dict[ParamKey, list[torch.Tensor]] = {}
        if len(bucket.ranks) == 1:
            self._own = {task.source.key: pack_slice(task, held[task.source.key].load(), dims) for task in bucket.tasks}
            return
        self._send = torch.empty(sum(self._sizes()), dtype=torch.uint8, device=device)
        # Here, not in the exchange: to run out of memory must be this rank's own failure, not a broken collective.
        expected = sum(self._nbytes(task) for task in bucket.tasks if task.owner == rank)
        self._received = torch.empty(expected * len(bucket.ranks), dtype=torch.uint8, device=device)
        offset = 0
        for task in self._by_owner():
            for tensor in pack_slice(task, held[task.source.key].load(), dims):
                data = tensor.contiguous().reshape(-1).view(torch.uint8)
                self._send[offset : offset + data.numel()].copy_(data)
                offset += aligned(data.numel())

    def exchange(self, groups: Groups) -> Delivered:
        """Sends every slice to the rank that writes it. A collective of the bucket's ranks."""
        mine = [task for task in self._bucket.tasks if task.owner == self._rank]
        if len(self._bucket.ranks) == 1:
            return [(task, [self._own[task.source.key]]) for task in mine]
        assert self._bucket.axis is not None
        count = len(self._bucket.ranks)
        dist.all_to_all_single(
            self._received,
            self._send,
            output_split_sizes=[self._received.numel() // count] * count,
            input_split_sizes=self._sizes(),
            group=groups[self._bucket.axis],
        )
        del self._send
        pieces = [list(self._unpack(chunk, mine)) for chunk in self._received.chunk(count)] if mine else []
        return [(task, [rank_pieces[index] for rank_pieces in pieces]) for index, task in enumerate(mine)]

    def _by_owner(self) -> list[ExportTask]:
        return [task for rank in self._bucket.ranks for task in self._bucket.tasks if task.owner == rank]

    def _sizes(self) -> list[int]:
        """Bytes that this rank sends to each rank of the group."""
        return [
            sum(self._nbytes(task) for task in self._bucket.tasks if task.owner == rank) for rank in self._bucket.ranks
        ]

    def _nbytes(self, task: ExportTask) -> int:
        return sum(aligned(spec.nbytes) for spec in self._specs[task.source.key])

    def _unpack(self, data: torch.Tensor, tasks: Sequence[ExportTask]) -> Iterator[list[torch.Tensor]]:
        offset = 0
        for task in tasks:
            tensors = []
            for spec in self._specs[task.source.key]:
                tensors.append(typed_view(data[offset : offset + spec.nbytes], spec))
                offset += aligned(spec.nbytes)
            yield tensors


def typed_view(data: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Bytes of a bucket as the tensor they are."""
    return data.view(spec.dtype).reshape(spec.shape)


def aligned(nbytes: int) -> int:
    """What a tensor of that many bytes takes up in a bucket."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
