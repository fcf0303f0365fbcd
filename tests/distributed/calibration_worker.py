"""Calibrates weights on 4 ranks, for test_calibration_sync.py; the oracle is max|W| of weights that are whole here."""

import sys
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

import quantplug.plugins  # noqa: F401
from quantplug.calibration.collect import gather_statistics
from quantplug.calibration.policy import CalibrationPolicy, ExpertWeights
from quantplug.calibration.run import calibrate
from quantplug.calibration.statistics import AmaxSource, CalibrationTable
from quantplug.megatron.parallel import initialize_parallel
from quantplug.megatron.parameters import MegatronParameter, iter_parameters
from tests.plugins.configs import BLOCKWISE
from tests.plugins.tiny_model import DENSE, EXPERTS, tiny_model

LAYOUTS = [{}, {"tp": 2, "ep": 2}, {"tp": 2, "etp": 2, "ep": 2}, {"pp": 2, "ep": 2}]
WHOLE_BLOCKS = {"hidden_size": 256, "moe_ffn_hidden_size": 256}


def whole(parameter: MegatronParameter) -> torch.Tensor:
    """The whole weight that this is a shard of: another largest value for every layer, expert, matrix and shard."""
    shape = list(parameter.tensor.shape)
    if parameter.shard is not None:
        shape[parameter.shard.dim] *= parameter.shard.count
    name = parameter.key.name
    generator = torch.Generator().manual_seed(int.from_bytes(name.encode()[-8:], "big") % 2**40 + len(name) * 31)
    scale = 1 + (parameter.key.layer or 0) * 4 + (parameter.key.expert or 0) / 3
    return (torch.randn(shape, generator=generator) * scale).to(parameter.tensor.dtype)


def amaxes_of_whole_weights(model: nn.Module) -> dict[int, torch.Tensor]:
    """Fills the model; max|W| of the whole weight of every parameter of it."""
    expected: dict[int, torch.Tensor] = {}
    for parameter in iter_parameters(model):
        weight = whole(parameter)
        shard = parameter.shard
        mine = weight if shard is None else weight.chunk(shard.count, dim=shard.dim)[shard.index]
        parameter.tensor.data.copy_(mine)
        expected[id(parameter.tensor)] = weight.abs().max()
    return expected


def quantized_weights(model: nn.Module) -> list[tuple[str, nn.Parameter, nn.Module]]:
    return [
        (f"{name} {index}", weight, quantizer)
        for name, module in model.named_modules()
        if hasattr(module, "iter_weights_for_calibration")
        for index, (weight, quantizer) in enumerate(module.iter_weights_for_calibration())
        if quantizer.is_enabled
    ]


def relayout(layout: dict[str, int]) -> None:
    parallel_state.destroy_model_parallel()
    initialize_parallel(**layout)


def done(what: str) -> None:
    if dist.get_rank() == 0:
        sys.stdout.write(f"{what} ok\n")


def per_tensor(layout: dict[str, int], **model: Any) -> CalibrationTable:
    """Plain mtq.quantize gives every weight the amax of the whole of it, and of nothing else."""
    relayout(layout)
    quantized = tiny_model(**model)
    expected = amaxes_of_whole_weights(quantized)
    mtq.quantize(quantized, mtq.W4A16_NVFP4_CFG)
    weights = quantized_weights(quantized)
    assert len(weights) >= 4 * len(quantized.decoder.layers)
    for name, weight, quantizer in weights:
        assert torch.equal(quantizer.amax, expected[id(weight)]), (layout, name)
    return gather_statistics(quantized)


def shared(layout: dict[str, int]) -> CalibrationTable:
    relayout(layout)
    model = tiny_model()
    amaxes_of_whole_weights(model)
    mtq.quantize(model, {**mtq.W4A16_NVFP4_CFG, "algorithm": None})
    calibrate(model, policy=CalibrationPolicy(ExpertWeights.SHARED))
    return gather_statistics(model)


def blocks(layout: dict[str, int]) -> None:
    """The amax of a block is of this rank's block alone."""
    relayout(layout)
    model = tiny_model(**WHOLE_BLOCKS)
    amaxes_of_whole_weights(model)
    config = {**BLOCKWISE, "quant_cfg": [*BLOCKWISE["quant_cfg"], {"quantizer_name": "*attention*", "enable": False}]}
    mtq.quantize(model, config)
    for name, weight, quantizer in quantized_weights(model):
        for row, rows in enumerate(weight.detach().split(128)):
            for column, block in enumerate(rows.split(128, dim=1)):
                assert torch.equal(quantizer.amax[row, 0, column, 0], block.abs().max()), (layout, name)
    done(f"blocks {layout}")


def main() -> None:
    initialize_parallel()
    for layout in ({"tp": 2, "pp": 2}, {"tp": 4}):
        per_tensor(layout, **DENSE, num_query_groups=4)
        done(f"dense {layout}")
    tables = [(per_tensor(layout), shared(layout)) for layout in LAYOUTS]
    own, together = tables[0]
    assert len([row for row in own.rows if row.expert is not None]) == 2 * 2 * EXPERTS
    assert len({row.amax for row in own.rows if row.expert is not None}) > 2 * EXPERTS
    for layout, (own_there, together_there) in zip(LAYOUTS, tables, strict=True):
        # The same numbers, whatever the layout. A shard's own maximum may not be the whole's: not the same source.
        assert amaxes(own_there) == amaxes(own), layout
        assert amaxes(together_there) == amaxes(together), layout
        done(f"moe {layout}")
    for layer in range(2):
        for linear in ("linear_fc1", "linear_fc2"):
            largest = max(row.amax for row in own.rows if is_expert_of(row.key.name, layer, linear))
            found = {row.amax for row in together.rows if is_expert_of(row.key.name, layer, linear)}
            assert found == {largest}
    assert not [row for row in own.rows if row.source is AmaxSource.MISSING]
    for layout in ({"tp": 1, "etp": 2}, {"ep": 2}):
        blocks(layout)
    dist.destroy_process_group()


def amaxes(table: CalibrationTable) -> list[tuple[str, float | None]]:
    return [(row.parameter, row.amax) for row in table.rows]


def is_expert_of(name: str, layer: int, linear: str) -> bool:
    return f"layers.{layer}.mlp.experts.{linear}.weight" in name


if __name__ == "__main__":
    main()
