"""Parallel layout as plain data, so that plans and tests need no process group."""

from dataclasses import dataclass
from enum import StrEnum


class ShardAxis(StrEnum):
    """The parallel dimension that cuts a tensor."""

    TP = "tp"
    ETP = "etp"


@dataclass(frozen=True)
class ParallelTopology:
    """Sizes of Megatron's parallel dimensions and this process's place in each.

    Attributes:
        tp, ep, etp, pp: Tensor, expert, expert-tensor and pipeline parallel sizes.
        tp_rank, ep_rank, etp_rank, pp_rank: This rank's index in each group.
        rank, world_size: Global rank and number of ranks.
    """

    tp: int = 1
    ep: int = 1
    etp: int = 1
    pp: int = 1
    tp_rank: int = 0
    ep_rank: int = 0
    etp_rank: int = 0
    pp_rank: int = 0
    rank: int = 0
    world_size: int = 1

    def place_on(self, axis: ShardAxis) -> tuple[int, int]:
        """This rank's index in the group that cuts along `axis`, and the size of that group."""
        # No default: mypy says so where an axis is added and has no place here.
        match axis:
            case ShardAxis.TP:
                return self.tp_rank, self.tp
            case ShardAxis.ETP:
                return self.etp_rank, self.etp


@dataclass(frozen=True)
class Shard:
    """Which slice of a whole tensor a rank holds: slice `index` of `count` equal ones.

    Attributes:
        axis: The parallel dimension that cuts it; ETP for the routed experts, TP for all else.
        dim: The dimension of the Megatron tensor that is cut.
    """

    axis: ShardAxis
    dim: int
    index: int
    count: int
