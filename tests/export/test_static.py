"""Static NVFP4 quantizers: calibrated by mtq without Triton, and exported by the scales that they hold."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.nn import QuantModule, StaticBlockScaleQuantizer
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

from quantplug import (
    export_checkpoint,
    export_hf_weights_quant,
    export_mcore_gpt_to_hf,
    load_checkpoint,
    quantize_checkpoint,
    save_checkpoint,
)
from quantplug.errors import CalibrationError, UnsupportedQuantizationError
from quantplug.megatron.models.build import LayerSpec
from quantplug.verify import verify_checkpoint
from tests.export.checkpoints import load, read, same_bytes
from tests.export.refusals import refused
from tests.logits import megatron_logits

pytestmark = pytest.mark.usefixtures("single_rank")

Sources = Callable[[str], Path]
NO_INPUTS = {"quantizer_name": "*input_quantizer", "enable": False}
CONFIGS = {
    "mse": mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG,
    "four_over_six": mtq.NVFP4_FOUR_OVER_SIX_CFG,
}


def weight_only(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**config, "quant_cfg": [*config["quant_cfg"], NO_INPUTS], **changes}


def static_weights(model: torch.nn.Module) -> Iterator[tuple[torch.Tensor, StaticBlockScaleQuantizer]]:
    for module in model.modules():
        if isinstance(module, QuantModule):
            for weight, quantizer in module.iter_weights_for_calibration():
                if isinstance(quantizer, StaticBlockScaleQuantizer):
                    yield weight, quantizer


@pytest.fixture(scope="module")
def models(sources: Sources) -> Callable[[str], torch.nn.Module]:
    """A model quantized by a config, made once."""
    made: dict[str, torch.nn.Module] = {}

    def model(name: str) -> torch.nn.Module:
        if name not in made:
            made[name] = mtq.quantize(load(sources("moe")), weight_only(CONFIGS[name]))
        return made[name]

    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_modelopts_configs_give_the_bytes_of_the_ways_without_data(
    name: str, sources: Sources, models: Callable[[str], torch.nn.Module], tmp_path: Path
) -> None:
    source, model = sources("moe"), models(name)
    assert len(list(static_weights(model))) > 8

    export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "live")
    quantize_checkpoint(source, tmp_path / "straight", "w4a16_nvfp4", scales=name)

    found, expected = read(tmp_path / "live"), read(tmp_path / "straight")
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(found[name], expected[name])] == []
    assert verify_checkpoint(tmp_path / "live", source).ok
    streamed = dict(export_hf_weights_quant(model, source, quant_format="as_quantized"))
    assert [name for name in expected if not same_bytes(streamed[name], expected[name])] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_the_state_is_what_modelopt_would_export(name: str, models: Callable[[str], torch.nn.Module]) -> None:
    """Its shapes and types; and of its exporter's scales each is an E4M3 number already, which rounding leaves."""
    for weight, quantizer in static_weights(models(name)):
        assert (quantizer.amax.dtype, quantizer.amax.shape) == (torch.float32, (weight.numel() // 16, 1))
        assert (quantizer.global_amax.dtype, quantizer.global_amax.shape) == (torch.float32, ())
        assert quantizer.global_amax == weight.float().abs().max()
        if not weight.any():
            continue  # Its scales are nobody's business, and ModelOpt divides by zero for them.
        exact, scale_2 = NVFP4QTensor.get_weights_scaling_factor_from_quantizer(quantizer, weight)
        largest = 256 if name == "four_over_six" else 448
        before = quantizer.amax.view(exact.shape) / 6 * largest / (quantizer.global_amax / 6)
        torch.testing.assert_close(before, exact.float(), rtol=1e-6, atol=0)
        assert scale_2 == quantizer.global_amax / (6 * largest)


def test_scales_of_another_algorithm_are_exported_as_they_are(sources: Sources, tmp_path: Path) -> None:
    """Such as GPTQ's, or local Hessian's: static amaxes of blocks, and weights that were changed with them."""
    model = mtq.quantize(load(sources("moe")), weight_only(CONFIGS["mse"], algorithm="max"))
    generator = torch.Generator().manual_seed(0)
    expected = []
    for weight, quantizer in static_weights(model):
        quantizer.amax = quantizer.amax * (0.8 + 0.4 * torch.rand(quantizer.amax.shape, generator=generator))
        scale, scale_2 = NVFP4QTensor.get_weights_scaling_factor_from_quantizer(quantizer, weight)
        expected.append((scale, NVFP4QTensor.quantize(weight.detach().clone(), 16, scale, scale_2)[0]._quantized_data))

    export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")

    found = read(tmp_path / "out")
    # Of linears that are one weight in both: of others, rows are distributed over several.
    down = [name for name in found if name.endswith("down_proj.weight") and found[name].any()]
    assert down
    for name in down:
        pair = (found[f"{name}_scale"], found[name])
        assert any(all(map(same_bytes, pair, theirs)) for theirs in expected if theirs[0].shape == pair[0].shape)


def test_a_state_of_other_blocks_is_refused_by_name(sources: Sources, tmp_path: Path) -> None:
    model = mtq.quantize(load(sources("moe")), weight_only(CONFIGS["mse"], algorithm="max"))
    quantizer = model.decoder.layers[1].mlp.experts.linear_fc1.weight_quantizer[2]
    quantizer._amax = quantizer._amax[:-1]
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    (offender,) = caught.value.offenders
    assert (offender.expert, "scales for the" in offender.reason) == (2, True)


@pytest.mark.parametrize("value", [float("nan"), -1.0, float("inf")])
def test_scales_that_are_none_are_refused_by_name(value: float, sources: Sources, tmp_path: Path) -> None:
    model = mtq.quantize(load(sources("moe")), weight_only(CONFIGS["mse"], algorithm="max"))
    quantizer = model.decoder.layers[1].mlp.experts.linear_fc1.weight_quantizer[2]
    quantizer._amax[7] = value
    with refused(CalibrationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    assert [offender.expert for offender in caught.value.offenders] == [2]


def test_amaxes_cannot_be_refreshed(sources: Sources, models: Callable[[str], torch.nn.Module], tmp_path: Path) -> None:
    with refused(CalibrationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(models("mse"), sources("moe"), export_dir=tmp_path / "out", amax="refresh")
    assert "clip" in caught.value.remedy


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_state_is_loaded_and_exported_without_a_model_to_the_same_bytes(
    name: str, sources: Sources, models: Callable[[str], torch.nn.Module], tmp_path: Path
) -> None:
    source, model = sources("moe"), models(name)
    save_checkpoint(model, tmp_path / "saved", extra={})
    expected = {id(weight): weight for weight, _ in static_weights(model)}

    loaded = load(source)
    load_checkpoint(loaded, tmp_path / "saved")

    pairs = list(zip(static_weights(model), static_weights(loaded), strict=True))
    assert len(pairs) == len(expected)
    for (_, before), (_, after) in pairs:
        assert torch.equal(before.amax, after.amax)
        assert torch.equal(before.global_amax, after.global_amax)
    quantize_checkpoint(source, tmp_path / "straight", "w4a16_nvfp4", scales=name)
    export_checkpoint(tmp_path / "saved", tmp_path / "out", source)
    found, wanted = read(tmp_path / "out"), read(tmp_path / "straight")
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not same_bytes(found[key], wanted[key])] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_and_inputs_are_calibrated_with_data_on_a_cpu(name: str, sources: Sources, tmp_path: Path) -> None:
    """By Megatron's local layers, whose forward needs no GPU, experts being modules of their own."""
    source = sources("moe")
    model = load(source, LayerSpec.LOCAL, dtype=torch.float32)

    mtq.quantize(model, CONFIGS[name], megatron_logits)

    export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "live")
    quantize_checkpoint(source, tmp_path / "straight", "w4a16_nvfp4", scales=name)
    found, weights = read(tmp_path / "live"), read(tmp_path / "straight")
    assert [key for key in weights if not same_bytes(found[key], weights[key])] == []
    inputs = {key for key in found if key.endswith("input_scale")}
    assert found.keys() == weights.keys() | inputs
    assert len(inputs) == sum(key.endswith("weight_scale_2") for key in weights)
    assert verify_checkpoint(tmp_path / "live", source).ok
