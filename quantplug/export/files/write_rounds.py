"""Carrying out a plan: pack, exchange and write, round by round, so that a failing rank ends all of them together.

What one rank holds whole, as experts are under expert parallelism, and everything where a checkpoint is the source, is
exchanged with nobody: it is written piece by piece while the next piece is packed.
"""

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from quantplug.checkpoint.disk_errors import disk_errors
from quantplug.export.files.sink import FileSink
from quantplug.export.files.staging import Staging
from quantplug.export.pipeline.assemble import assemble_piece
from quantplug.export.pipeline.buckets import Bucket, Round, make_rounds
from quantplug.export.pipeline.gather import Delivered, Groups, PackedBucket, Slices, pack_groups
from quantplug.export.pipeline.writer_thread import WriterThread
from quantplug.export.plan.pieces import PIECES_IN_A_BUCKET, Piece, source_bytes
from quantplug.export.plan.source import ReadRows
from quantplug.export.plan.types import ExportPlan, ShardFile
from quantplug.mappings.layouts import ModelDimensions
from quantplug.megatron.agreement import all_or_none, collective_device, lost_ranks_named, union
from quantplug.progress import Progress


@dataclass(frozen=True)
class Reading:
    """How rows come to be packed.

    Attributes:
        read: Gives the rows that this rank has of a piece.
        bucket_bytes: Memory of a bucket; rows are read in pieces that are a fraction of it.
    """

    read: ReadRows
    bucket_bytes: int


def write_tensors(
    plan: ExportPlan,
    reading: Reading,
    staging: Staging,
    rank: int,
    groups: Groups,
    progress: Progress,
    sizes: Mapping[str, int],
) -> None:
    """Writes every tensor of a plan that is not in a finished file yet. A collective of all ranks, which may be one.

    Before each round all ranks agree that each has written the last one and packed the next; so no rank waits in a
    collective for one that has failed. Memory holds at most a bucket that is sent and one that is received, or one that
    was received and working copies of a piece; of what is not exchanged, a few pieces.

    Args:
        groups: The process groups of slices; none where a rank holds all of every weight.
        progress: Called in bytes of the weights that this rank writes.
        sizes: Bytes of all files of the export, by their paths, also of those that are written after these.

    Raises:
        DestinationError: Another export left its unfinished files in the way, or still runs.
        WriteError: The disk refused a file on some rank.
        SourceError: What is read is no longer what the prescan has looked at.
        RankLostError: A rank ended.
    """
    # Each step on all ranks before the next one: no rank claims the directory while another still finds it locked.
    for step in (partial(staging.require_space, sizes), staging.make, staging.lock, staging.open):
        all_or_none(disk_errors(staging.directory)(step))
    finished = _finished_everywhere(plan, staging, rank)
    # All tensors of a weight are in one file, so that the first one tells of all.
    kept = {name for file in plan.files if file.name in finished for name in file.tensors}
    todo = [task for task in plan.tasks if task.outputs[0].tensors[0].name not in kept]
    files = [file for file in plan.files if file.name not in finished]
    rounds = make_rounds(todo, plan.dims, reading.bucket_bytes)
    sink = FileSink(staging.directory, files, plan, rank)
    full = _full_after(rounds, files)
    total = sum(source_bytes(piece) for piece in _all_pieces(rounds) if piece.task.owner == rank)
    delivered: Delivered = []
    try:
        if full:
            # Agreed upon before the first round: a rank must not open a file that its maker has not made.
            all_or_none(disk_errors(staging.directory)(sink.make_shared))
        with WriterThread() as writing:
            steps = _RankWork(reading, plan.dims, sink, staging.directory, rank, writing, progress, total)
            for number, bucket in enumerate(_mine(each, rank) for each in rounds):
                # All ranks have agreed on having written what the round before the last one delivered.
                packed = all_or_none(partial(steps.write_and_pack, delivered, bucket, full.get(number - 2, ())))
                with lost_ranks_named():
                    delivered = [] if packed is None else packed.exchange(groups)
                del packed  # Or what it received would be there while the next one is packed.
            # No bucket is left to pack: this writes what the last round delivered, and names what was full a round
            # before it. What that last round has filled takes one more agreement, that all ranks have written it.
            all_or_none(partial(steps.write_and_pack, delivered, None, full.get(len(rounds) - 2, ())))
            if full:
                all_or_none(partial(steps.write_and_pack, [], None, full.get(len(rounds) - 1, ())))
    finally:
        sink.close()
    sink.check_complete()


def _full_after(rounds: Sequence[Round], files: Sequence[ShardFile]) -> dict[int, list[str]]:
    """Files that several ranks write, by the number of the last round that delivers something of them."""
    home = {name: file.name for file in files if len(file.owners) > 1 for name in file.tensors}
    last: dict[str, int] = {}
    for number, buckets in enumerate(rounds):
        for piece in _all_pieces([buckets]):
            if piece.task.unit in home:
                # Rounds come in order, so that the last number stays.
                last[home[piece.task.unit]] = number
    full: defaultdict[int, list[str]] = defaultdict(list)
    for name, number in last.items():
        full[number].append(name)
    return dict(full)


def _all_pieces(rounds: Iterable[Round]) -> Iterator[Piece]:
    return (piece for buckets in rounds for bucket in buckets for piece in bucket.pieces)


@dataclass
class _RankWork:
    """What a rank does by itself between two collectives."""

    reading: Reading
    dims: ModelDimensions
    sink: FileSink
    directory: Path
    rank: int
    writing: WriterThread
    progress: Progress
    total: int
    done: int = 0

    def write_and_pack(self, delivered: Delivered, bucket: Bucket | None, full: Container[str]) -> PackedBucket | None:
        """Writes what the last round delivered, then packs what the next one sends, or writes it if that is to nobody.

        Args:
            full: Files of several ranks that have become full.
        """
        if delivered or bucket is None:
            self.writing.wait()  # Rows are written by one thread at a time.
        with disk_errors(self.directory):
            self.sink.name_shared(full)
        while delivered:
            self._write_delivered(*delivered.pop(0))
        if bucket is None:
            return None
        if len(bucket.ranks) > 1:
            self.writing.wait()
            return PackedBucket(bucket, self.reading.read, self.dims, self.rank, collective_device())
        self._pack_and_write(bucket)
        return None

    def _pack_and_write(self, bucket: Bucket) -> None:
        handed_over = 0
        group_bytes = self.reading.bucket_bytes // PIECES_IN_A_BUCKET
        for group in pack_groups(bucket.pieces, self.reading.read, group_bytes):
            pieces = [piece for piece, _ in group]
            # From the device here: another thread would not wait for the stream that has packed it. A group at once,
            # whose tensors share memory anyway: piece by piece the thread would soon wait for the next group.
            self.writing.do(partial(self._write_group, [(piece, [[it.cpu() for it in made]]) for piece, made in group]))
            del group
            handed_over += 1
            for piece in pieces:
                self._count(piece)
        # What the last bucket left is written by now, as the next agreement says; of this one the last groups may wait,
        # so that the thread has work while the next bucket is begun.
        self.writing.wait(handed_over)

    def _write_group(self, group: Delivered) -> None:
        while group:  # Emptied on the way, so that nothing outlives its being written.
            self._write(*group.pop(0))

    def _write_delivered(self, piece: Piece, slices: Slices) -> None:
        self._write(piece, slices)
        self._count(piece)

    def _write(self, piece: Piece, slices: Slices) -> None:
        with disk_errors(self.directory):
            for rows in assemble_piece(piece, slices, self.dims):
                self.sink.write(rows)

    def _count(self, piece: Piece) -> None:
        self.done += source_bytes(piece)
        self.progress("Packing and writing", self.done, self.total)


def _finished_everywhere(plan: ExportPlan, staging: Staging, rank: int) -> set[str]:
    """Files that their owners find finished, known to all ranks."""
    # A file of several ranks is looked at by the first of them alone.
    own = staging.finished([file for file in plan.files if file.owners[0] == rank], plan.expected())
    # As one vector of flags over the plan's files, which all ranks have in one order.
    flags = union(torch.tensor([file.name in own for file in plan.files], dtype=torch.uint8))
    return {file.name for file, flag in zip(plan.files, flags.tolist(), strict=True) if flag}


def _mine(buckets: Round, rank: int) -> Bucket | None:
    """This rank's bucket of a round; it may have none while others still have."""
    return next((bucket for bucket in buckets if rank in bucket.ranks), None)
