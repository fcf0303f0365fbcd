"""Tensors that models compute with in FP32: no bit of them is lost, by whichever way they are written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantplug import export_mcore_gpt_to_hf
from quantplug.checkpoint.config.source import read_source_config
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.verify import verify_checkpoint
from tests.export.checkpoints import load, one_rank, quantize, read, same_bytes

WIDE = (".A_log", ".D", ".dt_bias")


@pytest.fixture(params=["qwen3_next", "qwen3_5", "nemotron_h"])
def source(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint that holds these in FP32, of values that BF16 does not have."""
    directory = tmp_path / "source"
    directory.mkdir()
    plain = checkpoint(request.param)
    (directory / "config.json").write_text((plain / "config.json").read_text())
    tensors = load_file(plain / "model.safetensors")
    for name in [name for name in tensors if name.endswith(WIDE)]:
        tensors[name] = torch.rand(tensors[name].shape) + 0.1
        assert not torch.equal(tensors[name], tensors[name].bfloat16().float())
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_no_bit_of_them_is_lost(source: Path, tmp_path: Path) -> None:
    with one_rank():
        export_mcore_gpt_to_hf(quantize(load(source), "w4a16_nvfp4"), source, tmp_path / "out")
    # The quantizers stand on all linears, those too that are kept unless they are asked for.
    quantize_checkpoint(source, tmp_path / "free", "w4a16_nvfp4", preset="all")
    stored, exported, free = read(source), read(tmp_path / "out"), read(tmp_path / "free")
    wide = [name for name in stored if name.endswith(WIDE)]
    assert wide
    assert [name for name in wide if not same_bytes(exported[name], stored[name])] == []
    assert exported.keys() == free.keys()
    assert [name for name in exported if not same_bytes(exported[name], free[name])] == []
    assert verify_checkpoint(tmp_path / "out", source).ok


def test_without_the_source_s_weights_they_are_written_as_all_others(source: Path, tmp_path: Path) -> None:
    alone = tmp_path / "config"
    alone.mkdir()
    (alone / "config.json").write_text((source / "config.json").read_text())
    with one_rank():
        export_mcore_gpt_to_hf(load(source), alone, tmp_path / "out")
    stored, exported = read(source), read(tmp_path / "out")
    for name in [name for name in stored if name.endswith(WIDE)]:
        assert same_bytes(exported[name], stored[name].bfloat16())


@pytest.mark.parametrize("name", ["glm4_moe", "glm4v_moe", "deepseek_v3", "nemotron_h_moe"])
def test_biases_that_choose_experts_are_fp32_by_every_way(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Servers and transformers hold them so, whatever a source has them in: 16 bits widened, no other number."""
    source = tmp_path / "source"
    shutil.copytree(checkpoint(name), source)
    tensors = load_file(source / "model.safetensors")
    biases = [name for name in tensors if name.endswith("e_score_correction_bias")]
    assert biases
    tensors |= {name: tensors[name].bfloat16() for name in biases}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with one_rank():
        export_mcore_gpt_to_hf(quantize(load(source), "w4a16_nvfp4", source), source, tmp_path / "out")
    quantize_checkpoint(source, tmp_path / "free", "w4a16_nvfp4")
    exported, free = read(tmp_path / "out"), read(tmp_path / "free")
    # Nemotron-H's layers of multi-token prediction are carried by every way as they are: Megatron has no such layer.
    served = [bias for bias in biases if not bias.startswith("mtp.")]
    assert [bias for bias in served if not same_bytes(free[bias], tensors[bias].float())] == []
    assert exported.keys() == free.keys()
    assert [name for name in exported if not same_bytes(exported[name], free[name])] == []
    assert verify_checkpoint(tmp_path / "free", source).ok


@pytest.mark.parametrize("name", ["llama4_text", "llama4"])
def test_a_flag_that_was_published_as_a_number_is_read_as_one(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Llama 4's attn_temperature_tuning is 4 in its published config, which transformers 5 refuses."""
    source = tmp_path / "source"
    shutil.copytree(checkpoint(name), source)
    config = json.loads((source / "config.json").read_text())
    config.get("text_config", config)["attn_temperature_tuning"] = 4
    (source / "config.json").write_text(json.dumps(config))
    values, plain = read_source_config(source).values, read_source_config(checkpoint(name)).values
    assert values.get("text_config", values)["attn_temperature_tuning"] is True
    assert {**values, "_name_or_path": ""} == {**plain, "_name_or_path": ""}
    with one_rank():
        export_mcore_gpt_to_hf(quantize(load(checkpoint(name)), "w4a16_nvfp4", source), source, tmp_path / "out")
    quantize_checkpoint(source, tmp_path / "free", "w4a16_nvfp4")
    for directory in ("out", "free"):
        assert verify_checkpoint(tmp_path / directory, source).ok
