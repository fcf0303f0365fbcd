"""Exports as their readers see them: transformers, compressed-tensors, and Megatron's own forward."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized
from modelopt.torch.quantization.qtensor import FP8QTensor
from safetensors.torch import save_file
from torch import nn
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

from quantplug.export.plan.dialects.compressed_tensors import CompressedTensorsDialect
from quantplug.export.plan.dialects.table import DialectName
from quantplug.export.plan.types import QuantConfig
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.formats.names import SCHEMES, QuantFormat
from quantplug.megatron.models.build import LayerSpec
from quantplug.verify import Severity, verify_checkpoint
from quantplug.verify.checks import Check
from tests.export.checkpoints import linear_weights, load, quantize, read, same_bytes
from tests.logits import TOKENS, VOCABULARY, megatron_logits, transformers_logits, transformers_model

Sources = Callable[[str], Path]
Exports = Callable[..., Path]

SCALES = (".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".input_scale")


def _values(packed: torch.Tensor, module: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """FP32 values of a weight: NVFP4 by torchao, FP8 by its definition, plain ones as they are."""
    if packed.dtype == torch.uint8:
        block_scales, scale = tensors[f"{module}.weight_scale"], tensors[f"{module}.weight_scale_2"]
        return NVFP4Tensor(packed, block_scales, 16, torch.float32, per_tensor_scale=scale).dequantize()
    if f"{module}.weight_scale_inv" in tensors:
        scales = tensors[f"{module}.weight_scale_inv"]
        return packed.float() * scales.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
    # Of a tensor [] or [1], or of rows [out, 1]: as it broadcasts.
    return packed.float() * tensors.get(f"{module}.weight_scale", torch.tensor(1.0))


def dequantized(export: Path, source: Path, target: Path) -> Path:
    """A plain FP32 checkpoint with the values of an export."""
    tensors = read(export)
    plain = {
        name: _values(tensor, name.removesuffix(".weight"), tensors)
        for name, tensor in tensors.items()
        if not name.endswith(SCALES)
    }
    target.mkdir()
    shutil.copy(source / "config.json", target)
    save_file(plain, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("dense", "w8a16_fp8"),
        ("tied", "w8a16_fp8"),
        ("dense_blocks", "fp8_blockwise"),
        ("moe_blocks", "fp8_blockwise"),
        ("wide_moe_blocks", "fp8_blockwise"),
    ],
)
def test_transformers_loads_the_dequantized_weights(
    name: str, scheme: str, sources: Sources, exports: Exports, tmp_path: Path
) -> None:
    expected = transformers_logits(dequantized(exports(name, scheme), sources(name), tmp_path / "plain"))
    assert (expected - transformers_logits(sources(name))).abs().max() > 0.01  # Quantization is seen at all.
    torch.testing.assert_close(transformers_logits(exports(name, scheme)), expected, rtol=1e-5, atol=1e-6)


def _by_tokens(module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    """The input of a linear in FP8, each token by a scale of its own, as values."""
    scales = inputs[0].abs().amax(-1, keepdim=True) / 448
    return (inputs[0] / scales).to(torch.float8_e4m3fn).to(inputs[0].dtype) * scales


def test_transformers_computes_with_rows_and_tokens_in_fp8(sources: Sources, exports: Exports, tmp_path: Path) -> None:
    export = exports("dense", "fp8_dynamic")
    model = transformers_model(dequantized(export, sources("dense"), tmp_path / "plain"))
    quantized = {name.removesuffix(".weight_scale") for name in read(export) if name.endswith(".weight_scale")}
    for name, module in model.named_modules():
        if name in quantized:
            module.register_forward_pre_hook(_by_tokens)
    with torch.no_grad():
        expected = model(TOKENS, use_cache=False).logits
    # A value of an activation at the middle between two codes may go either way, where a scale differs in its last bit.
    found, plain = transformers_logits(export), transformers_logits(sources("dense"))
    assert (found - expected).norm() < 0.05 * (found - plain).norm()


@pytest.mark.parametrize("name", ["dense", "tied"])
def test_compressed_tensors_reads_our_config_as_fp8_weights_alone(name: str, exports: Exports) -> None:
    written = json.loads((exports(name, "w8a16_fp8") / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(written)
    (scheme,) = config.config_groups.values()
    assert config.quantization_status is QuantizationStatus.COMPRESSED
    assert (scheme.input_activations, scheme.output_activations, config.kv_cache_scheme) == (None, None, None)
    assert (scheme.weights.num_bits, scheme.weights.type, scheme.weights.strategy) == (8, "float", "tensor")
    assert scheme.targets == ["Linear"]
    assert config.format == infer_module_format(nn.Linear, scheme).value


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_compressed_tensors_reads_our_config_as_its_own_scheme_fp8_dynamic(name: str, exports: Exports) -> None:
    written = json.loads((exports(name, "fp8_dynamic") / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(written)
    (scheme,) = config.config_groups.values()
    assert config.quantization_status is QuantizationStatus.COMPRESSED
    assert scheme.model_copy(update={"format": None}) == preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    assert config.format == scheme.format == infer_module_format(nn.Linear, scheme).value == "float-quantized"


def test_compressed_tensors_decodes_the_weights_that_we_do(sources: Sources, exports: Exports) -> None:
    scheme, tensors = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]), read(exports("moe", "fp8_dynamic"))
    for name, original in linear_weights(read(sources("moe"))).items():
        state = {"weight": tensors[name], "weight_scale": tensors[f"{name}_scale"]}
        assert state["weight_scale"].shape == (original.shape[0], 1)
        decoded = FloatQuantizationCompressor.decompress(dict(state), scheme)["weight"]
        assert torch.equal(decoded.float(), state["weight"].float() * state["weight_scale"])
        # E4M3 has three mantissa bits, and below 2^-6 of the scale steps of 2^-9 of it.
        bound = torch.maximum(original.float().abs() * 2**-4, state["weight_scale"] * 2**-10) * (1 + 2**-20)
        assert ((decoded.float() - original.float()).abs() <= bound).all()


def test_verify_finds_experts_with_a_scale_a_row_and_static_inputs(exports: Exports, tmp_path: Path) -> None:
    out = shutil.copytree(exports("moe", "fp8_dynamic"), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    group["input_activations"] |= {"strategy": "tensor", "dynamic": False}
    (out / "config.json").write_text(json.dumps(config))
    assert Check.SERVED_EXPERTS in verify_checkpoint(out).checks(Severity.ERROR)


def test_a_weight_in_two_dialects_decodes_to_the_same_values(sources: Sources, tmp_path: Path) -> None:
    written = {}
    for dialect in (DialectName.MODELOPT, DialectName.COMPRESSED_TENSORS):
        out = tmp_path / dialect
        quantize_checkpoint(sources("moe"), out, QuantFormat.FP8, input_scale=0.5, dialect=dialect)
        assert verify_checkpoint(out, sources("moe")).ok
        written[dialect] = read(out)
    ours, theirs = written.values()
    config = json.loads((tmp_path / DialectName.COMPRESSED_TENSORS / "config.json").read_text())
    (scheme,) = QuantizationConfig.model_validate(config["quantization_config"]).config_groups.values()
    preset = preset_name_to_scheme("FP8", ["Linear"])
    assert scheme.weights == preset.weights
    # An observer is how calibration has found the scale, which is no matter to a reader.
    assert scheme.input_activations == preset.input_activations.model_copy(update={"observer": None})
    for name in linear_weights(read(sources("moe"))):
        state = {"weight": theirs[name], "weight_scale": theirs[f"{name}_scale"]}
        decoded = FloatQuantizationCompressor.decompress(dict(state), scheme)["weight"]
        codes = FP8QTensor(ours[name].shape, torch.float32, ours[name])
        assert torch.equal(decoded, codes.dequantize(dtype=torch.float32, scale=ours[f"{name}_scale"]))
        assert theirs[f"{name.removesuffix('weight')}input_scale"].tolist() == [0.5]


@pytest.fixture(scope="module")
def nvfp4_of(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """NVFP4 of the tiny MoE with scales of inputs, or weight-only, in each dialect: a directory of a format's."""

    @cache
    def written(quant_format: str) -> Path:
        out = tmp_path_factory.mktemp(quant_format)
        scale = 0.3 if SCHEMES[QuantFormat(quant_format)].has_input_scale else None
        for dialect in (DialectName.MODELOPT, DialectName.COMPRESSED_TENSORS):
            quantize_checkpoint(sources("moe"), out / dialect, quant_format, input_scale=scale, dialect=dialect)
        return out

    return written


NVFP4_SCHEMES = pytest.mark.parametrize(("quant_format", "preset"), [("w4a16_nvfp4", "NVFP4A16"), ("nvfp4", "NVFP4")])


@NVFP4_SCHEMES
def test_nvfp4_of_compressed_tensors_is_what_their_converter_makes_of_modelopts(
    quant_format: str, preset: str, nvfp4_of: Callable[[str], Path]
) -> None:
    ours, theirs = (read(nvfp4_of(quant_format) / name) for name in ("compressed-tensors", "modelopt"))
    converted = ModelOptNvfp4Converter(targets=["re:.*"]).process(theirs)
    assert ours.keys() == converted.keys()
    # A scalar in ModelOpt's spelling is a vector of one in theirs.
    assert [
        name for name, tensor in converted.items() if not same_bytes(ours[name], tensor.reshape(ours[name].shape))
    ] == []
    assert {ours[name].shape for name in ours if name.endswith("global_scale")} == {(1,)}
    written = json.loads((nvfp4_of(quant_format) / "compressed-tensors" / "config.json").read_text())
    config = QuantizationConfig.model_validate(written["quantization_config"])
    (scheme,) = config.config_groups.values()
    assert scheme.format == config.format == infer_module_format(nn.Linear, scheme).value == "nvfp4-pack-quantized"
    assert scheme.model_copy(update={"format": None}) == preset_name_to_scheme(preset, ["Linear"])


@NVFP4_SCHEMES
def test_their_decoder_gives_the_values_of_modelopts_spelling(
    quant_format: str, preset: str, sources: Sources, nvfp4_of: Callable[[str], Path]
) -> None:
    """To three roundings in FP32: of the reciprocal, of the division by it, and of the product with a code.

    Readers of the one dialect multiply by `weight_scale_2`, those of the other divide by what it is the reciprocal of.
    """
    ours, theirs = (read(nvfp4_of(quant_format) / name) for name in ("compressed-tensors", "modelopt"))
    scheme = preset_name_to_scheme(preset, ["Linear"])
    for name in linear_weights(read(sources("moe"))):
        module = name.removesuffix(".weight")
        packed, scales = ours[f"{module}.weight_packed"], ours[f"{module}.weight_scale"]
        codes = unpack_fp4_from_uint8(packed, packed.shape[0], packed.shape[1] * 2, torch.float32)
        decoded = dequantize(
            codes, scales.float(), None, scheme.weights, global_scale=ours[f"{module}.weight_global_scale"]
        )
        torch.testing.assert_close(decoded, _values(theirs[name], module, theirs), rtol=3 * 2**-24, atol=0)
    assert verify_checkpoint(nvfp4_of(quant_format) / "compressed-tensors", sources("moe")).ok


@pytest.mark.parametrize("group_size", [None, 32])
def test_compressed_tensors_reads_int4_as_its_own_scheme_and_decodes_what_it_would_have_packed(
    group_size: int | None, sources: Sources, tmp_path: Path
) -> None:
    source, out = sources("moe_blocks"), tmp_path / "out"
    quantize_checkpoint(source, out, "int4", group_size=group_size)
    config = QuantizationConfig.model_validate(json.loads((out / "config.json").read_text())["quantization_config"])
    (scheme,) = config.config_groups.values()
    expected = preset_name_to_scheme("W4A16", ["Linear"])
    expected.weights.group_size = group_size or 128
    assert scheme.format == config.format == infer_module_format(nn.Linear, scheme).value == "pack-quantized"
    assert scheme.model_copy(update={"format": None}) == expected
    tensors, originals = read(out), linear_weights(read(source))
    names = set(PackedQuantizationCompressor.compression_param_names(scheme))
    for name, original in originals.items():
        module = name.removesuffix("weight")
        state = {suffix: tensors.pop(f"{module}{suffix}") for suffix in names}
        groups = original.unflatten(-1, (-1, expected.weights.group_size))
        scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
        # In FP32, as its kernel for GPUs divides; the scales are rounded to BF16 as the model's type is.
        theirs = PackedQuantizationCompressor.compress(
            {"weight": original.float(), "weight_scale": scales.float()}, scheme
        )
        assert same_bytes(state["weight_scale"], scales)
        assert same_bytes(state["weight_packed"], theirs["weight_packed"])
        assert same_bytes(state["weight_shape"], theirs["weight_shape"])
        decoded = PackedQuantizationCompressor.decompress(state | {"weight_scale": scales.float()}, scheme)["weight"]
        steps = scales.float().repeat_interleave(expected.weights.group_size, 1)
        assert ((decoded - original.float()).abs() <= steps * (0.5 + 7.5 * 2**-7)).all()
    # All else is plain, and listed.
    assert {name for name in tensors if name not in read(source)} == set()


@pytest.mark.parametrize("name", ["dense_blocks", "moe_blocks"])
def test_transformers_computes_with_int4_of_experts_too(name: str, sources: Sources, tmp_path: Path) -> None:
    source, out = sources(name), tmp_path / "out"
    quantize_checkpoint(source, out, "int4")
    tensors, scheme = read(out), preset_name_to_scheme("W4A16", ["Linear"])
    suffixes = ("weight_packed", "weight_scale", "weight_shape")
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(suffixes)}
    for module in [name.removesuffix("weight_packed") for name in tensors if name.endswith("weight_packed")]:
        state = {suffix: tensors[f"{module}{suffix}"] for suffix in suffixes}
        plain[f"{module}weight"] = PackedQuantizationCompressor.decompress(state, scheme)["weight"].contiguous()
    (tmp_path / "plain").mkdir()
    shutil.copy(source / "config.json", tmp_path / "plain")
    save_file(plain, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    found, expected, original = (transformers_logits(path) for path in (out, tmp_path / "plain", source))
    # The one computes in BF16 where the other does in FP32.
    assert (found - expected).norm() < 0.1 * (found - original).norm()


def test_experts_that_stay_plain_are_named_as_vllm_asks_for_them() -> None:
    """`get_moe_method` in vLLM 0.33's compressed_tensors_moe.py asks for three linears of the first expert."""
    excluded = ["lm_head", "model.layers.0.mlp.experts", "model.layers.0.mlp.experts.0.gate_proj"]
    modules = {"model.layers.0.self_attn.o_proj": SCHEMES[QuantFormat.FP8_DYNAMIC]}
    written = CompressedTensorsDialect().config(modules, excluded, None).config_json["ignore"]
    asked = [f"model.layers.0.mlp.experts.0.{linear}" for linear in ("gate_proj", "up_proj", "down_proj")]
    assert set(written) == {*excluded, *asked}
    assert len(written) == len(set(written))


def test_compressed_tensors_quantizes_what_we_quantized_and_nothing_else(sources: Sources, exports: Exports) -> None:
    model = transformers_model(exports("dense", "w8a16_fp8"))
    quantized = {f"{name}.weight" for name, module in model.named_modules() if is_module_quantized(module)}
    assert quantized == linear_weights(read(sources("dense"))).keys()


def test_a_dialect_writes_the_excludes_it_is_given() -> None:
    modules = {"model.layers.0.self_attn.o_proj": SCHEMES[QuantFormat.W8A16_FP8]}
    config = CompressedTensorsDialect().config(modules, ["model.layers.0.mlp.gate", "lm_head"], None)
    assert isinstance(config, QuantConfig)
    assert QuantizationConfig.model_validate(dict(config.config_json)).ignore == ["model.layers.0.mlp.gate", "lm_head"]
    assert config.hf_quant_config is None


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("moe", "w4a16_nvfp4"),
        ("mixed", "w4a16_nvfp4"),
        ("dense", "w4a16_nvfp4"),
        ("tied", "nvfp4"),
        ("dense", "w8a16_fp8"),
        ("moe_blocks", "fp8_blockwise"),
        ("moe", "fp8_dynamic"),
    ],
)
def test_megatron_computes_with_the_exported_weights_what_transformers_does(
    name: str, scheme: str, sources: Sources, exports: Exports, tmp_path: Path
) -> None:
    plain = dequantized(exports(name, scheme), sources(name), tmp_path / "plain")
    expected = transformers_logits(plain)
    assert (expected - transformers_logits(sources(name))).abs().max() > 0.01
    logits = megatron_logits(load(plain, LayerSpec.LOCAL, dtype=torch.float32))[..., :VOCABULARY]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("scheme", ["w8a16_fp8", "w4a16_nvfp4"])
def test_the_quantized_megatron_model_computes_what_its_export_does(
    scheme: str, sources: Sources, exports: Exports, tmp_path: Path
) -> None:
    """ModelOpt's fake quantization multiplies by 448 / amax where packing divides: some ties go the other way."""
    for name in ("moe", "dense") if scheme == "w4a16_nvfp4" else ("dense",):
        plain = dequantized(exports(name, scheme), sources(name), tmp_path / name)
        model = quantize(load(sources(name), LayerSpec.LOCAL, dtype=torch.float32), scheme)
        exported, original = transformers_logits(plain), transformers_logits(sources(name))
        assert (megatron_logits(model)[..., :VOCABULARY] - exported).norm() < 0.05 * (exported - original).norm()


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *(
            (name, scheme)
            for name in ("moe", "mixed", "dense", "tied")
            for scheme in ("w4a16_nvfp4", "nvfp4", "fp8", "fp8_dynamic")
        ),
        *((name, "w8a16_fp8") for name in ("dense", "tied")),
        *((name, "fp8_blockwise") for name in ("moe_blocks", "wide_moe_blocks", "dense_blocks")),
    ],
)
def test_verify_finds_nothing(name: str, scheme: str, sources: Sources, exports: Exports) -> None:
    report = verify_checkpoint(exports(name, scheme), sources(name))
    assert not report.checks(Severity.ERROR)
    assert len(report.errors_by_tensor) >= len(linear_weights(read(sources(name))))
