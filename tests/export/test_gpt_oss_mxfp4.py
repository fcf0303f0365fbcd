"""GPT-OSS's experts in MXFP4, as it is published: every way writes what transformers reads."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx
from transformers import GptOssForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quantplug import export_checkpoint, export_hf_weights_quant, export_mcore_gpt_to_hf, save_checkpoint
from quantplug.errors import UnsupportedQuantizationError, WeightError
from quantplug.export.quantize_checkpoint import quantize_checkpoint
from quantplug.plugins.configs import quant_cfg, recipe_cfg
from tests.export.checkpoints import INPUTS_OFF, assert_same_export, load, read, same_bytes
from tests.made_once import MadeOnce

EXPERTS = ("gate_up_proj", "down_proj")
TOKENS = torch.arange(2, 18).reshape(2, 8)


@pytest.fixture(scope="module")
def exported(tiny_gpt_oss_dir: Path, made_once: MadeOnce) -> Path:
    return made_once("gpt_oss_mxfp4", lambda out: quantize_checkpoint(tiny_gpt_oss_dir, out, "mxfp4"))


def experts(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in tensors if name.endswith(EXPERTS)]


def test_blocks_are_torchaos_of_the_source_and_all_else_is_the_source(tiny_gpt_oss_dir: Path, exported: Path) -> None:
    source, found = read(tiny_gpt_oss_dir), read(exported)
    packed = {f"{name}_{kind}" for name in experts(source) for kind in ("blocks", "scales")}
    plain = source.keys() - set(experts(source))
    assert found.keys() == packed | plain
    assert [name for name in plain if not same_bytes(found[name], source[name])] == []
    for name in experts(source):
        for expert, weight in enumerate(source[name]):
            # Stored as [in, out], and quantized along the inputs.
            scales, codes = to_mx(weight.mT.contiguous(), torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.RCEIL)
            assert torch.equal(found[f"{name}_scales"][expert], scales.view(torch.uint8)), name
            assert torch.equal(found[f"{name}_blocks"][expert].flatten(-2), codes.view(torch.uint8)), name


def test_the_config_is_gpt_oss_s(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())["quantization_config"]
    assert config.keys() == {"quant_method", "modules_to_not_convert"}
    assert config["quant_method"] == "mxfp4"
    attention = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    assert {"lm_head", "model.embed_tokens", "model.layers.0.mlp.router", *attention} <= set(
        config["modules_to_not_convert"]
    )
    assert not [name for name in config["modules_to_not_convert"] if "experts" in name]
    assert not (exported / "hf_quant_config.json").exists()


def test_transformers_computes_with_the_dequantized_experts(tiny_gpt_oss_dir: Path, exported: Path) -> None:
    dequantize = Mxfp4Config(dequantize=True)
    model = GptOssForCausalLM.from_pretrained(exported, dtype=torch.bfloat16, quantization_config=dequantize)
    plain, found = GptOssForCausalLM.from_pretrained(tiny_gpt_oss_dir, dtype=torch.bfloat16), read(exported)
    with torch.no_grad():
        before = plain(TOKENS).logits
        for name in experts(plain.state_dict()):
            values = convert_moe_packed_tensors(found[f"{name}_blocks"], found[f"{name}_scales"])
            plain.state_dict()[name].copy_(values)
        expected, logits = plain(TOKENS).logits, model(TOKENS).logits
    assert torch.equal(logits, expected)
    # Two digits of binary mantissa: a value is off by an eighth at most, and most by less.
    assert 0 < (logits - before).float().norm() < 0.1 * before.float().norm()


@pytest.fixture
def of_random_bytes(exported: Path, tmp_path: Path) -> Path:
    """A source with blocks that no packer would give: any codes under any scale, zeros of both signs among them."""
    directory = shutil.copytree(exported, tmp_path / "source")
    generator = torch.Generator().manual_seed(5)
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        for name in sorted(name for name in tensors if name.endswith(("_blocks", "_scales"))):
            low, high = (0, 256) if name.endswith("_blocks") else (100, 130)
            tensors[name] = torch.randint(low, high, tensors[name].shape, generator=generator, dtype=torch.uint8)
            tensors[name][0, 0] = 0x88 if name.endswith("_blocks") else 0
        save_file(tensors, path, metadata={"format": "pt"})
    return directory


def test_blocks_of_a_source_come_back_bit_for_bit(of_random_bytes: Path, tmp_path: Path) -> None:
    quantize_checkpoint(of_random_bytes, tmp_path / "out", "mxfp4")
    source, found = read(of_random_bytes), read(tmp_path / "out")
    assert found.keys() == source.keys()
    assert [name for name in source if not same_bytes(found[name], source[name])] == []


def test_an_exponent_of_a_source_that_is_nan_is_found(of_random_bytes: Path, tmp_path: Path) -> None:
    for path in of_random_bytes.glob("*.safetensors"):
        tensors = load_file(path)
        for name in (name for name in tensors if name.endswith("layers.1.mlp.experts.down_proj_scales")):
            tensors[name][2, 1, 0] = 255
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.experts\.down_proj") as caught:
        quantize_checkpoint(of_random_bytes, tmp_path / "out", "mxfp4")
    assert [offender.expert for offender in caught.value.offenders] == [2]


@pytest.mark.usefixtures("single_rank")
def test_a_live_model_and_a_stream_give_the_same(tiny_gpt_oss_dir: Path, exported: Path, tmp_path: Path) -> None:
    model = load(tiny_gpt_oss_dir)
    stream = dict(export_hf_weights_quant(model, tiny_gpt_oss_dir, quant_format="mxfp4"))
    mtq.quantize(model, quant_cfg("mxfp4", tiny_gpt_oss_dir))
    export_mcore_gpt_to_hf(model, tiny_gpt_oss_dir, export_dir=tmp_path / "live")
    assert_same_export(tmp_path / "live", exported)
    as_quantized = dict(export_hf_weights_quant(model, tiny_gpt_oss_dir, quant_format="as_quantized"))
    for streamed in (stream, as_quantized):
        expected = read(exported)
        assert streamed.keys() == expected.keys()
        assert [name for name in expected if not same_bytes(streamed[name], expected[name])] == []


@pytest.mark.usefixtures("single_rank")
def test_a_training_checkpoint_gives_the_same_as_saved_and_by_name(
    tiny_gpt_oss_dir: Path, exported: Path, tmp_path: Path
) -> None:
    model = mtq.quantize(load(tiny_gpt_oss_dir), quant_cfg("mxfp4", tiny_gpt_oss_dir))
    save_checkpoint(model, tmp_path / "saved", extra={})
    for name in (None, "mxfp4"):
        export_checkpoint(tmp_path / "saved", tmp_path / str(name), tiny_gpt_oss_dir, format=name)
        assert_same_export(tmp_path / str(name), exported)


@pytest.mark.usefixtures("single_rank")
def test_modelopts_recipe_gives_the_same_and_is_refused_for_another_model(
    tiny_gpt_oss_dir: Path, tiny_qwen3_moe_dir: Path, exported: Path, tmp_path: Path
) -> None:
    recipe = recipe_cfg("mxfp4_mlp_weight_only")
    export_mcore_gpt_to_hf(mtq.quantize(load(tiny_gpt_oss_dir), recipe), tiny_gpt_oss_dir, tmp_path / "out")
    assert_same_export(tmp_path / "out", exported)
    other = mtq.quantize(load(tiny_qwen3_moe_dir), recipe)
    with pytest.raises(UnsupportedQuantizationError, match="which servers load in this format of GPT-OSS alone"):
        export_mcore_gpt_to_hf(other, tiny_qwen3_moe_dir, export_dir=tmp_path / "other")


def with_rules(*rules: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(mtq.MXFP4_DEFAULT_CFG)
    return {**config, "quant_cfg": [*config["quant_cfg"], *rules]}


ATTENTION_OFF = {"quantizer_name": "*self_attention*", "enable": False}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "inputs": (with_rules(ATTENTION_OFF), "does not go with its mxfp4 weight"),
    "attention": (with_rules(INPUTS_OFF), "linear weight of no expert"),
    "one layer": (
        with_rules(INPUTS_OFF, ATTENTION_OFF, {"quantizer_name": "*layers.1.mlp*", "enable": False}),
        "experts of other layers are",
    ),
}


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("case", WRONG)
def test_what_no_reader_expects_is_refused(case: str, tiny_gpt_oss_dir: Path, tmp_path: Path) -> None:
    config, words = WRONG[case]
    model = mtq.quantize(load(tiny_gpt_oss_dir), config)
    with pytest.raises(UnsupportedQuantizationError, match=words):
        export_mcore_gpt_to_hf(model, tiny_gpt_oss_dir, export_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_of_one_layer_cannot_be_left_out(tiny_gpt_oss_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedQuantizationError, match="of all layers, or of none"):
        quantize_checkpoint(tiny_gpt_oss_dir, tmp_path / "out", "mxfp4", exclude=["model.layers.1.mlp.experts"])


Refused = Callable[[Path, Path], object]


@pytest.mark.parametrize(
    "refused",
    [
        lambda source, out: quantize_checkpoint(source, out, "mxfp4"),
        lambda source, out: quant_cfg("mxfp4", source),
        lambda source, out: dict(export_hf_weights_quant(load(source), source, quant_format="mxfp4")),
    ],
    ids=["checkpoint", "config", "stream"],
)
@pytest.mark.usefixtures("single_rank")
def test_of_other_architectures_nothing_is_written_in_it(
    refused: Refused, tiny_qwen3_moe_dir: Path, tiny_qwen3_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedQuantizationError, match="which servers load in this format of GPT-OSS alone"):
        refused(tiny_qwen3_moe_dir, tmp_path / "moe")
    with pytest.raises(UnsupportedQuantizationError, match="No linear of the model would be quantized"):
        refused(tiny_qwen3_dir, tmp_path / "dense")
    assert not list(tmp_path.glob("*/*.safetensors"))
