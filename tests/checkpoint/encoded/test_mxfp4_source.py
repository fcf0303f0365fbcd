"""GPT-OSS in MXFP4, as it is published: what is imported is what transformers dequantizes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM, Mxfp4Config

from quantplug import export_mcore_gpt_to_hf, import_mcore_gpt_from_hf
from quantplug.checkpoint.encoded.mxfp4_source import MXFP4Checkpoint
from quantplug.errors import SourceError
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from tests.export.checkpoints import build, one_rank, quantize, read, same_bytes
from tests.families.cases import Tensors, make

EXPERTS = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny GPT-OSS with random blocks and scales in place of its experts' weights."""
    directory = make("gpt_oss", tmp_path_factory.mktemp("mxfp4"))
    change(directory, with_blocks)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def weights(tensors: Tensors) -> list[str]:
    return [name for name in tensors if name.endswith(EXPERTS)]


def with_blocks(tensors: Tensors) -> Tensors:
    for name in weights(tensors):
        tensors |= blocks_of(name, tensors)
    return tensors


def blocks_of(name: str, tensors: Tensors) -> Tensors:
    experts, columns, rows = tensors.pop(name).shape
    return {
        f"{name}_blocks": torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8),
        f"{name}_scales": torch.randint(118, 123, (experts, rows, columns // 32), dtype=torch.uint8),
    }


def change(directory: Path, how: Callable[[Tensors], Tensors]) -> None:
    file = directory / "model.safetensors"
    changed = how(load_file(file))
    save_file(changed, file, metadata={"format": "pt"})


def test_the_round_trip_gives_what_transformers_dequantizes(packed: Path, tmp_path: Path) -> None:
    with one_rank():
        model = build(packed)
        import_mcore_gpt_from_hf(model, packed)
        export_mcore_gpt_to_hf(model, packed, tmp_path / "out")
    dequantized = GptOssForCausalLM.from_pretrained(
        packed, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    expected = dequantized.state_dict()
    exported = read(tmp_path / "out")
    assert exported.keys() == expected.keys()
    assert [name for name in exported if not same_bytes(exported[name], expected[name])] == []
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("index", [(3,), (0, slice(32, 64)), (1, slice(17, 83), slice(5, 90)), (slice(1, 3),), ()])
def test_any_slice_is_that_of_the_whole(packed: Path, index: tuple[int | slice, ...]) -> None:
    with MXFP4Checkpoint(packed) as source:
        for name in weights(dict.fromkeys(source.tensors)):
            assert torch.equal(source.read(name, index), source.read(name)[index])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda scales, tensors: tensors.pop(scales), "is without its _scales"),
        (lambda scales, tensors: tensors.update({scales: torch.zeros(2, 2, 2).byte()}), "its _scales [2, 2, 2]"),
        (lambda scales, tensors: tensors.update({scales: tensors[scales].float()}), "float32"),
    ],
)
def test_blocks_without_matching_scales_are_all_named(packed: Path, tmp_path: Path, damage, reason: str) -> None:
    directory = shutil.copytree(packed, tmp_path / "damaged")

    def damaged(tensors: Tensors) -> Tensors:
        for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
            damage(f"{name}_scales", tensors)
        return tensors

    change(directory, damaged)
    with pytest.raises(SourceError) as caught:
        MXFP4Checkpoint(directory)
    assert len(caught.value.offenders) == 6
    assert all(reason in offender.reason for offender in caught.value.offenders)


def test_nvfp4_without_a_model_is_that_of_the_way_through_megatron(packed: Path, tmp_path: Path) -> None:
    with one_rank():
        model = build(packed)
        import_mcore_gpt_from_hf(model, packed)
        export_mcore_gpt_to_hf(
            quantize(model, "w4a16_nvfp4", packed, keep_experts=True), packed, tmp_path / "by-megatron"
        )
    quantize_checkpoint(packed, tmp_path / "out", "w4a16_nvfp4", exclude=["*.experts"])
    expected, found = read(tmp_path / "by-megatron"), read(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(found[name], expected[name])] == []
