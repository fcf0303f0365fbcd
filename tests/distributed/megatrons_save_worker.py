"""Saves a quantized mixture of experts at TP2 EP2 with Megatron's own call, with our wrappers."""

import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch.distributed as dist
from megatron.core import dist_checkpointing

import quantplug.plugins  # noqa: F401
from quantplug.megatron import cpu
from quantplug.megatron.checkpoint.files import results_within_process
from quantplug.megatron.parallel import initialize_parallel
from tests.plugins.tiny_model import tiny_model


def main(directory: Path) -> None:
    initialize_parallel(tp=2, ep=2)
    model = tiny_model()
    mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    directory.mkdir(exist_ok=True)
    with cpu.checkpointing(), results_within_process():
        dist_checkpointing.save(model.sharded_state_dict(), str(directory))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
