"""Carrying out a stream round by round: pack, gather to the owners, broadcast; a failing rank ends them all."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch

from quantplug.export.pipeline.amaxes import WeightAmax, amaxes_of_wholes
from quantplug.export.pipeline.assemble import assemble_piece
from quantplug.export.pipeline.buckets import Bucket, batches, payload
from quantplug.export.pipeline.gather import Delivered, Groups, PackedBucket, Slices
from quantplug.export.pipeline.outliers import refuse_outliers
from quantplug.export.pipeline.prescan import prescan
from quantplug.export.plan.pieces import Piece, cut
from quantplug.export.plan.source import ReadRows, Source
from quantplug.export.plan.types import ExportTask, PartOutput
from quantplug.export.stream.broadcast import BroadcastBucket
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions
from quantplug.megatron.agreement import all_or_none, collective_device, lost_ranks_named
from quantplug.topology import ShardAxis


@dataclass(frozen=True)
class Run:
    """Consecutive parts of the plan that are broadcast together.

    Attributes:
        batches: Their pieces, as many at a time as fit one bucket.
        is_large: Whether it is one part that is larger than a bucket, whose tensors receivers get without a copy.
    """

    batches: tuple[tuple[Piece, ...], ...]
    is_large: bool

    @property
    def parts(self) -> list[tuple[int, PartOutput]]:
        """Every part with the rank that owns it."""
        # Every part has exactly one piece that begins at row 0, the first.
        pieces = (piece for batch in self.batches for piece in batch)
        return [(piece.task.owner, piece.output) for piece in pieces if piece.start == 0]

    def with_tasks(self, tasks: Mapping[ParamKey, ExportTask]) -> "Run":
        """The same run of other tasks for the same weights."""
        batches = (tuple(replace(piece, task=tasks[piece.task.source.key]) for piece in it) for it in self.batches)
        return replace(self, batches=tuple(batches))


def cut_into_runs(tasks: Sequence[ExportTask], dims: ModelDimensions, bucket_bytes: int) -> list[Run]:
    """Weights in their order, cut where a bucket is full.

    Every part of a larger weight has a run of its own, and so has every tensor of all experts of a layer.
    """
    limit = payload(bucket_bytes)
    runs: list[Run] = []
    small: list[Piece] = []
    size = 0

    def flush() -> None:
        if small:
            runs.append(Run((tuple(small),), is_large=False))
            small.clear()

    # Tasks of experts in one tensor follow each other in the plan, so that a unit is all of them.
    for _, unit in groupby(tasks, key=lambda task: task.unit):
        of_unit = list(unit)
        pieces = [piece for task in of_unit for piece in cut(task, dims, bucket_bytes)]
        written = sum(part.nbytes(spec) for task in of_unit for part in task.outputs for spec in part.tensors)
        # A bucket holds what is exchanged between slices, then what is written: the larger of the two must fit.
        nbytes = max(written, sum(piece.in_flight for piece in pieces))
        is_fused = of_unit[0].outputs[0].placement is not None
        if size + nbytes > limit or is_fused:
            flush()
            size = 0
        if nbytes > limit or is_fused:
            # Part by part, so that no more than one large tensor is there at a time: gate is given away before up is
            # packed.
            parts = ([piece for piece in pieces if piece.part == part] for part in range(len(of_unit[0].outputs)))
            runs += [Run(tuple(batches(part, bucket_bytes)), is_large=True) for part in parts]
        else:
            small += pieces
            size += nbytes
    flush()
    return runs


@dataclass(frozen=True)
class Delivery:
    """What is the same in every round of a stream.

    Attributes:
        receivers: The ranks that get every tensor.
        groups: The process groups of slices.
        policy: What becomes of weights that have grown beyond a calibrated amax.
    """

    dims: ModelDimensions
    groups: Groups
    rank: int
    world_size: int
    receivers: tuple[int, ...]
    policy: WeightAmax = WeightAmax.CALIBRATED

    def rounds(self, runs: Sequence[Run], source: Source) -> Iterator[tuple[Run, BroadcastBucket]]:
        """The runs one after another, each with its bucket, which holds it all where this rank is a receiver.

        Amaxes are those of the weights as they are now, unless the plan has calibrated ones that are to be kept. A
        collective of all ranks.
        """
        # Each weight once, in the order of the runs, which all ranks have.
        by_key = {piece.task.source.key: piece.task for run in runs for batch in run.batches for piece in batch}
        tasks = list(by_key.values())
        # Marks would cost as much as all else, at every step of a training, and nothing is read a second time.
        look = partial(prescan, tasks, source, policy=self.policy, with_marks=False)
        found = all_or_none(torch.no_grad()(look))
        amaxes = amaxes_of_wholes(tasks, found.amaxes, self.groups)
        now = {task.source.key: self._with_amax(task, amaxes) for task in tasks}
        all_or_none(torch.no_grad()(partial(refuse_outliers, tuple(now.values()), found.typical, source)))
        for run in runs:
            yield run, self._deliver(run.with_tasks(now), source)

    def _with_amax(self, task: ExportTask, amaxes: Mapping[ParamKey, float]) -> ExportTask:
        """The task by the amax that it is packed by now."""
        # A calibrated amax stays, unless all are to be refreshed; without one, that of the weights as they are is all
        # there is.
        is_kept = task.amax is not None and self.policy is not WeightAmax.REFRESH
        key = task.source.key
        return task if is_kept or key not in amaxes else replace(task, amax=amaxes[key])

    @torch.no_grad()
    def _deliver(self, run: Run, source: Source) -> BroadcastBucket:
        bucket = BroadcastBucket(
            run.parts, self.rank, self.receivers, self.world_size, collective_device(), together=not run.is_large
        )
        delivered: Delivered = []
        for batch in run.batches:
            # What can fail on one rank is done under agreement; the collectives between come only when all have come
            # through.
            packed = all_or_none(partial(self._fill_and_pack, bucket, delivered, batch, source.read))
            with lost_ranks_named():
                # Each bucket is dropped before the next one is exchanged, with all that it has sent.
                while packed:
                    delivered += packed.pop(0).exchange(self.groups)
        # The last batch is filled in, and memory for what is received is found, before anybody broadcasts.
        all_or_none(partial(self._fill_and_pack, bucket, delivered, (), source.read))
        with lost_ranks_named():
            bucket.exchange()
        return bucket

    def _fill_and_pack(
        self, bucket: BroadcastBucket, delivered: Delivered, batch: Sequence[Piece], read: ReadRows
    ) -> list[PackedBucket]:
        """Takes what the last batch delivered, then packs the next one for each group that has slices of it."""
        while delivered:
            self._fill(bucket, *delivered.pop(0))
        if not batch:
            bucket.allocate()
            return []
        buckets = []
        # In one order on all ranks: were one in the collective of its TP group and another in that of its ETP group,
        # both would wait for ever. A rank is in one group of each axis, which is that of all pieces here.
        for axis in (*ShardAxis, None):
            pieces = tuple(piece for piece in batch if piece.task.source.axis is axis and self.rank in piece.task.ranks)
            if pieces:
                buckets.append(Bucket(axis, pieces[0].task.ranks, pieces))
        return [PackedBucket(each, read, self.dims, self.rank, collective_device()) for each in buckets]

    def _fill(self, bucket: BroadcastBucket, piece: Piece, slices: Slices) -> None:
        for rows in assemble_piece(piece, slices, self.dims):
            bucket.fill(rows)
