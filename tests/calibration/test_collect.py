import json
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from megatron.core.models.gpt import GPTModel

import quantplug.plugins  # noqa: F401  # registers our wrappers with ModelOpt
from quantplug.calibration.collect import collect_statistics
from quantplug.calibration.statistics import AmaxSource, CalibrationTable, StatisticsRow
from quantplug.mappings.families import find_family
from quantplug.megatron.models.build import LayerSpec, build_model

pytestmark = pytest.mark.usefixtures("single_rank")


def build(checkpoint: Path, layer_spec: LayerSpec = LayerSpec.TRANSFORMER_ENGINE) -> GPTModel:
    config = json.loads((checkpoint / "config.json").read_text())
    family = find_family(config["architectures"][0])
    model = build_model(family.megatron_config(config), layer_spec=layer_spec)
    generator = torch.Generator().manual_seed(3)
    for index, parameter in enumerate(model.parameters()):
        parameter.data.uniform_(-1, 1, generator=generator).mul_(0.01 * (index + 1))
    return model


def by_name(table: CalibrationTable) -> dict[str, StatisticsRow]:
    found = {row.parameter: row for row in table.rows}
    assert len(found) == len(table.rows)
    return found


def test_weight_only_shows_the_amax_of_every_expert(tiny_qwen3_moe_dir: Path) -> None:
    model = build(tiny_qwen3_moe_dir)
    parameters = {name: weight.detach() for name, weight in model.named_parameters()}
    model.decoder.layers[0].mlp.experts.linear_fc2.weight5.data.zero_()
    mtq.quantize(model, mtq.W4A16_NVFP4_CFG)

    rows = by_name(collect_statistics(model))

    experts = {name: row for name, row in rows.items() if row.expert is not None}
    assert len(experts) == 2 * 2 * 8
    for name, row in experts.items():
        assert name.endswith(f".weight{row.expert}")
        assert row.shape == tuple(parameters[name].shape)
        assert row.amax == float(parameters[name].abs().max())
        assert row.source is AmaxSource.WEIGHT
    assert rows["decoder.layers.0.mlp.experts.linear_fc2.weight5"].amax == 0.0
    assert rows["output_layer.weight"].source is AmaxSource.DISABLED
    assert rows["decoder.layers.1.self_attention.linear_qkv.weight"].source is AmaxSource.WEIGHT
    assert not [name for name in rows if "input_quantizer" in name]


def test_local_experts_have_their_global_ids(tiny_qwen3_moe_dir: Path) -> None:
    model = build(tiny_qwen3_moe_dir, LayerSpec.LOCAL)
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG)

    rows = by_name(collect_statistics(model))

    weight = rows["decoder.layers.1.mlp.experts.local_experts.6.linear_fc1.weight"]
    assert (weight.key.layer, weight.expert, weight.source) == (1, 6, AmaxSource.WEIGHT)
    activation = rows["decoder.layers.1.mlp.experts.local_experts.6.linear_fc1.input_quantizer"]
    assert (activation.key.layer, activation.expert) == (1, 6)


def test_an_enabled_quantizer_without_amax_is_missing(tiny_qwen3_moe_dir: Path) -> None:
    model = build(tiny_qwen3_moe_dir)
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG)  # No forward loop: weights only.
    model.decoder.layers[1].mlp.experts.linear_fc1.weight_quantizer[3].reset_amax()

    rows = by_name(collect_statistics(model))

    missing = {name for name, row in rows.items() if row.source is AmaxSource.MISSING}
    assert "decoder.layers.1.mlp.experts.linear_fc1.weight3" in missing
    assert "decoder.layers.0.mlp.experts.linear_fc1.input_quantizer" in missing
    assert "decoder.layers.1.mlp.experts.linear_fc1.weight2" not in missing


def test_a_calibrated_input_shows_its_amax(tiny_qwen3_dir: Path) -> None:
    model = build(tiny_qwen3_dir)
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG)
    model.decoder.layers[0].mlp.linear_fc2.input_quantizer.amax = torch.tensor(6.5)
    model.decoder.layers[0].mlp.linear_fc2.weight_quantizer.amax = torch.tensor(9.0)

    rows = by_name(collect_statistics(model))

    activation = rows["decoder.layers.0.mlp.linear_fc2.input_quantizer"]
    assert (activation.amax, activation.source, activation.shape) == (6.5, AmaxSource.CALIBRATED, ())
    weight = rows["decoder.layers.0.mlp.linear_fc2.weight"]
    assert (weight.amax, weight.source, weight.shape) == (9.0, AmaxSource.CALIBRATED, (160, 224))


def test_block_scales_show_their_largest(tiny_qwen3_moe_dir: Path) -> None:
    model = build(tiny_qwen3_moe_dir)
    mtq.quantize(model, mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG)
    parameters = {name: weight.detach() for name, weight in model.named_parameters()}

    rows = by_name(collect_statistics(model))

    name = "decoder.layers.0.mlp.experts.linear_fc1.weight2"
    assert model.decoder.layers[0].mlp.experts.linear_fc1.weight_quantizer[2].amax.numel() == 4
    assert rows[name].amax == float(parameters[name].abs().max())


def test_mx_formats_have_no_amax_by_definition(tiny_qwen3_dir: Path) -> None:
    model = build(tiny_qwen3_dir)
    mtq.quantize(model, mtq.MXFP8_DEFAULT_CFG)

    rows = by_name(collect_statistics(model))

    assert rows["decoder.layers.0.mlp.linear_fc1.weight"].source is AmaxSource.DYNAMIC


def test_tied_embeddings(tiny_qwen3_tied_dir: Path) -> None:
    model = build(tiny_qwen3_tied_dir)
    mtq.quantize(model, mtq.W4A16_NVFP4_CFG)

    sources = {name: row.source for name, row in by_name(collect_statistics(model)).items()}

    assert set(sources.values()) == {AmaxSource.WEIGHT}


def test_virtual_stages_are_all_there(tiny_qwen3_dir: Path) -> None:
    stages = [build(tiny_qwen3_dir), build(tiny_qwen3_dir)]
    for layer in stages[1].decoder.layers:
        layer.layer_number += 2
    for stage in stages:
        mtq.quantize(stage, mtq.W4A16_NVFP4_CFG)

    layers = {row.key.layer for row in collect_statistics(stages).rows}

    assert {0, 1, 2, 3} <= layers


def test_an_unquantized_model_has_no_rows(tiny_qwen3_dir: Path) -> None:
    assert collect_statistics(build(tiny_qwen3_dir)).rows == ()
