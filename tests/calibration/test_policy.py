import copy
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.experts import TEGroupedMLP

import quantplug.plugins  # noqa: F401  # registers our wrappers with ModelOpt
from quantplug.calibration.collect import collect_statistics
from quantplug.calibration.policy import CalibrationPolicy, ColdExperts, ExpertWeights
from quantplug.calibration.run import calibrate
from quantplug.calibration.statistics import AmaxSource, StatisticsRow
from quantplug.errors import CalibrationError, UnsupportedQuantizationError
from quantplug.megatron.models.build import LayerSpec
from tests.calibration.local_model import build, run, send_everything_to

pytestmark = pytest.mark.usefixtures("single_rank")

ALL_COLD = [(layer, expert) for layer in range(2) for expert in range(8) if expert not in (4, 5)]
INT8 = {
    **copy.deepcopy(mtq.INT8_DEFAULT_CFG),
    "algorithm": None,
}


def placed(model: GPTModel, config: dict[str, Any] = mtq.FP8_DEFAULT_CFG) -> GPTModel:
    mtq.quantize(model, {**config, "algorithm": None})
    return model


def cold_model(directory: Path, config: dict[str, Any] = mtq.FP8_DEFAULT_CFG) -> GPTModel:
    """Every token goes to experts 4 and 5."""
    model = placed(build(directory), config)
    send_everything_to(4, model)
    return model


def input_rows(rows: tuple[StatisticsRow, ...]) -> dict[tuple[int | None, int | None], StatisticsRow]:
    name = "linear_fc1.input_quantizer"
    return {(row.key.layer, row.expert): row for row in rows if "experts" in row.parameter and name in row.parameter}


def test_every_cold_expert_is_named_at_once(tiny_qwen3_moe_dir: Path) -> None:
    with pytest.raises(CalibrationError) as caught:
        calibrate(cold_model(tiny_qwen3_moe_dir), run)
    offenders = caught.value.offenders
    assert [(offender.parameter, offender.expert) for offender in offenders] == [
        (f"decoder.layers.{layer}.mlp.experts", expert) for layer, expert in ALL_COLD
    ]
    assert offenders[0].reason == "none of 96 routed tokens in layer 0"
    assert "layer_max" in caught.value.remedy


def test_plain_mtq_quantize_refuses_cold_experts_too(tiny_qwen3_moe_dir: Path) -> None:
    model = build(tiny_qwen3_moe_dir)
    send_everything_to(4, model)
    with pytest.raises(CalibrationError, match="saw no calibration token"):
        mtq.quantize(model, mtq.FP8_DEFAULT_CFG, run)


def test_cold_experts_do_not_matter_where_only_weights_are_quantized(tiny_qwen3_moe_dir: Path) -> None:
    model = cold_model(tiny_qwen3_moe_dir, mtq.W4A16_NVFP4_CFG)
    record = calibrate(model, run)
    assert record.fallback == frozenset()
    assert record.tokens[1].by_expert == (0, 0, 0, 0, 48, 48, 0, 0)


def test_layer_max_is_the_largest_input_of_the_layers_experts(tiny_qwen3_moe_dir: Path) -> None:
    model = cold_model(tiny_qwen3_moe_dir)
    seen: dict[str, float] = {}
    for name, module in model.named_modules():
        if name.endswith(("linear_fc1", "linear_fc2")) and "local_experts" in name:
            layer = name.split("local_experts")[0] + name[-1]

            def largest(_: Any, inputs: tuple[torch.Tensor, ...], layer: str = layer) -> None:
                if inputs[0].numel():
                    seen[layer] = max(seen.get(layer, 0.0), float(inputs[0].abs().max()))

            module.register_forward_pre_hook(largest)

    record = calibrate(model, run, CalibrationPolicy(cold_experts=ColdExperts.LAYER_MAX))

    assert record.fallback == frozenset(ALL_COLD)
    for name, module in model.named_modules():
        if name.endswith(("linear_fc1", "linear_fc2")) and "local_experts" in name:
            assert float(module.input_quantizer.amax) == seen[name.split("local_experts")[0] + name[-1]], name
    rows = input_rows(collect_statistics(model, record).rows)
    assert {key for key, row in rows.items() if row.source is AmaxSource.FALLBACK} == set(ALL_COLD)
    assert {key for key, row in rows.items() if row.is_cold} == set(ALL_COLD)
    assert rows[0, 4].source is AmaxSource.CALIBRATED
    assert (rows[0, 4].tokens, rows[0, 4].coverage) == (48, 4.0)


def test_grouped_experts_fall_back_to_their_shared_input_quantizer(
    tiny_qwen3_moe_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(experts: TEGroupedMLP, hidden: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None]:  # TE's takes a GPU.
        for linear in (experts.linear_fc1, experts.linear_fc2):
            linear.input_quantizer(hidden)
        return hidden, None

    monkeypatch.setattr(TEGroupedMLP, "forward", forward)
    model = placed(build(tiny_qwen3_moe_dir, LayerSpec.TRANSFORMER_ENGINE), _experts_only(mtq.FP8_DEFAULT_CFG))
    splits = torch.tensor([3, 0, 5, 1, 1, 1, 0, 1])

    def loop(whole: GPTModel) -> None:
        for layer in whole.decoder.layers:
            layer.mlp.experts(torch.full((12, 160), 2.5), splits, torch.ones(12))

    with pytest.raises(CalibrationError) as caught:
        calibrate(model, loop)
    assert [offender.expert for offender in caught.value.offenders] == [1, 6, 1, 6]

    record = calibrate(model, loop, CalibrationPolicy(cold_experts=ColdExperts.LAYER_MAX))
    rows = input_rows(collect_statistics(model, record).rows)
    assert rows.keys() == {(layer, expert) for layer in (0, 1) for expert in (None, 1, 6)}
    assert rows[0, None].source is AmaxSource.CALIBRATED
    assert (rows[1, 6].source, rows[1, 6].amax, rows[1, 6].tokens) == (AmaxSource.FALLBACK, 2.5, 0)


@pytest.mark.parametrize("config", [mtq.FP8_DEFAULT_CFG, mtq.NVFP4_DEFAULT_CFG], ids=["fp8", "nvfp4"])
def test_weight_only_fallback_is_refused_before_any_data(config: dict[str, Any], tiny_qwen3_moe_dir: Path) -> None:
    model = placed(build(tiny_qwen3_moe_dir), config)

    def never(_: GPTModel) -> None:
        raise AssertionError("data ran")

    with pytest.raises(UnsupportedQuantizationError, match="input_scale of every expert") as caught:
        calibrate(model, never, CalibrationPolicy(cold_experts=ColdExperts.WEIGHT_ONLY_FALLBACK))
    assert len(caught.value.offenders) == 2 * 8 * 2


def test_weight_only_fallback_leaves_a_cold_experts_inputs(tiny_qwen3_moe_dir: Path) -> None:
    model = cold_model(tiny_qwen3_moe_dir, INT8)
    record = calibrate(model, run, CalibrationPolicy(cold_experts=ColdExperts.WEIGHT_ONLY_FALLBACK))
    assert record.fallback == frozenset()
    rows = input_rows(collect_statistics(model, record).rows)
    assert rows.keys() == {(layer, expert) for layer in (0, 1) for expert in (4, 5)}
    cold, warm = (model.decoder.layers[0].mlp.experts.local_experts[expert].linear_fc2 for expert in (0, 4))
    assert cold.input_quantizer.amax is None
    assert cold.weight_quantizer.is_enabled
    assert warm.input_quantizer.is_enabled


@pytest.mark.parametrize("layer_spec", LayerSpec)
def test_shared_weights_have_the_largest_amax_of_their_layer(layer_spec: LayerSpec, tiny_qwen3_moe_dir: Path) -> None:
    model = placed(build(tiny_qwen3_moe_dir, layer_spec), mtq.W4A16_NVFP4_CFG)

    calibrate(model, policy=CalibrationPolicy(ExpertWeights.SHARED))

    rows = collect_statistics(model).rows
    for layer in range(2):
        for linear in ("linear_fc1", "linear_fc2"):
            weights = [
                weight
                for name, weight in model.named_parameters()
                if f"layers.{layer}.mlp.experts" in name and linear in name
            ]
            experts = [
                row for row in rows if row.key.layer == layer and row.expert is not None and linear in row.parameter
            ]
            assert len(experts) == len(weights) == 8
            assert {row.amax for row in experts} == {
                float(torch.stack([weight.detach().abs().max() for weight in weights]).max())
            }


def test_a_weights_own_amax_is_the_default(tiny_qwen3_moe_dir: Path) -> None:
    model = placed(build(tiny_qwen3_moe_dir), mtq.W4A16_NVFP4_CFG)
    calibrate(model)
    assert {row.source for row in collect_statistics(model).rows} == {AmaxSource.WEIGHT, AmaxSource.DISABLED}


def _experts_only(config: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(config)
    config["quant_cfg"].append({"quantizer_name": "*self_attention*", "enable": False})
    return config
