"""Parallel layout as plain data, so that plans and tests need no process group."""

from dataclasses import dataclass


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
