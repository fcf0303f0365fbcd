"""Which ranks deliver each weight and which one writes it, so that bytes and work balance over all ranks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from quantplug.export.base import WholeWeight
from quantplug.mappings.base import ParamKey


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
    load: Counter[int] = Counter()
    assigned = {}
    for weight in sorted(weights, key=lambda weight: (-weight.nbytes, weight.key.name)):
        candidates = [(load[rank], rank, ranks) for ranks in weight.replicas for rank in ranks]
        _, owner, ranks = min(candidates)
        assigned[weight.key] = Assignment(ranks, owner)
        load[owner] += weight.nbytes
        load.update(dict.fromkeys(ranks, weight.nbytes // len(ranks)))
    return assigned
