"""The output layer, quantized where it is asked for: the same bytes in every way; refused where no server reads it."""

import json
from collections.abc import Callable
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from safetensors.torch import save_file
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

from quantplug import (
    export_checkpoint,
    export_hf_weights_quant,
    export_mcore_gpt_to_hf,
    quant_cfg,
    quantize_checkpoint,
    save_checkpoint,
)
from quantplug.errors import ArgumentError, CheckpointError, QuantplugError, UnsupportedQuantizationError
from quantplug.verify import verify_checkpoint
from quantplug.verify.checks import Check
from quantplug.verify.report import Severity
from tests.export.checkpoints import assert_same_export, load, read, same_bytes
from tests.families.served import errors_of

pytestmark = pytest.mark.usefixtures("single_rank")

Sources = Callable[[str], Path]
HEAD = "lm_head.weight"


def test_it_is_the_same_in_every_way(sources: Sources, tmp_path: Path) -> None:
    """523 tokens, of which Megatron's model has 640 rows: what is padding is in no scale."""
    source = sources("moe")
    quantize_checkpoint(source, tmp_path / "direct", "w4a16_nvfp4", quantize_lm_head=True)
    model = load(source)
    streamed = dict(export_hf_weights_quant(model, source, quant_format="w4a16_nvfp4", quantize_lm_head=True))
    save_checkpoint(model, tmp_path / "trained", extra={})
    mtq.quantize(model, quant_cfg("w4a16_nvfp4", source, quantize_lm_head=True))
    export_mcore_gpt_to_hf(model, source, tmp_path / "live")
    export_checkpoint(tmp_path / "trained", tmp_path / "by_format", source, "w4a16_nvfp4", quantize_lm_head=True)

    found = read(tmp_path / "direct")
    for other in ("live", "by_format"):
        assert_same_export(tmp_path / other, tmp_path / "direct")
    assert streamed.keys() == found.keys()
    assert all(same_bytes(streamed[name], found[name]) for name in found)

    original = read(source)[HEAD].float()
    above = found["lm_head.weight_scale_2"]
    packed = NVFP4Tensor(found[HEAD], found["lm_head.weight_scale"], 16, torch.float32, per_tensor_scale=above)
    error = (packed.dequantize(torch.float32) - original).norm() / original.norm()
    assert float(above) == pytest.approx(float(original.abs().max()) / (6 * 448), rel=1e-6)
    assert 0.05 < error < 0.13
    config = json.loads((tmp_path / "direct" / "config.json").read_text())["quantization_config"]
    assert "lm_head" not in config["ignore"]
    assert "model.embed_tokens" in config["ignore"]
    assert errors_of(tmp_path / "direct", source) == set()


def test_megatron_has_no_checkpoint_of_it(sources: Sources, tmp_path: Path) -> None:
    """Its GPTModel asserts that the output layer has no state beside its weight."""
    source = sources("moe")
    model = mtq.quantize(load(source), quant_cfg("w4a16_nvfp4", source, quantize_lm_head=True))
    with pytest.raises(CheckpointError, match="output_layer") as caught:
        save_checkpoint(model, tmp_path / "saved", extra={})
    assert "--quantize-lm-head" in caught.value.remedy
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("format_name", "dialect"),
    [("fp8_dynamic", None), ("int4", None), ("w4a16_nvfp4", "compressed-tensors"), ("mxfp8", None)],
)
def test_every_dialect_names_it(format_name: str, dialect: str | None, sources: Sources, tmp_path: Path) -> None:
    source = sources("moe_blocks")
    quantize_checkpoint(source, tmp_path / "out", format_name, dialect=dialect, quantize_lm_head=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if config["quant_method"] == "compressed-tensors":
        assert config["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
        config["config_groups"]["group_0"]["targets"] = ["Linear"]
    assert errors_of(tmp_path / "out", source) == set()
    if config["quant_method"] == "compressed-tensors":
        whole = json.loads((tmp_path / "out" / "config.json").read_text())
        (tmp_path / "out" / "config.json").write_text(json.dumps({**whole, "quantization_config": config}))
        found = [finding for finding in verify_checkpoint(tmp_path / "out").findings if finding.subject == "lm_head"]
        assert any("targets" in finding.message for finding in found)


def test_beside_experts_of_another_format(sources: Sources, tmp_path: Path) -> None:
    source = sources("moe")
    quantize_checkpoint(source, tmp_path / "out", "mxfp8", expert_format="w4a16_nvfp4", quantize_lm_head=True)
    layers = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]["quantized_layers"]
    assert layers["lm_head"]["quant_algo"] == "MXFP8"
    assert errors_of(tmp_path / "out", source) == set()


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("gpt_oss", {"format": "fp8_dynamic", "exclude": ["*.experts*"]}, "GPT-OSS"),
        ("qwen3_next", {"format": "w4a16_nvfp4"}, "Qwen3-Next"),
        ("mixtral", {"format": "w4a16_nvfp4"}, "Mixtral"),
        ("llama4_text", {"format": "w4a16_nvfp4"}, "Llama 4"),
        # In whose layer of multi-token prediction it is once more.
        ("deepseek_v3", {"format": "w4a16_nvfp4"}, "shared_head.head"),
    ],
)
def test_what_servers_load_in_16_bits_is_refused(
    name: str, arguments: dict[str, object], words: str, checkpoint: Sources, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedQuantizationError, match=words) as caught:
        quantize_checkpoint(checkpoint(name), tmp_path / "out", **arguments, quantize_lm_head=True)
    assert [offender.parameter for offender in caught.value.offenders] == [HEAD]
    assert "--exclude lm_head" in caught.value.remedy
    assert "experts" not in caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_fp8_blocks_have_no_place_for_it(divisible_dir: Path, tmp_path: Path) -> None:
    for dialect in ("deepseek", "compressed-tensors"):
        with pytest.raises(UnsupportedQuantizationError, match="output layer"):
            quantize_checkpoint(
                divisible_dir, tmp_path / "out", "fp8_blockwise", dialect=dialect, quantize_lm_head=True
            )


def test_those_of_others_are_found(divisible_dir: Path, tmp_path: Path) -> None:
    """compressed-tensors' config can ask for them; SGLang 0.5.23 (`get_lm_head_scheme`) has no such scheme."""
    out = tmp_path / "out"
    quantize_checkpoint(divisible_dir, out, "fp8_blockwise", dialect="compressed-tensors")
    tensors = read(out)
    rows, columns = tensors[HEAD].shape
    tensors[HEAD] = tensors[HEAD].to(torch.float8_e4m3fn)
    tensors["lm_head.weight_scale"] = torch.ones(-(-rows // 128), -(-columns // 128), dtype=torch.bfloat16)
    for file in out.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    said = config["quantization_config"]
    said["ignore"].remove("lm_head")
    said["config_groups"]["group_0"]["targets"].append("lm_head")
    (out / "config.json").write_text(json.dumps(config))

    verdict = verify_checkpoint(out)
    (found,) = [finding for finding in verdict.findings if finding.subject == "lm_head"]
    assert (found.check, found.severity) == (Check.SGLANG, Severity.WARNING)
    assert "FP8 blocks" in found.message
    assert verdict.ok


def test_a_tied_one_is_the_embedding(tiny_qwen3_tied_dir: Path, tmp_path: Path) -> None:
    source = tiny_qwen3_tied_dir
    model = load(source)
    ways: list[Callable[[], object]] = [
        lambda: quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4", quantize_lm_head=True),
        lambda: quant_cfg("w4a16_nvfp4", source, quantize_lm_head=True),
        lambda: list(export_hf_weights_quant(model, source, quant_format="w4a16_nvfp4", quantize_lm_head=True)),
    ]
    for way in ways:
        with pytest.raises(ArgumentError, match="ties it to the embedding"):
            way()


@pytest.mark.parametrize(
    "asked", [{"quant_format": "as_quantized"}, {"quant_fn": lambda weight, block: (weight, weight)}]
)
def test_a_stream_takes_it_with_a_format_alone(asked: dict[str, object], sources: Sources) -> None:
    source = sources("moe")
    with pytest.raises(QuantplugError, match="quantize_lm_head"):
        list(export_hf_weights_quant(load(source), source, **asked, quantize_lm_head=True))
