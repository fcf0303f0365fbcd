"""What verify finds in damaged exports of DeepSeek-V3 and GLM-4.5, without the source."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file, save_file

from quantplug import quantize_checkpoint
from quantplug.verify import verify_checkpoint
from quantplug.verify.checks import Check
from quantplug.verify.report import Severity

Tensors = dict[str, torch.Tensor]
Damage = Callable[[Tensors], object]
Export = Callable[..., Path]
LATENT = "model.layers.1.self_attn"


@pytest.fixture
def found(export: Export, tmp_path: Path) -> Callable[..., dict[tuple[Check, str], str]]:
    """The errors of an export that was damaged: (check, subject) to message."""

    def errors_of(name: str, damage: Damage = lambda _: None, **settings: object) -> dict[tuple[Check, str], str]:
        directory = tmp_path / "damaged"
        shutil.copytree(export(name, "w4a16_nvfp4"), directory)
        (file,) = directory.glob("*.safetensors")
        tensors = load_file(file)
        damage(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        (directory / "model.safetensors.index.json").unlink(missing_ok=True)
        file.rename(directory / "model.safetensors")
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **settings}))
        report = verify_checkpoint(directory)
        return {
            (finding.check, finding.subject): finding.message
            for finding in report.findings
            if finding.severity is Severity.ERROR
        }

    return errors_of


def drop(*starts: str) -> Damage:
    def damage(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(starts)]:
            del tensors[name]

    return damage


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "deepseek_v2", "deepseek_v2_lite", "glm4_moe_air"])
def test_an_export_has_no_errors(name: str, found: Callable[..., object]) -> None:
    assert found(name) == {}


@pytest.mark.parametrize(
    ("damage", "subject", "says"),
    [
        (drop("model.layers.1.mlp.gate.e_score"), "model.layers.1.mlp.gate.e_score_correction_bias", "missing"),
        (drop("model.layers.3.eh_proj"), "model.layers.3.eh_proj.weight", "missing"),
        (drop("model.layers.3.shared_head.norm"), "model.layers.3.shared_head.norm.weight", "missing"),
        (drop(f"{LATENT}.kv_a_layernorm"), f"{LATENT}.kv_a_layernorm.weight", "missing"),
        (drop("model.layers.2.mlp.shared_experts.up"), "model.layers.2.mlp.shared_experts.up_proj.weight", "missing"),
        (
            lambda tensors: tensors.update({"model.layers.3.fc.bias": torch.ones(3)}),
            "model.layers.3.fc.bias",
            "no weight of",
        ),
        (
            lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.ones(160, 160).bfloat16()}),
            "model.layers.3.eh_proj.weight",
            "is [160, 160], by config.json [160, 320]",
        ),
        (
            lambda tensors: tensors.update({"model.layers.3.embed_tokens.weight": torch.ones(500, 160).bfloat16()}),
            "model.layers.3.embed_tokens.weight",
            "is [500, 160], by config.json [523, 160]",
        ),
        (
            lambda tensors: tensors.update({"model.layers.2.mlp.gate.e_score_correction_bias": torch.ones(7)}),
            "model.layers.2.mlp.gate.e_score_correction_bias",
            "is [7], by config.json [8]",
        ),
    ],
)
def test_a_damaged_weight_is_named(
    damage: Damage, subject: str, says: str, found: Callable[..., dict[tuple[Check, str], str]]
) -> None:
    assert says in found("deepseek_v3", damage)[Check.ARCHITECTURE, subject]


def test_a_lost_mtp_layer_is_one_error(found: Callable[..., dict[tuple[Check, str], str]]) -> None:
    errors = found("glm4_moe", drop("model.layers.3."))
    told = [subject for check, subject in errors if check is Check.ARCHITECTURE]
    assert told == ["model.layers.3"]
    assert "num_nextn_predict_layers is 1" in errors[Check.ARCHITECTURE, "model.layers.3"]


def test_a_layer_that_the_config_does_not_count(found: Callable[..., dict[tuple[Check, str], str]]) -> None:
    errors = found("deepseek_v3", num_nextn_predict_layers=0)
    assert "3" in errors[Check.LAYERS, "model.layers"]


def test_copies_may_be_absent(found: Callable[..., object]) -> None:
    copies = ("model.layers.3.embed_tokens", "model.layers.3.shared_head.head")
    assert not [subject for check, subject in found("deepseek_v3", drop(*copies)) if check is Check.ARCHITECTURE]


def test_down_projections_with_scales_of_their_own(found: Callable[..., dict[tuple[Check, str], str]]) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[f"{LATENT}.q_a_proj.weight_scale_2"] *= 2

    errors = found("deepseek_v3", damage)
    assert any(LATENT in subject for check, subject in errors if check is Check.SHARED_SCALES)


def test_latent_widths_that_the_tensors_do_not_have(found: Callable[..., dict[tuple[Check, str], str]]) -> None:
    errors = found("deepseek_v3", kv_lora_rank=48)
    told = {subject for check, subject in errors if check is Check.ARCHITECTURE}
    wrong = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")
    assert {f"model.layers.0.self_attn.{name}.weight" for name in wrong} == told


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_routed_experts", None),
        ("kv_lora_rank", "64"),
        ("v_head_dim", 0),
        ("first_k_dense_replace", -1),
        ("num_nextn_predict_layers", 1.5),
        ("num_nextn_predict_layers", 10**9),
    ],
)
def test_a_size_that_is_none(key: str, value: object, found: Callable[..., dict[tuple[Check, str], str]]) -> None:
    assert (Check.ARCHITECTURE, f"config.json {key}") in found("deepseek_v3", **{key: value})


@pytest.mark.parametrize(("name", "value"), [("topk_method", None), ("scoring_func", "softmax")])
def test_a_router_that_servers_compute_otherwise(
    name: str, value: object, found: Callable[..., dict[tuple[Check, str], str]]
) -> None:
    """vLLM 0.32 was run with such: it differs by more than 1 in logprobs, and stops at nothing."""
    assert found("deepseek_v3", **{name: value}).keys() == {(Check.SERVER_SETTINGS, f"config.json {name}")}


def test_kv_b_proj_in_fp4_is_a_warning(export: Export, tmp_path: Path) -> None:
    """As other tools pack it: ours keep it."""
    assert Check.MIN_BITS not in {it.check for it in verify_checkpoint(export("deepseek_v3", "w4a16_nvfp4")).findings}
    packed = shutil.copytree(export("deepseek_v3", "w4a16_nvfp4"), tmp_path / "packed")
    (shard,) = packed.glob("*.safetensors")
    tensors = load_file(shard)
    for layer in range(3):
        module = f"model.layers.{layer}.self_attn.kv_b_proj"
        codes, scales, scale = NVFP4QTensor.quantize(tensors[f"{module}.weight"], 16)
        beside = {"weight": codes._quantized_data, "weight_scale": scales, "weight_scale_2": scale}
        tensors |= {f"{module}.{name}": tensor for name, tensor in beside.items()}
    save_file(tensors, shard, metadata={"format": "pt"})
    for file, *keys in (
        ("config.json", "quantization_config", "ignore"),
        ("hf_quant_config.json", "quantization", "exclude_modules"),
    ):
        config = json.loads((packed / file).read_text())
        section, listed = config[keys[0]], keys[1]
        section[listed] = [name for name in section[listed] if not name.endswith("self_attn.kv_b_proj")]
        (packed / file).write_text(json.dumps(config))
    assert Check.MIN_BITS in {it.check for it in verify_checkpoint(packed).findings}


def test_a_layer_that_is_excluded_by_its_projections_is_told(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """SGLang 0.5.23 leaves those of all layers plain: tests/servers/test_sglang.py runs it."""
    quantize_checkpoint(checkpoint("deepseek_v3"), tmp_path / "out", "w4a16_nvfp4", exclude=["model.layers.0.*"])

    told = {
        it.subject for it in verify_checkpoint(tmp_path / "out").findings if "SGLang takes it for all" in it.message
    }
    assert told == {f"model.layers.0.self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")}

    for file in ("config.json", "hf_quant_config.json"):
        config = json.loads((tmp_path / "out" / file).read_text())
        holder = config.get("quantization_config") or config["quantization"]
        key = "ignore" if "ignore" in holder else "exclude_modules"
        others = [name for name in holder[key] if not name.startswith("model.layers.0.self_attn.")]
        holder[key] = ["model.layers.0.self_attn.*", *others]
        (tmp_path / "out" / file).write_text(json.dumps(config))
    report = verify_checkpoint(tmp_path / "out")
    assert report.ok
    assert not [it for it in report.findings if "SGLang takes it for all" in it.message]
