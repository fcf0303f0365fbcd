"""FP8 in blocks, as DeepSeek-V3 is published: what is read is codes times scales, and what transformers dequantizes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantplug import export_mcore_gpt_to_hf, import_mcore_gpt_from_hf
from quantplug.checkpoint.encoded.described import FP8Storage, Sharing
from quantplug.checkpoint.encoded.fp8_source import FP8Checkpoint
from quantplug.errors import SourceError, WeightError
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.verify import verify_checkpoint
from tests.export.checkpoints import build, linear_weights, one_rank, read, same_bytes
from tests.families.cases import Tensors, make


def opened(directory: Path, block: tuple[int, int]) -> FP8Checkpoint:
    return FP8Checkpoint(directory, FP8Storage("_scale_inv", frozenset({Sharing.BLOCKS}), block))


def packed(directory: Path, block: tuple[int, int]) -> Path:
    """A checkpoint with random codes and scales in place of its linears."""
    tensors = load_file(directory / "model.safetensors")
    for weight in [weight for weight in linear_weights(tensors) if "eh_proj" not in weight]:
        rows, columns = tensors[weight].shape
        blocks = (-(-rows // block[0]), -(-columns // block[1]))
        tensors[weight] = (tensors[weight].float() * 100).to(torch.float8_e4m3fn)
        tensors[f"{weight}_scale_inv"] = torch.rand(blocks) * 0.01 + 0.005
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": list(block),
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def decoded(directory: Path, block: tuple[int, int]) -> Tensors:
    """By the definition, with a scale written out for every entry."""
    tensors = read(directory)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scales, weight = tensors.pop(name), name.removesuffix("_scale_inv")
        rows, columns = tensors[weight].shape
        tensors[weight] = (tensors[weight].float() * spread(scales, block)[:rows, :columns]).to(torch.bfloat16)
    return tensors


def spread(scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    return scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


@pytest.fixture(scope="module", params=[(128, 128), (48, 112)], ids=["128x128", "48x112"])
def block(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def source(request: pytest.FixtureRequest, block: tuple[int, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(make(request.param, tmp_path_factory.mktemp(f"fp8-{request.param}")), block)


def test_the_round_trip_gives_codes_times_scales(source: Path, block: tuple[int, int], tmp_path: Path) -> None:
    with one_rank():
        model = build(source)
        import_mcore_gpt_from_hf(model, source)
        export_mcore_gpt_to_hf(model, source, tmp_path / "out")
    expected, exported = decoded(source, block), read(tmp_path / "out")
    assert exported.keys() == expected.keys()
    assert [name for name in exported if not same_bytes(exported[name], expected[name])] == []
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_transformers_dequantizes_the_same(divisible_dir: Path, tmp_path: Path) -> None:
    """Where blocks divide: of others transformers makes blocks of equal size, and DeepSeek's own code does not."""
    directory = packed(shutil.copytree(divisible_dir, tmp_path / "fp8"), (128, 128))
    with one_rank():
        model = build(directory)
        import_mcore_gpt_from_hf(model, directory)
        export_mcore_gpt_to_hf(model, directory, tmp_path / "out")
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict()
        for path in (directory, tmp_path / "out")
    ]
    assert [name for name in models[0] if not same_bytes(models[0][name], models[1][name])] == []


def test_nvfp4_of_it_is_verified_against_it(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    report = verify_checkpoint(tmp_path / "out", source)
    assert report.ok, [str(finding) for finding in report.findings]
    spoiled = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    if name not in spoiled:
        name = "model.layers.0.self_attn.o_proj.weight"
    spoiled[name] = spoiled[name].flip(0)
    save_file(spoiled, tmp_path / "out" / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    assert name.removesuffix(".weight") in str(verify_checkpoint(tmp_path / "out", source).findings)


def powers_of_two(directory: Path, codes: Callable[[torch.Size], torch.Tensor], *, as_floats: bool) -> Path:
    """A copy's scales as DeepSeek-V3.1 has them: 2^(code - 127), in FP32, or as the codes themselves (F8_E8M0)."""
    source = packed(directory, (128, 128))
    tensors = load_file(source / "model.safetensors")
    for name in sorted(name for name in tensors if name.endswith("_scale_inv")):
        code = codes(tensors[name].shape)
        exact = torch.ldexp(torch.ones(code.shape), code - 127)
        tensors[name] = exact if as_floats else code.to(torch.uint8).view(torch.float8_e8m0fnu)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (source / "config.json").write_text(json.dumps(config))
    return source


@pytest.mark.parametrize("as_floats", [False, True])
def test_scales_that_are_powers_of_two_are_read_exactly(as_floats: bool, divisible_dir: Path, tmp_path: Path) -> None:
    """From 2^-127 on, which is code 0 and no normal FP32 number."""

    def codes(shape: torch.Size) -> torch.Tensor:
        # Few enough doublings apart that no block drowns beside another one of its tensor.
        found = torch.randint(120, 127, shape)
        found[0, 0] = 0
        return found

    source = powers_of_two(shutil.copytree(divisible_dir, tmp_path / "fp8"), codes, as_floats=as_floats)
    expected = {}
    for name, tensor in read(source).items():
        if name.endswith("_scale_inv"):
            continue
        scales = read(source).get(f"{name}_scale_inv")
        # FP64 holds every product, so that there is the one rounding to BF16.
        stood_for = tensor.double() if scales is None else tensor.double() * spread(scales.float().double(), (128, 128))
        expected[name] = stood_for.bfloat16()
    with opened(source, (128, 128)) as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
        assert [name for name in expected if not same_bytes(checkpoint.read(name), expected[name])] == []
    quantize_checkpoint(source, tmp_path / "out", "w4a16_nvfp4")
    report = verify_checkpoint(tmp_path / "out", source)
    assert report.ok, [str(finding) for finding in report.findings]


@pytest.mark.parametrize(("code", "said"), [(255, "NaN"), (254, "Inf")])
@pytest.mark.parametrize("format_name", ["w4a16_nvfp4", "fp8_blockwise"])
def test_scales_that_stand_for_no_number_are_refused(
    code: int, said: str, format_name: str, divisible_dir: Path, tmp_path: Path
) -> None:
    """255 is the NaN of E8M0; 2^127 times a code of 448 is beyond BF16."""

    def codes(shape: torch.Size) -> torch.Tensor:
        return torch.full(shape, 120)

    source = powers_of_two(shutil.copytree(divisible_dir, tmp_path / "fp8"), codes, as_floats=False)
    tensors, name = read(source), "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name].view(torch.uint8)[0, 0] = 0x7E
    tensors[f"{name}_scale_inv"].view(torch.uint8)[0, 0] = code
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightError, match=said) as caught:
        quantize_checkpoint(source, tmp_path / "out", format_name)
    assert [offender.parameter for offender in caught.value.offenders] == [name]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "index", [(slice(32, 64),), (slice(17, 83), slice(5, 90)), (slice(None), slice(48, 96)), (slice(3, 3),), ()]
)
def test_any_slice_is_that_of_the_whole(source: Path, block: tuple[int, int], index: tuple[slice, ...]) -> None:
    with opened(source, block) as checkpoint:
        for name in linear_weights(dict.fromkeys(checkpoint.tensors)):
            assert torch.equal(checkpoint.read(name, index), checkpoint.read(name)[index])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda scales, tensors: tensors.pop(scales), "is FP8 without its *_scale_inv"),
        (lambda scales, tensors: tensors.update({scales: torch.zeros(9, 9)}), "its *_scale_inv [9, 9]"),
        (lambda scales, tensors: tensors.update({scales: tensors[scales].double()}), "float64"),
    ],
)
def test_scales_that_do_not_fit_are_all_named(
    damage: Callable[[str, Tensors], object], reason: str, source: Path, block: tuple[int, int], tmp_path: Path
) -> None:
    directory = shutil.copytree(source, tmp_path / "damaged")
    tensors = load_file(directory / "model.safetensors")
    scales = [name for name in tensors if name.endswith("_scale_inv")]
    for name in scales:
        damage(name, tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError) as caught:
        opened(directory, block)
    assert len(caught.value.offenders) == len(scales)
    assert all(reason in offender.reason for offender in caught.value.offenders)


@pytest.mark.parametrize(
    ("size", "said"), [(None, "without its \\*_scale"), ([128], "already"), ([128, 0], "already"), ("128", "already")]
)
def test_blocks_of_no_size_are_refused(size: object, said: str, source: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(source, tmp_path / "other")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = size
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=said):
        quantize_checkpoint(directory, tmp_path / "out", "w4a16_nvfp4")
