"""Carrying out a stream round by round: pack, gather to the owners, broadcast; a failing rank ends them all."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from quantplug.export.amaxes import current_amaxes
from quantplug.export.base import ExportTask, Held
from quantplug.export.broadcast import BroadcastBucket
from quantplug.export.gather import Delivered, Groups, PackedBucket
from quantplug.export.pack import join_slices
from quantplug.export.schedule import Bucket
from quantplug.mappings.layouts import ModelDimensions
from quantplug.megatron.agreement import all_or_none, collective_device, lost_ranks_named
from quantplug.topology import ShardAxis

Run = tuple[ExportTask, ...]
"""Consecutive tasks of the plan that fit one bucket."""


def cut_into_runs(tasks: Sequence[ExportTask], bucket_bytes: int) -> list[Run]:
    """Tasks in their order, cut where a bucket is full; a larger weight has a run of its own."""
    runs: list[list[ExportTask]] = []
    size = bucket_bytes
    for task in tasks:
        nbytes = max(task.travel_bytes, sum(spec.nbytes for part in task.outputs for spec in part.tensors))
        if size + nbytes > bucket_bytes:
            runs.append([])
            size = 0
        runs[-1].append(task)
        size += nbytes
    return [tuple(run) for run in runs]


@dataclass(frozen=True)
class Delivery:
    """What is the same in every round of a stream.

    Attributes:
        receivers: The ranks that get every tensor.
        groups: The process groups of slices.
    """

    dims: ModelDimensions
    groups: Groups
    rank: int
    world_size: int
    receivers: tuple[int, ...]

    def rounds(self, runs: Sequence[Run], held: Held) -> Iterator[tuple[Run, BroadcastBucket]]:
        """The tasks run after run, each with its bucket, which holds them all where this rank is a receiver.

        Amaxes are those of the weights as they are now, unless the plan has calibrated ones. A collective of all ranks.
        """
        amaxes = current_amaxes([task for run in runs for task in run], held, self.groups, self.rank)
        for run in runs:
            current = tuple(
                replace(task, amax=amaxes[task.source.key]) if task.source.key in amaxes and task.amax is None else task
                for task in run
            )
            yield run, self._deliver(current, held)

    def _deliver(self, run: Run, held: Held) -> BroadcastBucket:
        packed = all_or_none(partial(self._pack, run, held))
        delivered: Delivered = []
        with lost_ranks_named():
            while packed:
                delivered += packed.pop(0).exchange(self.groups)
        bucket = all_or_none(partial(self._join, run, delivered))
        with lost_ranks_named():
            bucket.exchange()
        return bucket

    def _pack(self, run: Run, held: Held) -> list[PackedBucket]:
        """This rank's slices, packed, for each group that it shares slices with."""
        buckets = []
        for axis in (*ShardAxis, None):
            tasks = tuple(task for task in run if task.source.axis is axis and self.rank in task.ranks)
            if tasks:
                buckets.append(Bucket(axis, tasks[0].ranks, tasks))
        return [PackedBucket(each, held, self.dims, self.rank, collective_device()) for each in buckets]

    def _join(self, run: Run, delivered: Delivered) -> BroadcastBucket:
        """A bucket with the tensors that this rank owns."""
        bucket = BroadcastBucket(run, self.rank, self.receivers, self.world_size, collective_device())
        while delivered:
            task, slices = delivered.pop(0)
            bucket.fill(join_slices(task, slices, self.dims))
        return bucket
