"""One of two ranks that quantize a model with gated delta nets at TP2, and export it from other layouts.

Arguments: `HF TIED OUT`; TIED is a model with tied embeddings.
"""

import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from quantplug import export_mcore_gpt_to_hf
from quantplug.checkpoint.config.source import read_source_config
from quantplug.errors import CheckpointError, UnsupportedQuantizationError
from quantplug.mappings.families import find_family
from quantplug.megatron.checkpoint.save_load import load_checkpoint, save_checkpoint
from quantplug.megatron.models.build import build_model
from quantplug.megatron.parallel import initialize_parallel
from tests.export.checkpoints import load


def relayout(**sizes: int) -> None:
    parallel_state.destroy_model_parallel()
    initialize_parallel(**sizes)


def main(source: Path, tied: Path, out: Path) -> None:
    initialize_parallel(tp=2)
    save_checkpoint(mtq.quantize(load(source), mtq.W4A16_NVFP4_CFG), out / "checkpoint", extra={})
    refuse_scales_of_parts(source, out / "blocks")
    for name, sizes in (("tp1", {}), ("pp2", {"pp": 2})):
        relayout(**sizes)
        model = zeros(source)
        load_checkpoint(model, out / "checkpoint")
        export_mcore_gpt_to_hf(model, source, out / name)
    with pytest.raises(CheckpointError, match="tied embeddings and multi-token prediction"):
        save_checkpoint(zeros(tied), out / "tied", extra={})
    dist.destroy_process_group()


def zeros(source: Path) -> GPTModel:
    config = read_source_config(source)
    return build_model(find_family(config.architecture).megatron_config(config.values))


def refuse_scales_of_parts(source: Path, directory: Path) -> None:
    """One amax a row: the rows of a rank's slice are of several parts."""
    rules = [{"quantizer_name": "*", "enable": False}]
    per_row = {"num_bits": (4, 3), "axis": 0}
    rules.append({"quantizer_name": "*in_proj.weight_quantizer", "cfg": per_row, "enable": True})
    model = mtq.quantize(load(source), {"quant_cfg": rules, "algorithm": "max"})
    with pytest.raises(UnsupportedQuantizationError, match="of several parts"):
        save_checkpoint(model, directory, extra={})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
