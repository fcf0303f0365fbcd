"""Packed bytes against others' arithmetic on the source's own tensors, and against others' decoders."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

from examples.make_tiny_model import ZERO_EXPERT
from quantplug import export_mcore_gpt_to_hf
from quantplug.megatron.models.build import LayerSpec
from tests.export.checkpoints import (
    files_of,
    group_amaxes,
    input_amax,
    linear_weights,
    load,
    quantize,
    raw,
    read,
    same_bytes,
    scale_group,
)

Sources = Callable[[str], Path]
Exports = Callable[..., Path]

AWKWARD = ["moe", "mixed", "dense", "tied"]
BLOCKS = ["moe_blocks", "wide_moe_blocks", "dense_blocks"]
SUFFIXES = {
    "w4a16_nvfp4": {"weight", "weight_scale", "weight_scale_2"},
    "nvfp4": {"weight", "weight_scale", "weight_scale_2", "input_scale"},
    "fp8": {"weight", "weight_scale", "input_scale"},
    "w8a16_fp8": {"weight", "weight_scale"},
    "fp8_blockwise": {"weight", "weight_scale_inv"},
    "fp8_dynamic": {"weight", "weight_scale"},
    "mxfp8": {"weight", "weight_scale"},
}
# No server loads experts in weight-only FP8, so that nothing writes them.
CHECKPOINTS = dict.fromkeys(SUFFIXES, AWKWARD) | {"fp8_blockwise": BLOCKS, "w8a16_fp8": ["dense", "tied"]}
OWN_SCALES = ("fp8_blockwise", "fp8_dynamic", "mxfp8")  # Of blocks and rows: no two linears have one in common.
EVERY_EXPORT = [(name, scheme) for scheme, names in CHECKPOINTS.items() for name in names]


def modules(source: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, float]]:
    """Every linear that is quantized: its name, its source weight, the amax of its scale group."""
    amaxes = group_amaxes(source)
    for name, weight in linear_weights(source).items():
        yield name.removesuffix(".weight"), weight, amaxes[name]


@pytest.mark.parametrize(("name", "scheme"), EVERY_EXPORT)
def test_names_shapes_and_plain_tensors(name: str, scheme: str, sources: Sources, exports: Exports) -> None:
    source, exported = read(sources(name)), read(exports(name, scheme))
    linears = linear_weights(source)
    packed = {f"{weight.removesuffix('.weight')}.{suffix}" for weight in linears for suffix in SUFFIXES[scheme]}
    plain = source.keys() - linears.keys()
    assert exported.keys() == packed | plain
    assert [tensor for tensor in plain if not same_bytes(exported[tensor], source[tensor])] == []


@pytest.mark.parametrize("scheme", ["w4a16_nvfp4", "nvfp4"])
@pytest.mark.parametrize("name", AWKWARD)
def test_nvfp4_is_modelopts_of_the_source(name: str, scheme: str, sources: Sources, exports: Exports) -> None:
    exported = read(exports(name, scheme))
    for module, weight, amax in modules(read(sources(name))):
        if amax == 0:
            continue
        weight_scale_2 = torch.tensor(amax) / torch.tensor(6.0 * 448.0)
        expected, block_scales, _ = NVFP4QTensor.quantize(weight, 16, weights_scaling_factor_2=weight_scale_2)
        assert same_bytes(exported[f"{module}.weight"], expected._quantized_data), module
        assert same_bytes(exported[f"{module}.weight_scale"], block_scales), module
        assert same_bytes(exported[f"{module}.weight_scale_2"], weight_scale_2), module


@pytest.mark.parametrize("name", AWKWARD)
def test_torchao_decodes_nvfp4_to_the_source(name: str, sources: Sources, exports: Exports) -> None:
    exported = read(exports(name, "w4a16_nvfp4"))
    for module, weight, _ in modules(read(sources(name))):
        block_scales, weight_scale_2 = exported[f"{module}.weight_scale"], exported[f"{module}.weight_scale_2"]
        decoded = NVFP4Tensor(
            exported[f"{module}.weight"], block_scales, 16, torch.float32, per_tensor_scale=weight_scale_2
        ).dequantize()
        assert decoded.shape == weight.shape
        # The widest step of E2M1, from 4 to 6, rounds by 1; above 6 times a scale that was rounded down it saturates.
        step = (block_scales.float() * weight_scale_2).repeat_interleave(16, dim=1)
        bound = torch.maximum(step, weight.float().abs() - 6 * step) * (1 + 1e-5)
        assert ((decoded - weight.float()).abs() <= bound).all(), module
        assert (decoded - weight.float()).norm() <= 0.13 * weight.float().norm(), module


@pytest.mark.parametrize("scheme", ["w4a16_nvfp4", "nvfp4", "fp8"])
def test_a_zero_expert_decodes_to_zeros(scheme: str, exports: Exports) -> None:
    exported = read(exports("moe", scheme))
    dead = {name: tensor for name, tensor in exported.items() if f".experts.{ZERO_EXPERT}." in name}
    assert len(dead) == 2 * 3 * len(SUFFIXES[scheme])
    for name, tensor in dead.items():
        if name.endswith(".weight"):
            assert set(raw(tensor)) == {0}, name
        else:
            assert tensor.float().isfinite().all(), name
            assert (tensor.float() > 0).all(), name


@pytest.mark.parametrize(
    ("name", "scheme"), [(name, scheme) for scheme in ("fp8", "w8a16_fp8") for name in CHECKPOINTS[scheme]]
)
def test_fp8_is_the_quotient_in_fp32(name: str, scheme: str, sources: Sources, exports: Exports) -> None:
    exported = read(exports(name, scheme))
    for module, weight, amax in modules(read(sources(name))):
        scale = torch.tensor(amax) / torch.tensor(448.0) if amax else torch.tensor(1.0)
        codes = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert same_bytes(exported[f"{module}.weight"], codes), module
        assert raw(exported[f"{module}.weight_scale"]) == raw(scale), module
        assert exported[f"{module}.weight_scale"].shape == (() if scheme == "fp8" else (1,))


@pytest.mark.parametrize("name", AWKWARD)
def test_fp8_rows_have_scales_of_their_own(name: str, sources: Sources, exports: Exports) -> None:
    exported = read(exports(name, "fp8_dynamic"))
    for module, weight, _ in modules(read(sources(name))):
        amaxes = weight.float().abs().amax(1, keepdim=True)
        scales = torch.where(amaxes == 0, 1.0, amaxes / torch.tensor(448.0))
        assert same_bytes(exported[f"{module}.weight_scale"], scales), module
        codes = (weight.float() / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert same_bytes(exported[f"{module}.weight"], codes), module


@pytest.mark.parametrize("name", AWKWARD)
def test_mxfp8_is_modelopts_of_the_source(name: str, sources: Sources, exports: Exports) -> None:
    exported = read(exports(name, "mxfp8"))
    for module, weight, _ in modules(read(sources(name))):
        expected, scales = MXFP8QTensor.quantize(weight)
        assert same_bytes(exported[f"{module}.weight"], expected._quantized_data), module
        assert same_bytes(exported[f"{module}.weight_scale"], scales), module


@pytest.mark.parametrize("name", BLOCKS)
def test_fp8_blocks_by_a_loop_over_blocks(name: str, sources: Sources, exports: Exports) -> None:
    exported = read(exports(name, "fp8_blockwise"))
    for module, weight, _ in modules(read(sources(name))):
        codes, scales = exported[f"{module}.weight"], exported[f"{module}.weight_scale_inv"]
        assert scales.dtype == torch.float32
        assert scales.shape == (weight.shape[0] // 128, weight.shape[1] // 128)
        assert scales.unique().numel() == scales.numel()  # No block can pass for another.
        for row, rows in enumerate(weight.float().split(128, dim=0)):
            for column, block in enumerate(rows.split(128, dim=1)):
                scale = block.abs().max() / torch.tensor(448.0)
                assert scales[row, column] == scale
                expected = (block / scale).to(torch.float8_e4m3fn)
                got = codes[128 * row : 128 * row + 128, 128 * column : 128 * column + 128]
                assert same_bytes(got, expected), module


@pytest.mark.parametrize(("name", "scheme"), [pair for pair in EVERY_EXPORT if pair[1] not in OWN_SCALES])
def test_fused_projections_share_their_scales(name: str, scheme: str, sources: Sources, exports: Exports) -> None:
    exported = read(exports(name, scheme))
    shared = SUFFIXES[scheme] & (
        {"weight_scale_2", "input_scale"} if "nvfp4" in scheme else {"weight_scale", "input_scale"}
    )
    groups: dict[str, set[bytes]] = {}
    for module, _, _ in modules(read(sources(name))):
        for suffix in shared:
            key = f"{scale_group(f'{module}.weight')}.{suffix}"
            groups.setdefault(key, set()).add(raw(exported[f"{module}.{suffix}"]))
    assert {key: len(values) for key, values in groups.items() if len(values) > 1} == {}
    assert any("qkv" in key for key in groups)


def megatron_linear(module: str, layer_spec: LayerSpec) -> str:
    """The Megatron linear whose input a Hugging Face projection has, written down once more for the tests."""
    expert = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+)", module)
    if expert is not None:
        layer, number, projection = expert.groups()
        one = f"local_experts.{number}." if layer_spec is LayerSpec.LOCAL else ""
        name = "linear_fc2" if projection == "down_proj" else "linear_fc1"
        return f"decoder.layers.{layer}.mlp.experts.{one}{name}"
    names = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "self_attention.linear_qkv"),
        **dict.fromkeys(("gate_proj", "up_proj"), "mlp.linear_fc1"),
        "o_proj": "self_attention.linear_proj",
        "down_proj": "mlp.linear_fc2",
    }
    layer, projection = re.fullmatch(r"model\.layers\.(\d+)\.\w+\.(\w+)", module).groups()
    return f"decoder.layers.{layer}.{names[projection]}"


@pytest.mark.parametrize("layer_spec", LayerSpec, ids=["te", "local"])
@pytest.mark.parametrize(("scheme", "largest"), [("nvfp4", 6.0 * 448.0), ("fp8", 448.0)])
@pytest.mark.parametrize("name", AWKWARD)
def test_every_projection_has_the_input_scale_of_its_linear(
    name: str, scheme: str, largest: float, layer_spec: LayerSpec, sources: Sources, exports: Exports
) -> None:
    exported = read(exports(name, scheme, layer_spec))
    for module, _, _ in modules(read(sources(name))):
        amax = torch.tensor(input_amax(megatron_linear(module, layer_spec)))
        assert same_bytes(exported[f"{module}.input_scale"], amax / torch.tensor(largest)), module


@pytest.mark.parametrize("scheme", ["w4a16_nvfp4", "w8a16_fp8", "fp8_blockwise", "fp8_dynamic", "mxfp8"])
def test_sequential_experts_give_the_bytes_of_grouped_ones(scheme: str, exports: Exports) -> None:
    for name in CHECKPOINTS[scheme]:
        assert files_of(exports(name, scheme, LayerSpec.LOCAL)) == files_of(exports(name, scheme)), name


@pytest.mark.usefixtures("single_rank")
def test_a_second_export_has_the_same_bytes(sources: Sources, exports: Exports, tmp_path: Path) -> None:
    model = quantize(load(sources("moe")), "nvfp4")
    for out in (tmp_path / "first", tmp_path / "second"):
        export_mcore_gpt_to_hf(model, sources("moe"), export_dir=out)
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second") == files_of(exports("moe", "nvfp4"))
