"""The policy of what is quantized where models meet it: refused by name, and the advice works when it is followed."""

import ast
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch

from quantplug import export_hf_weights_quant, export_mcore_gpt_to_hf
from quantplug.errors import ShapeError, UnsupportedQuantizationError
from quantplug.export.live_plan import plan_export
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.megatron.models.build import LayerSpec
from quantplug.plugins import quant_cfg
from quantplug.verify import verify_checkpoint
from tests.export.blockwise import blockwise_fp8
from tests.export.checkpoints import SCHEMES, assert_same_export, load, one_rank, read, same_bytes
from tests.families.cases import CASES, save
from tests.families.served import errors_of

Checkpoint = Callable[[str], Path]

# What some server cannot read in four bits, or in any format, and ModelOpt's own config quantizes.
KEPT = {
    "deepseek_v3": "decoder.layers.1.self_attention.linear_kv_up_proj.weight",
    "llama4_text": "decoder.layers.0.self_attention.linear_qkv.weight",
    "nemotron_h_latent": "decoder.layers.0.mlp.fc1_latent_proj.weight",
}


@pytest.mark.parametrize("name", KEPT)
def test_a_quantizer_against_the_policy_is_refused_with_rules_that_work(
    name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, stock = checkpoint(name), mtq.W4A16_NVFP4_CFG
    with one_rank():
        model = mtq.quantize(load(source), stock)
        with pytest.raises(UnsupportedQuantizationError) as caught:
            export_mcore_gpt_to_hf(model, source, tmp_path / "out")
        assert KEPT[name] in {offender.parameter for offender in caught.value.offenders}
        rules = rules_of(caught.value.remedy)
        followed = mtq.quantize(load(source), {**stock, "quant_cfg": [*stock["quant_cfg"], *rules]})
        export_mcore_gpt_to_hf(followed, source, tmp_path / "out")
    quantize_checkpoint(source, tmp_path / "expected", "w4a16_nvfp4")
    expected, exported = read(tmp_path / "expected"), read(tmp_path / "out")
    assert exported.keys() == expected.keys()
    assert [weight for weight in expected if not same_bytes(exported[weight], expected[weight])] == []


def options(remedy: str) -> list[str]:
    """What a remedy says to add on the command line."""
    words = shlex.split(remedy)
    return [pattern for option, pattern in pairwise(words) if option == "--exclude"]


@pytest.mark.parametrize(
    ("name", "exclude"),
    [
        ("qwen3", ["model.layers.0.self_attn.k_proj"]),
        ("qwen3", ["*.gate_proj"]),
        ("qwen3_moe", ["model.layers.0.mlp.experts.3.down_proj"]),
        ("qwen3_moe", ["*.experts.0.*", "*.v_proj"]),
        ("llama4_text", ["model.layers.1.feed_forward.experts.down_proj"]),
        ("deepseek_v3", ["model.layers.2.self_attn.q_a_proj"]),
        ("deepseek_v3", ["*.kv_a_proj_with_mqa", "model.layers.1.mlp.experts.1.up_proj"]),
    ],
)
def test_the_advice_on_what_was_excluded_in_part_works(
    name: str, exclude: list[str], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedQuantizationError) as caught:
        quantize_checkpoint(checkpoint(name), tmp_path / "out", "w4a16_nvfp4", exclude=exclude)
    advised = options(caught.value.remedy)
    assert advised
    quantize_checkpoint(checkpoint(name), tmp_path / "out", "w4a16_nvfp4", exclude=[*exclude, *advised])
    assert errors_of(tmp_path / "out", checkpoint(name)) == set()


# Sizes of some linears that do not divide by the 16 columns of a block.
UNEVEN: dict[str, dict[str, int]] = {
    "qwen3": {"intermediate_size": 216},
    "qwen3_moe": {"moe_intermediate_size": 104},
    "deepseek_v3": {"q_lora_rank": 104, "moe_intermediate_size": 104},
}


def uneven(name: str, directory: Path) -> Path:
    case = CASES[name]
    config = type(case.config)(**{**case.config.to_dict(), **UNEVEN[name]})
    return save(replace(case, config=config), directory)


@pytest.mark.parametrize("name", UNEVEN)
def test_the_advice_on_sizes_that_do_not_divide_works_without_a_model(name: str, tmp_path: Path) -> None:
    source = uneven(name, tmp_path / "source")
    with pytest.raises(ShapeError) as caught:
        quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    advised = options(caught.value.remedy)
    assert all(pattern.startswith("model.layers.*.") for pattern in advised)
    quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4", exclude=advised)
    assert verify_checkpoint(tmp_path / "out", source).ok


def rules_of(remedy: str) -> list[dict[str, object]]:
    """The rules that a remedy says to append."""
    return [ast.literal_eval(rule) for rule in re.findall(r"\{[^}]*\}", remedy)]


def test_the_advice_on_sizes_that_do_not_divide_works_with_a_model(tmp_path: Path) -> None:
    """Of experts too, whose quantizers have a number behind their name."""
    source = uneven("qwen3_moe", tmp_path / "source")
    config = quant_cfg("w4a16_nvfp4", source)
    with one_rank():
        model = mtq.quantize(load(source), {**config, "algorithm": None})
        with pytest.raises(ShapeError) as caught:
            plan_export(model, source, calibrated=False)
        rules = rules_of(caught.value.remedy)
        followed = mtq.quantize(load(source), {**config, "quant_cfg": [*config["quant_cfg"], *rules]})
        export_mcore_gpt_to_hf(followed, source, tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out", source).ok


# Families and formats of whose experts no server loads anything.
UNSERVED = [("gpt_oss", "w4a16_nvfp4"), ("qwen3_moe", "w8a16_fp8")]
NO_SERVER = "No server loads"


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(found[name], expected[name])] == []


@pytest.mark.parametrize(("name", "format_name"), UNSERVED)
def test_experts_that_no_server_loads_are_refused_in_every_way_with_advice_that_works(
    name: str, format_name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, stock = checkpoint(name), SCHEMES[format_name]
    with pytest.raises(UnsupportedQuantizationError, match=NO_SERVER) as caught:
        quantize_checkpoint(source, tmp_path / "out", format_name)
    assert {offender.expert for offender in caught.value.offenders} == set(range(8))
    assert list(tmp_path.iterdir()) == []
    # Of GPT-OSS's experts there is no other format to choose.
    assert ("Choose w4a16_nvfp4 or fp8_blockwise or fp8_dynamic" in caught.value.remedy) == (name == "qwen3_moe")
    quantize_checkpoint(source, tmp_path / "out", format_name, exclude=options(caught.value.remedy))
    assert verify_checkpoint(tmp_path / "out", source).ok
    expected = read(tmp_path / "out")

    with one_rank():
        model = mtq.quantize(load(source), {**stock, "algorithm": None})
        with pytest.raises(UnsupportedQuantizationError, match=NO_SERVER) as caught:
            plan_export(model, source, calibrated=False)
        with_rules = {**stock, "quant_cfg": [*stock["quant_cfg"], *rules_of(caught.value.remedy)]}
        export_mcore_gpt_to_hf(mtq.quantize(load(source), with_rules), source, tmp_path / "live")
        assert_same(read(tmp_path / "live"), expected)

        with pytest.raises(UnsupportedQuantizationError, match=NO_SERVER) as caught:
            export_hf_weights_quant(model, source, quant_format=format_name)
        patterns = re.findall(r"decoder[^ ,]*\*", caught.value.remedy)
        assert patterns
        streamed = export_hf_weights_quant(
            model, source, lambda key: not any(fnmatchcase(key, it) for it in patterns), quant_format=format_name
        )
        assert_same(dict(streamed), expected)


@pytest.mark.parametrize(("name", "format_name"), UNSERVED)
@pytest.mark.parametrize("layers", LayerSpec)
def test_a_config_of_ours_is_refused_likewise_before_there_is_a_model(
    name: str, format_name: str, layers: LayerSpec, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(name)
    with pytest.raises(UnsupportedQuantizationError, match=NO_SERVER) as caught:
        quant_cfg(format_name, source)
    assert len(caught.value.offenders) == 2
    assert "keep_experts=True" in caught.value.remedy
    config = quant_cfg(format_name, source, keep_experts=True)
    with one_rank():
        # Whatever Megatron calls the modules of experts, grouped or one after another.
        model = load(source, layers)
        export_mcore_gpt_to_hf(mtq.quantize(model, config), source, tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out", source).ok


def kept_of(tensors: dict[str, torch.Tensor]) -> set[str]:
    """Which of DeepSeek-V3's projections that are kept in four bits, or of multi-token prediction, are plain."""
    names = ("model.layers.1.self_attn.kv_b_proj", "model.layers.3.self_attn.o_proj", "model.layers.3.eh_proj")
    return {name.rpartition(".")[2] for name in names if tensors[f"{name}.weight"].dtype == torch.bfloat16}


def half_bytes(weight: torch.Tensor, block: tuple[int, int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands for a function of the caller's that makes four bits of a value."""
    return weight[:, ::2].to(torch.uint8), torch.ones(())


def served_in_fp8_with_mtp(name: str) -> bool:
    return ".experts." not in name and "eh_proj" not in name


def served_in_fp8(name: str) -> bool:
    return served_in_fp8_with_mtp(name) and "mtp." not in name


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"quant_format": "w4a16_nvfp4"}, {"kv_b_proj", "o_proj", "eh_proj"}),
        ({"quant_format": "w8a16_fp8", "quantization_checker": served_in_fp8}, {"o_proj", "eh_proj"}),
        (
            {"quant_format": "w8a16_fp8", "quantization_checker": served_in_fp8_with_mtp, "quantize_mtp": True},
            {"eh_proj"},
        ),
        ({"quant_fn": half_bytes}, {"kv_b_proj", "o_proj", "eh_proj"}),
        ({"quant_fn": half_bytes, "quantize_mtp": True}, {"kv_b_proj", "eh_proj"}),
        ({"quant_fn": blockwise_fp8, "quant_block_size": (16, 32)}, {"o_proj", "eh_proj"}),
        (
            {"quant_format": "w4a16_nvfp4", "quantization_checker": lambda name: ".mlp." in name and "mtp" not in name},
            {"kv_b_proj", "o_proj", "eh_proj"},
        ),
    ],
)
def test_a_stream_keeps_what_the_policy_keeps(asked: dict[str, Any], kept: set[str], checkpoint: Checkpoint) -> None:
    with one_rank():
        streamed = dict(export_hf_weights_quant(load(checkpoint("deepseek_v3")), checkpoint("deepseek_v3"), **asked))
    assert kept_of(streamed) == kept


@pytest.mark.parametrize("way", [{"quant_format": "w4a16_nvfp4"}, {"quant_fn": half_bytes}])
def test_a_checker_cannot_widen_the_policy(way: dict[str, Any], checkpoint: Checkpoint) -> None:
    source, kept = checkpoint("deepseek_v3"), KEPT["deepseek_v3"]
    with one_rank():
        model = load(source)
        with pytest.raises(UnsupportedQuantizationError) as caught:
            export_hf_weights_quant(model, source, lambda name: "embed" not in name, **way)
        named = {offender.parameter for offender in caught.value.offenders}
        assert {kept, "mtp.layers.0.transformer_layer.self_attention.linear_proj.weight"} <= named
        assert "quantize_mtp=True" in caught.value.remedy
        with pytest.raises(UnsupportedQuantizationError, match=re.escape(kept)):
            export_hf_weights_quant(model, source, lambda name: "linear_kv_up" in name, **way, quantize_mtp=True)


# Inputs of gated attention and of delta nets, as vendors keep them in four bits; 0 is a layer of each family's nets.
SENSITIVE = {
    "qwen3_next": {"linear_attn.in_proj_qkvz", *(f"self_attn.{part}_proj" for part in "qkv")},
    "qwen3_5": {"linear_attn.in_proj_qkv", "linear_attn.in_proj_z", *(f"self_attn.{part}_proj" for part in "qkv")},
}


def no_mtp(name: str) -> bool:
    return not name.startswith("mtp.")


def modules_packed(directory: Path) -> set[str]:
    names = (name.removesuffix(".weight_scale") for name in read(directory) if name.endswith(".weight_scale"))
    return {re.sub(r"^model\.layers\.\d+\.", "", name) for name in names}


@pytest.mark.parametrize("name", SENSITIVE)
def test_what_loses_much_in_four_bits_is_kept_unless_all_is_asked_for(
    name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, packed = checkpoint(name), {}
    for preset, quant_format in (("default", "w4a16_nvfp4"), ("all", "w4a16_nvfp4"), ("default", "fp8_dynamic")):
        out = tmp_path / f"{preset}-{quant_format}"
        quantize_checkpoint(source, out, quant_format, preset=preset)
        assert verify_checkpoint(out, source).ok
        packed[preset, quant_format] = modules_packed(out)
    everything = packed["all", "w4a16_nvfp4"]
    assert everything >= SENSITIVE[name]
    assert packed["default", "fp8_dynamic"] == everything
    assert packed["default", "w4a16_nvfp4"] == everything - SENSITIVE[name]
    assert {"self_attn.o_proj", "linear_attn.out_proj"} <= packed["default", "w4a16_nvfp4"]
    # Live by the config of the same name, and as a stream, to the same bytes.
    with one_rank():
        stream = dict(export_hf_weights_quant(load(source), source, quant_format="w4a16_nvfp4"))
        model = mtq.quantize(load(source), quant_cfg("w4a16_nvfp4", source))
        export_mcore_gpt_to_hf(model, source, tmp_path / "live")
        with pytest.raises(UnsupportedQuantizationError, match="the preset leaves out") as caught:
            export_hf_weights_quant(load(source), source, no_mtp, quant_format="w4a16_nvfp4")
    expected = read(tmp_path / "default-w4a16_nvfp4")
    assert_same_export(tmp_path / "live", tmp_path / "default-w4a16_nvfp4")
    assert [key for key, tensor in stream.items() if not same_bytes(tensor, expected[key])] == []
    assert {found.parameter.rpartition(".layers.")[2].partition(".")[2] for found in caught.value.offenders} == {
        "self_attention.linear_qkv.weight",
        "self_attention.in_proj.weight",
    }
