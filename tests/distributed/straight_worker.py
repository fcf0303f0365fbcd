"""Saves a model as a trainer does, on several ranks: stacked, with states of its optimizer and generators beside."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from quantplug.megatron import cpu
from quantplug.megatron.checkpoint.files import results_within_process
from quantplug.megatron.parallel import initialize_parallel
from tests.export.checkpoints import load


def main(source: Path, directory: Path, *sizes: str) -> None:
    initialize_parallel(**{name: int(size) for name, size in (each.split("=") for each in sizes)})
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = load(source)
    directory.mkdir(exist_ok=True)
    state = {
        "model": model.sharded_state_dict(),
        "optimizer": ShardedTensor.from_rank_offsets(
            "optimizer.state.exp_avg.decoder.final_layernorm.weight", torch.ones(8), (0, rank, ranks)
        ),
        "rng_state": ShardedObject("rng_state", {"seed": rank}, (ranks,), (rank,)),
    }
    with cpu.checkpointing(), results_within_process():
        dist_checkpointing.save(state, str(directory), validate_access_integrity=False)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
