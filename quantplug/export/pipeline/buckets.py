"""In which order and in what company weights are packed, exchanged and written.

Every rank is in one tensor parallel group and one expert tensor parallel group. Weights that are cut over the first
come first, then those cut over the second, then those that one rank holds whole: within each phase no rank is in two
groups, so groups work side by side and none waits for another. A round is one bucket for each group.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from quantplug.export.plan.ownership import PHASES
from quantplug.export.plan.pieces import BUCKET_BYTES, Piece, cut
from quantplug.export.plan.types import ExportTask
from quantplug.mappings.layouts import ModelDimensions
from quantplug.topology import ShardAxis

# One bucket is sent and one received, or one received and one written from: what is left of two is for working copies
# of a piece, for formats and the heap.
_PAYLOAD = 0.75


@dataclass(frozen=True)
class Bucket:
    """What one group of ranks does in one round.

    Attributes:
        axis: The parallel dimension of the group; None for a rank by itself.
        ranks: The group, in slice order.
    """

    axis: ShardAxis | None
    ranks: tuple[int, ...]
    pieces: tuple[Piece, ...]


Round = tuple[Bucket, ...]


def make_rounds(tasks: Sequence[ExportTask], dims: ModelDimensions, bucket_bytes: int = BUCKET_BYTES) -> list[Round]:
    """Cuts the work into rounds of buckets, of which any two and the work on them fit `2 * bucket_bytes` of memory."""
    rounds: list[Round] = []
    for phase in PHASES:
        by_group: defaultdict[tuple[int, ...], list[Piece]] = defaultdict(list)
        # The order of tasks is the plan's, which every rank has: ranks of a group fill the same buckets without asking.
        for task in tasks:
            if task.source.axis is phase:
                by_group[task.ranks] += cut(task, dims, bucket_bytes)
        buckets = [
            [Bucket(phase, ranks, batch) for batch in batches(pieces, bucket_bytes)]
            for ranks, pieces in by_group.items()
        ]
        # A round has the next bucket of every group that still has one. Groups with fewer sit out the last rounds of a
        # phase.
        rounds += [tuple(bucket for bucket in row if bucket is not None) for row in zip_longest(*buckets)]
    return rounds


def payload(bucket_bytes: int) -> int:
    """Bytes of tensors that a bucket may hold."""
    return int(bucket_bytes * _PAYLOAD)


def batches(pieces: Sequence[Piece], bucket_bytes: int) -> Iterator[tuple[Piece, ...]]:
    """Pieces in their order, cut where a bucket is full; a larger one, which cannot be cut, has one of its own."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        # A piece that is too large goes alone: a single expert of a tensor that cannot be cut must still travel.
        if batch and size + piece.in_flight > payload(bucket_bytes):
            yield tuple(batch)
            batch, size = [], 0
        batch.append(piece)
        size += piece.in_flight
    yield tuple(batch)
