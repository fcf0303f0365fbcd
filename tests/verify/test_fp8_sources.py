"""FP8 checkpoints of other tools as sources: read as those tools decode them, quantized, imported, verified against."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from modelopt.torch.quantization.qtensor import FP8QTensor
from safetensors.torch import load_file, save_file

from quantplug import export_mcore_gpt_to_hf, import_mcore_gpt_from_hf
from quantplug.checkpoint.encoded.plain import open_plain, refuse_quantized
from quantplug.errors import MappingError, SourceError, WeightError
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.verify import verify_checkpoint
from tests.export.checkpoints import build, one_rank, read, same_bytes
from tests.made_once import MadeOnce
from tests.verify.foreign import Tensors, compress_checkpoint, scheme_of

PRESETS = ("FP8", "FP8_DYNAMIC", "FP8_BLOCK")
MODELOPT = ("fp8", "fp8_channel")
UP = "model.layers.2.mlp.experts.0.up_proj.weight"


@pytest.fixture(scope="module", params=[*PRESETS, *MODELOPT])
def fp8(request: pytest.FixtureRequest, pristine: dict[str, Path], made_once: MadeOnce) -> tuple[str, Path]:
    name = request.param
    if name in MODELOPT:
        return name, pristine[name]

    def compress(directory: Path) -> None:
        compress_checkpoint(pristine["source"], directory, name, bfloat16_scales)

    return name, made_once(f"compressed_{name}", compress)


def bfloat16_scales(tensors: Tensors) -> None:
    """As llm-compressor stores them, of which compressed-tensors' own functions give FP32: of half of the weights."""
    names = sorted(name for name in tensors if name.endswith(".weight_scale"))
    for name in names[::2]:
        tensors[name] = tensors[name].bfloat16()


def decoded(name: str, directory: Path) -> Tensors:
    """The weights by the tool that wrote them, in BF16; other tensors as they are, without scales."""
    stored = read(directory)
    found = {}
    for weight, tensor in stored.items():
        if weight.rpartition(".")[2] in ("weight_scale", "input_scale", "k_scale", "v_scale"):
            continue
        if tensor.dtype is not torch.float8_e4m3fn:
            found[weight] = tensor
        elif name in MODELOPT:
            # As ModelOpt itself has a scale a row: [out, 1].
            scale = stored[f"{weight}_scale"]
            scale = scale[:, None] if scale.dim() else scale
            found[weight] = FP8QTensor(tensor.shape, torch.float32, tensor).dequantize(torch.float32, scale=scale)
        else:
            scheme = scheme_of(name)
            state = {"weight": tensor, "weight_scale": stored[f"{weight}_scale"]}
            found[weight] = BaseCompressor.get_value_from_registry(str(scheme.format)).decompress(state, scheme)[
                "weight"
            ]
    return {weight: tensor.bfloat16() for weight, tensor in found.items()}


def config_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "config.json").read_text()))


def changed(directory: Path, target: Path, edit: Callable[[dict[str, Any]], object], **tensors: torch.Tensor) -> Path:
    """A copy with another config, and some tensors more or others."""
    shutil.copytree(directory, target)
    config = config_of(directory)
    edit(config)
    (target / "config.json").write_text(json.dumps(config))
    save_file(read(directory) | tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_weights_are_those_that_the_tool_decodes(fp8: tuple[str, Path]) -> None:
    name, directory = fp8
    expected = decoded(name, directory)
    refuse_quantized(directory, config_of(directory))
    with open_plain(directory, config_of(directory)) as source:
        assert source.tensors.keys() == expected.keys()
        assert [weight for weight in expected if not same_bytes(source.read(weight), expected[weight])] == []
        for weight in ("model.layers.0.self_attn.q_proj.weight", UP):
            part = source.read(weight, (slice(17, 83), slice(5, 90)))
            assert same_bytes(part, expected[weight][17:83, 5:90].contiguous())


def test_it_is_quantized_and_verified_against(fp8: tuple[str, Path], tmp_path: Path) -> None:
    name, directory = fp8
    result = quantize_checkpoint(directory, tmp_path / "out", "w4a16_nvfp4")
    report = verify_checkpoint(tmp_path / "out", directory)
    assert report.ok, [str(finding) for finding in report.findings]
    assert len(report.errors_by_tensor) == 39
    stored = read(directory)
    assert set(result.scales_aside.names) == {
        each for each in stored if each.endswith((".input_scale", "k_scale", "v_scale"))
    }
    assert any("Left aside" in line for line in result.said()) is (name in ("FP8", "fp8"))
    # And as the model that it stands for, bit for bit.
    plain = tmp_path / "plain"
    plain.mkdir()
    config = config_of(directory)
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    save_file(decoded(name, directory), plain / "model.safetensors", metadata={"format": "pt"})
    quantize_checkpoint(plain, tmp_path / "expected", "w4a16_nvfp4")
    found, expected = read(tmp_path / "out"), read(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert [each for each in found if not same_bytes(found[each], expected[each])] == []


@pytest.mark.parametrize("suffix", ["weight", "weight_scale"])
def test_what_is_spoiled_is_found(suffix: str, fp8: tuple[str, Path], tmp_path: Path) -> None:
    _, directory = fp8
    quantize_checkpoint(directory, tmp_path / "out", "w4a16_nvfp4")
    file = tmp_path / "out" / "model-00001-of-00001.safetensors"
    tensors, name = load_file(file), UP.removesuffix("weight") + suffix
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    assert UP in str(verify_checkpoint(tmp_path / "out", directory).findings)


def test_a_model_is_built_of_it(fp8: tuple[str, Path], tmp_path: Path) -> None:
    name, directory = fp8
    with one_rank():
        model = build(directory)
        import_mcore_gpt_from_hf(model, directory)
        export_mcore_gpt_to_hf(model, directory, tmp_path / "out")
    exported, expected = read(tmp_path / "out"), decoded(name, directory)
    assert exported.keys() == expected.keys()
    assert [each for each in exported if not same_bytes(exported[each], expected[each])] == []


def test_modelopts_own_config_file_is_enough(pristine: dict[str, Path], tmp_path: Path) -> None:
    """As ModelOpt wrote it before it wrote into config.json."""
    source = changed(pristine["fp8"], tmp_path / "old", lambda config: config.pop("quantization_config"))
    quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    report = verify_checkpoint(tmp_path / "out", source)
    assert report.ok, [str(finding) for finding in report.findings]
    (source / "hf_quant_config.json").unlink()
    with pytest.raises(MappingError, match="weight_scale"):
        quantize_checkpoint(source, tmp_path / "again", "w4a16_nvfp4")


def test_weights_are_of_the_type_that_the_config_names(pristine: dict[str, Path], tmp_path: Path) -> None:
    """FP16 has more bits than BF16: a scale of 2^-3 / 448 times a code is rounded three bits later."""
    source = changed(pristine["fp8"], tmp_path / "half", lambda config: config.update(dtype="float16"))
    stored = read(source)
    with open_plain(source, config_of(source)) as checkpoint:
        expected = (stored[UP].float() * stored[f"{UP}_scale"]).half()
        assert same_bytes(checkpoint.read(UP), expected)
        assert not torch.equal(expected.float(), expected.bfloat16().float())
    quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    assert verify_checkpoint(tmp_path / "out", source).ok


def pack_quantized(config: dict[str, Any]) -> None:
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group"}}},
    }


def with_group(config: dict[str, Any], **settings: Any) -> None:
    (group,) = config["quantization_config"]["config_groups"].values()
    group["weights"].update(settings)


UNREAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "INT4": (pack_quantized, "compressed-tensors pack-quantized (4-bit int, group)"),
    "INT8": (lambda config: with_group(config, type="int"), "float-quantized (8-bit int, channel)"),
    "asymmetric": (lambda config: with_group(config, symmetric=False), "float-quantized (8-bit float, channel)"),
    "groups": (lambda config: with_group(config, strategy="group"), "(8-bit float, group)"),
    "blocks of no size": (lambda config: with_group(config, strategy="block"), "(8-bit float, block)"),
    "sparse": (
        lambda config: config["quantization_config"].update(sparsity_config={"format": "sparse-24-bitmask"}),
        "sparse by sparse-24-bitmask",
    ),
    "rotated": (
        lambda config: config["quantization_config"].update(transform_config={"config_groups": {"u": {}}}),
        "with transforms",
    ),
    "no groups": (lambda config: config["quantization_config"].update(config_groups={}), "compressed-tensors float"),
    "AWQ": (lambda config: config.update(quantization_config={"quant_method": "awq"}), "is awq, which"),
    "NVFP4": (lambda config: config.update(quantization_config={"quant_algo": "NVFP4"}), "is ModelOpt NVFP4, which"),
    "E5M2": (lambda config: config.update(quantization_config={"quant_method": "fp8", "fmt": "e5m2"}), "is fp8 e5m2"),
    "nobody's": (lambda config: config.update(quantization_config={"bits": 8}), "without a quant_method"),
}


@pytest.mark.parametrize(("edit", "named"), UNREAD.values(), ids=UNREAD)
def test_what_is_not_read_is_refused_by_its_name(
    edit: Callable[[dict[str, Any]], object], named: str, pristine: dict[str, Path], tmp_path: Path
) -> None:
    source = compress_checkpoint(pristine["source"], tmp_path / "source", "FP8_DYNAMIC", lambda tensors: None)
    config = config_of(source)
    edit(config)
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError) as caught:
        quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    assert named in str(caught.value)
    assert "Of quantized ones FP8 is read" in caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_an_fp8_weight_that_the_config_calls_plain_is_refused(pristine: dict[str, Path], tmp_path: Path) -> None:
    """A server would take its codes for values."""
    modules = [UP.removesuffix(".weight"), "model.layers.0.self_attn.q_proj"]
    source = changed(
        pristine["fp8"], tmp_path / "in", lambda config: config["quantization_config"]["ignore"].extend(modules)
    )
    with pytest.raises(SourceError) as caught:
        quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    assert {offender.parameter.removesuffix(".weight") for offender in caught.value.offenders} == set(modules)


def test_scales_of_another_kind_than_the_config_says_are_all_named(pristine: dict[str, Path], tmp_path: Path) -> None:
    scales = {f"{UP}_scale": torch.ones(5), "model.layers.0.mlp.up_proj.weight_scale": torch.ones(256, 1)}
    source = changed(pristine["fp8"], tmp_path / "in", lambda config: None, **scales)
    with pytest.raises(SourceError, match="not one a tensor") as caught:
        quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    assert {f"{offender.parameter}_scale" for offender in caught.value.offenders} == scales.keys()
    assert UP in str(verify_checkpoint(pristine["w4a16"], source).findings)


@pytest.mark.parametrize("spoil", [lambda codes: codes.fill_(0x7F), lambda codes: codes[3:4].fill_(0xFF)])
def test_codes_that_are_nan_are_refused_by_name(
    spoil: Callable[[torch.Tensor], object], fp8: tuple[str, Path], tmp_path: Path
) -> None:
    """As ModelOpt 0.47 writes an expert of zeros."""
    _, directory = fp8
    codes = read(directory)[UP].view(torch.uint8).clone()
    spoil(codes)
    source = changed(directory, tmp_path / "in", lambda config: None, **{UP: codes.view(torch.float8_e4m3fn)})
    with pytest.raises(WeightError) as caught:
        quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    assert [offender.parameter for offender in caught.value.offenders] == [UP]
