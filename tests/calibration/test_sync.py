"""On one rank: what is checked before and after a reduction. `tests/distributed` has the reductions themselves."""

from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from megatron.core.models.gpt import GPTModel
from modelopt.torch.quantization.mode import CalibrateModeRegistry

import quantplug.plugins
from quantplug.calibration.policy import CalibrationPolicy, ExpertWeights
from quantplug.calibration.run import calibrate
from quantplug.calibration.shared_amax import Axis, QuantizerRole, plan_reductions
from quantplug.calibration.sync import synchronize
from quantplug.errors import CalibrationError
from quantplug.megatron.models.build import LayerSpec
from quantplug.plugins.overrides.max_calibration import MODE
from tests.calibration.local_model import build, run

FC1 = "decoder.layers.1.mlp.experts.linear_fc1.weight_quantizer"


@pytest.fixture
def grouped(single_rank: None, tiny_qwen3_moe_dir: Path) -> GPTModel:
    model = build(tiny_qwen3_moe_dir, LayerSpec.TRANSFORMER_ENGINE)
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG)
    return model


def test_registering_twice_keeps_the_mode() -> None:
    before = CalibrateModeRegistry[MODE]
    quantplug.plugins.register()
    assert CalibrateModeRegistry[MODE] is before


def test_the_plan_says_what_shares_an_amax(grouped: GPTModel) -> None:
    own = {amax.name: amax for amax in plan_reductions([grouped], ExpertWeights.PER_EXPERT).amaxes}
    shared = {amax.name: amax for amax in plan_reductions([grouped], ExpertWeights.SHARED).amaxes}

    fc1 = own[f"0.{FC1}.3"]
    assert (fc1.role, len(fc1.leaves), fc1.axes) == (QuantizerRole.WEIGHT, 1, {Axis.EXPERT_DATA, Axis.EXPERT_TENSOR})
    fc1 = shared[f"0.{FC1}.*"]
    assert (len(fc1.leaves), fc1.axes) == (8, {Axis.EXPERT_DATA, Axis.EXPERT_TENSOR, Axis.EXPERT})
    inputs = own["0.decoder.layers.1.mlp.experts.linear_fc1.input_quantizer.0"]
    assert (inputs.role, Axis.EXPERT in inputs.axes) == (QuantizerRole.EXPERT_ACTIVATION, True)
    attention = own["0.decoder.layers.0.self_attention.linear_proj.weight_quantizer.0"]
    assert (attention.role, attention.axes) == (QuantizerRole.WEIGHT, {Axis.DATA, Axis.TENSOR})
    assert not any("output_layer" in name for name in own)


def test_block_scales_are_not_reduced_over_their_shards(single_rank: None, tiny_qwen3_moe_dir: Path) -> None:
    model = build(tiny_qwen3_moe_dir, LayerSpec.TRANSFORMER_ENGINE)
    mtq.quantize(model, mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG)
    axes = {axis for amax in plan_reductions([model], ExpertWeights.PER_EXPERT).amaxes for axis in amax.axes}
    assert axes == {Axis.DATA, Axis.EXPERT_DATA}


def test_a_weight_without_amax_is_named(grouped: GPTModel) -> None:
    grouped.get_submodule(f"{FC1}.3").reset_amax()
    grouped.get_submodule(f"{FC1}.5").amax.fill_(torch.nan)
    with pytest.raises(CalibrationError) as caught:
        synchronize(plan_reductions([grouped], ExpertWeights.PER_EXPERT), require_activations=False)
    missing, not_finite = caught.value.offenders
    assert (missing.parameter, not_finite.parameter) == (f"{FC1}.3", f"{FC1}.5")
    assert "no amax" in missing.reason
    assert "not a finite number" in not_finite.reason


def test_nothing_is_written_where_an_activation_is_missing(grouped: GPTModel) -> None:
    before = [quantizer.amax.clone() for quantizer in grouped.get_submodule(FC1)]
    plan = plan_reductions([grouped], ExpertWeights.SHARED)
    with pytest.raises(CalibrationError, match="saw no data on any rank"):
        synchronize(plan, require_activations=True)
    assert [quantizer.amax for quantizer in grouped.get_submodule(FC1)] == before
    synchronize(plan, require_activations=False)
    assert {float(quantizer.amax) for quantizer in grouped.get_submodule(FC1)} == {float(max(before))}


@pytest.mark.usefixtures("single_rank")
def test_a_module_that_no_data_reaches_is_an_error(tiny_qwen3_dir: Path) -> None:
    model = build(tiny_qwen3_dir)
    mtq.quantize(model, {**mtq.FP8_DEFAULT_CFG, "algorithm": None})
    with pytest.raises(CalibrationError) as caught:
        calibrate(model, lambda _: None)
    assert len(caught.value.offenders) == 2 * 4
    assert caught.value.offenders[0].parameter.startswith("decoder.layers.0.self_attention.linear_proj.input_quantizer")


@pytest.mark.usefixtures("single_rank")
def test_virtual_stages_collect_from_one_forward_loop(tiny_qwen3_dir: Path) -> None:
    chunks = [build(tiny_qwen3_dir), build(tiny_qwen3_dir)]
    for chunk in chunks:
        mtq.quantize(chunk, {**mtq.FP8_DEFAULT_CFG, "algorithm": None})
    loops = []

    def loop(models: list[GPTModel]) -> None:
        loops.append(models)
        for model in models:
            run(model)

    calibrate(chunks, loop)

    assert loops == [chunks]
    for chunk in chunks:
        assert float(chunk.decoder.layers[1].mlp.linear_fc2.input_quantizer.amax) > 0


@pytest.mark.usefixtures("single_rank")
def test_virtual_stages_share_nothing(tiny_qwen3_moe_dir: Path) -> None:
    chunks = [build(tiny_qwen3_moe_dir, LayerSpec.TRANSFORMER_ENGINE) for _ in range(2)]
    for parameter in chunks[1].parameters():
        parameter.data.mul_(2)
    for chunk in chunks:
        mtq.quantize(chunk, {**mtq.W4A16_NVFP4_CFG, "algorithm": None})
    calibrate(chunks, policy=CalibrationPolicy(ExpertWeights.SHARED))
    first, second = (chunk.get_submodule(FC1)[0].amax for chunk in chunks)
    assert float(second) == 2 * float(first)
