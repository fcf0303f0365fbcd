"""Checkpoints as trainers write them: layers and experts stacked, and beside the model all that a training needs again.

Optimizer state of Megatron-Core needs a GPU. Its keys are those of megatron/core/optimizer/distrib_optimizer.py 0.16.1,
its values are none; keys of the rest are those of Megatron-LM's megatron/training/checkpointing.py, core_v0.16.1.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor
from torch import nn

from quantplug.megatron import cpu
from quantplug.megatron.checkpoint.files import results_within_process
from quantplug.megatron.parallel import current_topology

CHECKPOINTS = Path(__file__).parents[4] / "shared" / "checkpoints"
"""Of trainers themselves; not everywhere."""
BESIDE = {"optimizer": 4, "random number generators": 1, "rerun state": 1}
"""What `save_trained` writes beside the model: how many entries of each kind, on one rank."""


def save_trained(
    chunks: Sequence[nn.Module], root: Path, iteration: int = 100, *, alike: bool = True, **arguments: Any
) -> Path:
    """Saves as Megatron-LM does; the directory of the iteration. All ranks call it.

    Args:
        alike: Whether the trainer said no more of its layers than that they are alike, so that they are stacked.
        arguments: More of what Megatron-LM's command line said.
    """
    directory = root / f"iter_{iteration:07d}"
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
        (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    dist.barrier()
    frequency = chunks[0].config.moe_layer_freq
    if alike:
        chunks[0].config.moe_layer_freq = 1
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    with cpu.checkpointing(), results_within_process():
        state: dict[str, Any] = {
            name: chunk.sharded_state_dict(metadata={"singleton_local_shards": False})
            for name, chunk in zip(names, chunks, strict=True)
        }
        noted = {"args": argparse.Namespace(**{"num_layers": chunks[0].config.num_layers, **arguments})}
        content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
        dist_checkpointing.save(
            {**state, **_beside(), **noted, "iteration": iteration}, str(directory), content_metadata=content
        )
    chunks[0].config.moe_layer_freq = frequency
    return directory


def _beside() -> ShardedStateDict:
    topology, rank, world = current_topology(), dist.get_rank(), dist.get_world_size()
    optimizer = {
        key: ShardedTensor.from_rank_offsets(key, torch.full((4,), 7.0), (0, rank, world))
        for key in (
            "optimizer.state.exp_avg.decoder.final_layernorm.weight",
            "optimizer.state.fp32_param.decoder.final_layernorm.weight",
            "chained_0.optimizer.state.exp_avg_sq.output_layer.weight",
        )
    }
    step = ShardedObject("optimizer.distributed.dp_group_idx_0.per_bucket_numel", [3], (1,), (0,), replica_id=rank)
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    place, shape = (topology.pp_rank, topology.tp_rank), (topology.pp, topology.tp)
    return {
        "optimizer": {**optimizer, "numel": step},
        "rng_state": ShardedObject("rng_state", [{"seed": 3}], shape, place, replica_id=replica),
        "rerun": ShardedObject("rerun_state_machine_state", {"mode": "x"}, (world,), (rank,)),
    }
