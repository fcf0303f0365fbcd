"""Several formats in one checkpoint: ModelOpt's MIXED_PRECISION and compressed-tensors' mixed-precision.

The oracle of values is torchao's and ModelOpt's own decoders, that of the configs what vLLM 0.33 and SGLang 0.5.23 do
with them, which the rules of `verify` say.
"""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import match_named_modules
from megatron.core.transformer.attention import SelfAttention
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.quantization.qtensor import FP8QTensor
from safetensors.torch import load_file, save_file
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantplug import (
    calibrate,
    export_checkpoint,
    export_hf_weights_quant,
    export_mcore_gpt_to_hf,
    plan_export,
    quantize_checkpoint,
    save_checkpoint,
)
from quantplug.calibration.policy import CalibrationPolicy, ColdExperts
from quantplug.calibration.quantizers import needs_amax
from quantplug.errors import ArgumentError, UnsupportedQuantizationError
from quantplug.export.stream.api import plan_stream
from quantplug.formats.names import QuantFormat
from quantplug.megatron import cpu
from quantplug.megatron.models.build import LayerSpec
from quantplug.verify import verify_checkpoint
from tests.export.checkpoints import assert_same_export, input_amax, linear_weights, load, read, same_bytes
from tests.export.mixed import FP8, KV_CACHE, fp8_of, mixed_cfg
from tests.export.refusals import offenders, refused
from tests.families.cases import make
from tests.made_once import MadeOnce

pytestmark = pytest.mark.usefixtures("single_rank")

Sources = Callable[[str], Path]


def quantized(source: Path, config: dict[str, Any]) -> torch.nn.Module:
    """Transformer Engine's modules, whose forward needs a GPU: amaxes of inputs are set by hand."""
    model = mtq.quantize(load(source), config)
    for name, module in model.named_modules():
        if name.endswith(".input_quantizer") and needs_amax(module):
            module.amax = torch.tensor(input_amax(name.removesuffix(".input_quantizer")))
    return model


def configs(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    return config, json.loads((directory / "hf_quant_config.json").read_text())


def run(model: torch.nn.Module) -> None:
    tokens, later = torch.arange(48).view(2, 24) * 7 % 500, torch.ones(1, 1, 24, 24, dtype=torch.bool).triu(1)
    with torch.no_grad(), cpu.local_forward():
        model.eval()(tokens, torch.arange(24).expand_as(tokens), later)


def with_large_keys(source: Path, target: Path) -> Path:
    """A copy of a model whose keys are larger than E4M3 holds, so that their scales are above the least, 1."""
    shutil.copytree(source, target)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        tensors |= {name: tensor * 2000 for name, tensor in tensors.items() if name.endswith(".k_norm.weight")}
        save_file(tensors, file, metadata={"format": "pt"})
    return target


def amaxes_of_transformers_cache(source: Path) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """The largest key and value of each attention layer, of the tokens of `run`, after rotation."""
    found = {}

    def attention(module: torch.nn.Module, query: Any, key: Any, value: Any, *more: Any, **settings: Any) -> Any:
        found[module.layer_idx] = (key.abs().max(), value.abs().max())
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *more, **settings)

    AttentionInterface.register("recorded", attention)
    AttentionMaskInterface.register("recorded", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="recorded")
    with torch.no_grad():
        model.eval()(torch.arange(48).view(2, 24) * 7 % 500)
    return found


NETS = [*fp8_of("self_attention.in_proj"), *fp8_of("self_attention.out_proj")]


@pytest.mark.parametrize(("name", "more"), [("qwen3_moe", []), ("qwen3_next", NETS)])
def test_what_is_calibrated_with_data_is_what_servers_read(
    name: str, more: list[dict[str, Any]], made_once: MadeOnce, tmp_path: Path
) -> None:
    """NVFP4 experts beside FP8 attention, delta nets and KV cache, in FP32 on a CPU, by Megatron's own modules."""
    source = with_large_keys(made_once(f"family_{name}", partial(make, name)), tmp_path / "source")
    cache = {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": (4, 3)}}
    config = {**mixed_cfg(*more, cache), "algorithm": None}
    model = mtq.quantize(load(source, LayerSpec.LOCAL, dtype=torch.float32), config)
    calibrate(model, run, CalibrationPolicy(cold_experts=ColdExperts.LAYER_MAX))
    export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "out")

    assert verify_checkpoint(tmp_path / "out").ok
    assert verify_checkpoint(tmp_path / "out", source).ok
    # Amaxes of keys and values are those that transformers puts into its cache.
    cores = {
        number: layer.self_attention.core_attention
        for number, layer in enumerate(model.decoder.layers)
        if isinstance(layer.self_attention, SelfAttention)
    }
    cached, scales = amaxes_of_transformers_cache(source), read(tmp_path / "out")
    assert cached.keys() == cores.keys()
    for number, (keys, values) in cached.items():
        held = torch.stack([cores[number].k_bmm_quantizer.amax, cores[number].v_bmm_quantizer.amax])
        torch.testing.assert_close(held, torch.stack([keys, values]), rtol=1e-4, atol=0)
        attention = f"model.layers.{number}.self_attn"
        assert scales[f"{attention}.k_proj.k_scale"] == held[0] / 448 > 1
        assert scales[f"{attention}.v_proj.v_scale"] == max(1, held[1] / 448)
    of_decoder = [it for it in scales if it.startswith("model.") and it.endswith(("k_scale", "v_scale"))]
    assert len(of_decoder) == 2 * len(cached)
    # A training checkpoint of it, which says the same without a model.
    save_checkpoint(model, tmp_path / "saved", extra={})
    export_checkpoint(tmp_path / "saved", tmp_path / "straight", source)
    assert_same_export(tmp_path / "straight", tmp_path / "out")
    config, legacy = configs(tmp_path / "out")
    assert legacy["quantization"]["kv_cache_quant_algo"] == "FP8"
    tensors, seen = read(tmp_path / "out"), set()
    for module, layer in config["quantized_layers"].items():
        seen.add(layer["quant_algo"])
        attends = ".self_attn." in module or ".linear_attn." in module
        assert layer == ({"quant_algo": "FP8"} if attends else {"quant_algo": "NVFP4", "group_size": 16})
        assert tensors[f"{module}.input_scale"] > 0
        assert tensors[f"{module}.weight"].dtype == (torch.float8_e4m3fn if attends else torch.uint8)
    assert seen == {"FP8", "NVFP4"}
    # Amaxes of inputs are Megatron's own, seen on the way of the tokens.
    last = len(model.decoder.layers) - 1
    seen_by = model.decoder.layers[last].self_attention.linear_proj.input_quantizer.amax
    assert tensors[f"model.layers.{last}.self_attn.o_proj.input_scale"] == seen_by.float() / 448
    assert legacy["quantization"]["quantized_layers"] == config["quantized_layers"]
    # ModelOpt's own converter makes of its file what stands in config.json.
    converted = convert_hf_quant_config_format(json.loads(json.dumps(legacy)))
    assert converted["quantized_layers"] == config["quantized_layers"]
    assert sorted(map(repr, converted["config_groups"].values())) == sorted(
        repr({key: group[key] for key in ("input_activations", "weights", "targets")})
        for group in config["config_groups"].values()
    )


def test_each_weight_decodes_by_its_own_algorithm(sources: Sources, tmp_path: Path) -> None:
    source = sources("moe")
    export_mcore_gpt_to_hf(quantized(source, mixed_cfg(KV_CACHE)), source, export_dir=tmp_path / "out")
    tensors, (config, legacy) = read(tmp_path / "out"), configs(tmp_path / "out")
    for name, original in linear_weights(read(source)).items():
        module, codes = name.removesuffix(".weight"), tensors[name]
        if config["quantized_layers"][module]["quant_algo"] == "FP8":
            decoded = FP8QTensor(codes.shape, torch.float32, codes).dequantize(
                dtype=torch.float32, scale=tensors[f"{module}.weight_scale"]
            )
            bound = original.float().abs() * 2**-4 + tensors[f"{module}.weight_scale"] * 2**-10
        else:
            blocks, scale = tensors[f"{module}.weight_scale"], tensors[f"{module}.weight_scale_2"]
            decoded = NVFP4Tensor(codes, blocks, 16, torch.float32, per_tensor_scale=scale).dequantize()
            # The widest step of E2M1 is 2, from 4 to 6, and the scale of a block is rounded by 2^-4 at most.
            bound = (blocks.float() * scale).repeat_interleave(16, 1) * 1.5
        assert ((decoded - original.float()).abs() <= bound).all(), name
    assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert legacy["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert verify_checkpoint(tmp_path / "out", source).ok


@pytest.mark.parametrize("config", [mixed_cfg(KV_CACHE), mtq.MXFP8_DEFAULT_CFG], ids=["NVFP4 and FP8", "mxfp8"])
def test_a_model_its_checkpoint_and_a_stream_of_it_give_the_same(
    config: dict[str, Any], sources: Sources, tmp_path: Path
) -> None:
    source = sources("moe")
    model = quantized(source, config)
    export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "live")
    save_checkpoint(model, tmp_path / "saved", extra={})
    export_checkpoint(tmp_path / "saved", tmp_path / "straight", source)
    stream = export_hf_weights_quant(model, source, quant_format="as_quantized")
    live = read(tmp_path / "live")
    for tensors in (read(tmp_path / "straight"), dict(stream)):
        assert tensors.keys() == live.keys()
        assert [name for name in live if not same_bytes(tensors[name], live[name])] == []
    assert configs(tmp_path / "straight") == configs(tmp_path / "live")


def test_where_one_format_is_left_the_config_is_of_it_alone(sources: Sources) -> None:
    no_experts = {"quantizer_name": "*mlp*", "enable": False}
    plan = plan_export(quantized(sources("moe"), mixed_cfg(no_experts)), sources("moe")).plan
    assert plan.quant_config.algorithm == "FP8"
    assert "quantized_layers" not in plan.quant_config.config_json


def test_experts_that_stay_plain_are_on_both_lists(sources: Sources, tmp_path: Path) -> None:
    """Else vLLM gives them the format of whatever is listed beside them."""
    source = sources("latent_blocks")
    plain = {"quantizer_name": "*mlp.experts.*", "enable": False}
    kept = {"quantizer_name": "*linear_kv_up_proj*", "enable": False}
    model = quantized(source, mixed_cfg(plain, kept, *fp8_of("mlp.linear_fc*"), {**kept}))
    export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "out")
    config, legacy = configs(tmp_path / "out")
    experts = {name.partition(".experts.")[0] + ".experts" for name in read(source) if ".mlp.experts." in name}
    assert experts
    assert experts <= {*config["ignore"]} & {*legacy["quantization"]["exclude_modules"]}
    assert verify_checkpoint(tmp_path / "out", source).ok


EXPERT = "decoder.layers.*.mlp.experts"
NOT_ALIKE = {
    "fc1 and fc2 apart": fp8_of("mlp.experts.linear_fc2"),
    "an expert apart": [
        {"quantizer_name": "*linear_fc1.weight_quantizer.3", "cfg": FP8},
        {"quantizer_name": "*linear_fc1.input_quantizer", "cfg": FP8},
    ],
}


@pytest.mark.parametrize("case", NOT_ALIKE)
def test_experts_of_two_formats_are_refused_by_name(case: str, sources: Sources, tmp_path: Path) -> None:
    model = quantized(sources("moe"), mixed_cfg(*NOT_ALIKE[case]))
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out")
    assert {expert for _, expert in offenders(caught)} >= {3}
    assert all(".mlp.experts." in name for name, _ in offenders(caught))


def test_linears_that_servers_fuse_have_one_format(sources: Sources, tmp_path: Path) -> None:
    """The two down projections of multi-latent attention, which are two weights of Megatron's."""
    source = sources("latent_blocks")
    kept = {"quantizer_name": "*linear_kv_up_proj*", "enable": False}
    apart = [{**rule, "cfg": {**NVFP4, "enable": True}} for rule in fp8_of("linear_kv_down_proj")]
    model = quantized(source, mixed_cfg(kept, *apart))
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "out")
    assert "others of" in str(caught.value)


NO_INPUTS = {"quantizer_name": "*input_quantizer", "enable": False}
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
ROWS = [
    {"quantizer_name": "*linear_proj.weight_quantizer", "cfg": {"num_bits": (4, 3), "axis": 0}},
    {
        "quantizer_name": "*linear_proj.input_quantizer",
        "cfg": {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}},
    },
]


def test_formats_that_modelopt_cannot_say_are_said_by_compressed_tensors(sources: Sources, tmp_path: Path) -> None:
    """FP8 by tensors and by rows; compressed-tensors' own matching tells which module is in which group."""
    source = sources("moe")
    model = quantized(source, mixed_cfg(*ROWS, base=mtq.FP8_DEFAULT_CFG))
    export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out").ok
    assert verify_checkpoint(tmp_path / "out", source).ok
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(written)
    assert config.format == "float-quantized"  # How weights are stored is alike in both.
    with torch.device("meta"):
        reader = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    found = {}
    for group in config.config_groups.values():
        assert group.format == "float-quantized"
        for name, _ in match_named_modules(reader, group.targets, config.ignore):
            assert name not in found
            found[name] = str(group.weights.strategy)
    attention = {name: strategy for name, strategy in found.items() if ".self_attn." in name}
    assert len(attention) == 4 * 2
    assert {strategy for name, strategy in attention.items() if name.endswith("o_proj")} == {"channel"}
    assert {strategy for name, strategy in attention.items() if not name.endswith("o_proj")} == {"tensor"}


def test_weights_alone_of_two_formats_are_said_by_compressed_tensors(sources: Sources, tmp_path: Path) -> None:
    """Of one weight the group says how it is stored, and what compressed-tensors decodes is what was written."""
    source = sources("moe")
    fp8 = {"quantizer_name": "*self_attention*weight_quantizer", "cfg": FP8}
    model = mtq.quantize(load(source), mixed_cfg(fp8, NO_INPUTS, base=mtq.W4A16_NVFP4_CFG))
    export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out").ok
    assert verify_checkpoint(tmp_path / "out", source).ok
    config = QuantizationConfig.model_validate(
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    )
    assert config.format == "mixed-precision"
    tensors, plain = read(tmp_path / "out"), linear_weights(read(source))
    seen = set()
    for group in config.config_groups.values():
        compressor = BaseCompressor.get_value_from_registry(group.format)
        for module in group.targets:
            stem = f"{module}."
            state = {name.removeprefix(stem): tensor for name, tensor in tensors.items() if name.startswith(stem)}
            decoded = compressor.decompress(state, group)["weight"].float()
            original = plain[f"{module}.weight"].float()
            assert (decoded - original).norm() <= {8: 0.05, 4: 0.15}[group.weights.num_bits] * original.norm()
            seen.add(f"{module}.weight")
    assert seen == plain.keys()


@pytest.mark.parametrize(
    ("base", "experts", "input_scale", "dialect"),
    [
        ("mxfp8", "nvfp4", 1.0, "modelopt"),  # As MiniMax-M3 is published.
        ("fp8", "nvfp4", 1.0, "modelopt"),
        ("fp8_dynamic", "w4a16_nvfp4", None, "compressed-tensors"),
        ("int4", "fp8_dynamic", None, "compressed-tensors"),
    ],
)
def test_experts_of_another_format_without_data(
    base: str, experts: str, input_scale: float | None, dialect: str, divisible_dir: Path, tmp_path: Path
) -> None:
    quantize_checkpoint(
        divisible_dir, tmp_path / "out", base, expert_format=experts, input_scale=input_scale, kv_cache="fp8_cast"
    )
    assert verify_checkpoint(tmp_path / "out").ok
    assert verify_checkpoint(tmp_path / "out", divisible_dir).ok
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == dialect
    # Each has the bytes that it has in a checkpoint of its format alone.
    mixed = read(tmp_path / "out")
    for name in (base, experts):
        alone = tmp_path / name
        needs = input_scale if QuantFormat(name).needs_data else None
        quantize_checkpoint(divisible_dir, alone, name, input_scale=needs, kv_cache="fp8_cast", dialect=dialect)
        tensors = read(alone)
        for key in mixed:
            if (".experts." in key) == (name == experts):
                assert same_bytes(mixed[key], tensors[key]), key


def test_a_training_checkpoint_takes_the_same_formats(sources: Sources, tmp_path: Path) -> None:
    source, formats = sources("moe"), {"expert_format": "nvfp4", "input_scale": 1.0, "kv_cache": "fp8_cast"}
    quantize_checkpoint(source, tmp_path / "free", "fp8", **formats)
    save_checkpoint(load(source), tmp_path / "saved", extra={})
    export_checkpoint(tmp_path / "saved", tmp_path / "trained", source, "fp8", **formats)
    assert_same_export(tmp_path / "trained", tmp_path / "free")


@pytest.mark.parametrize(
    "formats",
    [
        {"quant_format": "mxfp8", "expert_format": "w4a16_nvfp4", "scales": "four_over_six"},
        {"quant_format": "fp8_dynamic", "expert_format": "int4", "group_size": 32},
    ],
    ids=lambda formats: formats["expert_format"],
)
def test_a_stream_takes_the_same_formats(formats: dict[str, Any], divisible_dir: Path, tmp_path: Path) -> None:
    name, choices = formats["quant_format"], {key: formats[key] for key in formats if key != "quant_format"}
    quantize_checkpoint(divisible_dir, tmp_path / "out", name, **choices)
    plan = plan_stream(load(divisible_dir), divisible_dir, **formats)
    tensors, expected = dict(plan.tensors()), read(tmp_path / "out")
    assert tensors.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(tensors[name], expected[name])] == []
    assert plan.quant_config is not None
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert plan.quant_config.config_json == written["quantization_config"]


def test_experts_of_another_format_need_experts(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    with refused(ArgumentError, tmp_path) as caught:
        quantize_checkpoint(tiny_qwen3_dir, tmp_path / "out", "mxfp8", expert_format="w4a16_nvfp4")
    assert offenders(caught) == {("expert_format", None)}
    with pytest.raises(ArgumentError) as caught:
        export_hf_weights_quant(load(tiny_qwen3_dir), tiny_qwen3_dir, quant_format="mxfp8", expert_format="w4a16_nvfp4")
    assert offenders(caught) == {("expert_format", None)}


def test_formats_that_nothing_says_together_are_refused_with_each_dialect_s_reason(
    sources: Sources, tmp_path: Path
) -> None:
    model = quantized(sources("moe"), mixed_cfg(*ROWS, base=mtq.FP8_DEFAULT_CFG))
    with refused(UnsupportedQuantizationError, tmp_path) as caught:
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=tmp_path / "out", dialect="modelopt")
    assert "has no name for fp8_dynamic" in str(caught.value)
