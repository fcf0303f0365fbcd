"""Saves a quantized mixture of experts at TP2 EP2 with Megatron's own call, with our wrappers or with ModelOpt's."""

import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch.distributed as dist
from megatron.core import dist_checkpointing

from quantplug.megatron import cpu
from quantplug.megatron.parallel import initialize_parallel
from tests.plugins.tiny_model import tiny_model


def main(wrappers: str, directory: Path) -> None:
    initialize_parallel(tp=2, ep=2)
    if wrappers == "ours":
        import quantplug.plugins  # noqa: F401
    model = tiny_model()
    mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    directory.mkdir(exist_ok=True)
    with cpu.checkpointing():
        dist_checkpointing.save(model.sharded_state_dict(), str(directory))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
