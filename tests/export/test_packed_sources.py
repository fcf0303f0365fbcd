"""Sources that are in the very format that is asked for: codes and scales come out as they went in."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantplug.errors import WeightError
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.verify import verify_checkpoint
from tests.export.checkpoints import linear_weights, read, same_bytes
from tests.families.cases import Tensors, make
from tests.made_once import MadeOnce

Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.experts.2.up_proj.weight"
FORMATS = ("fp8_blockwise", "fp8_dynamic")
SCALES = {"fp8_blockwise": "_scale_inv", "fp8_dynamic": "_scale"}


def with_random_codes(directory: Path) -> None:
    """Scales that no packer would choose: by them nearly every code is another one when it is packed anew."""
    generator = torch.Generator().manual_seed(3)
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        for name in sorted(name for name in tensors if name.endswith(("_scale_inv", ".weight_scale"))):
            tensors[name] = torch.rand(tensors[name].shape, generator=generator) * 0.01 + 0.005
            codes = torch.randint(0, 0x70, tensors[name.rpartition("_scale")[0]].shape, generator=generator)
            tensors[name.rpartition("_scale")[0]] = codes.to(torch.uint8).view(torch.float8_e4m3fn)
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module", params=FORMATS)
def packed(request: pytest.FixtureRequest, divisible_dir: Path, made_once: MadeOnce) -> tuple[str, Path]:
    """A Qwen3-MoE in a format, and the format."""

    def pack(directory: Path) -> None:
        quantize_checkpoint(divisible_dir, directory, request.param)
        with_random_codes(directory)

    return request.param, made_once(f"random_{request.param}", pack)


def changed(source: Path, target: Path, tensors: Mapping[str, torch.Tensor | None]) -> Path:
    """A copy in one file with other tensors; None: without it."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    kept = {name: tensor for name, tensor in {**read(source), **tensors}.items() if tensor is not None}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_codes_and_scales_are_the_same_bytes(packed: tuple[str, Path], tmp_path: Path) -> None:
    format_name, source = packed
    quantize_checkpoint(source, tmp_path / "out", format_name)
    found, expected = read(tmp_path / "out"), read(source)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(found[name], expected[name])] == []
    configs = [json.loads((directory / "config.json").read_text()) for directory in (source, tmp_path / "out")]
    assert configs[0] == configs[1]
    report = verify_checkpoint(tmp_path / "out", source)
    assert report.ok, [str(finding) for finding in report.findings]
    assert all(error.relative_error < 2**-8 for error in report.errors_by_tensor)


@pytest.mark.parametrize("pieces", [2**14, 2**17])
def test_pieces_of_any_size_are_the_same_bytes(
    pieces: int, packed: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    format_name, source = packed
    monkeypatch.setattr("quantplug.export.sources.checkpoint_rows.CheckpointSource.bucket_bytes", pieces)
    monkeypatch.setattr("quantplug.export.sources.checkpoint_rows.BUCKET_BYTES", pieces)
    quantize_checkpoint(source, tmp_path / "out", format_name)
    found, expected = read(tmp_path / "out"), read(source)
    assert [name for name in expected if not same_bytes(found[name], expected[name])] == []


def test_what_the_source_has_plain_is_quantized_beside(packed: tuple[str, Path], tmp_path: Path) -> None:
    """k_proj among q, k and v of one weight, and an expert: as if all of the source had been plain."""
    format_name, source = packed
    plain = {Q.replace("q_proj", "k_proj"): torch.randn(128, 256).bfloat16(), UP: torch.randn(256, 256).bfloat16()}
    scales = {name + SCALES[format_name]: None for name in plain}
    mixed = changed(source, tmp_path / "mixed", {**plain, **scales})
    quantize_checkpoint(mixed, tmp_path / "out", format_name)
    found, expected = read(tmp_path / "out"), read(source)
    assert found.keys() == expected.keys()
    anew = {name for name in expected if not same_bytes(found[name], expected[name])}
    assert anew == {each for name in plain for each in (name, name + SCALES[format_name])}
    assert verify_checkpoint(tmp_path / "out", mixed).ok


def test_other_formats_take_it_for_what_it_stands_for(packed: tuple[str, Path], tmp_path: Path) -> None:
    """FP8 of another kind of scales, and what is excluded, which comes out in BF16."""
    format_name, source = packed
    (other,) = set(FORMATS) - {format_name}
    for asked, exclude in ((other, ()), (format_name, ["model.layers.0.*"])):
        quantize_checkpoint(source, tmp_path / asked, asked, exclude=exclude)
        report = verify_checkpoint(tmp_path / asked, source)
        assert report.ok, [str(finding) for finding in report.findings]
    assert read(tmp_path / format_name)[Q].dtype is torch.bfloat16


@pytest.mark.parametrize("value", [0.0, -0.5, 2.0**-130, 2.0**127])
def test_scales_that_no_kernel_reads_are_made_anew(value: float, packed: tuple[str, Path], tmp_path: Path) -> None:
    """A scale of 0 is that of a block of zeros, as some tools write it; GPUs flush subnormals. The values stay."""
    format_name, source = packed
    name = UP + SCALES[format_name]
    scales, codes = read(source)[name], read(source)[UP]
    scales[0, 0] = value
    rows = 128 if format_name == "fp8_blockwise" else 1
    odd = (slice(0, rows), slice(0, 128 if rows == 128 else None))
    codes[odd] = torch.full_like(codes[odd].float(), 2.0**-3).to(codes.dtype)
    quantize_checkpoint(changed(source, tmp_path / "in", {name: scales, UP: codes}), tmp_path / "out", format_name)
    found = read(tmp_path / "out")
    assert found[name][0, 0] > 0
    assert torch.equal(found[UP][odd].float() * found[name][0, 0], torch.full_like(codes[odd].float(), value / 8))
    others = torch.ones(codes.shape, dtype=torch.bool)
    others[odd] = False
    assert torch.equal(found[UP].view(torch.uint8)[others], codes.view(torch.uint8)[others])
    assert torch.equal(found[name].flatten()[1:], scales.flatten()[1:])
    report = verify_checkpoint(tmp_path / "out", tmp_path / "in")
    assert report.ok, [str(finding) for finding in report.findings]


def spoil_code(codes: torch.Tensor, scales: torch.Tensor) -> None:
    codes.view(torch.uint8)[5, 9] = 0xFF


def spoil_scale(codes: torch.Tensor, scales: torch.Tensor) -> None:
    scales[0, 0] = torch.nan


def spoil_product(codes: torch.Tensor, scales: torch.Tensor) -> None:
    scales[0, 0] = 3e38


@pytest.mark.parametrize("spoil", [spoil_code, spoil_scale, spoil_product])
def test_what_is_no_number_is_refused(
    spoil: Callable[[torch.Tensor, torch.Tensor], None], packed: tuple[str, Path], tmp_path: Path
) -> None:
    format_name, source = packed
    tensors = read(source)
    codes, scales = tensors[UP], tensors[UP + SCALES[format_name]]
    spoil(codes, scales)
    source = changed(source, tmp_path / "in", {UP: codes, UP + SCALES[format_name]: scales})
    with pytest.raises(WeightError) as caught:
        quantize_checkpoint(source, tmp_path / "out", format_name)
    assert [offender.parameter for offender in caught.value.offenders] == [UP]
    assert not (tmp_path / "out").exists()


def swap_rows(tensors: Tensors, suffix: str) -> None:
    tensors[UP] = tensors[UP].flip(0).contiguous()


def double_a_scale(tensors: Tensors, suffix: str) -> None:
    tensors[UP + suffix][0, 0] *= 2


def zero_a_row(tensors: Tensors, suffix: str) -> None:
    tensors[UP].view(torch.uint8)[3] = 0


@pytest.mark.parametrize("spoil", [swap_rows, double_a_scale, zero_a_row])
def test_verify_finds_what_is_spoiled_since(
    spoil: Callable[[Tensors, str], None], packed: tuple[str, Path], tmp_path: Path
) -> None:
    format_name, source = packed
    quantize_checkpoint(source, tmp_path / "out", format_name)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    spoil(tensors, SCALES[format_name])
    save_file(tensors, file, metadata={"format": "pt"})
    assert UP in str(verify_checkpoint(tmp_path / "out", source).findings)


def test_blocks_of_experts_in_one_tensor_are_not_those_of_one_by_one(tmp_path: Path) -> None:
    """Written one by one they have other tensors than they came in: gate and up together have blocks of both."""
    source = make("qwen3_vl_moe_resaved", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]:
        experts, rows, columns = tensors[name].shape
        tensors[f"{name}_scale_inv"] = torch.rand(experts, -(-rows // 128), -(-columns // 128)) * 0.01 + 0.005
        tensors[name] = (tensors[name].float() * 100).to(torch.float8_e4m3fn)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps(config))
    quantize_checkpoint(source, tmp_path / "out", "fp8_dynamic")
    report = verify_checkpoint(tmp_path / "out", source)
    assert report.ok, [str(finding) for finding in report.findings]


def test_nothing_is_packed_anew(packed: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a source of hundreds of gigabytes would take as long as one in BF16."""

    def pack(*args: object) -> None:
        raise AssertionError("a weight that is packed already")

    format_name, source = packed
    assert linear_weights(read(source))
    monkeypatch.setattr("quantplug.formats.block_format.BlockFormat.pack_group", pack)
    quantize_checkpoint(source, tmp_path / "out", format_name)
