"""In which order and in what company weights are packed, exchanged and written.

Every rank is in one tensor parallel group and one expert tensor parallel group. Weights that are cut over the first
come first, then those cut over the second, then those that one rank holds whole: within each phase no rank is in two
groups, so groups work side by side and none waits for another. A round is one bucket for each group.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from quantplug.export.base import ExportTask
from quantplug.topology import ShardAxis

BUCKET_BYTES = 256 * 2**20

_PHASES = (ShardAxis.TP, ShardAxis.ETP, None)


@dataclass(frozen=True)
class Bucket:
    """What one group of ranks does in one round.

    Attributes:
        axis: The parallel dimension of the group; None for a rank by itself.
        ranks: The group, in slice order.
    """

    axis: ShardAxis | None
    ranks: tuple[int, ...]
    tasks: tuple[ExportTask, ...]


Round = tuple[Bucket, ...]


def in_order(tasks: Sequence[ExportTask]) -> list[ExportTask]:
    """Tasks phase by phase; within one in the order of the plan. Each rank writes its files in this order."""
    return [task for phase in _PHASES for task in tasks if _axis(task) is phase]


def make_rounds(tasks: Sequence[ExportTask], bucket_bytes: int = BUCKET_BYTES) -> list[Round]:
    """Cuts the work into rounds of buckets of at most `bucket_bytes`; a larger weight has a bucket of its own."""
    rounds: list[Round] = []
    for phase in _PHASES:
        by_group: defaultdict[tuple[int, ...], list[ExportTask]] = defaultdict(list)
        for task in tasks:
            if _axis(task) is phase:
                by_group[task.ranks].append(task)
        buckets = [_buckets(phase, ranks, group, bucket_bytes) for ranks, group in by_group.items()]
        rounds += [tuple(bucket for bucket in row if bucket is not None) for row in zip_longest(*buckets)]
    return rounds


def _axis(task: ExportTask) -> ShardAxis | None:
    return task.source.axis


def _buckets(
    axis: ShardAxis | None, ranks: tuple[int, ...], tasks: Sequence[ExportTask], limit: int
) -> Iterator[Bucket]:
    bucket: list[ExportTask] = []
    size = 0
    for task in tasks:
        if bucket and size + task.travel_bytes > limit:
            yield Bucket(axis, ranks, tuple(bucket))
            bucket, size = [], 0
        bucket.append(task)
        size += task.travel_bytes
    yield Bucket(axis, ranks, tuple(bucket))
