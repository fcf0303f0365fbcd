"""Experts in one tensor against their source: BF16, or GPT-OSS's own MXFP4, which is not turned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quantplug.verify import Severity, verify_checkpoint

EXPERTS = "model.layers.1.mlp.experts"
GATE_UP, DOWN = f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"
Surgeries = tuple[Any, Any]
Spoil = Callable[[Any, Any], object]


def told(report: Any) -> set[tuple[str, str]]:
    errors = (found for found in report.findings if found.severity is Severity.ERROR)
    return {(str(found.check), found.subject) for found in errors if found.check != "served-experts"}


def bytes_of(surgery: Any, name: str) -> torch.Tensor:
    """A tensor's own bytes (or values, if they are wider), open to change."""
    surgery.tensors[name] = surgery.tensors[name].clone()
    tensor = surgery.tensors[name]
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def zero_codes(export: Any, source: Any) -> None:
    bytes_of(export, DOWN)[2] = 0


def zero_row(export: Any, source: Any) -> None:
    """One output of one expert: a column as it is stored."""
    bytes_of(export, DOWN)[1, :, 5] = 0


def zero_block(export: Any, source: Any) -> None:
    bytes_of(export, GATE_UP)[3, 8:16, 11] = 0


def swap_codes(export: Any, source: Any) -> None:
    codes = bytes_of(export, DOWN)
    codes[0], codes[3] = codes[3].clone(), codes[0].clone()


def halve_scales(export: Any, source: Any) -> None:
    """One E4M3 exponent step down: every value of one expert by a half."""
    bytes_of(export, f"{DOWN}_weight_scale")[1] -= 8


def roll_scales(export: Any, source: Any) -> None:
    scales = bytes_of(export, f"{GATE_UP}_weight_scale")
    scales[0] = torch.where(torch.arange(192) % 2 == 0, 0x10, scales[0])  # the gate's, which alternate with those of up


def double_tensor_scale(export: Any, source: Any) -> None:
    export.tensors[f"{DOWN}_weight_scale_2"] = export.tensors[f"{DOWN}_weight_scale_2"] * 2


def change_bias(export: Any, source: Any) -> None:
    bytes_of(export, f"{DOWN}_bias")[3, 2] += 1


def turn_source(export: Any, source: Any) -> None:
    source.tensors[DOWN] = source.tensors[DOWN].mT.contiguous()


def fewer_in_source(export: Any, source: Any) -> None:
    source.tensors[DOWN] = source.tensors[DOWN][:3].contiguous()


def lose_from_source(export: Any, source: Any) -> None:
    source.drop(f"{DOWN}_bias")


def integers_in_source(export: Any, source: Any) -> None:
    source.tensors[DOWN] = source.tensors[DOWN].to(torch.int32)


def errors(name: str, *experts: int) -> set[tuple[str, str]]:
    return {("error-bound", f"{name}[{expert}]") for expert in experts}


SPOILED: dict[str, tuple[Spoil, set[tuple[str, str]]]] = {
    "codes of an expert zeroed": (zero_codes, errors(DOWN, 2)),
    "a row of an expert zeroed": (zero_row, errors(DOWN, 1)),
    "a block of an expert zeroed": (zero_block, errors(GATE_UP, 3)),
    "two experts in each other's place": (swap_codes, errors(DOWN, 0, 3)),
    "scales of an expert halved": (halve_scales, {("gain", f"{DOWN}[1]")}),
    "scales of one expert's gate lost": (roll_scales, errors(GATE_UP, 0)),
    "the scale of all doubled": (double_tensor_scale, errors(DOWN, 0, 1, 2, 3)),
    "a bias changed": (change_bias, {("source-values", f"{DOWN}_bias")}),
    "the source turned": (turn_source, {("source-names", DOWN)}),
    "fewer experts in the source": (fewer_in_source, {("source-names", DOWN)}),
    "a bias that the source has not": (lose_from_source, {("source-names", f"{DOWN}_bias")}),
    "whole numbers in the source": (integers_in_source, {("source", DOWN)}),
}


@pytest.fixture
def both(open_fused: Callable[[str], Any]) -> Surgeries:
    return open_fused("nvfp4"), open_fused("source")


@pytest.mark.parametrize(("spoil", "expected"), SPOILED.values(), ids=SPOILED)
def test_what_differs_from_the_source_is_told(both: Surgeries, spoil: Spoil, expected: set[tuple[str, str]]) -> None:
    export, source = both
    spoil(export, source)
    export.close()
    source.close()
    assert told(verify_checkpoint(export.directory, source.directory)) == expected


@pytest.mark.parametrize("spoil", [zero_codes, zero_row, swap_codes])
def test_fp8_too(open_fused: Callable[[str], Any], fused: dict[str, Path], spoil: Spoil) -> None:
    export = open_fused("fp8")
    spoil(export, None)
    export.close()
    found = told(verify_checkpoint(export.directory, fused["source"]))
    assert {check for check, _ in found} == {"error-bound"}


def test_a_square_matrix_stored_turned(both: Surgeries) -> None:
    """Shapes cannot tell: GPT-OSS's experts are 2880 by 2880."""
    export, source = both
    original = source.tensors[DOWN][..., :96].contiguous()
    scale = original.float().abs().max() / 2688
    for turned in (False, True):
        packed = [quantize(expert.T if not turned else expert, scale) for expert in original]
        export.tensors[DOWN] = torch.stack([codes.T for codes, _ in packed]).contiguous()
        export.tensors[f"{DOWN}_weight_scale"] = stack_turned([scales for _, scales in packed])
        export.tensors[f"{DOWN}_weight_scale_2"] = scale
        source.tensors[DOWN] = original
        export.close()
        source.close()
        found = told(verify_checkpoint(export.directory, source.directory))
        assert found & errors(DOWN, 0, 1, 2, 3) == (errors(DOWN, 0, 1, 2, 3) if turned else set())


def test_reads_in_pieces_give_the_same_numbers(fused: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvfp4", "fp8"):
        whole = verify_checkpoint(fused[name], fused["source"])
        with monkeypatch.context() as patch:
            patch.setattr("quantplug.verify.inventory.checkpoint.CHUNK_BYTES", 700)
            pieces = verify_checkpoint(fused[name], fused["source"])
        assert told(pieces) == set()
        for one, other in zip(whole.errors_by_tensor, pieces.errors_by_tensor, strict=True):
            assert other.squared_error == pytest.approx(one.squared_error, rel=1e-12)
            assert (other.name, other.max_error) == (one.name, one.max_error)


def quantize(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ModelOpt's codes and block scales of a matrix [out, in]."""
    packed, scales, _ = NVFP4QTensor.quantize(weight.float(), 16, weights_scaling_factor_2=scale)
    return packed._quantized_data, scales


def stack_turned(scales: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([scale.view(torch.uint8).T for scale in scales]).contiguous().view(torch.float8_e4m3fn)


@pytest.fixture
def from_mxfp4(both: Surgeries) -> Surgeries:
    """The source as OpenAI publishes it, and an NVFP4 export of what transformers decodes it to."""
    export, source = both
    generator = torch.Generator().manual_seed(7)
    source.config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    for name in [name for name in source.tensors if name.endswith((".gate_up_proj", ".down_proj"))]:
        experts, inputs, outputs = source.tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 124, (experts, outputs, inputs // 32), dtype=torch.uint8, generator=generator)
        source.tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        decoded = convert_moe_packed_tensors(blocks, scales)
        assert decoded.shape == (experts, inputs, outputs)
        tensor_scale = decoded.float().abs().max() / 2688
        packed = [quantize(expert.T, tensor_scale) for expert in decoded]
        export.tensors[name] = torch.stack([codes.T for codes, _ in packed]).contiguous()
        export.tensors[f"{name}_weight_scale"] = stack_turned([scale for _, scale in packed])
        export.tensors[f"{name}_weight_scale_2"] = tensor_scale
    return export, source


def in_bf16(export: Any, source: Any) -> None:
    """The experts of one layer unquantized, as transformers decodes them."""
    for name in (GATE_UP, DOWN):
        export.drop(f"{name}_weight_scale")
        export.drop(f"{name}_input_scale")
        decoded = convert_moe_packed_tensors(source.tensors[f"{name}_blocks"], source.tensors[f"{name}_scales"])
        export.tensors[name] = decoded.contiguous()
    export.exclude(EXPERTS)


def in_bf16_but_one(export: Any, source: Any) -> None:
    in_bf16(export, source)
    export.tensors[DOWN][2, 3, 4] += 1


def in_bf16_turned(export: Any, source: Any) -> None:
    in_bf16(export, source)
    export.tensors[DOWN] = export.tensors[DOWN].mT.contiguous()


def without_scales(export: Any, source: Any) -> None:
    source.drop(f"{DOWN}_scales")


def without_blocks(export: Any, source: Any) -> None:
    source.drop(f"{DOWN}_blocks")


def scales_of_other_shape(export: Any, source: Any) -> None:
    source.tensors[f"{DOWN}_scales"] = source.tensors[f"{DOWN}_scales"][..., :2].contiguous()


def blocks_of_other_shape(export: Any, source: Any) -> None:
    source.tensors[f"{DOWN}_blocks"] = source.tensors[f"{DOWN}_blocks"].flatten(2)


def blocks_of_signed_bytes(export: Any, source: Any) -> None:
    source.tensors[f"{DOWN}_blocks"] = source.tensors[f"{DOWN}_blocks"].view(torch.int8)


def turned_blocks(export: Any, source: Any) -> None:
    for part in ("blocks", "scales"):
        name = f"{DOWN}_{part}"
        source.tensors[name] = source.tensors[name].transpose(1, 2).contiguous()


def other_exponent(export: Any, source: Any) -> None:
    source.tensors[f"{DOWN}_scales"][1] += 1


def quantized_otherwise(export: Any, source: Any) -> None:
    source.config["quantization_config"]["quant_method"] = "fp8"


MXFP4: dict[str, tuple[Spoil, set[tuple[str, str]]]] = {
    "as it is": (lambda export, source: None, set()),
    "a layer in BF16": (in_bf16, set()),
    "a layer in BF16, one value off": (in_bf16_but_one, {("source-values", DOWN)}),
    "a layer in BF16, turned": (in_bf16_turned, {("source-names", DOWN), ("architecture", DOWN)}),
    "codes of an expert zeroed": (zero_codes, errors(DOWN, 2)),
    "two experts in each other's place": (swap_codes, errors(DOWN, 0, 3)),
    "no scales": (without_scales, {("source", f"{DOWN}_blocks")}),
    "no blocks": (without_blocks, {("source", f"{DOWN}_scales")}),
    "scales of another shape": (scales_of_other_shape, {("source", f"{DOWN}_blocks")}),
    "blocks of another shape": (blocks_of_other_shape, {("source", f"{DOWN}_blocks")}),
    "blocks of signed bytes": (blocks_of_signed_bytes, {("source", f"{DOWN}_blocks")}),
    "blocks turned": (turned_blocks, {("source-names", f"{DOWN}_blocks")}),
    "another exponent": (other_exponent, {("gain", f"{DOWN}[1]")}),
    "a config of another method": (quantized_otherwise, {("source", "config.json")}),
}


@pytest.mark.parametrize(("spoil", "expected"), MXFP4.values(), ids=MXFP4)
def test_against_mxfp4(from_mxfp4: Surgeries, spoil: Spoil, expected: set[tuple[str, str]]) -> None:
    export, source = from_mxfp4
    spoil(export, source)
    export.close()
    source.close()
    assert told(verify_checkpoint(export.directory, source.directory)) == expected


def test_mxfp4_is_measured_expert_by_expert(from_mxfp4: Surgeries) -> None:
    for surgery in from_mxfp4:
        surgery.close()
    export, source = from_mxfp4
    report = verify_checkpoint(export.directory, source.directory)
    measured = {error.name: error for error in report.errors_by_tensor}
    decoded = convert_moe_packed_tensors(source.tensors[f"{DOWN}_blocks"], source.tensors[f"{DOWN}_scales"])
    for expert in range(4):
        error = measured[f"{DOWN}[{expert}]"]
        assert error.kind == "mlp.experts.down_proj"
        assert error.squared_norm == pytest.approx(float(decoded[expert].double().square().sum()))
        assert 0 < error.relative_error < error.bound


def test_blocks_of_no_experts_are_no_mxfp4(both: Surgeries) -> None:
    """Names alone do not make a format."""
    export, source = both
    source.tensors |= {"visual.blocks": torch.ones(2, 2), "visual.scales": torch.ones(2)}
    source.close()
    found = told(verify_checkpoint(export.directory, source.directory))
    assert found == {("source-names", "visual.blocks"), ("source-names", "visual.scales")}


@pytest.fixture
def in_fp8_blocks(open_fused: Callable[[str], Any]) -> Any:
    """DeepSeek's form of the experts, their widths cutting the last blocks; all else stays plain."""
    export = open_fused("source")
    for name in [name for name in export.tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts = export.tensors[name].float()
        scales = block_amax(experts) / 448
        codes = experts / spread(scales, experts.shape)
        export.tensors[name] = codes.clamp(-448, 448).to(torch.float8_e4m3fn)
        export.tensors[f"{name}_scale_inv"] = scales
    plain = [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn", "mlp.router")]
    export.config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", *plain],
    }
    return export


def block_amax(experts: torch.Tensor) -> torch.Tensor:
    """[E, ceil(rows / 128), ceil(columns / 128)]."""
    rows = [part.abs().amax(dim=1) for part in experts.split(128, dim=1)]
    return torch.stack(
        [torch.stack([part.amax(dim=1) for part in row.split(128, dim=1)], dim=1) for row in rows], dim=1
    )


def spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    whole = scales.repeat_interleave(128, dim=1).repeat_interleave(128, dim=2)
    return whole[:, : shape[1], : shape[2]]


def turn_blocks(export: Any, source: Any) -> None:
    name = f"{DOWN}_scale_inv"
    export.tensors[name] = export.tensors[name].mT.contiguous()


def blocks_of_one(export: Any, source: Any) -> None:
    export.tensors[f"{DOWN}_scale_inv"] = export.tensors[f"{DOWN}_scale_inv"][0].contiguous()


def double_one_block(export: Any, source: Any) -> None:
    bytes_of(export, f"{GATE_UP}_scale_inv")[2, 1, 1] *= 2


def no_blocks(export: Any, source: Any) -> None:
    export.drop(f"{GATE_UP}_scale_inv")


FP8_BLOCKS: dict[str, tuple[Spoil, set[tuple[str, str]]]] = {
    "as it is": (lambda export, source: None, set()),
    "scales turned": (turn_blocks, {("tensor-layout", f"{DOWN}_scale_inv")}),
    "scales of one expert": (blocks_of_one, {("tensor-layout", f"{DOWN}_scale_inv")}),
    "no scales": (no_blocks, {("tensor-layout", f"{GATE_UP}_scale_inv")}),
    "one block doubled": (double_one_block, errors(GATE_UP, 2)),
    "two experts in each other's place": (swap_codes, errors(DOWN, 0, 3)),
}


@pytest.mark.parametrize(("spoil", "expected"), FP8_BLOCKS.values(), ids=FP8_BLOCKS)
def test_fp8_in_blocks(
    in_fp8_blocks: Any, fused: dict[str, Path], spoil: Spoil, expected: set[tuple[str, str]]
) -> None:
    spoil(in_fp8_blocks, None)
    in_fp8_blocks.close()
    assert told(verify_checkpoint(in_fp8_blocks.directory, fused["source"])) == expected


def test_fp8_blocks_that_a_server_cuts(in_fp8_blocks: Any) -> None:
    in_fp8_blocks.close()
    report = verify_checkpoint(in_fp8_blocks.directory)
    cut = {found.subject: found.message for found in report.findings if found.check == "serving-tp"}
    assert cut.keys() == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert cut["mlp.experts.gate_up_proj"].startswith("out_features 192 of a rank")
    assert cut["mlp.experts.down_proj"].startswith("in_features 96 of a rank")


@pytest.mark.parametrize("shape", [(10**8, 0, 160), (0, 48, 160), (4, 0, 0), (4,), (), (4, 48, 160, 1), (2, 2)])
def test_shapes_that_are_none(both: Surgeries, shape: tuple[int, ...]) -> None:
    """However odd, it is a finding, and soon."""
    export, source = both
    blocks = (*shape[:1], *(shape[1] * 2 // 16, shape[2])) if len(shape) == 3 else shape
    export.tensors[DOWN] = torch.zeros(shape, dtype=torch.uint8)
    export.tensors[f"{DOWN}_weight_scale"] = torch.zeros(blocks).to(torch.float8_e4m3fn)
    source.tensors[DOWN] = torch.zeros((*shape[:1], 2 * shape[1], shape[2]) if len(shape) == 3 else shape)
    export.close()
    source.close()
    found = told(verify_checkpoint(export.directory, source.directory))
    assert found & {("experts", DOWN), ("architecture", DOWN), ("tensor-layout", DOWN)}
