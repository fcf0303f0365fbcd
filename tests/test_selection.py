"""The one policy of what is quantized, and what to leave out together."""

import shlex
from dataclasses import replace

import pytest

from quantplug.errors import MappingError, QuantplugError, UnsupportedQuantizationError
from quantplug.mappings.families import find_family
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions, Option
from quantplug.mappings.table import Family
from quantplug.selection.advice import LeaveOut, by_checker, by_exclude, by_rules, by_rules_of_pairs
from quantplug.selection.exclude import excluding
from quantplug.selection.policy import Policy, Reason, decide, quantized
from tests.export.refusals import offenders

MOE = ModelDimensions(2, 160, 4, 2, 48, vocab_size=523, num_experts=3, moe_layers=(0, 1))
QWEN3_MOE, GPT_OSS = (find_family(name) for name in ("Qwen3MoeForCausalLM", "GptOssForCausalLM"))
EXPERTS = "model.layers.0.mlp.experts"


def chosen(family: Family, *exclude: str) -> frozenset[ParamKey]:
    decisions = decide((key for _, key in family.expected(MOE)), family, Policy(weight_bits=4))
    return frozenset(quantized(excluding(decisions, exclude, family, MOE)))


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
        (QWEN3_MOE, [f"{EXPERTS}.0.*"], UnsupportedQuantizationError, {(f"{EXPERTS}.2.down_proj", 2)}),
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


@pytest.mark.parametrize(
    ("family", "exclude", "advised"),
    [
        (
            QWEN3_MOE,
            ["model.layers.1.self_attn.k_proj"],
            [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"],
        ),
        (QWEN3_MOE, ["*.q_proj"], [f"model.layers.*.self_attn.{name}_proj" for name in "qkv"]),
        (QWEN3_MOE, [f"{EXPERTS}.2.up_proj"], [f"{EXPERTS}.*"]),
        (QWEN3_MOE, ["*.experts.1.*"], ["model.layers.*.mlp.experts.*"]),
        (GPT_OSS, [f"{EXPERTS}.down_proj"], [EXPERTS]),
    ],
)
def test_the_advice_is_all_that_is_fused_and_no_more(family: Family, exclude: list[str], advised: list[str]) -> None:
    with pytest.raises(UnsupportedQuantizationError) as caught:
        chosen(family, *exclude)
    words = shlex.split(caught.value.remedy)
    assert [word for word in words if word.startswith("model.")] == advised
    assert words.count("--exclude") == len(advised)


@pytest.mark.parametrize(
    ("advice", "numbers"), [(by_rules, ("1", "1")), (by_rules_of_pairs, ("2", "3"))], ids=["GPTModel", "HybridModel"]
)
def test_rules_name_the_layers_that_the_model_has(advice: LeaveOut, numbers: tuple[str, str]) -> None:
    """Attention and experts of layer 1, of which a HybridModel makes its layers 2 and 3."""
    rows = quantized(decide((key for _, key in QWEN3_MOE.expected(MOE)), QWEN3_MOE, Policy(weight_bits=4)))
    attention = ParamKey("decoder.layers.*.self_attention.linear_proj.weight", 1)
    expert = ParamKey("decoder.layers.*.mlp.experts.linear_fc2.weight*", 1, 0)

    said = advice([attention, expert], rows, MOE)

    assert f"'*decoder.layers.{numbers[0]}.self_attention.linear_proj.*_quantizer*'" in said
    assert f"'*decoder.layers.{numbers[1]}.mlp.experts.*_quantizer*'" in said


def test_a_format_that_fits_no_linear_is_not_advised_with_excludes() -> None:
    rows = quantized(decide((key for _, key in QWEN3_MOE.expected(MOE)), QWEN3_MOE, Policy(weight_bits=4)))
    for advice in (by_exclude, by_rules, by_checker):
        assert advice(rows, rows, MOE).startswith("Choose another format")


def test_every_decision_says_why() -> None:
    """What is not quantized, by Megatron's name, and the reason: data of the rows, whatever the architecture."""
    family = find_family("DeepseekV3ForCausalLM")
    dims = replace(MOE, mtp_layers=1, options=frozenset({Option.QUERY_LATENT}))
    decisions = decide((key for _, key in family.expected(dims)), family, Policy(weight_bits=4))
    reasons = {key.module.rpartition("layers.*.")[2]: it.kept and it.kept.reason for key, it in decisions.items()}
    assert reasons["self_attention.linear_kv_up_proj.weight"] is Reason.BITS
    assert reasons["self_attention.linear_kv_down_proj.weight"] is None
    assert reasons["eh_proj.weight"] is Reason.ROLE
    assert reasons["transformer_layer.mlp.experts.linear_fc1.weight*"] is Reason.MTP
    assert reasons["transformer_layer.self_attention.linear_kv_up_proj.weight"] is Reason.BITS
    assert all(it.kept is None or it.kept.words for it in decisions.values())
