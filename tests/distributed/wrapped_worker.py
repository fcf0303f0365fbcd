"""One rank of two that share a sequence (CP 2), with a model in Megatron's wrappers, for test_pipeline_layouts.py.

Arguments: `SOURCE OUTPUT`: it is exported, saved, loaded into another one and exported again.
"""

import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from torch import nn

import quantplug
from quantplug import quant_cfg
from quantplug.megatron import cpu
from tests.distributed.pipeline_layout_worker import FORMAT


def wrapped(model: nn.Module) -> nn.Module:
    """As a trainer with a distributed optimizer has it: every parameter is a view of one flat buffer."""
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
    with cpu.construction():
        return DistributedDataParallel(model.config, settings, Float16Module(model.config, model))


if __name__ == "__main__":
    torch.set_num_threads(1)
    source, output = map(Path, sys.argv[1:])
    quantplug.initialize_parallel()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    trained = wrapped(mtq.quantize(quantplug.build_model(source), quant_cfg(FORMAT, source)))
    quantplug.import_mcore_gpt_from_hf(trained, source)
    quantplug.calibrate(trained)
    quantplug.export_mcore_gpt_to_hf(trained, source, export_dir=output / "exported")
    quantplug.save_checkpoint(trained, output / "saved", extra={})
    loaded = wrapped(quantplug.build_model(source))
    quantplug.load_checkpoint(loaded, output / "saved")
    quantplug.export_mcore_gpt_to_hf(loaded, source, export_dir=output / "loaded")
    quantplug.destroy_parallel()
