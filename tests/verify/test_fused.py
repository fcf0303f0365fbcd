"""Experts in one tensor: what ModelOpt writes of GPT-OSS passes, and whatever can be wrong with it is told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantplug.mappings.families.gpt_oss import GPT_OSS
from quantplug.verify import Severity, verify_checkpoint
from quantplug.verify.inventory.fused import fused_experts
from quantplug.verify.inventory.known import table_of

EXPERTS = "model.layers.1.mlp.experts"
GATE_UP, DOWN = f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"
ROUTER = "model.layers.1.mlp.router"
SINKS = "model.layers.1.self_attn.sinks"
PARTS = ("", "_weight_scale", "_weight_scale_2", "_input_scale", "_bias")
Spoil = Callable[[Any], object]


def told(report: Any) -> set[tuple[str, str]]:
    """Check and subject of every error but that no server reads such experts, which each of these exports has."""
    errors = (found for found in report.findings if found.severity is Severity.ERROR)
    return {(str(found.check), found.subject) for found in errors if found.check != "served-experts"}


def edit(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    """Changes a tensor, the bytes of one that torch cannot compute with."""

    def spoil(s: Any) -> None:
        tensor = s.tensors[name]
        is_codes = tensor.dtype == torch.float8_e4m3fn
        changed = change(tensor.view(torch.uint8) if is_codes else tensor).contiguous()
        s.tensors[name] = changed.view(tensor.dtype) if is_codes else changed

    return spoil


def put(name: str, expert: int, value: float) -> Spoil:
    """Overwrites one value of one expert, or one byte of a one-byte tensor."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[expert].view(-1)[7] = value
        return tensor

    return edit(name, change)


def drop(name: str) -> Spoil:
    return lambda s: s.tensors.pop(name)


def add(name: str, value: torch.Tensor) -> Spoil:
    return lambda s: s.tensors.__setitem__(name, value)


def move(old: str, new: str) -> Spoil:
    return lambda s: s.tensors.__setitem__(new, s.tensors.pop(old))


def every(*spoils: Spoil) -> Spoil:
    return lambda s: [spoil(s) for spoil in spoils]


def turn(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mT


def half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[..., : tensor.shape[-1] // 2]


def three(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:3]


def alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[0]


def for_each(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat(4)


def plain(s: Any, *weights: tuple[str, tuple[int, ...]]) -> None:
    for name, shape in weights or ((GATE_UP, (4, 160, 192)), (DOWN, (4, 96, 160))):
        for part in PARTS[1:4]:
            s.tensors.pop(f"{name}{part}")
        s.tensors[name] = torch.ones(shape, dtype=torch.bfloat16)


def plain_excluded(*patterns: str) -> Spoil:
    def spoil(s: Any) -> None:
        plain(s)
        s.exclude(*patterns)

    return spoil


def quantized_router(s: Any) -> None:
    s.include(ROUTER)
    s.tensors[f"{ROUTER}.weight"] = torch.zeros(4, 80, dtype=torch.uint8)
    s.tensors[f"{ROUTER}.weight_scale"] = torch.ones(4, 10).to(torch.float8_e4m3fn)
    s.tensors[f"{ROUTER}.weight_scale_2"] = torch.tensor(1.0)
    s.tensors[f"{ROUTER}.input_scale"] = torch.tensor(1.0)


def no_count(s: Any) -> None:
    del s.config["num_local_experts"]


@pytest.mark.parametrize("name", ["nvfp4", "w4a16", "fp8"])
def test_what_modelopt_writes_passes(fused: dict[str, Path], name: str) -> None:
    report = verify_checkpoint(fused[name], fused["source"])
    assert told(report) == set()
    unserved = {found.subject for found in report.findings if found.check == "served-experts"}
    assert unserved == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert report.checks(Severity.WARNING).keys() <= {"serving-tp"}
    assert all(0 < error.relative_error < error.bound for error in report.errors_by_tensor)
    kinds = {kind.kind: kind for kind in report.errors_by_kind}
    assert kinds["mlp.experts.gate_up_proj"].tensors == 2 * 4
    assert {error.name for error in report.errors_by_tensor} >= {f"{DOWN}[{expert}]" for expert in range(4)}
    sizes = {size.kind: size for size in report.sizes}
    assert sizes["mlp.experts.down_proj"].source_bytes == 2 * 4 * 160 * 97 * 2
    assert sizes["mlp.experts.down_proj"].export_bytes < 2 * 4 * 160 * 97 * 2


SPOILED: dict[str, tuple[Spoil, set[tuple[str, str]]]] = {
    "no block scales": (drop(f"{GATE_UP}_weight_scale"), {("tensor-layout", f"{GATE_UP}_weight_scale")}),
    "no tensor scale": (drop(f"{DOWN}_weight_scale_2"), {("tensor-layout", f"{DOWN}_weight_scale_2")}),
    "no input scale": (drop(f"{DOWN}_input_scale"), {("input-scale", f"{DOWN}_input_scale")}),
    "no codes": (drop(DOWN), {("coverage", DOWN)}),
    "half the block scales": (edit(f"{DOWN}_weight_scale", half), {("tensor-layout", f"{DOWN}_weight_scale")}),
    "block scales turned": (edit(f"{DOWN}_weight_scale", turn), {("tensor-layout", f"{DOWN}_weight_scale")}),
    "block scales of three": (edit(f"{DOWN}_weight_scale", three), {("tensor-layout", f"{DOWN}_weight_scale")}),
    "codes turned": (edit(DOWN, turn), {("tensor-layout", f"{DOWN}_weight_scale"), ("architecture", DOWN)}),
    "all turned": (
        every(edit(DOWN, turn), edit(f"{DOWN}_weight_scale", turn)),
        {("tensor-layout", f"{DOWN}_weight_scale"), ("architecture", DOWN)},
    ),
    "codes of one expert": (edit(DOWN, alone), {("tensor-layout", DOWN)}),
    "half the width": (
        every(edit(GATE_UP, half), edit(f"{GATE_UP}_weight_scale", half)), {("architecture", GATE_UP)}
    ),
    "a tensor scale each": (edit(f"{DOWN}_weight_scale_2", for_each), {("tensor-layout", f"{DOWN}_weight_scale_2")}),
    "an input scale each": (edit(f"{DOWN}_input_scale", for_each), {("tensor-layout", f"{DOWN}_input_scale")}),
    "a tensor scale in BF16": (
        edit(f"{DOWN}_weight_scale_2", torch.Tensor.bfloat16), {("tensor-layout", f"{DOWN}_weight_scale_2")}
    ),
    "codes as I8": (edit(DOWN, lambda codes: codes.view(torch.int8)), {("tensor-layout", DOWN)}),
    "NaN in a block scale": (put(f"{DOWN}_weight_scale", 2, 0x7F), {("finite", f"{DOWN}_weight_scale")}),
    "a block scale below zero": (put(f"{DOWN}_weight_scale", 2, 0xB0), {("scale-range", f"{DOWN}_weight_scale")}),
    "a tensor scale of zero": (
        edit(f"{DOWN}_weight_scale_2", torch.zeros_like), {("scale-range", f"{DOWN}_weight_scale_2")}
    ),
    "an input scale of NaN": (
        edit(f"{DOWN}_input_scale", lambda scale: scale * torch.nan), {("finite", f"{DOWN}_input_scale")}
    ),
    "Inf in a bias": (put(f"{GATE_UP}_bias", 2, torch.inf), {("finite", f"{GATE_UP}_bias")}),
    "three experts": (
        every(*(edit(f"{name}{part}", three) for name in (GATE_UP, DOWN) for part in ("", "_weight_scale", "_bias"))),
        {("experts", GATE_UP), ("experts", DOWN)},
    ),
    "no number of experts": (no_count, {("architecture", "config.json num_experts")}),
    "no bias": (drop(f"{DOWN}_bias"), {("architecture", f"{DOWN}_bias")}),
    "a bias for three": (edit(f"{DOWN}_bias", three), {("architecture", f"{DOWN}_bias")}),
    "half a bias": (edit(f"{GATE_UP}_bias", half), {("architecture", f"{GATE_UP}_bias")}),
    "no sinks": (drop(SINKS), {("architecture", SINKS)}),
    "half the sinks": (edit(SINKS, half), {("architecture", SINKS)}),
    "no bias of an attention": (
        drop("model.layers.1.self_attn.o_proj.bias"), {("architecture", "model.layers.1.self_attn.o_proj.bias")}
    ),
    "a router for fewer": (edit(f"{ROUTER}.weight", three), {("architecture", f"{ROUTER}.weight")}),
    "no down projection": (
        every(*(drop(f"{DOWN}{part}") for part in PARTS)),
        {("architecture", DOWN), ("architecture", f"{DOWN}_bias")},
    ),
    "a stranger": (add(f"{DOWN}_foo", torch.ones(3)), {("architecture", f"{DOWN}_foo")}),
    "a scale of another format": (
        add(f"{DOWN}_scale_inv", torch.ones(4, 1, 2)), {("tensor-layout", f"{DOWN}_scale_inv")}
    ),
    "a scale named as a module's": (
        move(f"{DOWN}_weight_scale", f"{DOWN}.weight_scale"), {("names", f"{DOWN}_weight_scale")}
    ),
    "codes named as a module's": (move(DOWN, f"{DOWN}.weight"), {("names", DOWN)}),
    "codes twice, once as a module's": (
        add(f"{DOWN}.weight", torch.zeros(4, 48, 160, dtype=torch.uint8)),
        {("names", DOWN)},
    ),
    "excluded but quantized": (lambda s: s.exclude(EXPERTS), {("coverage", GATE_UP), ("coverage", DOWN)}),
    "plain but not excluded": (plain_excluded(), {("coverage", GATE_UP), ("coverage", DOWN)}),
    "plain and excluded": (plain_excluded(EXPERTS), set()),
    "plain and excluded by a wildcard": (plain_excluded(f"{EXPERTS}*"), set()),
    "plain and excluded as if a module": (
        plain_excluded(GATE_UP, DOWN),
        {("exclude-pattern", GATE_UP), ("exclude-pattern", DOWN), ("coverage", GATE_UP), ("coverage", DOWN)},
    ),
    "one of two plain": (
        lambda s: plain(s, (DOWN, (4, 96, 160))), {("one-algo", EXPERTS), ("coverage", DOWN)}
    ),
    "plain and turned": (
        every(plain_excluded(EXPERTS), edit(DOWN, turn)), {("architecture", DOWN)}
    ),
    "the router on no list": (lambda s: s.include(ROUTER), {("exclude-missing", ROUTER)}),
    "the router quantized": (quantized_router, {("exclude-missing", ROUTER)}),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "expected"), SPOILED.values(), ids=SPOILED)
def test_what_is_wrong_is_told(open_fused: Callable[[str], Any], spoil: Spoil, expected: set[tuple[str, str]]) -> None:
    surgery = open_fused("nvfp4")
    spoil(surgery)
    surgery.close()
    assert told(verify_checkpoint(surgery.directory)) == expected


FP8_SPOILED: dict[str, tuple[Spoil, set[tuple[str, str]]]] = {
    "no scale": (drop(f"{DOWN}_weight_scale"), {("tensor-layout", f"{DOWN}_weight_scale")}),
    "no input scale": (drop(f"{DOWN}_input_scale"), {("input-scale", f"{DOWN}_input_scale")}),
    "a scale each": (edit(f"{DOWN}_weight_scale", for_each), {("tensor-layout", f"{DOWN}_weight_scale")}),
    "a scale of zero": (edit(f"{DOWN}_weight_scale", torch.zeros_like), {("scale-range", f"{DOWN}_weight_scale")}),
    "a NaN": (put(DOWN, 3, 0xFF), {("finite", DOWN)}),
    "turned": (edit(DOWN, turn), {("architecture", DOWN)}),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "expected"), FP8_SPOILED.values(), ids=FP8_SPOILED)
def test_what_is_wrong_in_fp8_is_told(
    open_fused: Callable[[str], Any], spoil: Spoil, expected: set[tuple[str, str]]
) -> None:
    surgery = open_fused("fp8")
    spoil(surgery)
    surgery.close()
    assert told(verify_checkpoint(surgery.directory)) == expected


def test_an_activation_scale_in_a_weight_only_format(open_fused: Callable[[str], Any]) -> None:
    surgery = open_fused("w4a16")
    surgery.tensors[f"{DOWN}_input_scale"] = torch.tensor(1.0)
    surgery.close()
    assert told(verify_checkpoint(surgery.directory)) == {("weight-only", f"{DOWN}_input_scale")}


def test_channel_scales_are_served_for_no_experts(open_fused: Callable[[str], Any]) -> None:
    surgery = open_fused("fp8")
    surgery.quantization_config["quant_algo"] = surgery.quantization["quant_algo"] = "FP8_PER_CHANNEL_PER_TOKEN"
    surgery.close()
    assert ("algo", "config.json") in told(verify_checkpoint(surgery.directory))


@pytest.mark.parametrize("chunk", [700, 1 << 20])
def test_experts_with_values_that_are_not_finite_are_named(
    open_fused: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("quantplug.verify.inventory.checkpoint.CHUNK_BYTES", chunk)
    surgery = open_fused("nvfp4")
    for expert in (0, 2):
        put(f"{DOWN}_weight_scale", expert, 0x7F)(surgery)
    surgery.close()
    (found,) = (found for found in verify_checkpoint(surgery.directory).findings if found.check == "finite")
    assert found.message == "2 values are NaN or Inf, in experts 0, 2"


def test_an_exclude_by_the_module_of_the_experts_asks_for_nothing(open_fused: Callable[[str], Any]) -> None:
    surgery = open_fused("nvfp4")
    plain_excluded(EXPERTS)(surgery)
    surgery.close()
    assert "exclude-pattern" not in verify_checkpoint(surgery.directory).checks()


def test_subnormal_scales_are_counted_by_kind(open_fused: Callable[[str], Any]) -> None:
    surgery = open_fused("w4a16")
    for expert in range(3):
        put(f"{DOWN}_weight_scale", expert, 0x03)(surgery)
    surgery.close()
    report = verify_checkpoint(surgery.directory)
    (found,) = (found for found in report.findings if found.check == "subnormal-scales")
    assert found.subject == "mlp.experts.down_proj"
    assert found.message.startswith(f"3 of {2 * 4 * 6 * 160} block scales, in 1 tensors")


def test_another_number_of_experts_in_the_config(open_fused: Callable[[str], Any]) -> None:
    surgery = open_fused("nvfp4")
    surgery.config["num_local_experts"] = 8
    surgery.close()
    found = told(verify_checkpoint(surgery.directory))
    assert ("experts", GATE_UP) in found
    assert ("architecture", "model.layers.0.mlp.router.weight") in found


def test_experts_in_one_tensor_of_an_architecture_that_we_do_not_know(open_fused: Callable[[str], Any]) -> None:
    surgery = open_fused("nvfp4")
    surgery.config["architectures"] = ["ElseForCausalLM"]
    surgery.close()
    assert ("names", GATE_UP) in told(verify_checkpoint(surgery.directory))


@pytest.mark.parametrize(
    ("stored", "inner"),
    [
        (GATE_UP, f"{GATE_UP}.weight"),
        (f"{GATE_UP}_bias", f"{GATE_UP}.bias"),
        (f"{DOWN}_weight_scale_2", f"{DOWN}.weight_scale_2"),
        (f"{DOWN}_blocks", f"{DOWN}.blocks"),
        (f"{DOWN}s", f"{DOWN}s"),
        (f"{DOWN}_a.weight", f"{DOWN}_a.weight"),
        (f"x.{DOWN}", f"x.{DOWN}"),
        ("model.layers.1.mlp.router.weight", "model.layers.1.mlp.router.weight"),
        ("model.layers.one.mlp.experts.down_proj", "model.layers.one.mlp.experts.down_proj"),
    ],
)
def test_names(stored: str, inner: str) -> None:
    names = fused_experts(GPT_OSS)
    assert names.inner_name(stored) == inner
    assert names.stored_name(inner) == stored


@pytest.mark.parametrize(
    "config", [{}, {"architectures": "GptOssForCausalLM"}, {"architectures": ["Qwen3MoeForCausalLM"]}]
)
def test_other_architectures_have_no_such_names(config: dict[str, Any]) -> None:
    assert fused_experts(table_of(config)).inner_name(GATE_UP) == GATE_UP
