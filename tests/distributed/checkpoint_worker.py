"""Saves a quantized model at TP2 EP2 and loads it at other layouts, on 2 ranks, for test_checkpoint_topologies.py."""

import copy
import re
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

import quantplug.plugins  # noqa: F401
from quantplug.errors import QuantplugError, ShapeError, UnsupportedQuantizationError
from quantplug.megatron.checkpoint.save_load import LoadReport, load_checkpoint, save_checkpoint
from quantplug.megatron.parallel import current_topology, initialize_parallel
from quantplug.topology import ParallelTopology
from tests.plugins.configs import BLOCKWISE, WEIGHT_ONLY_FP8
from tests.plugins.tiny_model import DENSE, EXPERTS, grouped_linears, tiny_model

SAVED_AT = {"tp": 2, "ep": 2}
LOADED_AT = [{}, {"ep": 2}, {"pp": 2}, {"tp": 2, "etp": 2}, {"tp": 2, "ep": 2}]

BY_ROW = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*.experts.*weight_quantizer*", "cfg": {"num_bits": (4, 3), "axis": 0}},
    ],
    "algorithm": "max",
}

Key = tuple[int, str, int]
"""Global layer, name of the grouped linear, global expert."""


def without(pattern: str, config: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(config)
    config["quant_cfg"].append({"quantizer_name": pattern, "enable": False})
    return config


def quantizers(model: nn.Module, topology: ParallelTopology) -> dict[Key, nn.Module]:
    """Every local expert's weight quantizer by its global place, counted here from the layout alone."""
    found: dict[Key, nn.Module] = {}
    for name, linear in grouped_linears(model).items():
        layer = int(re.search(r"layers\.(\d+)\.", name)[1]) + topology.pp_rank * len(model.decoder.layers)
        for local, quantizer in enumerate(linear.weight_quantizer):
            expert = topology.ep_rank * len(linear.weight_quantizer) + local
            found[layer, name.rpartition(".")[2], expert] = quantizer
    return found


def block_shard(amax: torch.Tensor, linear: str, topology: ParallelTopology) -> torch.Tensor:
    """This rank's share of an amax [N/b, 1, K/b, 1] or [N, 1]: of gate and of up rows (fc1), or of columns (fc2)."""
    if amax.ndim < 2 or (amax.ndim == 2 and linear == "linear_fc2"):
        return amax  # Of the whole weight; or of its rows, all of which every rank has.
    if linear == "linear_fc2":
        return amax.chunk(topology.etp, dim=2)[topology.etp_rank]
    return torch.cat([half.chunk(topology.etp)[topology.etp_rank] for half in amax.chunk(2)])


def gathered(local: dict[Key, Any]) -> dict[Key, Any]:
    parts: list[dict[Key, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, local)
    return {key: value for part in parts for key, value in part.items()}


def save(directory: Path, config: dict[str, Any], **model: Any) -> dict[Key, torch.Tensor]:
    """Saves at TP2 EP2; returns what every expert's amax must be afterwards."""
    topology = relayout(**SAVED_AT)
    quantized = tiny_model(**model)
    mtq.quantize(quantized, config)
    expected: dict[Key, torch.Tensor] = {}
    for (layer, linear, expert), quantizer in quantizers(quantized, topology).items():
        # Values that no calibration gives, another for every expert and block; the same on the ranks that share it.
        amax = quantizer._amax
        amax.mul_(1 + layer + expert / 8).add_(torch.arange(amax.numel()).view_as(amax) / 64)
        if expert == 5:
            quantizer.disable()
        expected[layer, linear, expert] = amax.clone()
    save_checkpoint(quantized, directory, extra={"config": str(directory)})
    return gathered(expected)


def check(directory: Path, expected: dict[Key, torch.Tensor], layout: dict[str, int], **model: Any) -> None:
    topology = relayout(**layout)
    loaded = tiny_model(**model)
    assert load_checkpoint(loaded, directory) == LoadReport({"config": str(directory)})
    mine = quantizers(loaded, topology)
    for key, quantizer in mine.items():
        want = block_shard(expected[key], key[1], topology)
        assert quantizer._amax.dtype == want.dtype, (layout, key)
        assert torch.equal(quantizer._amax, want), (layout, key, quantizer._amax, want)
        assert quantizer.is_enabled == (key[2] != 5), (layout, key)
    assert gathered(dict.fromkeys(mine)).keys() == expected.keys(), layout


def refused(
    directory: Path,
    layout: dict[str, int],
    error: type[QuantplugError],
    names: set[str],
    config: dict[str, Any] = BLOCKWISE,
    **model: Any,
) -> None:
    """An amax that has no place in a checkpoint of any layout is refused, on every rank, and nothing is written."""
    relayout(**layout)
    quantized = tiny_model(**model)
    mtq.quantize(quantized, config)
    with pytest.raises(error) as refusal:
        save_checkpoint(quantized, directory, extra={})
    assert names <= {offender.parameter for offender in refusal.value.offenders}, refusal.value
    assert list(directory.parent.glob(f"*{directory.name}*")) == []


def virtual_stages(directory: Path) -> None:
    """Saved by two pipeline ranks of two virtual stages each (layers 0, 2 and 1, 3), loaded as one stage."""
    relayout(pp=2)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(2)
    chunks = [tiny_model(vp_stage=stage, num_layers=4, virtual_pipeline_model_parallel_size=2) for stage in range(2)]
    for stage, chunk in enumerate(chunks):
        mtq.quantize(chunk, mtq.W4A16_NVFP4_CFG)
        for linear in grouped_linears(chunk).values():
            for quantizer in linear.weight_quantizer:
                quantizer.amax.fill_(2 * stage + parallel_state.get_pipeline_model_parallel_rank())
    save_checkpoint(chunks, directory, extra={})
    relayout()
    loaded = tiny_model(num_layers=4)
    load_checkpoint(loaded, directory)
    for layer, block in enumerate(loaded.decoder.layers):
        for linear in grouped_linears(block).values():
            assert [float(quantizer.amax) for quantizer in linear.weight_quantizer] == [layer] * EXPERTS


def relayout(**sizes: int) -> ParallelTopology:
    parallel_state.destroy_model_parallel()
    initialize_parallel(**sizes)
    return current_topology()


def main(directory: Path) -> None:
    initialize_parallel(**SAVED_AT)
    cases: list[tuple[str, dict[str, Any], list[dict[str, int]], dict[str, Any]]] = [
        ("nvfp4", mtq.W4A16_NVFP4_CFG, LOADED_AT, {}),
        # Its amaxes are as NVFP4's, one number a weight: once by stage and expert, and once cut.
        ("fp8", WEIGHT_ONLY_FP8, [{"pp": 2}, {"tp": 2, "etp": 2}], {}),
        # One for each row.
        ("fp8_channel", BY_ROW, [{"tp": 2, "etp": 2}, {}], {}),
        ("fp8_blockwise", without("*self_attention*", BLOCKWISE), LOADED_AT, {"moe_ffn_hidden_size": 256}),
    ]
    for name, config, layouts, model in cases:
        expected = save(directory / name, config, **model)
        for layout in layouts:
            check(directory / name, expected, layout, **model)
            if dist.get_rank() == 0:
                sys.stdout.write(f"{name} {layout} ok\n")
    virtual_stages(directory / "virtual")
    # No whole blocks: expert width 96, and on each of two ranks 96 columns of the projection and 192 rows of q, k, v.
    fc1 = {f"decoder.layers.0.mlp.experts.linear_fc1.weight_quantizer.{expert}._amax" for expert in range(8)}
    refused(directory / "experts", {"tp": 1, "etp": 2}, ShapeError, fc1)
    projection = {"decoder.layers.0.self_attention.linear_proj.weight_quantizer._amax"}
    refused(directory / "projection", {"tp": 2}, ShapeError, projection)
    qkv = {"decoder.layers.0.self_attention.linear_qkv.weight_quantizer._amax"}
    refused(directory / "qkv", {"tp": 2}, ShapeError, qkv, without("*linear_proj*", BLOCKWISE))
    fc1 = {"decoder.layers.0.mlp.linear_fc1.weight_quantizer._amax"}
    gated = {**DENSE, "ffn_hidden_size": 512}
    refused(
        directory / "gated",
        {"tp": 2},
        UnsupportedQuantizationError,
        fc1,
        without("*self_attention*", BLOCKWISE),
        **gated,
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
