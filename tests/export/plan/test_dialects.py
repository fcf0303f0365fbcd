"""Exports as their readers see them: transformers, compressed-tensors, and Megatron's own forward."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from compressed_tensors.quantization.utils import is_module_quantized
from safetensors.torch import save_file
from torch import nn
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

from quantplug.export.plan.dialects import CompressedTensorsDialect
from quantplug.export.plan.types import QuantConfig
from quantplug.megatron.models.build import LayerSpec
from quantplug.verify import Severity, verify_checkpoint
from tests.export.checkpoints import linear_weights, load, quantize, read
from tests.logits import VOCABULARY, megatron_logits, transformers_logits, transformers_model

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


def test_compressed_tensors_quantizes_what_we_quantized_and_nothing_else(sources: Sources, exports: Exports) -> None:
    model = transformers_model(exports("dense", "w8a16_fp8"))
    quantized = {f"{name}.weight" for name, module in model.named_modules() if is_module_quantized(module)}
    assert quantized == linear_weights(read(sources("dense"))).keys()


def test_a_dialect_writes_the_excludes_it_is_given() -> None:
    config = CompressedTensorsDialect().config(["model.layers.0.mlp.gate", "lm_head"], None)
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
        *((name, scheme) for name in ("moe", "mixed", "dense", "tied") for scheme in ("w4a16_nvfp4", "nvfp4", "fp8")),
        *((name, "w8a16_fp8") for name in ("dense", "tied")),
        *((name, "fp8_blockwise") for name in ("moe_blocks", "wide_moe_blocks", "dense_blocks")),
    ],
)
def test_verify_finds_nothing(name: str, scheme: str, sources: Sources, exports: Exports) -> None:
    report = verify_checkpoint(exports(name, scheme), sources(name))
    assert not report.checks(Severity.ERROR)
    assert len(report.errors_by_tensor) >= len(linear_weights(read(sources(name))))
