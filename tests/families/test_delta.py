"""Qwen3-Next and Qwen3.5 in what no other family has.

Parts that stay plain of a packed weight, a norm that is 1 off, experts in one tensor or one by one, and layers of
multi-token prediction that a config does not count.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5MoeForCausalLM

from quantplug import export_mcore_gpt_to_hf, import_mcore_gpt_from_hf
from quantplug.calibration.policy import CalibrationPolicy, ColdExperts
from quantplug.calibration.run import calibrate
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.megatron import cpu
from quantplug.megatron.models.build import LayerSpec
from quantplug.megatron.parameters import iter_parameters
from quantplug.plugins import quant_cfg
from quantplug.verify import verify_checkpoint
from quantplug.verify.report import Severity
from tests.export.checkpoints import build, load, one_rank, quantize, read, same_bytes
from tests.families.cases import CASES, DELTA, Tensors, save
from tests.ranks import run_ranks

Checkpoint = Callable[[str], Path]
Export = Callable[..., Path]
NET = "model.layers.0.linear_attn"


def changed(source: Path, target: Path, change: Callable[[Tensors], object], **settings: object) -> Path:
    """A copy of a checkpoint with other tensors, and other settings; one that is None is left out."""
    shutil.copytree(source, target)
    for path in target.glob("*.safetensors"):
        path.unlink()
    (target / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors = read(source)
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text()) | settings
    kept = {name: value for name, value in config.items() if value is not None or name not in settings}
    (target / "config.json").write_text(json.dumps(kept))
    return target


def same(one: Path, other: Path) -> bool:
    first, second = read(one), read(other)
    return first.keys() == second.keys() and all(same_bytes(first[name], second[name]) for name in first)


def errors(directory: Path, source: Path | None = None) -> set[tuple[str, str]]:
    findings = verify_checkpoint(directory, source).findings
    return {(str(found.check), found.subject) for found in findings if found.severity is Severity.ERROR}


def excluded(directory: Path) -> list[str]:
    said = json.loads((directory / "config.json").read_text())["quantization_config"]
    return said.get("ignore") or said["modules_to_not_convert"]


# Parts that stay plain of a weight that is packed.


def test_what_stays_plain_is_excluded_by_every_name_that_servers_look_up(export: Export) -> None:
    by_key_head = {f"{NET}.in_proj_ba", f"{NET}.conv1d"}
    found = excluded(export("qwen3_next", "w4a16_nvfp4"))
    assert {name for name in found if name.startswith(NET)} == by_key_head
    assert {"model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate", "lm_head"} <= {*found}
    parts = {f"{NET}.in_proj_b", f"{NET}.in_proj_a", f"{NET}.in_proj_ba", f"{NET}.conv1d"}
    found = excluded(export("qwen3_5", "fp8"))
    assert {name for name in found if name.startswith(NET)} == parts


def test_a_projection_that_is_excluded_is_named_as_servers_merge_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    quantize_checkpoint(checkpoint("qwen3_5"), tmp_path / "out", "w8a16_fp8", exclude=[f"{NET}.in_proj_*"])
    merged = {f"{NET}.in_proj_qkvz", f"{NET}.in_proj_ba"}
    assert merged | {f"{NET}.in_proj_qkv", f"{NET}.in_proj_z"} <= {*excluded(tmp_path / "out")}
    assert verify_checkpoint(tmp_path / "out", checkpoint("qwen3_5")).ok


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5"])
def test_only_packed_parts_must_hold_whole_blocks(name: str, tmp_path: Path) -> None:
    """Of the projection's rows 8 are betas and alphas, which fill no block of 128."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}
    sizes |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    sizes |= {"layer_types": ["linear_attention", "full_attention"]}
    experts = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    config = type(CASES[name].config)(**{**DELTA, **sizes, **experts, "num_experts": 2, "num_experts_per_tok": 2})
    source = save(replace(CASES[name], config=config), tmp_path / "source")
    with one_rank():
        export_mcore_gpt_to_hf(quantize(load(source), "fp8_blockwise"), source, tmp_path / "out")
    exported, part = read(tmp_path / "out"), "qkvz" if name == "qwen3_next" else "qkv"
    assert exported[f"{NET}.in_proj_{part}.weight"].dtype == torch.float8_e4m3fn
    assert exported[f"{NET}.in_proj_{part}.weight_scale_inv"].shape == ((768 if part == "qkvz" else 512) // 128, 2)
    assert {f"{NET}.in_proj_ba", f"{NET}.conv1d"} <= {*excluded(tmp_path / "out")}
    assert verify_checkpoint(tmp_path / "out", source).ok
    quantize_checkpoint(source, tmp_path / "free", "fp8_blockwise")
    assert same(tmp_path / "free", tmp_path / "out")


# The norm that is zero-centred in Megatron alone.


def small_norms(tensors: Tensors) -> None:
    """BF16 numbers from 2**-16 to 1/2, and negative ones: 1 less, most of them are no BF16 numbers."""
    name = f"{NET}.norm.weight"
    size = len(tensors[name])
    exponents = torch.linspace(-16, -1.01, size).exp2()
    tensors[name] = (exponents * torch.tensor([1.0, -1.0]).repeat(size // 2)).bfloat16()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_norms_below_one_half_come_back_as_they_were(
    dtype: torch.dtype | None, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = changed(checkpoint("qwen3_5"), tmp_path / "source", small_norms)
    with one_rank():
        model = build(source)
        import_mcore_gpt_from_hf(model, source, dtype=dtype)
        export_mcore_gpt_to_hf(model, source, tmp_path / "out")
    assert same(source, tmp_path / "out")


def test_a_norm_that_was_trained_in_bf16_is_exported_rounded(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_5")
    with one_rank():
        model = load(source).bfloat16()
        weight = model.decoder.layers[0].self_attention.out_norm.weight.detach().clone()
        export_mcore_gpt_to_hf(model, source, tmp_path / "out")
    assert weight.dtype == torch.bfloat16
    assert torch.equal(read(tmp_path / "out")[f"{NET}.norm.weight"], (weight.float() + 1).bfloat16())


@pytest.mark.parametrize("layer_spec", LayerSpec)
def test_all_other_weights_are_of_the_models_type(layer_spec: LayerSpec, checkpoint: Checkpoint) -> None:
    with one_rank():
        parameters = list(iter_parameters(build(checkpoint("qwen3_next"), layer_spec)))
    wide = {parameter.key.name for parameter in parameters if parameter.tensor.dtype != torch.bfloat16}
    in_fp32 = ("out_norm.weight", "A_log", "dt_bias")
    assert wide == {f"decoder.layers.{layer}.self_attention.{name}" for layer in range(2) for name in in_fp32}


# Experts in one tensor, as Qwen3.5 is published.


@pytest.fixture(scope="module")
def fused(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """The same checkpoint with the tensors that transformers holds in memory, which are those of the hub.

    Of multi-token prediction, which transformers leaves out, the experts are one by one or stacked.
    """
    original = checkpoint("qwen3_5_moe")

    def in_one_tensor(tensors: Tensors, mtp_too: bool) -> None:
        model = Qwen3_5MoeForCausalLM.from_pretrained(original, dtype=torch.bfloat16)
        mtp = {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
        tensors.clear()
        tensors |= {name: tensor.clone() for name, tensor in model.state_dict().items()} | mtp
        experts = "mtp.layers.0.mlp.experts"
        for projections, name in ((("gate", "up"), "gate_up"), (("down",), "down")) if mtp_too else ():
            apart = [[tensors.pop(f"{experts}.{i}.{part}_proj.weight") for part in projections] for i in range(6)]
            tensors[f"{experts}.{name}_proj"] = torch.stack([torch.cat(parts) for parts in apart])

    made: dict[bool, Path] = {}

    def fused_checkpoint(mtp_too: bool) -> Path:
        if mtp_too not in made:
            target = tmp_path_factory.mktemp("fused") / "source"
            made[mtp_too] = changed(original, target, lambda tensors: in_one_tensor(tensors, mtp_too))
        return made[mtp_too]

    return fused_checkpoint


@pytest.mark.parametrize("mtp_too", [False, True])
def test_experts_in_one_tensor_are_the_same_experts(
    mtp_too: bool, checkpoint: Checkpoint, fused: Callable[[bool], Path], tmp_path: Path
) -> None:
    source = fused(mtp_too)
    assert load_file(source / "model.safetensors")["model.layers.0.mlp.experts.gate_up_proj"].shape == (6, 192, 160)
    with one_rank():
        model, other = load(source), load(checkpoint("qwen3_5_moe"))
        weights = {parameter.key: parameter.tensor for parameter in iter_parameters(other)}
        assert all(torch.equal(parameter.tensor, weights[parameter.key]) for parameter in iter_parameters(model))
        export_mcore_gpt_to_hf(model, source, tmp_path / "out")
    assert same(source, tmp_path / "out")


@pytest.mark.parametrize("mtp_too", [False, True])
def test_quantized_they_are_written_one_by_one(
    mtp_too: bool, checkpoint: Checkpoint, export: Export, fused: Callable[[bool], Path], tmp_path: Path
) -> None:
    """Also those of multi-token prediction, which stay plain: readers take all of a model's in one of the two ways."""
    source, out = fused(mtp_too), tmp_path / "out"
    quantize_checkpoint(source, out, "w4a16_nvfp4", preset="all")
    quantize_checkpoint(checkpoint("qwen3_5_moe"), tmp_path / "apart", "w4a16_nvfp4", preset="all")
    assert same(out, tmp_path / "apart")
    with one_rank():
        export_mcore_gpt_to_hf(quantize(load(source), "w4a16_nvfp4"), source, tmp_path / "by_megatron")
    assert same(tmp_path / "by_megatron", export("qwen3_5_moe", "w4a16_nvfp4"))
    report = verify_checkpoint(out, source)
    assert report.ok
    measured = {found.name for found in report.errors_by_tensor}
    assert {f"model.layers.3.mlp.experts.5.{part}_proj.weight" for part in ("gate", "up", "down")} <= measured


def test_experts_that_are_not_their_sources_are_found(fused: Callable[[bool], Path], tmp_path: Path) -> None:
    up, gone = "model.layers.1.mlp.experts.4.up_proj.weight", "mtp.layers.0.mlp.experts.2.down_proj.weight"
    plain = "mtp.layers.0.mlp.experts.3.gate_proj.weight"

    def spoil(tensors: Tensors) -> None:
        tensors[up] = tensors[up].flip(0)
        tensors[plain] = tensors[plain] * 2
        del tensors[gone]

    quantize_checkpoint(fused(True), tmp_path / "out", "w4a16_nvfp4")
    found = errors(changed(tmp_path / "out", tmp_path / "spoiled", spoil), fused(True))
    assert {("error-bound", up), ("source-values", plain), ("source-names", gone)} <= found


def test_experts_that_stay_as_they_are_stay_in_one_tensor(fused: Callable[[bool], Path], tmp_path: Path) -> None:
    source = fused(True)
    quantize_checkpoint(source, tmp_path / "out", "w8a16_fp8", exclude=["*.mlp.experts*"])
    assert "model.layers.0.mlp.experts.down_proj" in read(tmp_path / "out")
    assert {"model.layers.0.mlp.experts", "mtp.layers.0.mlp.experts"} <= {*excluded(tmp_path / "out")}
    assert verify_checkpoint(tmp_path / "out", source).ok


# Multi-token prediction.


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5"])
def test_layers_that_the_config_does_not_count_are_carried(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    setting = "num_nextn_predict_layers" if name == "qwen3_next" else "mtp_num_hidden_layers"
    source = changed(checkpoint(name), tmp_path / "source", lambda _: None, **{setting: None})
    original = read(source)
    carried = [tensor for tensor in original if tensor.startswith("mtp.")]
    with one_rank():
        model = load(source)
        assert not any(parameter.key.stack == "mtp" for parameter in iter_parameters(model))
        export_mcore_gpt_to_hf(model, source, tmp_path / "plain")
        export_mcore_gpt_to_hf(quantize(model, "w4a16_nvfp4"), source, tmp_path / "out")
    assert same(source, tmp_path / "plain")
    exported = read(tmp_path / "out")
    assert all(same_bytes(exported[tensor], original[tensor]) for tensor in carried)
    assert {"mtp.fc", "mtp.layers.0.self_attn.q_proj"} <= {*excluded(tmp_path / "out")}
    assert verify_checkpoint(tmp_path / "out", source).ok
    quantize_checkpoint(source, tmp_path / "free", "w4a16_nvfp4", preset="all")
    assert same(tmp_path / "free", tmp_path / "out")


def test_layers_that_the_config_counts_are_cast_as_the_rest(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def widen(tensors: Tensors) -> None:
        tensors["mtp.norm.weight"] = tensors["mtp.norm.weight"].float()

    source = changed(checkpoint("qwen3_5"), tmp_path / "source", widen)
    with one_rank():
        export_mcore_gpt_to_hf(quantize(load(source), "w4a16_nvfp4"), source, tmp_path / "out")
    assert read(tmp_path / "out")["mtp.norm.weight"].dtype == torch.bfloat16
    assert verify_checkpoint(tmp_path / "out", source).ok


def without_mtp(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("mtp.")]:
        del tensors[name]


def test_calibration_with_data_reaches_every_linear(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """W4A4, by Megatron's own modules: delta nets, gated attention, shared experts and multi-token prediction."""
    source, tokens = checkpoint("qwen3_5_moe"), torch.arange(48).view(2, 24) * 7 % 500
    later = torch.triu(torch.ones(1, 1, 24, 24, dtype=torch.bool), diagonal=1)

    def forward(chunk: torch.nn.Module) -> None:
        with torch.no_grad(), cpu.local_forward():
            chunk.eval()(tokens, torch.arange(24).expand_as(tokens), later)

    with one_rank():
        model = load(source, LayerSpec.LOCAL)
        mtq.quantize(model, {**quant_cfg("nvfp4", source, quantize_mtp=True, preset="all"), "algorithm": None})
        calibrate(model, forward, CalibrationPolicy(cold_experts=ColdExperts.LAYER_MAX))
        export_mcore_gpt_to_hf(model, source, tmp_path / "out")
    exported = read(tmp_path / "out")
    scales = [exported[f"{NET}.{part}.input_scale"] for part in ("in_proj_qkv", "in_proj_z")]
    assert same_bytes(*scales)
    assert exported["mtp.layers.0.self_attn.q_proj.input_scale"] > 0
    assert verify_checkpoint(tmp_path / "out", source).ok


# Parallel layouts.


@pytest.mark.distributed
@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_loads_at_other_layouts(
    checkpoint: Checkpoint, export: Export, tmp_path: Path
) -> None:
    """Every slice of a delta net has rows of all its parts. Saved at TP2, loaded at TP1, and on two stages."""
    worker = Path(__file__).with_name("delta_worker.py")
    run = run_ranks(2, worker, checkpoint("qwen3_5_moe"), checkpoint("qwen3_5"), tmp_path)
    assert run.ok, run.output[-9000:]
    assert same(tmp_path / "tp1", export("qwen3_5_moe", "w4a16_nvfp4"))
    assert same(tmp_path / "pp2", tmp_path / "tp1")


# What verify finds.


def scaled(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensors[name] * 2})


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (without_mtp, ("architecture", "mtp.fc")),
        (lambda tensors: tensors.pop("mtp.norm.weight"), ("architecture", "mtp.norm.weight")),
        (lambda tensors: tensors.pop(f"{NET}.A_log"), ("architecture", f"{NET}.A_log")),
        (lambda tensors: tensors.pop(f"{NET}.in_proj_a.weight"), ("architecture", f"{NET}.in_proj_a.weight")),
        (
            lambda tensors: tensors.update({f"{NET}.conv1d.weight": tensors[f"{NET}.conv1d.weight"][:, :, :3].clone()}),
            ("architecture", f"{NET}.conv1d.weight"),
        ),
        (scaled(f"{NET}.in_proj_z.weight_scale_2"), ("shared-scales", NET)),
    ],
)
def test_one_thing_spoiled_is_found(
    spoil: Callable[[Tensors], object], found: tuple[str, str], export: Export, tmp_path: Path
) -> None:
    assert found in errors(changed(export("qwen3_5", "w4a16_nvfp4"), tmp_path / "spoiled", spoil))


def test_a_layer_behind_the_decoder_is_none_of_multi_token_prediction(export: Export, tmp_path: Path) -> None:
    """Which has numbers of its own here, so that what the config counts of it lets no other layer pass."""

    def add(tensors: Tensors) -> None:
        tensors["model.layers.4.input_layernorm.weight"] = torch.ones(160, dtype=torch.bfloat16)

    copy = changed(export("qwen3_next", "w4a16_nvfp4"), tmp_path / "copy", add)
    assert errors(copy) == {("layers", "model.layers")}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("layer_types", "full_attention"),
        ("layer_types", ["full_attention"] * 5),
        ("layer_types", [["full_attention"]] * 4),
        ("linear_num_key_heads", 3),
        ("linear_num_key_heads", 0),
        ("linear_value_head_dim", "24"),
        ("linear_conv_kernel_dim", [4]),
        ("mtp_num_hidden_layers", 10**9),
    ],
)
def test_a_setting_that_no_sizes_can_be_read_from(setting: str, value: object, export: Export, tmp_path: Path) -> None:
    named = "linear_num_value_heads" if value == 3 else setting
    copy = changed(export("qwen3_5", "w4a16_nvfp4"), tmp_path / "copy", lambda _: None, **{setting: value})
    assert ("architecture", f"config.json {named}") in errors(copy)


def test_a_merged_name_is_no_name_where_its_parts_are_quantized(export: Export, tmp_path: Path) -> None:
    copy = changed(export("qwen3_5", "w4a16_nvfp4"), tmp_path / "copy", lambda _: None)
    for file, keys in (
        ("config.json", ("quantization_config", "ignore")),
        ("hf_quant_config.json", ("quantization", "exclude_modules")),
    ):
        config = json.loads((copy / file).read_text())
        config[keys[0]][keys[1]].append(f"{NET}.in_proj_qkvz")
        (copy / file).write_text(json.dumps(config))
    assert errors(copy) == {("exclude-pattern", f"{NET}.in_proj_qkvz")}
