"""Names and patterns of modules that stay as they are."""

import pytest
import torch

from quantplug.errors import MappingError, QuantplugError, UnsupportedQuantizationError
from quantplug.export.plan.exclude import chosen_weights
from quantplug.export.plan.types import WholeWeight
from quantplug.mappings.families import find_family
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import Family, ParamKey
from tests.export.refusals import offenders

MOE = ModelDimensions(2, 160, 4, 2, 48, vocab_size=523, num_experts=3, moe_layers=(0, 1))
QWEN3_MOE, GPT_OSS = (find_family(name) for name in ("Qwen3MoeForCausalLM", "GptOssForCausalLM"))
EXPERTS = "model.layers.0.mlp.experts"


def chosen(family: Family, *exclude: str) -> frozenset[ParamKey]:
    weights = [WholeWeight(key, (1, 1), torch.bfloat16) for _, key in family.expected(MOE)]
    return chosen_weights(weights, family, MOE, exclude)


def left_out(family: Family, *exclude: str) -> set[str]:
    table = family.by_megatron()
    keys = chosen(family) - chosen(family, *exclude)
    return {name for key in keys for name in table[key.module].hf_names(key, MOE)}


def test_linears_are_quantized_and_nothing_else() -> None:
    modules = {key.module.removeprefix("decoder.layers.*.") for key in chosen(QWEN3_MOE)}
    assert modules == {
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
        "mlp.experts.linear_fc1.weight*",
        "mlp.experts.linear_fc2.weight*",
    }


def test_an_exact_name_is_one_module() -> None:
    name = "model.layers.1.self_attn.o_proj"
    assert left_out(QWEN3_MOE, name) == {f"{name}.weight"}


def test_a_pattern_is_every_module_that_it_matches() -> None:
    assert left_out(QWEN3_MOE, "*.o_proj") == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)}
    assert len(left_out(QWEN3_MOE, f"{EXPERTS}.*")) == 3 * 3
    assert len(left_out(QWEN3_MOE, "model.layers.1.self_attn.[qkv]_proj")) == 3


def test_fused_experts_go_by_the_name_of_their_module() -> None:
    assert left_out(GPT_OSS, EXPERTS) == {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    assert left_out(GPT_OSS, f"{EXPERTS}.*") == left_out(GPT_OSS, EXPERTS)


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens", "model.layers.0.mlp.gate"])
def test_what_stays_in_any_case_may_be_named(name: str) -> None:
    assert left_out(QWEN3_MOE, name) == set()


@pytest.mark.parametrize(
    ("family", "exclude", "kind", "named"),
    [
        (QWEN3_MOE, ["model.layers.2.*"], MappingError, {("model.layers.2.*", None)}),
        (QWEN3_MOE, ["o_proj", "*.o_proj"], MappingError, {("o_proj", None)}),
        (QWEN3_MOE, ["model.norm"], MappingError, {("model.norm", None)}),
        (QWEN3_MOE, ["*.o_proj.weight"], MappingError, {("*.o_proj.weight", None)}),
        (
            QWEN3_MOE,
            ["model.layers.1.self_attn.k_proj"],
            UnsupportedQuantizationError,
            {(f"model.layers.1.self_attn.{name}_proj", None) for name in "qv"},
        ),
        (QWEN3_MOE, [f"{EXPERTS}.*.gate_proj"], UnsupportedQuantizationError, {(f"{EXPERTS}.1.up_proj", 1)}),
        (QWEN3_MOE, [f"{EXPERTS}.0.*"], UnsupportedQuantizationError, {(f"{EXPERTS}.2.down_proj.weight", 2)}),
        (QWEN3_MOE, [f"{EXPERTS}.*.down_proj"], UnsupportedQuantizationError, set()),
        (GPT_OSS, [f"{EXPERTS}.down_proj"], UnsupportedQuantizationError, {(f"{EXPERTS}.gate_up_proj", 1)}),
        (QWEN3_MOE, ["*"], UnsupportedQuantizationError, {("exclude", None)}),
    ],
)
def test_what_cannot_be_excluded_is_named(
    family: Family, exclude: list[str], kind: type[QuantplugError], named: set[tuple[str, int | None]]
) -> None:
    with pytest.raises(QuantplugError) as caught:
        chosen(family, *exclude)
    assert type(caught.value) is kind
    assert caught.value.remedy
    assert named <= offenders(caught)
