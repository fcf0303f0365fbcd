"""Layers of multi-token prediction: never dropped, quantized or left as they are by choice."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from safetensors.torch import load_file, save_file

from quantplug import build_model, export_hf_weights_quant, export_mcore_gpt_to_hf, import_mcore_gpt_from_hf
from quantplug.calibration.collect import gather_statistics
from quantplug.calibration.policy import CalibrationPolicy, ColdExperts
from quantplug.calibration.run import calibrate
from quantplug.calibration.statistics import StatisticsRow
from quantplug.checkpoint.config.file import read_config_file
from quantplug.errors import CalibrationError, MappingError, SourceError
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.mappings.families import find_family
from quantplug.megatron import cpu
from quantplug.megatron.models.build import LayerSpec
from quantplug.megatron.releases.mtp import without_labels
from quantplug.plugins import quant_cfg
from quantplug.verify import verify_checkpoint
from quantplug.verify.checks import Check
from tests.export.checkpoints import build, load, one_rank, read, same_bytes

WITH_MTP = ["deepseek_v3", "glm4_moe"]
EXPERT = "model.layers.3.mlp.experts.5.down_proj.weight"

Checkpoint = Callable[[str], Path]


def changed(
    source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object], **settings: object
) -> Path:
    """A copy of a checkpoint with other tensors, and with other settings in its config."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **settings}))
    return target


def without_layer(tensors: dict[str, torch.Tensor]) -> None:
    by_name = any(name.startswith("mtp.") for name in tensors)
    for name in [name for name in tensors if name.startswith("mtp." if by_name else "model.layers.3.")]:
        del tensors[name]


def refused(error: type[Exception], source: Path) -> str:
    """The message of an import that must leave the model as it was."""
    with one_rank():
        model = build(source)
        with pytest.raises(error) as caught:
            import_mcore_gpt_from_hf(model, source)
        assert all(parameter.isnan().all() for parameter in model.parameters())
    return str(caught.value)


@pytest.mark.parametrize("copied", ["model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"])
def test_a_copy_that_is_not_its_original_is_refused(copied: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[copied][522, 7] += 1

    message = refused(SourceError, changed(checkpoint("deepseek_v3"), tmp_path / "source", spoil))
    assert f"{copied}: row 522 is not that of" in message


def test_a_source_without_copies_is_exported_without_them(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.3.embed_tokens.weight"]

    source = changed(checkpoint("glm4_moe"), tmp_path / "source", drop)
    with one_rank():
        export_mcore_gpt_to_hf(load(source), source, tmp_path / "out")
    assert read(tmp_path / "out").keys() == read(source).keys()


@pytest.mark.parametrize("name", [*WITH_MTP, "qwen3_5"])
def test_layers_that_transformers_has_not_saved_are_taken_as_none_in_every_way(
    name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = changed(checkpoint(name), tmp_path / "source", without_layer)
    setting = find_family(read_config_file(source)["architectures"][0]).mtp_setting
    quantized = quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    with one_rank():
        model = build_model(source, import_weights=True)
        streamed = dict(export_hf_weights_quant(model, source, quant_format="w4a16_nvfp4"))
        mtq.quantize(model, quant_cfg("w4a16_nvfp4", source))
        exported = export_mcore_gpt_to_hf(model, source, tmp_path / "live")
    expected = read(tmp_path / "out")
    for found in (read(tmp_path / "live"), streamed):
        assert found.keys() == expected.keys()
        assert all(same_bytes(found[tensor], expected[tensor]) for tensor in expected)
    for result in (quantized, exported):
        assert read_config_file(result.directory)[setting] == 0
        (said, *_) = result.said()
        assert f"counts 1 in {setting}" in said
    assert verify_checkpoint(tmp_path / "out", source).ok


def test_the_same_below_text_config(checkpoint: Checkpoint, tmp_path: Path) -> None:
    text = read_config_file(checkpoint("qwen3_5_vl"))["text_config"]

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("mtp.")]:
            del tensors[name]

    counted = {**text, "mtp_num_hidden_layers": 1}
    source = changed(checkpoint("qwen3_5_vl"), tmp_path / "source", drop, text_config=counted, mtp_num_hidden_layers=1)
    result = quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    config = read_config_file(result.directory)
    # Some readers take it from the whole, some from what its language model says.
    assert (config["text_config"]["mtp_num_hidden_layers"], config["mtp_num_hidden_layers"]) == (0, 0)
    assert result.lost_mtp is not None


def test_one_tensor_of_a_layer_that_is_counted_is_no_sign_that_there_is_none(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = changed(checkpoint("glm4_moe"), tmp_path / "source", lambda tensors: tensors.pop(EXPERT))
    with pytest.raises(MappingError, match=re.escape(EXPERT)):
        quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")


def test_a_model_with_layers_that_its_source_lacks_keeps_them(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """They were trained in Megatron; what is there cannot be read into them."""
    source = changed(checkpoint("glm4_moe"), tmp_path / "source", without_layer)
    message = refused(MappingError, source)
    assert "mtp.layers.0.eh_proj.weight" in message
    with one_rank():
        result = export_mcore_gpt_to_hf(load(checkpoint("glm4_moe")), source, tmp_path / "out")
    assert result.lost_mtp is None
    assert EXPERT in read(tmp_path / "out")
    assert read_config_file(tmp_path / "out")["num_nextn_predict_layers"] == 1


def test_a_model_without_mtp_is_exported_once_the_config_says_so(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = changed(checkpoint("glm4_moe"), tmp_path / "source", without_layer, num_nextn_predict_layers=0)
    with one_rank():
        export_mcore_gpt_to_hf(load(source), source, tmp_path / "out")
    assert read(tmp_path / "out").keys() == read(source).keys()


def test_a_layer_that_the_config_does_not_know_is_not_dropped(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = changed(checkpoint("glm4_moe"), tmp_path / "source", lambda _: None, num_nextn_predict_layers=0)
    assert EXPERT in refused(MappingError, source)


def test_a_model_without_the_promised_layer_is_not_exported(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with one_rank():
        model = build(checkpoint("glm4_moe"), num_nextn_predict_layers=0)
        with pytest.raises(MappingError, match=r"(?s)mtp\.layers\.0\.eh_proj\.weight.*set num_next"):
            export_mcore_gpt_to_hf(model, checkpoint("glm4_moe"), tmp_path / "out")


def quantized(source: Path, config: dict[str, object], out: Path) -> None:
    with one_rank():
        model = mtq.quantize(load(source), config)
        export_mcore_gpt_to_hf(model, source, out)


@pytest.mark.parametrize("name", WITH_MTP)
def test_stock_configs_leave_it_in_high_precision(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    quantized(checkpoint(name), quant_cfg("w4a16_nvfp4", checkpoint(name)), tmp_path / "out")
    original, exported = read(checkpoint(name)), read(tmp_path / "out")
    layer = [tensor for tensor in original if tensor.startswith("model.layers.3.")]
    assert all(same_bytes(exported[tensor], original[tensor]) for tensor in layer)
    # One pattern for the layer. vLLM looks up `model.layers.3.head`, which is on no disk, and SGLang compares only the
    # last segment of MLA's projections, so that exact names would leave these unquantized in every layer.
    excluded = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert [module for module in excluded if module.startswith("model.layers.3.")] == ["model.layers.3.*"]
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == excluded
    report = verify_checkpoint(tmp_path / "out", checkpoint(name))
    assert report.ok
    assert not {Check.EXCLUDE_PATTERN, Check.EXCLUDE_MISSING} & {finding.check for finding in report.findings}


@pytest.mark.parametrize("name", WITH_MTP)
def test_it_is_quantized_by_choice_but_for_its_projection(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = quant_cfg("w4a16_nvfp4", checkpoint(name), quantize_mtp=True)
    quantized(checkpoint(name), config, tmp_path / "out")
    exported = read(tmp_path / "out")
    linears = [f"{module}.weight" for module in ("model.layers.3.self_attn.o_proj", EXPERT.removesuffix(".weight"))]
    assert all(exported[linear].dtype == torch.uint8 for linear in linears)
    assert exported["model.layers.3.eh_proj.weight"].dtype == torch.bfloat16
    assert verify_checkpoint(tmp_path / "out", checkpoint(name)).ok


def names(source: Path, format_name: str, **asked: bool) -> list[object]:
    """The quantizers that a config of ours names and ModelOpt's own does not, by the name of the format."""
    stock = {rule["quantizer_name"] for rule in mtq.W4A16_NVFP4_CFG["quant_cfg"]}
    rules = quant_cfg(format_name, source, **asked)["quant_cfg"]
    return [rule["quantizer_name"] for rule in rules if rule["quantizer_name"] not in {*stock, "*input_quantizer"}]


def test_kv_b_proj_is_kept_in_four_bits(checkpoint: Checkpoint) -> None:
    """SGLang reads its weight as values, whatever the format."""
    projection = "*mtp.layers.*.eh_proj.*_quantizer*"
    assert names(checkpoint("deepseek_v3"), "nvfp4") == [
        "*decoder.layers.*.self_attention.linear_kv_up_proj.*_quantizer*",
        projection,
        "*mtp.layers.*.self_attention.linear_kv_up_proj.*_quantizer*",
    ]
    assert names(checkpoint("deepseek_v3"), "fp8") == [projection]


def test_rules_are_for_what_a_model_has(checkpoint: Checkpoint) -> None:
    plain, with_mtp = checkpoint("glm4_moe_air"), checkpoint("glm4_moe")
    assert quant_cfg("w4a16_nvfp4", plain) == quant_cfg("w4a16_nvfp4", plain, quantize_mtp=True) == mtq.W4A16_NVFP4_CFG
    assert names(with_mtp, "w4a16_nvfp4") == ["*mtp.layers.*.eh_proj.*_quantizer*"]
    off = {rule["quantizer_name"] for rule in quant_cfg("w4a16_nvfp4", with_mtp)["quant_cfg"]}
    assert off - {
        rule["quantizer_name"] for rule in quant_cfg("w4a16_nvfp4", with_mtp, quantize_mtp=True)["quant_cfg"]
    } == {"mtp.*"}


def test_correction_biases_are_never_rounded(checkpoint: Checkpoint) -> None:
    with one_rank():
        model = build(checkpoint("deepseek_v3"))
        import_mcore_gpt_from_hf(model, checkpoint("deepseek_v3"), dtype=torch.float16, moe_router_dtype=torch.float16)
    bias = read(checkpoint("deepseek_v3"))["model.layers.3.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    (router,) = (module for module in model.mtp.modules() if isinstance(module, TopKRouter))
    assert torch.equal(router.expert_bias, bias)


def forward(model: GPTModel, tokens: torch.Tensor, **labels: torch.Tensor) -> torch.Tensor:
    length = tokens.shape[1]
    hidden_from_later = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), diagonal=1)
    with torch.no_grad(), cpu.local_forward():
        return model.eval()(tokens, torch.arange(length).expand_as(tokens), hidden_from_later, **labels)


@pytest.mark.parametrize("name", WITH_MTP)
def test_calibration_reaches_it_without_labels(name: str, checkpoint: Checkpoint) -> None:
    """Megatron-Core's own forward of a model with MTP fails where there are no labels."""
    tokens = torch.arange(48).view(2, 24) * 7 % 500
    with one_rank():
        model = load(checkpoint(name), LayerSpec.LOCAL, dtype=torch.float32)
        mtq.quantize(model, {**quant_cfg("fp8", checkpoint(name), quantize_mtp=True), "algorithm": None})
        calibrate(model, lambda chunk: forward(chunk, tokens), CalibrationPolicy(cold_experts=ColdExperts.LAYER_MAX))
        inputs = {
            name: module.amax
            for name, module in model.named_modules()
            if name.startswith("mtp.") and name.endswith("input_quantizer") and module.is_enabled
        }
        assert model.config.mtp_num_layers == 1
    assert any(".experts." in name for name in inputs)
    assert all(amax > 0 for amax in inputs.values())


def test_logits_of_the_main_model_come_first(checkpoint: Checkpoint) -> None:
    tokens = torch.arange(12).view(2, 6)
    with one_rank():
        model = load(checkpoint("glm4_moe"), LayerSpec.LOCAL, dtype=torch.float32)
        with without_labels([model]):
            logits = forward(model, tokens)
        loss = forward(model, tokens, labels=tokens)
    assert logits.shape == (2, 12, 640)
    expected = torch.nn.functional.cross_entropy(logits[:, :6].flatten(0, 1), tokens.flatten(), reduction="none")
    torch.testing.assert_close(loss.flatten(), expected, rtol=1e-4, atol=1e-4)


def test_tokens_of_its_experts_are_counted(checkpoint: Checkpoint) -> None:
    """Under their own layer, after the decoder's, and in the rows of the statistics that are theirs."""
    tokens = torch.arange(48).view(2, 24) * 7 % 500
    with one_rank():
        model = load(checkpoint("glm4_moe"), LayerSpec.LOCAL, dtype=torch.float32)
        mtq.quantize(model, {**quant_cfg("fp8", checkpoint("glm4_moe"), quantize_mtp=True), "algorithm": None})
        policy = CalibrationPolicy(cold_experts=ColdExperts.LAYER_MAX)
        record = calibrate(model, lambda chunk: forward(chunk, tokens), policy)
        rows = gather_statistics(model, record).rows
        send_nothing_to(7, model)
        with pytest.raises(CalibrationError, match=r"mtp\.layers\.0\.transformer_layer\.mlp\.experts \(expert 7\)"):
            calibrate(model, lambda chunk: forward(chunk, tokens))
    assert record.tokens.keys() == {1, 2, 3}
    assert all(counted.routed == 48 * 2 for counted in record.tokens.values())
    told = {row.key.expert: row.tokens for row in rows if row.key.name.endswith("linear_fc2.weight") and is_mtp(row)}
    assert tuple(told[expert] for expert in range(8)) == record.tokens[3].by_expert
    assert {expert for layer, expert in record.fallback if layer == 3} == {
        expert for expert, count in told.items() if count == 0
    }


def is_mtp(row: StatisticsRow) -> bool:
    return row.key.stack == "mtp" and row.key.expert is not None


def send_nothing_to(expert: int, model: GPTModel) -> None:
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.expert_bias.zero_()
            module.expert_bias[expert] = -9.0
