# ruff: noqa: E501 (tables: one case a line)
"""The whole checker on real ModelOpt exports: the good pass, and one spoiled thing fires exactly one check."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantplug.errors import SourceError
from quantplug.verify import Severity, verify_checkpoint

ATTENTION = "model.layers.1.self_attn"
EXPERT = "model.layers.1.mlp.experts.2"
DENSE = "model.layers.0.mlp"
Spoil = Callable[[Any], object]


def fired(report: Any) -> set[str]:
    return {str(check) for check in report.checks(Severity.ERROR, Severity.WARNING)}


@pytest.mark.parametrize("name", ["nvfp4", "w4a16", "fp8"])
def test_what_modelopt_writes_passes(pristine: dict[str, Path], name: str) -> None:
    report = verify_checkpoint(pristine[name], pristine["source"])
    assert fired(report) == set()
    assert report.ok
    assert len(report.errors_by_tensor) == 3 * 4 + 3 + 2 * 4 * 3
    assert all(0 < error.relative_error < error.bound for error in report.errors_by_tensor)
    assert report.source_bytes is not None
    assert report.export_bytes < report.source_bytes


@pytest.mark.parametrize("name", ["nvfp4", "fp8"])
def test_the_same_in_shards_passes(open_copy: Callable[[str], Any], name: str) -> None:
    surgery = open_copy(name)
    surgery.close(shards=3)
    assert fired(verify_checkpoint(surgery.directory)) == set()


def test_errors_are_summed_over_each_kind(pristine: dict[str, Path]) -> None:
    report = verify_checkpoint(pristine["nvfp4"], pristine["source"])
    kinds = {kind.kind: kind for kind in report.errors_by_kind}
    assert kinds["mlp.experts.gate_proj"].tensors == 8
    assert kinds["self_attn.q_proj"].tensors == 3
    gates = [error for error in report.errors_by_tensor if error.kind == "mlp.experts.gate_proj"]
    expected = math.sqrt(sum(e.squared_error for e in gates) / sum(e.squared_norm for e in gates))
    assert kinds["mlp.experts.gate_proj"].relative_error == pytest.approx(expected)
    assert kinds["mlp.experts.gate_proj"].worst_relative_error == max(e.relative_error for e in gates)


def test_progress_ends_at_all_bytes(pristine: dict[str, Path]) -> None:
    steps: list[tuple[int, int]] = []
    verify_checkpoint(pristine["w4a16"], pristine["source"], lambda done, total: steps.append((done, total)))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert {total for _, total in steps} == {steps[-1][0]}


def scale(name: str, factor: float) -> Spoil:
    return lambda s: s.tensors.__setitem__(name, s.tensors[name] * factor)


def store(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return lambda s: s.tensors.__setitem__(name, make(s.tensors[name]).contiguous())


def foreign(spoil: Spoil) -> Spoil:
    """The same in a model of an architecture whose weights we do not know."""

    def both(s: Any) -> None:
        s.config["architectures"] = ["ElseForCausalLM"]
        spoil(s)

    return both


def rename_expert(s: Any) -> None:
    for name in [name for name in s.tensors if f"{EXPERT}." in name]:
        s.tensors[name.replace(EXPERT, EXPERT.removesuffix("2") + "9")] = s.tensors.pop(name)


def plain_attention_q_only(s: Any) -> None:
    s.plain(f"{ATTENTION}.q_proj", 128)
    s.exclude(f"{ATTENTION}.q_proj")


def plain_expert(s: Any) -> None:
    for part in ("gate", "up", "down"):
        s.plain(f"{EXPERT}.{part}_proj", 128)
        s.exclude(f"{EXPERT}.{part}_proj")


def narrow(s: Any) -> None:
    """A down projection of 40 columns: two blocks and a half."""
    for suffix, columns in (("weight", 20), ("weight_scale", 3)):
        name = f"{DENSE}.down_proj.{suffix}"
        s.tensors[name] = s.tensors[name][:, :columns].contiguous()


def no_producer(s: Any) -> None:
    s.hf_quant_config["producer"]["name"] = "someone"


def drop_file(s: Any) -> None:
    s.hf_quant_config = None


def both(key: str, file_key: str, value: object) -> Spoil:
    def spoil(s: Any) -> None:
        s.quantization_config[key] = value
        s.quantization[file_key] = value

    return spoil


def nvfp4_only_in_config(s: Any) -> None:
    for group in s.quantization_config["config_groups"].values():
        group["input_activations"] = None


def quantized_router(s: Any) -> None:
    s.include("model.layers.1.mlp.gate")
    for suffix in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        s.tensors[f"model.layers.1.mlp.gate.{suffix}"] = s.tensors[f"{ATTENTION}.k_proj.{suffix}"].clone()


def zero_scale(s: Any) -> None:
    for part in ("gate", "up"):
        s.tensors[f"{EXPERT}.{part}_proj.weight_scale_2"] = torch.tensor(0.0)


def fused_experts(s: Any) -> None:
    s.tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.ones(4, 8, 8)


def beside_projections(s: Any) -> None:
    """The other spelling of KV scales, compressed-tensors'."""
    for name in [name for name in s.tensors if name.endswith(("k_scale", "v_scale"))]:
        s.tensors[name.replace("k_proj.", "").replace("v_proj.", "")] = s.tensors.pop(name)


def parent_name(s: Any) -> None:
    """All of one attention is plain, excluded by the name of its parent."""
    for part in "qkvo":
        s.plain(f"{ATTENTION}.{part}_proj", 128)
    s.exclude(ATTENTION)


def router_in_dense_layer(s: Any) -> None:
    s.tensors[f"{DENSE}.gate.weight"] = torch.ones(7, 128, dtype=torch.bfloat16)
    s.exclude(f"{DENSE}.gate")


def shared_expert_gate(s: Any) -> None:
    s.tensors["model.layers.1.mlp.shared_expert_gate.weight"] = torch.ones(1, 128, dtype=torch.bfloat16)


def shared_expert(s: Any) -> None:
    for name in [name for name in s.tensors if EXPERT in name]:
        s.tensors[name.replace("experts.2", "shared_expert")] = s.tensors[name].clone()
    s.tensors["model.layers.1.mlp.shared_expert.up_proj.weight_scale_2"] *= 2


def quantized_embeddings(s: Any) -> None:
    s.include("model.embed_tokens")
    for suffix in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        s.tensors[f"model.embed_tokens.{suffix}"] = s.tensors[f"{ATTENTION}.o_proj.{suffix}"].clone()


SPOILED: list[tuple[str, str, Spoil, set[str], str]] = [
    # name, checkpoint, what is spoiled, checks that fire, a subject among the findings
    ("scale not shared by gate and up", "nvfp4", scale(f"{EXPERT}.up_proj.weight_scale_2", 2), {"shared-scales"}, EXPERT),
    ("by one bit", "w4a16", store(f"{EXPERT}.up_proj.weight_scale_2", lambda t: (t.view(torch.int32) + 1).view(torch.float32)), {"shared-scales"}, EXPERT),
    ("input scale not shared", "nvfp4", scale(f"{EXPERT}.gate_proj.input_scale", 2), {"shared-scales"}, EXPERT),
    ("dense gate and up", "nvfp4", scale(f"{DENSE}.gate_proj.weight_scale_2", 2), {"shared-scales"}, DENSE),
    ("q, k and v", "nvfp4", scale(f"{ATTENTION}.v_proj.weight_scale_2", 2), {"shared-scales"}, ATTENTION),
    ("FP8 experts' weight scale", "fp8", scale(f"{EXPERT}.up_proj.weight_scale", 2), {"shared-scales"}, EXPERT),
    ("no input scale", "nvfp4", lambda s: s.drop(f"{EXPERT}.down_proj.input_scale"), {"input-scale"}, f"{EXPERT}.down_proj.input_scale"),
    ("no FP8 input scale", "fp8", lambda s: s.drop(f"{EXPERT}.down_proj.input_scale"), {"input-scale"}, f"{EXPERT}.down_proj.input_scale"),
    ("input scale in weight-only", "w4a16", lambda s: s.tensors.update({f"{EXPERT}.down_proj.input_scale": torch.tensor(1.0)}), {"weight-only"}, f"{EXPERT}.down_proj.input_scale"),
    ("no input_activations", "nvfp4", nvfp4_only_in_config, {"weight-only"}, "config.json config_groups"),
    ("no block scales", "w4a16", lambda s: s.drop(f"{EXPERT}.up_proj.weight_scale"), {"tensor-layout"}, f"{EXPERT}.up_proj.weight_scale"),
    ("no weight", "w4a16", lambda s: s.drop(f"{EXPERT}.up_proj.weight") or s.tensors.update({f"{EXPERT}.up_proj.weight_scale": torch.ones(1)}), {"coverage"}, f"{EXPERT}.up_proj"),
    ("tensor scale of another dtype", "w4a16", store(f"{ATTENTION}.o_proj.weight_scale_2", lambda t: t.bfloat16()), {"tensor-layout"}, f"{ATTENTION}.o_proj.weight_scale_2"),
    ("tensor scale not a scalar", "w4a16", store(f"{ATTENTION}.o_proj.weight_scale_2", lambda t: t.repeat(2)), {"tensor-layout"}, f"{ATTENTION}.o_proj.weight_scale_2"),
    ("block scales transposed", "w4a16", store(f"{ATTENTION}.o_proj.weight_scale", lambda t: t.view(torch.uint8).T.contiguous().view(torch.float8_e4m3fn)), {"tensor-layout"}, f"{ATTENTION}.o_proj.weight_scale"),
    ("block scales as bytes", "w4a16", store(f"{ATTENTION}.o_proj.weight_scale", lambda t: t.view(torch.uint8)), {"tensor-layout"}, f"{ATTENTION}.o_proj.weight_scale"),
    ("a foreign scale", "w4a16", lambda s: s.tensors.update({f"{EXPERT}.up_proj.weight_scale_inv": torch.ones(1)}), {"tensor-layout"}, f"{EXPERT}.up_proj.weight_scale_inv"),
    ("half a block", "w4a16", foreign(narrow), {"alignment", "serving-tp"}, f"{DENSE}.down_proj"),
    ("group size 32", "w4a16", lambda s: s.quantization.update(group_size=32), {"alignment"}, "hf_quant_config.json"),
    ("expert missing", "nvfp4", lambda s: s.drop(f"{EXPERT}."), {"experts"}, "model.layers.1.mlp.experts"),
    ("expert misnumbered", "nvfp4", rename_expert, {"experts"}, "model.layers.1.mlp.experts"),
    ("projection missing", "nvfp4", lambda s: s.drop(f"{EXPERT}.down_proj."), {"experts"}, EXPERT),
    ("all experts of a layer missing", "w4a16", lambda s: s.drop("layers.1.mlp.experts."), {"experts"}, "model.layers.1.mlp"),
    ("layer missing", "w4a16", lambda s: s.drop("layers.0."), {"layers"}, "model.layers"),
    ("layer too many", "w4a16", lambda s: s.config.update(num_hidden_layers=2), {"layers"}, "model.layers"),
    ("head missing", "w4a16", lambda s: s.drop("lm_head") or s.include("lm_head"), {"layers"}, "lm_head"),
    ("plain expert", "nvfp4", plain_expert, {"one-algo"}, "model.layers.1.mlp.experts"),
    ("plain q beside quantized k and v", "nvfp4", plain_attention_q_only, {"one-algo"}, f"{ATTENTION}.qkv_proj"),
    ("plain, not excluded", "w4a16", lambda s: s.plain(f"{ATTENTION}.o_proj", 128), {"coverage"}, f"{ATTENTION}.o_proj"),
    ("excluded, yet quantized", "w4a16", lambda s: s.exclude(f"{ATTENTION}.o_proj"), {"coverage"}, f"{ATTENTION}.o_proj"),
    ("router not excluded", "nvfp4", lambda s: s.include("model.layers.1.mlp.gate"), {"exclude-missing"}, "model.layers.1.mlp.gate"),
    ("head not excluded", "nvfp4", lambda s: s.include("lm_head"), {"exclude-missing"}, "lm_head"),
    ("embeddings need not be excluded", "nvfp4", lambda s: s.include("model.embed_tokens"), set(), ""),
    ("router quantized", "nvfp4", quantized_router, {"exclude-missing", "architecture"}, "model.layers.1.mlp.gate"),
    ("pattern without a match", "nvfp4", lambda s: s.exclude("lm_head.\x00backbone.pt_name_sentinel"), {"exclude-pattern"}, "lm_head.\x00backbone.pt_name_sentinel"),
    ("regular expression", "nvfp4", lambda s: s.exclude("re:.*gate$"), {"exclude-pattern"}, "re:.*gate$"),
    ("wildcards at both ends", "nvfp4", lambda s: s.exclude("*lm_head*"), {"exclude-pattern"}, "*lm_head*"),
    ("bare layer number", "nvfp4", lambda s: s.exclude("model.layers.1*"), {"exclude-pattern", "coverage"}, "model.layers.1*"),
    ("router's name cut short", "nvfp4", lambda s: s.exclude("model.layers.0.mlp.gate*"), {"exclude-pattern", "coverage", "one-algo"}, "model.layers.0.mlp.gate*"),
    ("wildcards that end with a name are fine", "nvfp4", lambda s: s.exclude("*.mlp.gate", "model.norm*", "model.layers.1.input_layernorm"), set(), ""),
    ("a wildcard for a whole component is fine", "nvfp4", lambda s: s.exclude("model.layers.*.mlp.gate"), set(), ""),
    ("a wildcard inside a component", "nvfp4", lambda s: s.exclude("model.layers.1*.mlp.gate"), {"exclude-pattern"}, "model.layers.1*.mlp.gate"),
    ("one expert by pattern", "nvfp4", lambda s: s.exclude(f"{EXPERT}.*"), {"coverage", "one-algo"}, "model.layers.1.mlp.experts"),
    ("a parent's name", "nvfp4", parent_name, {"exclude-pattern"}, ATTENTION),
    ("part of a merged name", "nvfp4", foreign(router_in_dense_layer), {"exclude-pattern"}, f"{DENSE}.gate"),
    ("shared expert's gate not excluded", "nvfp4", foreign(shared_expert_gate), {"exclude-missing"}, "model.layers.1.mlp.shared_expert_gate"),
    ("shared expert's scales", "nvfp4", foreign(shared_expert), {"shared-scales"}, "model.layers.1.mlp.shared_expert"),
    ("quantized embeddings", "nvfp4", quantized_embeddings, {"exclude-missing", "architecture"}, "model.embed_tokens"),
    ("lower-case algorithm", "w4a16", both("quant_algo", "quant_algo", "w4a16_nvfp4"), {"algo"}, "config.json"),
    ("FP8 in blocks, as ModelOpt spells it", "fp8", both("quant_algo", "quant_algo", "fp8_pb_wo"), {"algo", "not-judged"}, "config.json"),
    ("unknown algorithm", "w4a16", both("quant_algo", "quant_algo", "NVFP5"), {"algo", "not-judged"}, "config.json"),
    ("algorithms disagree", "nvfp4", lambda s: s.quantization.update(quant_algo="W4A16_NVFP4"), {"config-agreement"}, "quant_algo"),
    ("excludes disagree", "nvfp4", lambda s: s.quantization["exclude_modules"].remove("lm_head"), {"config-agreement"}, "lm_head"),
    ("KV disagrees", "fp8", lambda s: s.quantization.update(kv_cache_quant_algo=None), {"config-agreement"}, "KV cache"),
    ("producer", "nvfp4", no_producer, {"config-agreement"}, "hf_quant_config.json"),
    ("no hf_quant_config.json", "nvfp4", drop_file, {"config-agreement"}, "hf_quant_config.json"),
    ("no quantization_config", "nvfp4", lambda s: s.config.pop("quantization_config"), {"config-agreement"}, "config.json"),
    ("NaN block scale", "nvfp4", lambda s: s.set_byte(f"{EXPERT}.up_proj.weight_scale", 3, 0x7F), {"finite"}, f"{EXPERT}.up_proj.weight_scale"),
    ("negative NaN block scale", "nvfp4", lambda s: s.set_byte(f"{EXPERT}.up_proj.weight_scale", 3, 0xFF), {"finite"}, f"{EXPERT}.up_proj.weight_scale"),
    ("NaN FP8 weight", "fp8", lambda s: s.set_byte(f"{EXPERT}.up_proj.weight", 3, 0xFF), {"finite"}, f"{EXPERT}.up_proj.weight"),
    ("NaN plain weight", "nvfp4", scale("model.norm.weight", math.nan), {"finite"}, "model.norm.weight"),
    ("infinite input scale", "nvfp4", scale(f"{EXPERT}.down_proj.input_scale", math.inf), {"finite"}, f"{EXPERT}.down_proj.input_scale"),
    ("zero tensor scale", "nvfp4", zero_scale, {"scale-range"}, f"{EXPERT}.up_proj.weight_scale_2"),
    ("negative block scale", "nvfp4", lambda s: s.set_byte(f"{EXPERT}.up_proj.weight_scale", 3, 0xB8), {"scale-range"}, f"{EXPERT}.up_proj.weight_scale"),
    ("block scale -0 is fine", "nvfp4", lambda s: s.set_byte(f"{EXPERT}.up_proj.weight_scale", 3, 0x80), set(), ""),
    ("subnormal block scale", "nvfp4", lambda s: s.set_byte(f"{EXPERT}.up_proj.weight_scale", 3, 0x07), {"subnormal-scales"}, "mlp.experts.up_proj"),
    ("no KV scale", "fp8", lambda s: s.drop(f"{ATTENTION}.k_proj.k_scale"), {"kv-scales"}, f"{ATTENTION}.k_proj.k_scale"),
    ("zero KV scale", "fp8", scale(f"{ATTENTION}.k_proj.k_scale", 0), {"scale-range"}, f"{ATTENTION}.k_proj.k_scale"),
    ("KV scale of another dtype", "fp8", store(f"{ATTENTION}.v_proj.v_scale", lambda t: t.bfloat16()), {"kv-scales"}, f"{ATTENTION}.v_proj.v_scale"),
    ("KV scale of no keys", "fp8", lambda s: s.tensors.update({f"{ATTENTION}.o_proj.k_scale": torch.tensor(1.0)}), {"kv-scales"}, f"{ATTENTION}.o_proj.k_scale"),
    ("two KV scales", "fp8", lambda s: s.tensors.update({f"{ATTENTION}.k_scale": torch.tensor(1.0)}), {"kv-scales"}, f"{ATTENTION}.k_proj.k_scale"),
    ("KV scale nobody speaks of", "nvfp4", lambda s: s.tensors.update({f"{ATTENTION}.k_proj.k_scale": torch.tensor(1.0)}), {"kv-scales"}, f"{ATTENTION}.k_proj.k_scale"),
    ("subnormal input scale", "nvfp4", store(f"{EXPERT}.down_proj.input_scale", lambda t: t.new_tensor(2.0**-127)), {"tiny-scales"}, f"{EXPERT}.down_proj.input_scale"),
    ("input scale of a subnormal inverse", "nvfp4", store(f"{EXPERT}.down_proj.input_scale", lambda t: t.new_tensor(2.0**127)), {"tiny-scales"}, f"{EXPERT}.down_proj.input_scale"),
    ("subnormal tensor scale", "w4a16", store(f"{EXPERT}.down_proj.weight_scale_2", lambda t: t.new_tensor(1e-40)), {"tiny-scales"}, f"{EXPERT}.down_proj.weight_scale_2"),
    ("subnormal FP8 scale", "fp8", store(f"{EXPERT}.down_proj.weight_scale", lambda t: t.new_tensor(1e-40)), {"tiny-scales"}, f"{EXPERT}.down_proj.weight_scale"),
    ("the smallest normal scale is fine", "nvfp4", store(f"{EXPERT}.down_proj.input_scale", lambda t: t.new_tensor(2.0**-126)), set(), ""),
    ("the largest scale with a normal inverse is fine", "nvfp4", store(f"{EXPERT}.down_proj.input_scale", lambda t: t.new_tensor(2.0**126)), set(), ""),
    ("scalar with an axis", "nvfp4", store(f"{ATTENTION}.o_proj.weight_scale_2", lambda t: t.reshape(1)), {"scalar-shape"}, "self_attn.o_proj.weight_scale_2"),
    ("input scale with an axis", "fp8", store(f"{ATTENTION}.o_proj.input_scale", lambda t: t.reshape(1)), {"scalar-shape"}, "self_attn.o_proj.input_scale"),
    ("a KV cache that is cast has no scale", "fp8", lambda s: s.drop("k_scale") or s.drop("v_scale"), set(), ""),
    ("KV scales beside the projections", "fp8", beside_projections, set(), ""),
    ("KV scales of one axis", "fp8", store(f"{ATTENTION}.v_proj.v_scale", lambda t: t.reshape(1)), set(), ""),
    ("fused experts", "w4a16", fused_experts, {"names"}, "model.layers.1.mlp.experts.gate_up_proj"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("base", "spoil", "checks", "subject"), [row[1:] for row in SPOILED], ids=[r[0] for r in SPOILED]
)
def test_one_spoiled_thing_fires_its_check_alone(
    open_copy: Callable[[str], Any], base: str, spoil: Spoil, checks: set[str], subject: str
) -> None:
    surgery = open_copy(base)
    spoil(surgery)
    surgery.close()
    report = verify_checkpoint(surgery.directory)
    assert fired(report) == checks, report.findings
    assert not checks or subject in {finding.subject for finding in report.findings}


def test_all_findings_at_once(open_copy: Callable[[str], Any]) -> None:
    surgery = open_copy("nvfp4")
    spoils = [
        row[2] for row in SPOILED if row[0] in ("q, k and v", "no input scale", "head missing", "NaN plain weight")
    ]
    for spoil in spoils:
        spoil(surgery)
    surgery.close()
    assert fired(verify_checkpoint(surgery.directory)) == {"shared-scales", "input-scale", "layers", "finite"}


def roll_scales(s: Any) -> None:
    """Two rows of block scales changed places, as a swizzled layout would have it."""
    name = f"{EXPERT}.down_proj.weight_scale"
    s.tensors[name] = s.tensors[name].view(torch.uint8).roll(1, dims=0).contiguous().view(torch.float8_e4m3fn)


def swap_nibbles(s: Any) -> None:
    name = f"{EXPERT}.down_proj.weight"
    s.tensors[name] = (s.tensors[name] >> 4) | (s.tensors[name] << 4)


def swap_experts(s: Any) -> None:
    for suffix in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        ours, theirs = f"{EXPERT}.down_proj.{suffix}", f"model.layers.1.mlp.experts.3.down_proj.{suffix}"
        s.tensors[ours], s.tensors[theirs] = s.tensors[theirs], s.tensors[ours]


def zero_row(name: str, row: int) -> Spoil:
    """One row of a tensor of bytes is zero: codes, or the block scales."""

    def spoil(s: Any) -> None:
        s.tensors[name] = s.tensors[name].clone()
        s.tensors[name].view(torch.uint8)[row] = 0

    return spoil


def swap_rows(s: Any) -> None:
    """Two rows of codes changed places: too few for the bound of the whole tensor."""
    name = f"{EXPERT}.down_proj.weight"
    s.tensors[name] = s.tensors[name][torch.tensor([1, 0, *range(2, 128)])].contiguous()


AGAINST_SOURCE: list[tuple[str, str, Spoil, set[str], str]] = [
    ("nibbles swapped", "nvfp4", swap_nibbles, {"error-bound"}, f"{EXPERT}.down_proj.weight"),
    ("experts swapped", "nvfp4", swap_experts, {"error-bound"}, f"{EXPERT}.down_proj.weight"),
    ("tensor scale off by a third", "nvfp4", scale(f"{EXPERT}.down_proj.weight_scale_2", 1.33), {"gain"}, f"{EXPERT}.down_proj.weight"),
    ("FP8 scale off by a tenth", "fp8", scale(f"{EXPERT}.down_proj.weight_scale", 1.1), {"gain"}, f"{EXPERT}.down_proj.weight"),
    ("block scales of one row lost", "nvfp4", zero_row(f"{EXPERT}.gate_proj.weight_scale", 0), {"error-bound"}, f"{EXPERT}.gate_proj.weight"),
    ("codes of the last row lost", "w4a16", zero_row(f"{EXPERT}.gate_proj.weight", -1), {"error-bound"}, f"{EXPERT}.gate_proj.weight"),
    ("one block scale lost", "nvfp4", lambda s: s.set_byte(f"{EXPERT}.down_proj.weight_scale", 5, 0), {"error-bound"}, f"{EXPERT}.down_proj.weight"),
    ("FP8 codes of one row lost", "fp8", zero_row(f"{EXPERT}.gate_proj.weight", -1), {"error-bound"}, f"{EXPERT}.gate_proj.weight"),
    ("two rows swapped", "w4a16", swap_rows, {"error-bound"}, f"{EXPERT}.down_proj.weight"),
    ("plain value changed", "nvfp4", scale("model.norm.weight", 2), {"source-values"}, "model.norm.weight"),
    ("plain tensor in FP32", "nvfp4", store("model.norm.weight", lambda t: t.float()), set(), ""),
    ("tensor missing", "nvfp4", foreign(lambda s: s.drop("layers.1.input_layernorm")), {"source-names"}, "model.layers.1.input_layernorm.weight"),
    ("module missing", "nvfp4", foreign(lambda s: s.drop(f"{ATTENTION}.o_proj")), {"source-names"}, f"{ATTENTION}.o_proj.weight"),
    ("tensor too many", "nvfp4", foreign(lambda s: s.tensors.update({"model.extra.bias": torch.ones(3)})), {"source-names"}, "model.extra.bias"),
    ("padded vocabulary", "nvfp4", foreign(store("lm_head.weight", lambda t: torch.cat([t, t[:5]]))), {"source-names"}, "lm_head.weight"),
    ("one block off", "nvfp4", lambda s: s.set_byte(f"{EXPERT}.down_proj.weight_scale", 0, 0x60), {"value-bound"}, f"{EXPERT}.down_proj.weight"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("base", "spoil", "checks", "subject"), [row[1:] for row in AGAINST_SOURCE], ids=[r[0] for r in AGAINST_SOURCE]
)
def test_only_the_source_shows_it(
    pristine: dict[str, Path], open_copy: Callable[[str], Any], base: str, spoil: Spoil, checks: set[str], subject: str
) -> None:
    surgery = open_copy(base)
    spoil(surgery)
    surgery.close()
    assert fired(verify_checkpoint(surgery.directory)) == set()
    report = verify_checkpoint(surgery.directory, pristine["source"])
    assert fired(report) - ({"settings"} if spoil.__qualname__.startswith("foreign.") else set()) == checks
    assert not checks or subject in {finding.subject for finding in report.findings}


def test_rows_of_block_scales_out_of_place(open_copy: Callable[[str], Any], tmp_path: Path) -> None:
    """On weights whose rows differ in size, as trained ones do."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight = torch.randn(128, 128) * torch.logspace(-2, 0, 128).unsqueeze(1)
    surgery = open_copy("w4a16")
    name = f"{EXPERT}.down_proj"
    quantized, scales, tensor_scale = NVFP4QTensor.quantize(weight, 16)
    surgery.tensors |= {
        f"{name}.weight": quantized._quantized_data, f"{name}.weight_scale": scales, f"{name}.weight_scale_2": tensor_scale
    }  # fmt: skip
    source = open_copy("source")
    source.tensors[f"{name}.weight"] = weight
    source.close()
    surgery.close()
    assert fired(verify_checkpoint(surgery.directory, source.directory)) == set()
    roll_scales(surgery)
    surgery.close()
    assert fired(verify_checkpoint(surgery.directory)) == set()
    assert fired(verify_checkpoint(surgery.directory, source.directory)) == {"error-bound"}


@pytest.mark.parametrize("factor", [0.95, 0.98, 1.0, 1.02, 1.05])
@pytest.mark.parametrize(("name", "suffix"), [("nvfp4", "weight_scale_2"), ("fp8", "weight_scale")])
def test_a_scale_that_is_a_little_off_is_found(
    open_copy: Callable[[str], Any], pristine: dict[str, Path], name: str, suffix: str, factor: float
) -> None:
    """No single value is beyond what rounding gives it, yet all of them are too large, or too small."""
    surgery = open_copy(name)
    scale(f"{EXPERT}.down_proj.{suffix}", factor)(surgery)
    surgery.close()
    report = verify_checkpoint(surgery.directory, pristine["source"])
    errors = {(str(f.check), f.subject) for f in report.findings if f.severity is Severity.ERROR}
    assert errors == ({("gain", f"{EXPERT}.down_proj.weight")} if factor != 1 else set())


@pytest.mark.parametrize(("dtype", "checks"), [(torch.float16, {"source-values"}), (torch.float32, set())])
def test_a_plain_tensor_is_not_narrowed(
    open_copy: Callable[[str], Any], pristine: dict[str, Path], dtype: torch.dtype, checks: set[str]
) -> None:
    """FP16 cannot hold all that BF16 holds, even where it happens to hold these values; FP32 can."""
    surgery = open_copy("nvfp4")
    store("model.norm.weight", lambda tensor: tensor.to(dtype))(surgery)
    surgery.close()
    assert fired(verify_checkpoint(surgery.directory, pristine["source"])) == checks


@pytest.mark.parametrize(("values", "checks"), [(0.1, {"source-values"}), (0.5, set())])
def test_what_the_source_keeps_wider_is_not_rounded(
    open_copy: Callable[[str], Any], values: float, checks: set[str]
) -> None:
    """A router in FP32 beside weights in BF16 is so on purpose: rounded, tokens go to other experts."""
    surgery, source = open_copy("w4a16"), open_copy("source")
    router = "model.layers.1.mlp.gate.weight"
    source.tensors[router] = torch.full((4, 128), values)
    surgery.tensors[router] = torch.full((4, 128), values, dtype=torch.bfloat16)
    surgery.close()
    source.close()
    report = verify_checkpoint(surgery.directory, source.directory)
    assert {(str(f.check), f.subject) for f in report.findings if f.severity is Severity.ERROR} == {
        (check, router) for check in checks
    }


def test_a_source_that_is_wider_as_a_whole_may_be_cast(open_copy: Callable[[str], Any]) -> None:
    surgery, source = open_copy("w4a16"), open_copy("source")
    source.tensors = {name: tensor.float() for name, tensor in source.tensors.items()}
    source.tensors["model.norm.weight"].fill_(1.1)
    surgery.tensors["model.norm.weight"].fill_(1.1)
    surgery.close()
    source.close()
    assert fired(verify_checkpoint(surgery.directory, source.directory)) == set()


def zero(surgery: Any, codes: int) -> None:
    for part in ("gate", "up"):
        surgery.tensors[f"{EXPERT}.{part}_proj.weight"] = torch.full((128, 64), codes, dtype=torch.uint8)
        surgery.tensors[f"{EXPERT}.{part}_proj.weight_scale_2"] = torch.tensor(1.0)


@pytest.mark.parametrize(("codes", "checks"), [(0x00, set()), (0x80, set()), (0x01, {"error-bound"})])
def test_a_zero_source_must_decode_to_zeros(open_copy: Callable[[str], Any], codes: int, checks: set[str]) -> None:
    surgery, source = open_copy("nvfp4"), open_copy("source")
    zero(surgery, codes)
    for part in ("gate", "up"):
        source.tensors[f"{EXPERT}.{part}_proj.weight"].zero_()
    surgery.close()
    source.close()
    assert fired(verify_checkpoint(surgery.directory, source.directory)) == checks


def test_modelopts_own_export_of_a_zero_expert_is_refused(open_copy: Callable[[str], Any]) -> None:
    """ModelOpt 0.47 writes NaN block scales and a zero tensor scale for an all-zero weight."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    quantized, scales, tensor_scale = NVFP4QTensor.quantize(torch.zeros(128, 128), 16)
    surgery = open_copy("nvfp4")
    name = f"{EXPERT}.down_proj"
    surgery.tensors |= {
        f"{name}.weight": quantized._quantized_data, f"{name}.weight_scale": scales, f"{name}.weight_scale_2": tensor_scale
    }  # fmt: skip
    surgery.close()
    assert fired(verify_checkpoint(surgery.directory)) == {"finite", "scale-range"}


def test_a_tied_head_may_be_absent(open_copy: Callable[[str], Any]) -> None:
    surgery, source = open_copy("w4a16"), open_copy("source")
    for opened in (surgery, source):
        opened.config["tie_word_embeddings"] = True
        opened.drop("lm_head")
        opened.close()
    assert fired(verify_checkpoint(surgery.directory, source.directory)) == set()


def test_a_quantized_source_is_no_source(pristine: dict[str, Path]) -> None:
    assert "source" in fired(verify_checkpoint(pristine["nvfp4"], pristine["nvfp4"]))


def test_an_absent_directory_is_a_users_error(tmp_path: Path, pristine: dict[str, Path]) -> None:
    with pytest.raises(SourceError, match="not a directory"):
        verify_checkpoint(tmp_path / "absent")
    with pytest.raises(SourceError, match="not a directory"):
        verify_checkpoint(pristine["nvfp4"], tmp_path / "absent")


def test_serving_sizes_that_cut_blocks(open_copy: Callable[[str], Any]) -> None:
    """An expert width of 96 is 6 blocks: whole on 2 ranks, cut on 4 and 8."""
    surgery = open_copy("w4a16")
    surgery.config["architectures"] = ["ElseForCausalLM"]
    for name in [name for name in surgery.tensors if ".experts." in name and "down_proj" in name]:
        if surgery.tensors[name].dim() == 2:  # the gate and up projections stay wider
            columns = 48 if name.endswith(".weight") else 6
            surgery.tensors[name] = surgery.tensors[name][:, :columns].contiguous()
    surgery.close()
    report = verify_checkpoint(surgery.directory)
    assert report.ok
    assert [finding.subject for finding in report.findings] == ["mlp.experts.down_proj"]
    assert "TP=4: 24" in report.findings[0].message
    assert "TP=2" not in report.findings[0].message


def test_reads_in_chunks_give_the_same_numbers(pristine: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = verify_checkpoint(pristine["nvfp4"], pristine["source"])
    monkeypatch.setattr("quantplug.verify.inventory.checkpoint.CHUNK_BYTES", 700)
    pieces = verify_checkpoint(pristine["nvfp4"], pristine["source"])
    assert fired(pieces) == set()
    for one, other in zip(whole.errors_by_tensor, pieces.errors_by_tensor, strict=True):
        assert other.squared_error == pytest.approx(one.squared_error, rel=1e-12)
        assert (other.name, other.max_error) == (one.name, one.max_error)


def test_a_checkpoint_without_quantization(pristine: dict[str, Path]) -> None:
    assert fired(verify_checkpoint(pristine["source"])) == {"no-quantization"}


def test_formats_not_judged_say_so(open_copy: Callable[[str], Any], pristine: dict[str, Path]) -> None:
    surgery = open_copy("w4a16")
    for config in (surgery.quantization_config, surgery.quantization):
        config["quant_algo"] = "W4A8_NVFP4_FP8"
    surgery.close()
    report = verify_checkpoint(surgery.directory, pristine["source"])
    assert "not-judged" in fired(report)
    assert any("W4A8_NVFP4_FP8" in finding.message for finding in report.findings)


def test_a_second_file_beside_the_single_one(open_copy: Callable[[str], Any]) -> None:
    surgery = open_copy("nvfp4")
    save_file({"stray": torch.ones(2)}, surgery.directory / "stray.safetensors")
    assert fired(verify_checkpoint(surgery.directory)) == {"index", "architecture"}


def test_fp8_by_channel_is_decoded_and_refused_for_experts(pristine: dict[str, Path]) -> None:
    """ModelOpt writes it for a mixture of experts; neither vLLM's MoE nor SGLang loads that."""
    report = verify_checkpoint(pristine["fp8_channel"], pristine["source"])
    assert fired(report) == {"algo"}
    assert all(0.02 < error.relative_error < 0.03 for error in report.errors_by_tensor)


def test_an_ancestor_of_every_name_is_no_name(open_copy: Callable[[str], Any]) -> None:
    """An empty pattern names nothing, whatever it is part of."""
    surgery = open_copy("nvfp4")
    surgery.exclude("")
    surgery.close()
    assert fired(verify_checkpoint(surgery.directory)) == {"exclude-pattern"}
