"""One rank of two: what is refused of a model, on both ranks with the same words, for test_unserved.py.

Arguments: `SOURCE OUTPUT`. Every case notes in OUTPUT what each rank was told.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import quantplug
from quantplug import LayerSpec, QuantplugError, quant_cfg

FORMAT = "w4a16_nvfp4"


def half_a_model(source: Path, _: Path) -> None:
    """As scripts do that take the first chunk for the model."""
    quantplug.initialize_parallel(pp=2)
    chunks = quantplug.build_model(source, virtual_stages=2, pipeline_layout="Et|t|t|tL")
    mtq.quantize(chunks[0], {**quant_cfg(FORMAT, source), "algorithm": None})
    quantplug.plan_export(chunks, source, calibrated=False)


def one_stage(source: Path, _: Path) -> None:
    quantplug.initialize_parallel(pp=2)
    model = quantplug.build_model(source)
    if dist.get_rank() == 0:
        mtq.quantize(model, {**quant_cfg(FORMAT, source), "algorithm": None})
    quantplug.plan_export(model, source, calibrated=False)


def experts_one_by_one(source: Path, _: Path) -> None:
    quantplug.initialize_parallel(tp=2, ep=2)
    mtq.quantize(quantplug.build_model(source, layer_spec=LayerSpec.LOCAL), quant_cfg(FORMAT, source))


def a_stage_without_experts(source: Path, _: Path) -> None:
    """It has nothing that the setting concerns, and the other stage has."""
    quantplug.initialize_parallel(pp=2)
    model = quantplug.build_model(source, pipeline_layout="E|ttttL")
    model.config.moe_mlp_glu_interleave_size = 32
    mtq.quantize(model, quant_cfg(FORMAT, source))


def a_layer_by_number(source: Path, _: Path) -> None:
    """Its rule is meant of layer 0, and has hit the first layer of each stage: 0 and 2."""
    quantplug.initialize_parallel(pp=2)
    model = quantplug.build_model(source)
    mtq.quantize(model, _without_layer(source, 0))
    quantplug.plan_export(model, source, calibrated=False)


def a_layer_by_its_own_number(source: Path, output: Path) -> None:
    """And the way out of it."""
    quantplug.initialize_parallel(pp=2)
    model = quantplug.build_model(source)
    mtq.quantize(model, {**quant_cfg(FORMAT, source), "algorithm": None})
    for layer in model.decoder.layers:
        if layer.layer_number == 1:
            mtq.disable_quantizer(layer, "*")
    quantplug.plan_export(model, source, calibrated=False)


def sharded_before(source: Path, _: Path) -> None:
    quantplug.initialize_parallel()
    mtq.quantize(_shard(quantplug.build_model(source)), quant_cfg(FORMAT, source))


def sharded_at_calibration(source: Path, _: Path) -> None:
    quantplug.initialize_parallel()
    quantplug.calibrate(_shard(_quantized(source)))


def sharded_at_save(source: Path, output: Path) -> None:
    quantplug.initialize_parallel()
    quantplug.save_checkpoint(_shard(_quantized(source)), output / "saved", extra={})


def sharded_at_export(source: Path, output: Path) -> None:
    """And the way out of it."""
    quantplug.initialize_parallel()
    model = _shard(_quantized(source))
    try:
        quantplug.export_mcore_gpt_to_hf(model, source, export_dir=output / "gathered")
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
        quantplug.export_mcore_gpt_to_hf(model, source, export_dir=output / "gathered")


def no_config(source: Path, output: Path) -> None:
    """One rank has a directory without its config.json, as on a node to which it was not copied."""
    quantplug.initialize_parallel(tp=2)
    own = output / f"source-{dist.get_rank()}"
    shutil.copytree(source, own)
    if dist.get_rank() == 1:
        (own / "config.json").unlink()
    quantplug.build_model(own)


CASES: dict[str, Callable[[Path, Path], None]] = {
    case.__name__: case
    for case in (
        half_a_model,
        one_stage,
        experts_one_by_one,
        a_stage_without_experts,
        a_layer_by_number,
        a_layer_by_its_own_number,
        sharded_before,
        sharded_at_calibration,
        sharded_at_save,
        sharded_at_export,
        no_config,
    )
}


def _without_layer(source: Path, number: int) -> dict[str, Any]:
    config = quant_cfg(FORMAT, source)
    off = {"quantizer_name": f"*decoder.layers.{number}.*", "enable": False}
    return {**config, "quant_cfg": [*config["quant_cfg"], off], "algorithm": None}


def _quantized(source: Path) -> nn.Module:
    return mtq.quantize(quantplug.build_model(source, import_weights=True), quant_cfg(FORMAT, source))


def _shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.decoder.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


if __name__ == "__main__":
    torch.set_num_threads(1)
    source, output = map(Path, sys.argv[1:])
    for name, case in CASES.items():
        said = "no error"
        try:
            case(source, output)
        except QuantplugError as error:
            said = f"{type(error).__name__}: {error}"
        (output / f"{name}-{dist.get_rank()}.txt").write_text(said)
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
