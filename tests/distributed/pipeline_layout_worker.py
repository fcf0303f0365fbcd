"""One rank of a pipeline, with models whose pipeline stages are laid out in every way, for test_pipeline_layouts.py.

Arguments: `SOURCE OUTPUT LAYOUT ...`: each is exported, streamed, saved and loaded by the next one, which is exported
too. A layout is Megatron's, `E|tt|tt|L`, or settings of its TransformerConfig by name, `name=value,name=value`.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import quantplug
from quantplug import calibration, quant_cfg
from quantplug.checkpoint.config.source import read_source_config
from quantplug.mappings.families import find_family
from quantplug.megatron.models import build

FORMAT = "w4a16_nvfp4"


def laid_out(source: Path, layout: str) -> list[nn.Module]:
    """The empty chunks of this rank, of a model that is laid out like this."""
    if "=" in layout:
        return _by_settings(source, {name: int(value) for name, value in (it.split("=") for it in layout.split(","))})
    virtual = (layout.count("|") + 1) // dist.get_world_size()
    if virtual == 1:
        return [quantplug.build_model(source, pipeline_layout=layout)]
    return quantplug.build_model(source, virtual_stages=virtual, pipeline_layout=layout)


def _by_settings(source: Path, settings: dict[str, int]) -> list[nn.Module]:
    """By Megatron's other settings, of which our builder knows nothing: it would refuse what they make divide."""
    config = read_source_config(source)
    family = find_family(config.architecture).megatron_config(config.values)
    virtual = settings.pop("virtual_pipeline_model_parallel_size", None)
    family = replace(family, transformer={**family.transformer, **settings})
    build.check_divisible = lambda *_: None
    stages = (None,) if virtual is None else range(virtual)
    return [build.build_model(family, virtual_stages=virtual, virtual_stage=stage) for stage in stages]


def export_all(source: Path, output: Path, layouts: list[str]) -> None:
    saved: Path | None = None
    for number, layout in enumerate(layouts):
        if saved is not None:
            chunks = laid_out(source, layout)
            quantplug.load_checkpoint(chunks, saved)
            quantplug.export_mcore_gpt_to_hf(chunks, source, export_dir=output / f"loaded-{number}")
        chunks = laid_out(source, layout)
        quantplug.import_mcore_gpt_from_hf(chunks, source)
        for chunk in chunks:
            mtq.quantize(chunk, quant_cfg(FORMAT, source))
        quantplug.plan_export(chunks, source)
        quantplug.calibrate(chunks)
        quantplug.export_mcore_gpt_to_hf(chunks, source, export_dir=output / f"out-{number}")
        streamed = dict(quantplug.export_hf_weights_quant(chunks, source, quant_format="as_quantized"))
        table = calibration.gather_statistics(chunks)
        saved = output / f"saved-{number}"
        quantplug.save_checkpoint(chunks, saved, extra={})
        if dist.get_rank() == 0:
            (output / f"stream-{number}").mkdir()
            save_file(streamed, output / f"stream-{number}" / "all.safetensors")
            table.save(output / f"table-{number}.json")


if __name__ == "__main__":
    torch.set_num_threads(1)
    quantplug.initialize_parallel(pp=int(os.environ["WORLD_SIZE"]))
    export_all(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    quantplug.destroy_parallel()
