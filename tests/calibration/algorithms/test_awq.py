"""`awq_lite` of Megatron models: the same function to the last bit, plain files, and less lost on outliers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantplug import (
    LayerSpec,
    build_model,
    export_mcore_gpt_to_hf,
    load_checkpoint,
    quant_cfg,
    save_checkpoint,
    verify_checkpoint,
)
from quantplug.calibration.algorithms.awq import FoldedChannels, awq_lite, fold_channels
from quantplug.calibration.algorithms.folds import folds_of
from quantplug.calibration.inputs.linears import linears_of
from quantplug.calibration.policy import CalibrationPolicy, ColdExperts
from quantplug.calibration.run import calibrate
from quantplug.errors import CalibrationError, UnsupportedQuantizationError
from quantplug.megatron.parameters import LanguageModel
from tests.calibration.test_expert_inputs import run
from tests.export.checkpoints import read
from tests.families.cases import make
from tests.logits import megatron_logits
from tests.made_once import MadeOnce

pytestmark = pytest.mark.usefixtures("single_rank")

CASES = ("llama3", "qwen2", "qwen2_moe", "mixtral", "glm4_moe", "llama4", "qwen3_vl_moe")
OUTLIERS = (3, 17, 90, 141)
HEAD, OF_VALUES = 48, (5, 40)


def source_of(case: str, made_once: MadeOnce, directory: Path) -> Path:
    """A family's checkpoint with four channels of each norm times 32, and two of each head of values."""
    made = made_once(f"family_{case}", partial(make, case))
    directory.mkdir()
    for file in made.glob("*.json"):
        (directory / file.name).write_text(file.read_text())
    tensors = {name: tensor for file in made.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in tensors.items():
        norm = name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight"))
        if norm and "vision" not in name:
            tensor[list(OUTLIERS)] *= 32
        if "v_proj" in name and "vision" not in name:  # Rows of the weight, and of its bias.
            tensor.unflatten(0, (-1, HEAD))[:, list(OF_VALUES)] *= 32
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def quantized(source: Path, **options: Any) -> tuple[LanguageModel, torch.Tensor, tuple[FoldedChannels, ...]]:
    """A model whose channels were folded, its logits before that, and what was done."""
    model = build_model(source, import_weights=True, layer_spec=LayerSpec.LOCAL, dtype=torch.float32)
    before = megatron_logits(model)
    mtq.quantize(model, {**quant_cfg("w4a16_nvfp4", source), "algorithm": None})
    return model, before, awq_lite(model, run, **options)


@pytest.mark.parametrize("case", CASES)
def test_the_model_computes_what_it_did_and_its_files_are_judged_so(
    case: str, made_once: MadeOnce, tmp_path: Path
) -> None:
    source = source_of(case, made_once, tmp_path / "source")
    model, before, folded = quantized(source)
    norms = [one for one in folded if one.name.endswith("layernorm")]
    others = [one for one in folded if not one.name.endswith("layernorm")]
    assert norms
    # The large channels get the largest factors: of all, as their inputs are 32 times as large.
    for one in norms:
        assert bool((one.exponents[0, list(OUTLIERS)] >= 1).all()), one.name
    assert any(bool(one.exponents.any()) for one in others)
    # Both heads of queries that read a head of values have its factors.
    of_values = [one.exponents.view(-1, HEAD) for one in folded if one.name.endswith("linear_proj")]
    assert of_values
    assert all(bool((one[:, list(OF_VALUES)] >= 1).all()) for one in of_values)

    export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "out")
    mtq.disable_quantizer(model, "*weight_quantizer*")
    # Every product is of a power of two times what it was: no sum rounds otherwise.
    assert torch.equal(megatron_logits(model), before)

    report = verify_checkpoint(tmp_path / "out", source)
    assert report.ok, report.findings
    (said,) = (finding.message for finding in report.findings if "powers of two" in finding.message)
    assert "norms" in said
    assert f"of {len(of_values)} projections to values" in said
    stored = {name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)}
    assert not any("pre_quant_scale" in name for name in stored)


def test_a_saved_model_is_exported_as_the_live_one(tiny_qwen3_moe_dir: Path, tmp_path: Path) -> None:
    model = build_model(tiny_qwen3_moe_dir, import_weights=True, layer_spec=LayerSpec.LOCAL, dtype=torch.float32)
    mtq.quantize(model, {**quant_cfg("w4a16_nvfp4", tiny_qwen3_moe_dir), "algorithm": "awq_lite"}, run)
    save_checkpoint(model, tmp_path / "saved", extra={})
    loaded = build_model(tiny_qwen3_moe_dir, layer_spec=LayerSpec.LOCAL, dtype=torch.float32)
    load_checkpoint(loaded, tmp_path / "saved")
    for name, one in (("live", model), ("loaded", loaded)):
        export_mcore_gpt_to_hf(one, tiny_qwen3_moe_dir, export_dir=tmp_path / name)
    live, again = (read(tmp_path / name) for name in ("live", "loaded"))
    assert live.keys() == again.keys()
    assert all(torch.equal(live[name], again[name]) for name in live)
    assert verify_checkpoint(tmp_path / "loaded", tiny_qwen3_moe_dir).ok


def test_quantized_inputs_are_calibrated_behind_the_factors(made_once: MadeOnce, tmp_path: Path) -> None:
    source = source_of("qwen2_moe", made_once, tmp_path / "source")
    amaxes = []
    for folds in (False, True):
        model = build_model(source, import_weights=True, layer_spec=LayerSpec.LOCAL, dtype=torch.float32)
        mtq.quantize(model, {**quant_cfg("nvfp4", source), "algorithm": None})
        if folds:
            fold_channels(model, run)
        calibrate(model, run, CalibrationPolicy(cold_experts=ColdExperts.LAYER_MAX))
        inputs = [layer.self_attention.linear_qkv.input_quantizer for layer in model.decoder.layers]
        amaxes.append([float(quantizer.amax) for quantizer in inputs])
    # The four channels were 32 times as large as the others.
    assert all(folded < plain / 3 for plain, folded in zip(*amaxes, strict=True)), amaxes
    export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out", source).ok


@pytest.fixture
def export(made_once: MadeOnce, tmp_path: Path) -> tuple[Path, Path]:
    source = source_of("qwen2_moe", made_once, tmp_path / "source")
    model, _, _ = quantized(source)
    export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "out")
    return source, tmp_path / "out"


def spoilt(export: Path, name: str, spoil: Callable[[torch.Tensor], None]) -> None:
    (file,) = export.glob("*.safetensors")
    tensors = load_file(file)
    spoil(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


def wrong_in(export: Path, source: Path) -> set[str]:
    findings = verify_checkpoint(export, source).findings
    return {finding.subject for finding in findings if finding.severity == "error"}


def test_every_reader_of_a_channel_must_have_its_factor(export: tuple[Path, Path]) -> None:
    source, out = export
    original = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name in ("mlp.gate.weight", "mlp.shared_expert_gate.weight"):
        full = f"model.layers.0.{name}"
        spoilt(out, full, lambda stored, full=full: stored.copy_(original[full]))
    wrong = wrong_in(out, source)
    assert wrong == {"model.layers.0.mlp.gate.weight", "model.layers.0.mlp.shared_expert_gate.weight"}


def test_a_factor_that_is_no_power_of_two_is_none(export: tuple[Path, Path]) -> None:
    source, out = export
    name = "model.layers.1.input_layernorm.weight"
    spoilt(out, name, lambda stored: stored[5].mul_(3))
    wrong = wrong_in(out, source)
    assert name in wrong
    # Without factors of its norm, what reads it is far off too.
    assert "model.layers.1.self_attn.q_proj.weight" in wrong


def test_factors_that_quantized_weights_do_not_take_up_are_told(export: tuple[Path, Path]) -> None:
    """One column of many, which the error of the whole weight does not show."""
    source, out = export
    spoilt(out, "model.layers.1.input_layernorm.weight", lambda stored: stored[5].mul_(2))
    scales = "model.layers.2.mlp.experts.3.up_proj.weight_scale"
    spoilt(out, scales, lambda stored: stored[7].copy_(stored[7].float() / 2))
    scales = "model.layers.0.self_attn.v_proj.weight_scale"
    spoilt(out, scales, lambda stored: stored[7].copy_(stored[7].float() / 2))
    wrong = wrong_in(out, source)
    assert wrong >= {
        "model.layers.1.input_layernorm.weight",
        "model.layers.2.mlp.experts.3.up_proj",
        "model.layers.0.self_attn.v_proj",
    }


def test_a_factor_of_a_channel_that_nothing_takes_up_is_told(export: tuple[Path, Path]) -> None:
    source, out = export
    name = "model.layers.0.post_attention_layernorm.weight"
    spoilt(out, name, lambda stored: stored[5].mul_(4))
    wrong = wrong_in(out, source)
    assert "model.layers.0.mlp.gate.weight" in wrong


def test_values_that_are_not_quantized_have_factors_too(made_once: MadeOnce, tmp_path: Path) -> None:
    """As in ModelOpt's NVFP4_OMLP_ONLY_CFG."""
    source = source_of("qwen2_moe", made_once, tmp_path / "source")
    model = build_model(source, import_weights=True, layer_spec=LayerSpec.LOCAL, dtype=torch.float32)
    mtq.quantize(model, {**quant_cfg("w4a16_nvfp4", source), "algorithm": None})
    mtq.disable_quantizer(model, "*linear_qkv*")
    folded = awq_lite(model, run)
    assert any(one.name.endswith("linear_proj") and bool(one.exponents.any()) for one in folded)
    export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "out")
    report = verify_checkpoint(tmp_path / "out", source)
    assert report.ok, report.findings
    name = "model.layers.1.self_attn.v_proj.weight"
    spoilt(tmp_path / "out", name, lambda stored: stored[5].mul_(2))
    wrong = wrong_in(tmp_path / "out", source)
    attention = "model.layers.1.self_attn"
    assert wrong == {f"{attention}.v_proj", f"{attention}.v_proj.bias", f"{attention}.o_proj.weight"}


def test_a_gate_on_attention_changes_nothing_of_a_fold(made_once: MadeOnce) -> None:
    source = made_once("family_qwen3_next", partial(make, "qwen3_next"))
    model = build_model(source, import_weights=True, layer_spec=LayerSpec.LOCAL, dtype=torch.float32)
    before = megatron_logits(model)
    mtq.quantize(model, {**quant_cfg("w4a16_nvfp4", source), "algorithm": None})
    mtq.disable_quantizer(model, "*")
    mtq.enable_quantizer(model, "*linear_proj.weight_quantizer")
    folds = folds_of(model, linears_of(model))
    assert folds
    for fold in folds:
        assert fold.linears[0].modules[0].config.attention_output_gate
        weight = fold.linears[0].weights[0].weight
        was = weight.clone()
        fold.apply((torch.arange(fold.channels, dtype=torch.int32) % 7 - 3)[None])
        assert not torch.equal(weight, was)
    mtq.disable_quantizer(model, "*")
    assert torch.equal(megatron_logits(model), before)


def test_what_cannot_be_folded_is_refused_by_name(made_once: MadeOnce, tmp_path: Path) -> None:
    source = made_once("family_qwen3_next", partial(make, "qwen3_next"))
    with pytest.raises(UnsupportedQuantizationError) as caught:
        quantized(source)
    assert {"1 + weight" in offender.reason for offender in caught.value.offenders} == {True, False}
    latent = made_once("family_deepseek_v3", partial(make, "deepseek_v3"))
    with pytest.raises(UnsupportedQuantizationError) as caught:
        quantized(latent)
    assert all(".self_attention." in offender.parameter for offender in caught.value.offenders)


def test_other_formats_and_a_calibration_without_data_are_refused(tiny_qwen3_moe_dir: Path) -> None:
    def model() -> LanguageModel:
        return build_model(tiny_qwen3_moe_dir, import_weights=True, layer_spec=LayerSpec.LOCAL, dtype=torch.float32)

    with pytest.raises(CalibrationError, match="needs calibration data"):
        mtq.quantize(model(), {**mtq.W4A16_NVFP4_CFG, "algorithm": "awq_lite"})
    with pytest.raises(UnsupportedQuantizationError, match="NVFP4 and INT4"):
        mtq.quantize(model(), {**mtq.FP8_DEFAULT_CFG, "algorithm": "awq_lite"}, run)
    half = model().half()
    with pytest.raises(UnsupportedQuantizationError) as caught:
        mtq.quantize(half, {**mtq.W4A16_NVFP4_CFG, "algorithm": "awq_lite"}, run)
    assert "float16" in caught.value.offenders[0].reason
