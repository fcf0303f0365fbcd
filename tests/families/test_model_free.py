"""Every family in every way: from a checkpoint, from a live model to files, and as a stream, in the same bytes."""

import json
from collections.abc import Callable
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch

from quantplug import export_hf_weights_quant, export_mcore_gpt_to_hf, quant_cfg
from quantplug.checkpoint.config.source import read_source_config
from quantplug.errors import UnsupportedQuantizationError
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.mappings.families import find_family
from quantplug.verify import Severity, verify_checkpoint
from quantplug.verify.checks import Check
from tests.export.checkpoints import assert_same_export, load, one_rank, quantize, read, same_bytes
from tests.families.served import errors_of, has_experts, serves_experts

# Hidden 160 and expert width 96 do not divide by 128: FP8 in blocks has a checkpoint of its own in tests/export.
FORMATS = ("w4a16_nvfp4", "fp8_dynamic")


def apart_from_experts(name: str) -> bool:
    """What the policy quantizes, without the experts."""
    return ".experts." not in name and not name.startswith("mtp.") and "latent_proj" not in name


def of_megatron(tensors: dict[str, torch.Tensor], source: Path) -> dict[str, torch.Tensor]:
    """Without what Megatron's model does not hold, which a receiver of a stream has already."""
    config = read_source_config(source)
    family = find_family(config.architecture)
    has_mtp = family.dimensions(config.values).mtp_layers > 0  # Then the table expects these layers: Megatron has them.
    passthrough = tuple(start for start in family.passthrough if not (has_mtp and start == "mtp."))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(passthrough)}


@pytest.mark.parametrize("format_name", FORMATS)
def test_the_bytes_are_the_same_in_every_way(
    family: str, format_name: str, checkpoint: Callable[[str], Path], export: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = checkpoint(family), tmp_path / "out"
    # What no server loads is left out in each of the ways.
    keep_experts = has_experts(source) and not serves_experts(family, format_name)
    result = quantize_checkpoint(source, out, format_name, exclude=["*.experts*"] if keep_experts else [], preset="all")
    with one_rank():
        model, checker = load(source), apart_from_experts if keep_experts else None
        streamed = dict(export_hf_weights_quant(model, source, checker, quant_format=format_name, preset="all"))
        if format_name == "w4a16_nvfp4":
            exported = export(family, format_name)  # Which other tests look at too.
        else:
            exported = tmp_path / "by_megatron"  # Of the very model that was streamed, and never quantized before.
            export_mcore_gpt_to_hf(quantize(model, format_name, source, keep_experts=keep_experts), source, exported)
    expected, found = read(exported), read(out)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(found[name], expected[name])] == []
    received = of_megatron(expected, source)
    assert streamed.keys() == received.keys()
    assert [name for name in received if not same_bytes(streamed[name], received[name])] == []
    assert {path.name for path in out.iterdir()} == {path.name for path in exported.iterdir()}
    for path in exported.glob("*.json"):
        assert (out / path.name).read_text() == path.read_text(), path.name
    assert result.tensors == len(expected)
    report = verify_checkpoint(out, source)
    assert report.checks(Severity.ERROR) == {}
    assert result.serving_tp == report.serving_tp


@pytest.mark.parametrize("name", ["qwen3_next", "deepseek_v3", "llama4"])
def test_int4_in_groups_of_32_is_the_same_in_every_way(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of experts one by one, where an architecture keeps them in one tensor too; 32 divides all widths here."""
    source = checkpoint(name)
    quantize_checkpoint(source, tmp_path / "direct", "int4", group_size=32)
    with one_rank():
        model = load(source)
        streamed = dict(export_hf_weights_quant(model, source, quant_format="int4", group_size=32))
        mtq.quantize(model, quant_cfg("int4", source, group_size=32))
        export_mcore_gpt_to_hf(model, source, tmp_path / "live")
    assert_same_export(tmp_path / "live", tmp_path / "direct")
    expected = of_megatron(read(tmp_path / "direct"), source)
    assert streamed.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(streamed[name], expected[name])] == []
    packed = [name for name in expected if name.endswith(".weight_packed")]
    assert any(".experts.3.down_proj." in name for name in packed)
    assert {expected[name].dtype for name in packed} == {torch.int32}
    assert errors_of(tmp_path / "direct", source) == set()


def test_gpt_oss_has_no_reader_of_int4(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Its experts have biases, which vLLM's method of compressed-tensors' experts has no place for."""
    source = checkpoint("gpt_oss")
    with pytest.raises(UnsupportedQuantizationError, match=r"experts") as caught:
        quantize_checkpoint(source, tmp_path / "out", "int4", group_size=32)
    assert all(".experts." in offender.parameter for offender in caught.value.offenders)
    assert not (tmp_path / "out").exists()
    quantize_checkpoint(source, tmp_path / "rest", "int4", group_size=32, exclude=["*.experts*"])
    assert verify_checkpoint(tmp_path / "rest", source).ok


def test_multi_token_prediction_is_quantized_on_demand(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    quantize_checkpoint(checkpoint("glm4_moe"), tmp_path / "out", "w4a16_nvfp4", quantize_mtp=True)
    scaled = {name for name in read(tmp_path / "out") if name.endswith(".weight_scale_2")}
    assert "model.layers.3.mlp.experts.0.gate_proj.weight_scale_2" in scaled
    assert "model.layers.3.eh_proj.weight_scale_2" not in scaled
    assert verify_checkpoint(tmp_path / "out", checkpoint("glm4_moe")).ok


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "llama4"])  # One by one; by other names; in one tensor.
def test_plain_experts_are_excluded_by_the_names_that_vllm_asks_for(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """vLLM 0.33, `get_moe_method` of compressed_tensors_moe.py: three linears of the first expert, compared exactly."""
    source, out = checkpoint(name), tmp_path / "out"
    quantize_checkpoint(source, out, "fp8_dynamic", exclude=["*.experts*"])
    report = verify_checkpoint(out, source)
    assert report.ok
    assert Check.EXCLUDE_PATTERN not in report.checks(Severity.WARNING)
    config = json.loads((out / "config.json").read_text())
    ignore = config["quantization_config"]["ignore"]
    asked = [name for name in ignore if name.endswith(".experts.0.up_proj")]
    assert asked
    config["quantization_config"]["ignore"] = [name for name in ignore if name not in asked]
    (out / "config.json").write_text(json.dumps(config))
    assert Check.EXCLUDE_MISSING in verify_checkpoint(out, source).checks(Severity.ERROR)
