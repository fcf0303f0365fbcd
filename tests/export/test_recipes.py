"""Recipes and presets: straight from a checkpoint the bytes of a live model that ModelOpt quantized by its own."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import modelopt_recipes
import pytest
import torch
from modelopt.recipe import load_recipe

from quantplug import export_mcore_gpt_to_hf, plan_export, quant_cfg, quantize_checkpoint, recipe_cfg
from quantplug.errors import ArgumentError, MappingError, QuantplugError, UnsupportedQuantizationError
from quantplug.recipes import RECIPES
from quantplug.verify import verify_checkpoint
from tests.export.checkpoints import assert_same_export, load, read
from tests.export.refusals import refused
from tests.families.cases import make
from tests.made_once import MadeOnce

pytestmark = pytest.mark.usefixtures("single_rank")

Sources = Callable[[str], Path]


GENERAL = Path(modelopt_recipes.__file__).parent / "general" / "ptq"

# Why the rest of ModelOpt's general recipes cannot be planned: what no server reads, or we do not write.
REFUSED = {
    "mxfp4_mlp_weight_only": "No server loads these weights in this format",
    "nvfp4_mlp_weight_only": "block_sizes={-1: 32}",
}


def divided_by(recipe: str, sources: Sources) -> Path:
    """A model whose linears the recipe's groups divide."""
    return sources("moe_blocks" if "int4" in recipe else "moe")


@pytest.mark.parametrize("recipe", sorted(path.stem for path in GENERAL.glob("*.yaml")))
def test_each_of_modelopts_general_recipes_is_planned_or_refused(recipe: str, sources: Sources) -> None:
    source = divided_by(recipe, sources)
    model = mtq.quantize(load(source), {**recipe_cfg(recipe), "algorithm": None})
    if recipe in REFUSED:
        with pytest.raises(UnsupportedQuantizationError) as caught:
            plan_export(model, source, calibrated=False)
        assert REFUSED[recipe] in str(caught.value)
    else:
        plan = plan_export(model, source, calibrated=False).plan
        packed = {part.name for task in plan.tasks for part in task.outputs if part.format is not None}
        leaves_out_o_proj = "experts_only" in recipe or "_mlp_only" in recipe
        assert any(".o_proj." in name for name in packed) is not leaves_out_o_proj


@pytest.mark.parametrize("recipe", ["no_such_recipe", "general/qad/nvfp4_default-kv_fp8", "../x.yaml"])
def test_a_recipe_that_is_none(recipe: str) -> None:
    with pytest.raises(ArgumentError, match="recipe"):
        recipe_cfg(recipe)


def test_hugging_face_names_become_megatrons(tmp_path: Path) -> None:
    names = ("*o_proj*weight_quantizer", "*q_proj.weight_quantizer", "*.k_proj.weight_quantizer", "*lm_head*")
    rules = [{"quantizer_name": name, "enable": False} for name in (*names, "*kv_o_proj*", "*q_a_proj*")]
    (tmp_path / "own.yaml").write_text(
        json.dumps({"metadata": {"recipe_type": "ptq"}, "quantize": {"quant_cfg": rules}})
    )
    found = [rule["quantizer_name"] for rule in recipe_cfg(tmp_path / "own.yaml")["quant_cfg"]]
    translated = ["*linear_proj*weight_quantizer", "*linear_qkv.weight_quantizer", "*.linear_qkv.weight_quantizer"]
    assert found == [*translated, "*output_layer*", "*kv_o_proj*", "*q_a_proj*"]


VENDORS = Path(modelopt_recipes.__file__).parent
NEMOTRON, QWEN = "models/nvidia/NVIDIA-Nemotron-", "huggingface/qwen3_5"
# Recipes that NVIDIA has for models of these families: the formats that they give to them, or why they are refused.
OF_MODELS = {
    f"{NEMOTRON}3-Super-120B-A12B-BF16/ptq/nvfp4-max-calib.yaml": ("nemotron_h_moe", {"nvfp4", "fp8"}),
    f"{NEMOTRON}3-Super-120B-A12B-BF16/ptq/nvfp4-mse.yaml": ("nemotron_h_moe", {"nvfp4", "fp8"}),
    f"{NEMOTRON}3-Ultra-550B-A55B-BF16/ptq/nvfp4-4o6.yaml": ("nemotron_h_moe", {"nvfp4", "fp8"}),
    # Whose output layer is quantized too.
    f"{NEMOTRON}3.5-Lightning-30B-A3B-BF16/ptq/w4a16_nvfp4_4o6.yaml": ("nemotron_h_moe", {"w4a16_nvfp4", "fp8"}),
    f"{QWEN}_moe/ptq/nvfp4_experts_mse-fp8_rest-kv_fp8.yaml": ("qwen3_5_moe", {"nvfp4", "fp8"}),
    f"{QWEN}_moe/ptq/w4a16_nvfp4-fp8_attn-kv_fp8_cast.yaml": ("qwen3_5_moe", {"w4a16_nvfp4", "fp8"}),
    f"{QWEN}/ptq/w4a16_nvfp4-fp8_attn-kv_fp8_cast.yaml": ("qwen3_5", "output_layer.weight_quantizer: is enabled"),
    # Its rules name layers by number, which a model of that size has.
    f"{NEMOTRON}3-Nano-4B-BF16/ptq/nvfp4_w4a16.yaml": ("nemotron_h", "*layers.3.mlp.linear_fc2*weight_quantizer"),
}


@pytest.mark.parametrize("recipe", OF_MODELS)
def test_recipes_for_a_model_are_planned_or_refused(recipe: str, made_once: MadeOnce) -> None:
    name, expected = OF_MODELS[recipe]
    source = made_once(f"family_{name}", partial(make, name))
    model = mtq.quantize(load(source), {**recipe_cfg(VENDORS / recipe), "algorithm": None})
    if isinstance(expected, str):
        with pytest.raises(QuantplugError) as caught:
            plan_export(model, source, calibrated=False)
        assert any(str(offender).startswith(expected) for offender in caught.value.offenders)
    else:
        plan = plan_export(model, source, calibrated=False).plan
        assert {str(task.scheme.format) for task in plan.tasks if task.scheme} == expected


def test_a_rule_by_the_other_name_of_what_a_model_has_may_match_nothing(made_once: MadeOnce) -> None:
    """NVIDIA's own file lists Hugging Face's names beside Megatron-Core's, for its own exporter and loader."""
    source = made_once("family_nemotron_h_moe", partial(make, "nemotron_h_moe"))
    quantize = load_recipe(str(VENDORS / NEMOTRON) + "3-Super-120B-A12B-BF16/ptq/nvfp4-max-calib.yaml").quantize
    config = {"quant_cfg": [*quantize.model_dump()["quant_cfg"]], "algorithm": None}
    plan = plan_export(mtq.quantize(load(source), config), source, calibrated=False).plan
    assert {str(task.scheme.format) for task in plan.tasks if task.scheme} == {"nvfp4", "fp8"}
    # Of another setting it says something else, which then nothing says.
    for rule in config["quant_cfg"]:
        if rule["quantizer_name"] == "*mixer.experts.*weight_quantizer":
            rule["cfg"] = {"num_bits": (4, 3)}
    with pytest.raises(MappingError, match=r"mixer\.experts"):
        plan_export(mtq.quantize(load(source), config), source, calibrated=False)


def modelopts(recipe: str) -> dict[str, Any]:
    quantize = load_recipe(str(GENERAL / f"{recipe}.yaml")).quantize
    return {"quant_cfg": quantize.quant_cfg, "algorithm": "max"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_without_data_is_modelopt_s(recipe: str, sources: Sources, tmp_path: Path) -> None:
    source = divided_by(recipe, sources)
    model = mtq.quantize(load(source), modelopts(recipe))
    export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "live")
    asked = RECIPES[recipe]
    quantize_checkpoint(
        source,
        tmp_path / "direct",
        asked.format,
        preset=asked.preset,
        input_scale=asked.input_scale,
        kv_cache=asked.kv_cache,
    )
    assert_same_export(tmp_path / "direct", tmp_path / "live")
    assert verify_checkpoint(tmp_path / "direct", source).ok


# Which Hugging Face modules of a layer a preset packs, by hand: a model with dense layers, shared experts and MLA.
GATED = ("gate_proj", "up_proj", "down_proj")
EXPERTS = {f"mlp.experts.N.{linear}" for linear in GATED}
MLP = EXPERTS | {f"mlp.{linear}" for linear in GATED} | {f"mlp.shared_experts.{linear}" for linear in GATED}
PACKED = {"experts_only": EXPERTS, "mlp_only": MLP, "omlp_only": MLP | {"self_attn.o_proj"}}


@pytest.mark.parametrize("preset", PACKED)
def test_a_preset_packs_the_same_in_both_ways(preset: str, sources: Sources, tmp_path: Path) -> None:
    source = sources("latent_blocks")
    quantize_checkpoint(source, tmp_path / "direct", "w4a16_nvfp4", preset=preset)
    tensors = read(tmp_path / "direct")
    packed = {name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dtype == torch.uint8}
    assert {re.sub(r"experts\.\d+", "experts.N", name.split(".", 3)[3]) for name in packed} == PACKED[preset]
    model = mtq.quantize(load(source), quant_cfg("w4a16_nvfp4", source, preset=preset))
    export_mcore_gpt_to_hf(model, source, export_dir=tmp_path / "live")
    assert_same_export(tmp_path / "direct", tmp_path / "live")
    assert verify_checkpoint(tmp_path / "direct", source).ok


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan"), 1e-60])
def test_an_input_scale_is_a_number_above_0(scale: float, sources: Sources, tmp_path: Path) -> None:
    with refused(ArgumentError, tmp_path):
        quantize_checkpoint(sources("moe"), tmp_path / "out", "nvfp4", input_scale=scale)


def test_an_input_scale_needs_a_format_with_inputs(sources: Sources, tmp_path: Path) -> None:
    with refused(ArgumentError, tmp_path):
        quantize_checkpoint(sources("moe"), tmp_path / "out", "w4a16_nvfp4", input_scale=1.0)


def test_a_preset_that_is_none(sources: Sources, tmp_path: Path) -> None:
    with refused(ArgumentError, tmp_path):
        quantize_checkpoint(sources("moe"), tmp_path / "out", "w4a16_nvfp4", preset="attention_only")
