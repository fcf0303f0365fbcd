# ruff: noqa: E501 (tables: one case a line)
"""Checkpoints of other tools: compressed-tensors' own compressors, DeepSeek's block FP8, ModelOpt's mixed precision."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from safetensors.torch import save_file
from transformers import FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Linear, replace_with_fp8_linear
from transformers.quantizers.base import HfQuantizer

from quantplug.verify import Severity, verify_checkpoint
from tests.verify.foreign import Tensors, compress_checkpoint, linears, write


def fired(report: Any) -> set[str]:
    return {str(check) for check in report.checks(Severity.ERROR, Severity.WARNING)}


@pytest.fixture
def compressed(pristine: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    def make(preset: str, spoil: Callable[[Tensors], object] = lambda tensors: None, **config: Any) -> Path:
        return compress_checkpoint(pristine["source"], tmp_path / preset, preset, spoil, **config)

    return make


@pytest.mark.parametrize(
    ("preset", "checks", "tensors"),
    [
        ("NVFP4A16", {"transformers"}, 39),
        ("NVFP4", {"transformers"}, 39),
        ("FP8", set(), 39),
        ("FP8_DYNAMIC", set(), 39),
        # k and v have 64 rows, half a block, and stay plain: that q is quantized beside them is the one finding.
        ("FP8_BLOCK", {"one-algo", "serving-tp"}, 33),
    ],
)
def test_compressed_tensors(
    compressed: Callable[..., Path], pristine: dict[str, Path], preset: str, checks: set[str], tensors: int
) -> None:
    report = verify_checkpoint(compressed(preset), pristine["source"])
    assert fired(report) == checks, report.findings
    assert len(report.errors_by_tensor) == tensors
    typical = 0.1 if "NVFP4" in preset else 0.03
    assert all(typical / 2 < error.relative_error < typical for error in report.errors_by_tensor)


EXPERT = "model.layers.2.mlp.experts.0.up_proj"
CT_SPOILED: list[tuple[str, str, Callable[[Tensors], object], str]] = [
    ("global scale not shared", "NVFP4A16", lambda t: t[f"{EXPERT}.weight_global_scale"].mul_(2), "shared-scales"),
    ("no global scale", "NVFP4A16", lambda t: t.pop(f"{EXPERT}.weight_global_scale"), "tensor-layout"),
    ("no input scale", "NVFP4", lambda t: t.pop(f"{EXPERT}.input_global_scale"), "input-scale"),
    ("activations in weight-only", "NVFP4A16", lambda t: t.update({f"{EXPERT}.input_global_scale": torch.ones(1)}), "weight-only"),
    ("zero channel scale", "FP8_DYNAMIC", lambda t: t[f"{EXPERT}.weight_scale"][3].zero_(), "scale-range"),
    ("no channel scale", "FP8_DYNAMIC", lambda t: t.pop(f"{EXPERT}.weight_scale"), "tensor-layout"),
    ("scale of the wrong rank", "FP8_DYNAMIC", lambda t: t.update({f"{EXPERT}.weight_scale": torch.ones(128, 2)}), "tensor-layout"),
]  # fmt: skip


@pytest.mark.parametrize(("preset", "spoil", "check"), [row[1:] for row in CT_SPOILED], ids=[r[0] for r in CT_SPOILED])
def test_compressed_tensors_spoiled(
    compressed: Callable[..., Path], preset: str, spoil: Callable[[Tensors], object], check: str
) -> None:
    assert fired(verify_checkpoint(compressed(preset, spoil))) - {"transformers"} == {check}


def test_the_reciprocal_is_taken(compressed: Callable[..., Path], pristine: dict[str, Path]) -> None:
    """A global scale stored as ModelOpt stores it is off by orders of magnitude, and only the source shows it."""

    def invert(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("weight_global_scale")]:
            tensors[name] = tensors[name].reciprocal()

    directory = compressed("NVFP4A16", invert)
    assert fired(verify_checkpoint(directory)) == {"transformers"}
    assert "error-bound" in fired(verify_checkpoint(directory, pristine["source"]))


@pytest.mark.parametrize(
    ("status", "checks"),
    [("compressed", set()), ("frozen", {"quantization-status"}), ("calibration", {"quantization-status"})],
)
def test_weights_that_the_config_says_are_not_packed_yet(
    compressed: Callable[..., Path], status: str, checks: set[str]
) -> None:
    assert fired(verify_checkpoint(compressed("FP8", quantization_status=status))) == checks


@pytest.mark.parametrize("place", ["", "{}_proj."])
@pytest.mark.parametrize("scale", [torch.ones(1).bfloat16(), torch.tensor(1.0)], ids=["BF16 [1]", "F32 []"])
def test_kv_scales_as_llm_compressor_writes_them(
    compressed: Callable[..., Path], scale: torch.Tensor, place: str
) -> None:
    def add(tensors: Tensors) -> None:
        for layer in range(3):
            for letter in "kv":
                name = f"model.layers.{layer}.self_attn.{place.format(letter)}{letter}_scale"
                tensors[name] = scale.clone()

    kv_cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    assert fired(verify_checkpoint(compressed("FP8", add, kv_cache_scheme=kv_cache))) == set()


def test_a_kv_cache_that_is_cast_has_no_scales(compressed: Callable[..., Path]) -> None:
    """Servers take 1, and transformers what memory holds."""
    scheme = {"num_bits": 8, "type": "float"}
    assert fired(verify_checkpoint(compressed("FP8", kv_cache_scheme=scheme))) == {"transformers"}


def test_weight_only_fp8_of_experts_is_not_served(compressed: Callable[..., Path]) -> None:
    """And of dense models it is: only the experts are named."""
    scheme = preset_name_to_scheme("FP8", ["Linear"]).model_dump(mode="json") | {"format": "naive-quantized"}
    groups = {"group_0": scheme | {"input_activations": None}}
    directory = compressed(
        "FP8", lambda t: [t.pop(name) for name in list(t) if "input_scale" in name], config_groups=groups
    )
    report = verify_checkpoint(directory)
    assert fired(report) == {"served-experts"}
    assert {f.subject for f in report.findings if f.check == "served-experts"} == {
        f"mlp.experts.{name}_proj" for name in ("gate", "up", "down")
    }


def test_compressed_tensors_of_another_format(compressed: Callable[..., Path]) -> None:
    report = verify_checkpoint(
        compressed("FP8", format="pack-quantized", config_groups={"group_0": {"targets": ["Linear"]}})
    )
    assert fired(report) == {"not-judged"}


# --- DeepSeek's form, on shapes that are not multiples of 128


def awkward_source(directory: Path) -> Tensors:
    """One dense layer: hidden 160, four heads of 48, two for keys and values, width 224, an odd vocabulary."""
    torch.manual_seed(1)
    shapes = {
        "self_attn.q_proj": (192, 160), "self_attn.k_proj": (96, 160), "self_attn.v_proj": (96, 160),
        "self_attn.o_proj": (160, 192), "mlp.gate_proj": (224, 160), "mlp.up_proj": (224, 160), "mlp.down_proj": (160, 224),
    }  # fmt: skip
    tensors = {f"model.layers.0.{name}.weight": torch.randn(shape).half() for name, shape in shapes.items()}
    tensors |= {"model.embed_tokens.weight": torch.randn(131, 160).half(), "model.norm.weight": torch.ones(160).half()}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"num_hidden_layers": 1, "tie_word_embeddings": True}))
    save_file(tensors, directory / "model.safetensors")
    return tensors


def block_fp8(weight: torch.Tensor) -> Tensors:
    rows, columns = (-(-size // 128) for size in weight.shape)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            place = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scales[i, j] = weight[place].abs().max().float() / 448
            codes[place] = (weight[place].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales}


DEEPSEEK = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


def deepseek(
    tmp_path: Path, spoil: Callable[[Tensors], object] = lambda tensors: None, **config: Any
) -> tuple[Path, Path]:
    source = tmp_path / "source"
    weights = awkward_source(source)
    tensors = dict(weights)
    for module in list(linears(weights)):
        packed = block_fp8(tensors.pop(f"{module}.weight"))
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in packed.items()}
    spoil(tensors)
    return write(tmp_path / "fp8", source, tensors, DEEPSEEK | config), source


def test_deepseek_block_fp8_of_awkward_shapes(tmp_path: Path) -> None:
    directory, source = deepseek(tmp_path)
    report = verify_checkpoint(directory, source)
    assert report.ok, report.findings
    assert fired(report) == {"serving-tp"}
    assert {f.subject for f in report.findings if "cannot merge" in f.message} == {
        f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
    }
    assert len(report.errors_by_tensor) == 7
    assert all(0.015 < error.relative_error < 0.03 for error in report.errors_by_tensor)


def test_deepseeks_own_plain_modules_need_no_exclude_list(tmp_path: Path) -> None:
    """Routers, the projection of the draft layer and its head are BF16 in DeepSeek-V3, and no list says so."""

    def add(tensors: Tensors) -> None:
        for name in ("gate", "up", "down"):
            for expert in range(2):
                packed = block_fp8(torch.randn(128, 128))
                prefix = f"model.layers.0.mlp.experts.{expert}.{name}_proj"
                tensors |= {f"{prefix}.{suffix}": tensor for suffix, tensor in packed.items()}
        for name in ("mlp.gate", "eh_proj", "shared_head.head"):
            tensors[f"model.layers.0.{name}.weight"] = torch.ones(2, 160).bfloat16()
        tensors["model.layers.0.mlp.gate.e_score_correction_bias"] = torch.ones(2)

    directory, _ = deepseek(tmp_path, add)
    config = json.loads((directory / "config.json").read_text()) | {"n_routed_experts": 2}
    (directory / "config.json").write_text(json.dumps(config))
    assert fired(verify_checkpoint(directory)) == {"serving-tp"}


Q = "model.layers.0.self_attn.q_proj"
DEEPSEEK_SPOILED: list[tuple[str, Callable[[Tensors], object], dict[str, Any], str]] = [
    ("scales rounded down", lambda t: t.update({f"{Q}.weight_scale_inv": t[f"{Q}.weight_scale_inv"][:1].clone()}), {}, "tensor-layout"),
    ("scales per tensor", lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(1)}), {}, "tensor-layout"),
    ("no scales", lambda t: t.pop(f"{Q}.weight_scale_inv"), {}, "tensor-layout"),
    ("no activation scheme", lambda t: None, {"activation_scheme": None}, "algo"),
    ("a zero scale", lambda t: t[f"{Q}.weight_scale_inv"].zero_(), {}, "scale-range"),
    ("another float", lambda t: None, {"fmt": "e5m2"}, "algo"),
    ("scales that are no powers of two", lambda t: None, {"scale_fmt": "ue8m0"}, "algo"),
    ("two lists", lambda t: None, {"modules_to_not_convert": ["lm_head"], "ignored_layers": ["x"]}, "config-agreement"),
    ("excluded, yet quantized", lambda t: None, {"modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.o_proj"]}, "coverage"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "config", "check"), [row[1:] for row in DEEPSEEK_SPOILED], ids=[row[0] for row in DEEPSEEK_SPOILED]
)
def test_deepseek_spoiled(
    tmp_path: Path, spoil: Callable[[Tensors], object], config: dict[str, Any], check: str
) -> None:
    directory, _ = deepseek(tmp_path, spoil, **config)
    assert fired(verify_checkpoint(directory)) - {"serving-tp"} == {check}


@pytest.mark.parametrize(
    ("listed", "warned"), [(None, False), (["lm_head"], False), ([], True), (["model.embed_tokens"], True)]
)
def test_a_list_that_does_not_name_the_head(listed: list[str] | None, warned: bool, tmp_path: Path) -> None:
    """transformers leaves the head as it is where there is no list; with one it goes by that."""
    directory, _ = deepseek(
        tmp_path,
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
        **({} if listed is None else {"modules_to_not_convert": listed}),
    )
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    assert fired(verify_checkpoint(directory)) - {"serving-tp"} == ({"transformers"} if warned else set())
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, hidden_size=128, intermediate_size=128))
    kept = HfQuantizer.get_modules_to_not_convert(model, listed)
    form = FineGrainedFP8Config(modules_to_not_convert=listed)
    replace_with_fp8_linear(model, kept, form, pre_quantized=True)
    assert isinstance(model.lm_head, FP8Linear) is warned


def test_scales_inverted_as_their_name_says(tmp_path: Path) -> None:
    directory, source = deepseek(tmp_path, lambda t: t[f"{Q}.weight_scale_inv"].reciprocal_())
    report = verify_checkpoint(directory, source)
    assert {f.subject for f in report.findings if f.check == "error-bound"} == {f"{Q}.weight"}


# --- ModelOpt's mixed precision


def mix(surgery: Any, algo: str = "NVFP4") -> None:
    modules = {name.removesuffix(".weight_scale") for name in surgery.tensors if name.endswith(".weight_scale")}
    layers = {module: {"quant_algo": algo, "group_size": 16} for module in modules}
    for config in (surgery.quantization_config, surgery.quantization):
        config |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    surgery.quantization_config["kv_cache_quant_algo"] = None


def in_both(key: str, value: Any) -> Callable[[Any], None]:
    return lambda s: [
        config["quantized_layers"].update({key: value}) for config in (s.quantization_config, s.quantization)
    ]


def unlist(key: str) -> Callable[[Any], None]:
    return lambda s: s.quantization_config["quantized_layers"].pop(key)  # the same object as the other file's


def by_its_parent(parent: str) -> Callable[[Any], object]:
    """One key in place of those of all modules below it."""

    def spoil(surgery: Any) -> None:
        layers = surgery.quantization_config["quantized_layers"]
        for name in [name for name in layers if name.startswith(f"{parent}.")]:
            layers[parent] = layers.pop(name)

    return spoil


def plain_experts(surgery: Any) -> None:
    """Experts of a layer in 16 bits that nothing excludes, beside a module of the layer's MLP that is listed."""
    layers = surgery.quantization_config["quantized_layers"]
    for name in [name for name in layers if name.startswith("model.layers.1.mlp.experts.")]:
        surgery.plain(name, 2 * surgery.tensors[f"{name}.weight"].shape[1])
        del layers[name]
    # In place of a shared expert, which this model does not have.
    layers["model.layers.1.mlp.gate"] = {"quant_algo": "NVFP4", "group_size": 16}


def grouped(bits: int, *more: str) -> Callable[[Any], None]:
    """One group of `config_groups` for an expert, and for more modules, by name."""
    weights = {"num_bits": bits, "type": "float", "group_size": 16}
    group = {"targets": [EXPERT, *more], "weights": weights}
    return lambda s: s.quantization_config.update(config_groups={"group_0": group})


def grouped_with_fp8(surgery: Any) -> None:
    in_both("model.layers.1.mlp.gate", {"quant_algo": "FP8"})(surgery)
    grouped(4, "model.layers.1.mlp.gate")(surgery)


MIXED_SPOILED: list[tuple[str, Callable[[Any], object], set[str]]] = [
    ("nothing", lambda s: None, set()),
    ("a layer that is not there", in_both("model.layers.7.mlp", {"quant_algo": "NVFP4"}), {"mixed"}),
    ("FP8 in blocks", in_both("model.layers.1.mlp.gate", {"quant_algo": "FP8_PB_WO"}), {"mixed"}),
    ("no KV key", lambda s: s.quantization_config.pop("kv_cache_quant_algo"), {"mixed"}),
    ("layers in one file alone", lambda s: s.quantization.pop("quantized_layers"), {"config-agreement"}),
    ("not listed, yet quantized", unlist("model.layers.0.self_attn.o_proj"), {"coverage"}),
    ("another format for k than for q", in_both("model.layers.0.self_attn.k_proj", {"quant_algo": "FP8"}), {"architecture", "one-algo", "tensor-layout"}),
    ("blocks of 32", in_both(EXPERT, {"quant_algo": "NVFP4", "group_size": 32}), {"alignment"}),
    ("a scale a row", in_both("model.layers.1.mlp.gate", {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}), {"mixed"}),
    ("a pattern", in_both("model.layers.0.self_attn.*", {"quant_algo": "NVFP4", "group_size": 16}), {"mixed"}),
    ("a parent that no server looks up", by_its_parent("model.layers.0.self_attn"), {"coverage", "mixed"}),
    ("all experts by one name", by_its_parent("model.layers.1.mlp.experts"), set()),
    ("plain experts on no list", plain_experts, {"mixed"}),
    ("a group of its own bits", grouped(4), set()),
    ("a group of other bits", grouped(8), {"config-groups"}),
    ("a group of two formats", grouped_with_fp8, {"config-groups"}),
    ("another algorithm in one expert", in_both(EXPERT, {"quant_algo": "W4A16_NVFP4"}), {"one-algo", "weight-only"}),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "checks"), [row[1:] for row in MIXED_SPOILED], ids=[row[0] for row in MIXED_SPOILED])
def test_mixed_precision(open_copy: Callable[[str], Any], spoil: Callable[[Any], object], checks: set[str]) -> None:
    surgery = open_copy("nvfp4")
    mix(surgery)
    spoil(surgery)
    surgery.close()
    report = verify_checkpoint(surgery.directory)
    assert fired(report) == checks, report.findings


def test_mixed_precision_without_nvfp4(open_copy: Callable[[str], Any]) -> None:
    surgery = open_copy("fp8")
    mix(surgery, "FP8")
    surgery.close()
    assert fired(verify_checkpoint(surgery.directory)) == {"mixed"}


def test_the_nested_config_of_old_modelopt(open_copy: Callable[[str], Any]) -> None:
    surgery = open_copy("nvfp4")
    surgery.config["quantization_config"] = surgery.hf_quant_config
    surgery.close()
    assert fired(verify_checkpoint(surgery.directory)) == {"config-agreement"}


def test_a_method_nobody_here_knows(open_copy: Callable[[str], Any]) -> None:
    surgery = open_copy("source")
    surgery.config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    surgery.close()
    assert fired(verify_checkpoint(surgery.directory)) == {"not-judged"}
