"""Quantizers that cannot be written are all refused by name, and nothing is left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer

from quantplug import export_mcore_gpt_to_hf, plan_stream
from quantplug.errors import (
    CalibrationError,
    ShapeError,
    UnsupportedQuantizationError,
)
from quantplug.export.live_plan import plan_export
from quantplug.megatron.models.build import LayerSpec
from tests.export.checkpoints import load, quantize
from tests.export.refusals import FC1, FC2, NVFP4_16, expert_quantizer, offenders, refused, rules
from tests.logits import megatron_logits

pytestmark = pytest.mark.usefixtures("single_rank")

Sources = Callable[[str], Path]

_BLOCKS = {-1: 16, "type": "dynamic", "scale_bits": (4, 3), "four_over_six": True}
_FOUR_OVER_SIX = {"num_bits": (2, 1), "block_sizes": _BLOCKS}


def test_quantizers_that_were_never_calibrated(sources: Sources, tmp_path: Path) -> None:
    model = mtq.quantize(load(sources("moe")), rules(algorithm=None))
    with refused(CalibrationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    assert len(caught.value.offenders) == 2 * (2 + 2 * 4)  # qkv and proj; two linears of four experts.
    assert (f"{FC1}.weight_quantizer.3", 3) in offenders(caught)
    assert plan_export(model, sources("moe"), calibrated=False).plan.quant_config is not None


def test_inputs_that_were_never_calibrated(sources: Sources, tmp_path: Path) -> None:
    model = mtq.quantize(load(sources("moe")), mtq.NVFP4_DEFAULT_CFG)
    with refused(CalibrationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    assert {name for name, _ in offenders(caught)} == {
        f"decoder.layers.{layer}.{linear}.input_quantizer"
        for layer in range(2)
        for linear in (
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "mlp.experts.linear_fc1",
            "mlp.experts.linear_fc2",
        )
    }


def test_experts_without_amax_are_all_named(sources: Sources, tmp_path: Path) -> None:
    model = quantize(load(sources("moe")), "w4a16_nvfp4")
    expert_quantizer(model, FC1, 3).reset_amax()
    expert_quantizer(model, FC2, 0).reset_amax()
    with refused(CalibrationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    assert offenders(caught) == {(f"{FC1}.weight_quantizer.3", 3), (f"{FC2}.weight_quantizer.0", 0)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_an_amax_that_is_no_magnitude(value: float, sources: Sources, tmp_path: Path) -> None:
    model = quantize(load(sources("moe")), "fp8")
    expert_quantizer(model, FC1, 2)._amax.fill_(value)
    model.get_submodule(f"{FC2}.input_quantizer")._amax.fill_(value)
    with refused(CalibrationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    assert {name for name, _ in offenders(caught)} == {f"{FC1}.weight_quantizer.2", f"{FC2}.input_quantizer"}


def test_an_input_amax_of_zero(sources: Sources, tmp_path: Path) -> None:
    model = quantize(load(sources("moe")), "nvfp4")
    model.get_submodule(f"{FC2}.input_quantizer")._amax.zero_()
    with refused(CalibrationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    assert {name for name, _ in offenders(caught)} == {f"{FC2}.input_quantizer"}


@pytest.mark.parametrize("scheme", ["w4a16_nvfp4", "fp8"])
def test_weights_that_came_alive_after_an_amax_of_zero(scheme: str, sources: Sources, tmp_path: Path) -> None:
    model = quantize(load(sources("moe")), scheme)
    with torch.no_grad():
        model.get_submodule(FC1).weight1[5, 7] = 1e-6
    with refused(CalibrationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    assert offenders(caught) == {(f"{FC1}.weight1", 1)}


WEIGHTS = "*decoder*weight_quantizer"
TOKENS = {
    "quantizer_name": "*decoder*input_quantizer",
    "cfg": {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}},
}
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "int8": ({"quantizer_name": WEIGHTS, "cfg": {"num_bits": 8}},),
    "int8 channels": ({"quantizer_name": WEIGHTS, "cfg": {"num_bits": 8, "axis": 0}},),
    "mxfp8": (
        {
            "quantizer_name": WEIGHTS,
            "cfg": {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
        },
    ),
    "mxfp4": (
        {
            "quantizer_name": WEIGHTS,
            "cfg": {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
        },
    ),
    "nvfp4 of 32": (
        {
            "quantizer_name": WEIGHTS,
            "cfg": {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (4, 3)}},
        },
    ),
    "fp8 channels": ({"quantizer_name": WEIGHTS, "cfg": {"num_bits": (4, 3), "axis": 0}},),
    "fp8 rows with static inputs": (
        {"quantizer_name": WEIGHTS, "cfg": {"num_bits": (4, 3), "axis": 0}},
        {"quantizer_name": "*decoder*input_quantizer", "cfg": {"num_bits": (4, 3)}},
    ),
    "fp8 columns": ({"quantizer_name": WEIGHTS, "cfg": {"num_bits": (4, 3), "axis": 1}}, TOKENS),
    "fp8 with inputs by token": ({"quantizer_name": WEIGHTS, "cfg": {"num_bits": (4, 3)}}, TOKENS),
    "fp8 blocks with inputs by token": (
        {"quantizer_name": WEIGHTS, "cfg": {"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 128}}},
        TOKENS,
    ),
    "fp8 blocks of 32": ({"quantizer_name": WEIGHTS, "cfg": {"num_bits": (4, 3), "block_sizes": {-1: 32, -2: 32}}},),
    "int4 then fp8": ({"quantizer_name": WEIGHTS, "cfg": [{"num_bits": 4}, {"num_bits": (4, 3)}]},),
    "rotated": ({"quantizer_name": WEIGHTS, "cfg": {**NVFP4_16, "rotate": True}},),
    "nvfp4 weights with fp8 inputs": ({"quantizer_name": "*decoder*input_quantizer", "cfg": {"num_bits": (4, 3)}},),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_that_cannot_be_written_name_every_linear(setting: str, sources: Sources, tmp_path: Path) -> None:
    model = mtq.quantize(load(sources("moe")), rules(*SETTINGS[setting], algorithm=None))
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    linears = {(name, expert) for name, expert in offenders(caught) if "quantizer" not in name}
    experts = {expert for _, expert in linears}
    assert experts == {None, 0, 1, 2, 3}
    assert len(linears) == 2 * (2 + 2 * 4)


def test_inputs_quantized_without_their_weights(sources: Sources, tmp_path: Path) -> None:
    rule = {"quantizer_name": "*linear_qkv.input_quantizer", "cfg": NVFP4_16}
    config = rules({"quantizer_name": "*linear_qkv.weight_quantizer", "enable": False}, rule)
    model = mtq.quantize(load(sources("moe")), config)
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    assert {f"decoder.layers.{layer}.self_attention.linear_qkv.weight" for layer in range(2)} <= {
        name for name, _ in offenders(caught)
    }


def test_quantizers_that_no_tensor_expresses(sources: Sources, tmp_path: Path) -> None:
    keys_and_values = {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": (4, 3)}}
    outputs = {"quantizer_name": "*linear_proj.output_quantizer", "cfg": {"num_bits": (4, 3)}}
    model = mtq.quantize(load(sources("dense")), rules(keys_and_values, outputs))
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("dense"), export_dir=tmp_path / "out")
    assert {name for name, _ in offenders(caught)} == {
        f"decoder.layers.{layer}.self_attention.{quantizer}"
        for layer in range(2)
        for quantizer in (
            "core_attention.k_bmm_quantizer",
            "core_attention.v_bmm_quantizer",
            "linear_proj.output_quantizer",
        )
    }


def test_awq_scales_are_not_dropped(sources: Sources, tmp_path: Path) -> None:
    """ModelOpt smooths weights and scales inputs whether it quantizes inputs or not. By awq_full: awq_lite is ours."""
    model = load(sources("dense"), LayerSpec.LOCAL)
    model = mtq.quantize(model, {**mtq.W4A16_NVFP4_CFG, "algorithm": "awq_full"}, megatron_logits)
    scaled = {
        name.replace("input_quantizer", "weight")
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and module.pre_quant_scale is not None
    }
    assert len(scaled) == 2 * 4
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("dense"), export_dir=tmp_path / "out")
    assert {name for name, _ in offenders(caught)} == scaled
    assert "pre_quant_scale" in str(caught.value)
    # A stream quantizes by formats of its own, and the weights that it would pack are smoothed all the same.
    with pytest.raises(UnsupportedQuantizationError, match="pre_quant_scale"):
        plan_stream(model, sources("dense"), quant_format="w4a16_nvfp4")


def test_a_disabled_rotation_still_rotates(sources: Sources, tmp_path: Path) -> None:
    model = quantize(load(sources("dense")), "nvfp4")
    quantizer = model.decoder.layers[1].mlp.linear_fc2.input_quantizer
    quantizer.set_from_attribute_config({"enable": False, "rotate": True})
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("dense"), export_dir=tmp_path / "out")
    assert offenders(caught) == {("decoder.layers.1.mlp.linear_fc2.weight", None)}


def test_settings_beside_the_format_s_are_not_lost(sources: Sources, tmp_path: Path) -> None:
    four_over_six = {"quantizer_name": "*linear_fc2.weight_quantizer", "cfg": _FOUR_OVER_SIX}
    model = mtq.quantize(load(sources("dense")), rules(four_over_six))
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("dense"), export_dir=tmp_path / "out")
    assert {name for name, _ in offenders(caught)} == {f"decoder.layers.{i}.mlp.linear_fc2.weight" for i in range(2)}
    assert "four_over_six" in str(caught.value)


def test_two_schemes_that_a_dialect_does_not_have(sources: Sources, tmp_path: Path) -> None:
    fp8 = {"quantizer_name": "*self_attention*weight_quantizer", "cfg": {"num_bits": (4, 3)}}
    model = mtq.quantize(load(sources("moe")), rules(fp8))
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out", dialect="modelopt")
    assert offenders(caught) == {("dialect", None)}
    assert "compressed-tensors" in caught.value.remedy


def test_only_some_experts_of_a_layer(sources: Sources, tmp_path: Path) -> None:
    model = mtq.quantize(load(sources("moe")), rules({"quantizer_name": f"{FC1}*.2", "enable": False}))
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    assert {expert for _, expert in offenders(caught)} == {2}


def test_weights_that_do_not_divide(sources: Sources, tmp_path: Path) -> None:
    model = quantize(load(sources("moe")), "fp8_blockwise")
    with refused(ShapeError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    assert "128" in str(caught.value)
    assert {expert for _, expert in offenders(caught)} == {None, 0, 1, 2, 3}


def test_a_layer_that_was_never_quantized(sources: Sources, tmp_path: Path) -> None:
    model = load(sources("moe"))
    mtq.quantize(model.decoder.layers[0], rules())
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    assert offenders(caught) == {
        (f"decoder.layers.1.{linear}", None)
        for linear in (
            "self_attention.linear_qkv.weight",
            "self_attention.linear_proj.weight",
            "mlp.experts.linear_fc1.weight*",
            "mlp.experts.linear_fc2.weight*",
        )
    }


def test_a_layer_that_a_rule_leaves_out_is_exported_as_it_is(sources: Sources, tmp_path: Path) -> None:
    left_out = {"quantizer_name": "*decoder.layers.1.*", "enable": False}
    model = mtq.quantize(load(sources("moe")), rules(left_out))
    export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")


def test_a_model_none_of_whose_quantizers_is_enabled_is_exported_plain(sources: Sources, tmp_path: Path) -> None:
    model = load(sources("moe"))
    mtq.quantize(model.decoder.layers[0], rules())
    mtq.disable_quantizer(model, "*")
    assert export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out").algorithm is None
