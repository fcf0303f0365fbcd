"""Which ranks deliver each weight, which one writes it, and in which order: bytes and work balance over all ranks."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantplug.export.plan.types import ExportTask, WholeWeight
from quantplug.mappings.keys import ParamKey
from quantplug.topology import ShardAxis

PHASES = (ShardAxis.TP, ShardAxis.ETP, None)
"""Weights cut over tensor parallel ranks come first, then those cut over expert tensor parallel ones, then whole ones.

Every rank is in one group of each kind: within a phase no rank is in two groups, so that none waits for another.
"""


@dataclass(frozen=True)
class Assignment:
    """Who brings one weight to disk.

    Attributes:
        ranks: The ranks that deliver it, in slice order; all in one tensor parallel group.
        owner: The one of them that writes it.
    """

    ranks: tuple[int, ...]
    owner: int


def assign(weights: Sequence[WholeWeight]) -> dict[ParamKey, Assignment]:
    """Gives each weight, the largest first, to the rank that has the least to do of those that hold it.

    A pure function of its input, so that all ranks come to the same result.
    """
    # Bytes of work that each rank has been given so far.
    load: Counter[int] = Counter()
    assigned = {}
    # The largest first, so that small ones are left to even out the loads (longest processing time first; Graham,
    # 1969). Names break ties, as the order in which a rank lists its weights must not matter.
    for weight in sorted(weights, key=lambda weight: (-weight.nbytes, weight.key.name)):
        # Of several copies any will do: all data parallel ranks take their part of the writing.
        candidates = [(load[rank], rank, ranks) for ranks in weight.replicas for rank in ranks]
        _, owner, ranks = min(candidates)
        assigned[weight.key] = Assignment(ranks, owner)
        load[owner] += weight.nbytes
        # The owner writes all of it; every rank of the group packs and sends its slice. Counter.update adds.
        load.update(dict.fromkeys(ranks, weight.nbytes // len(ranks)))
    return assigned | _side_by_side(weights, assigned)


def _side_by_side(
    weights: Sequence[WholeWeight], assigned: Mapping[ParamKey, Assignment]
) -> dict[ParamKey, Assignment]:
    """Deals out anew the experts that the same ranks hold, so that those of one owner follow each other.

    They are alike, so that the balance stays; and where they lie in one tensor, an owner sends them in one piece.
    """
    alike: defaultdict[tuple[str, int | None, tuple[tuple[int, ...], ...]], list[ParamKey]] = defaultdict(list)
    for weight in weights:
        if weight.key.expert is not None:
            alike[weight.key.module, weight.key.layer, weight.replicas].append(weight.key)
    dealt: dict[ParamKey, Assignment] = {}
    for keys in alike.values():
        shares = sorted((assigned[key] for key in keys), key=lambda share: share.owner)
        dealt.update(zip(sorted(keys), shares, strict=True))
    return dealt


def in_order(tasks: Sequence[ExportTask]) -> list[ExportTask]:
    """Tasks phase by phase; within one in the order of the plan. Each rank writes its files in this order."""
    return [task for phase in PHASES for task in tasks if task.source.axis is phase]
