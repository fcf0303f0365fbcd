"""All experts of a layer in one FP8 tensor, as Qwen3-VL-MoE FP8 is published: read as the BF16 model it stands for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantplug import export_mcore_gpt_to_hf, import_mcore_gpt_from_hf
from quantplug.checkpoint.encoded.described import FP8Storage, Sharing
from quantplug.checkpoint.encoded.fp8_source import FP8Checkpoint
from quantplug.checkpoint.encoded.plain import open_plain
from quantplug.errors import SourceError
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.verify import verify_checkpoint
from tests.export.checkpoints import build, one_rank, read, same_bytes
from tests.families.cases import Tensors, make

BLOCK = (48, 112)


def spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A scale written out for every entry of [experts, rows, columns]."""
    whole = scales.repeat_interleave(BLOCK[0], dim=1).repeat_interleave(BLOCK[1], dim=2)
    return whole[:, : shape[1], : shape[2]]


@pytest.fixture(scope="module", params=["qwen3_vl_moe", "qwen3_vl_moe_resaved", "llama4"])
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """The checkpoint, and what it stands for."""
    directory = make(request.param, tmp_path_factory.mktemp(f"fp8-{request.param}"))
    tensors, decoded = load_file(directory / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]:
        experts, rows, columns = tensors[name].shape
        scales = torch.rand(experts, -(-rows // BLOCK[0]), -(-columns // BLOCK[1])) * 0.01 + 0.005
        tensors[name] = (tensors[name].float() * 100).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
        decoded[name] = (tensors[name].float() * spread(scales, tensors[name].shape)).bfloat16()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    (directory / "config.json").write_text(json.dumps(config))
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale_inv")}
    return directory, plain | decoded


def test_the_round_trip_gives_codes_times_scales(sources: tuple[Path, Tensors], tmp_path: Path) -> None:
    source, expected = sources
    with one_rank():
        model = build(source)
        import_mcore_gpt_from_hf(model, source)
        export_mcore_gpt_to_hf(model, source, tmp_path / "out")
    exported = read(tmp_path / "out")
    assert exported.keys() == expected.keys()
    assert [name for name in exported if not same_bytes(exported[name], expected[name])] == []


def test_without_a_model_it_is_quantized_as_the_plain_one(sources: tuple[Path, Tensors], tmp_path: Path) -> None:
    source, plain = sources
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    for name, directory in (("out", source), ("expected", tmp_path / "plain")):
        quantize_checkpoint(directory, tmp_path / name, "w4a16_nvfp4")
    found, expected = read(tmp_path / "out"), read(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert [name for name in found if not same_bytes(found[name], expected[name])] == []


def test_verify_measures_the_error_of_every_expert(sources: tuple[Path, Tensors], tmp_path: Path) -> None:
    source, plain = sources
    out = tmp_path / "out"
    quantize_checkpoint(source, out, "w4a16_nvfp4")
    report = verify_checkpoint(out, source)
    assert report.ok, report
    experts = sum(len(tensor) for name, tensor in plain.items() if name.endswith(".experts.down_proj"))
    assert sum("experts" in error.name and "down_proj" in error.name for error in report.errors_by_tensor) == experts


def test_scales_of_another_number_of_blocks_are_refused(sources: tuple[Path, Tensors], tmp_path: Path) -> None:
    source, _ = sources
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".down_proj_scale_inv"))
    tensors[name] = tensors[name][:, :, :1].repeat(1, 1, 5)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError) as caught:
        FP8Checkpoint(tmp_path, FP8Storage("_scale_inv", frozenset({Sharing.BLOCKS}), BLOCK))
    assert [offender.parameter for offender in caught.value.offenders] == [name.removesuffix("_scale_inv")]


def one_scale(shape: torch.Size, transposed: bool) -> tuple[int, ...]:
    return ()


def one_an_expert(shape: torch.Size, transposed: bool) -> tuple[int, ...]:
    return (shape[0], 1, 1)


def one_a_channel(shape: torch.Size, transposed: bool) -> tuple[int, ...]:
    """Of [experts, in, out] as of [experts, out, in]: an output has a scale."""
    return (shape[0], 1, shape[2]) if transposed else (shape[0], shape[1], 1)


MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
CHANNEL = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    },
}


@pytest.mark.parametrize(
    ("scales", "quantization"), [(one_scale, MODELOPT), (one_an_expert, MODELOPT), (one_a_channel, CHANNEL)]
)
@pytest.mark.parametrize(("family", "transposed"), [("qwen3_vl_moe_resaved", False), ("llama4", True)])
def test_scales_of_a_tensor_or_a_channel_are_read_too(
    scales: Callable[[torch.Size, bool], tuple[int, ...]],
    quantization: dict[str, object],
    family: str,
    transposed: bool,
    tmp_path: Path,
) -> None:
    """In ModelOpt's spelling of a parameter that is no module's weight: `experts.down_proj_weight_scale`."""
    source = make(family, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    names = [name for name in tensors if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]
    decoded: Tensors = {}
    for name in names:
        scale = torch.rand(scales(tensors[name].shape, transposed)) * 0.01 + 0.005
        tensors[name] = (tensors[name].float() * 100).to(torch.float8_e4m3fn)
        tensors[f"{name}_weight_scale"] = scale
        tensors[f"{name}_input_scale"] = torch.ones(())
        decoded[name] = (tensors[name].float() * scale).bfloat16()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with open_plain(source, {**config, "quantization_config": quantization}) as checkpoint:
        assert all(same_bytes(checkpoint.read(name), decoded[name]) for name in names)
        expert = (1, slice(3, 40), slice(7, 90))
        assert all(same_bytes(checkpoint.read(name, expert), decoded[name][expert].contiguous()) for name in names)
    quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    report = verify_checkpoint(tmp_path / "out", source)
    assert report.ok, [str(finding) for finding in report.findings]


@pytest.mark.parametrize("family", ["llama4", "qwen3_vl_moe"])
def test_our_own_export_is_a_source(family: str, tmp_path: Path) -> None:
    """With experts one by one, of families that are published with all of a layer in one tensor."""
    source = make(family, tmp_path / "source")
    quantize_checkpoint(source, tmp_path / "fp8", "fp8_dynamic")
    quantize_checkpoint(tmp_path / "fp8", tmp_path / "out", "w4a16_nvfp4")
    report = verify_checkpoint(tmp_path / "out", tmp_path / "fp8")
    assert report.ok, [str(finding) for finding in report.findings]
