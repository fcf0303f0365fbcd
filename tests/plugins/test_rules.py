"""Rules of a config against the quantizers of real models: `mtq.quantize` says nothing of those that match none."""

import copy
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from modelopt.torch.opt.conversion import ModeloptStateManager

import quantplug.plugins  # noqa: F401  # registers the wrappers
from quantplug.errors import MappingError
from quantplug.plugins.rules.unmatched import judge_rules, refuse_unmatched
from tests.plugins.tiny_model import tiny_model

pytestmark = pytest.mark.usefixtures("single_rank")

NVFP4_WEIGHT = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
DENSE = {"num_moe_experts": None, "moe_ffn_hidden_size": None}
EVERYTHING_OFF = {"quantizer_name": "*", "enable": False}
INPUTS_OFF = {"quantizer_name": "*input_quantizer", "enable": False}


def check_rules(model) -> None:
    """As an export of one rank judges."""
    refuse_unmatched(judge_rules(model))


def quantized(config: dict[str, Any], **overrides: Any) -> GPTModel:
    """A tiny model with its quantizers placed: rules need no calibration."""
    return mtq.quantize(tiny_model(**overrides), {**config, "algorithm": None})


def with_rules(*rules: dict[str, Any]) -> dict[str, Any]:
    return {"quant_cfg": [EVERYTHING_OFF, *rules], "algorithm": None}


def enabling(name: str, **more: Any) -> dict[str, Any]:
    return {"quantizer_name": name, "cfg": NVFP4_WEIGHT, **more}


def disabling(name: str, **more: Any) -> dict[str, Any]:
    return {"quantizer_name": name, "enable": False, **more}


@pytest.mark.parametrize("grouped", [True, False], ids=["TEGroupedMLP", "SequentialMLP"])
@pytest.mark.parametrize(
    "name",
    ["W4A16_NVFP4_CFG", "NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"],
)
def test_stock_configs_match(name: str, grouped: bool) -> None:
    config = copy.deepcopy(getattr(mtq, name))
    config["quant_cfg"].append(INPUTS_OFF)
    check_rules(quantized(config, moe_grouped_gemm=grouped))


@pytest.mark.parametrize("grouped", [True, False], ids=["TEGroupedMLP", "SequentialMLP"])
@pytest.mark.parametrize("name", ["NVFP4_MLP_ONLY_CFG", "NVFP4_EXPERTS_ONLY_CFG"])
def test_stock_rules_for_other_architectures_are_excused(name: str, grouped: bool) -> None:
    check_rules(quantized(getattr(mtq, name), moe_grouped_gemm=grouped))


def test_stock_rules_for_experts_are_not_excused_where_nothing_else_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELOPT_SKIP_WEIGHT_QUANT_CHECK", "1")  # ModelOpt's own check, of all weight rules together.
    with pytest.raises(MappingError) as caught:
        check_rules(quantized(mtq.NVFP4_EXPERTS_ONLY_CFG, **DENSE))
    assert {offender.parameter for offender in caught.value.offenders} == {
        "*.experts.*weight_quantizer",
        "*.experts.*input_quantizer",
        "*block_sparse_moe*weight_quantizer",
        "*block_sparse_moe*input_quantizer",
    }


def test_a_stock_rule_that_knows_no_megatron_names_is_an_error() -> None:
    """NVFP4_OMLP_ONLY_CFG quantizes Hugging Face's o_proj; Megatron's linear_proj would stay as it is in silence."""
    with pytest.raises(MappingError) as caught:
        check_rules(quantized(mtq.NVFP4_OMLP_ONLY_CFG))
    assert {offender.parameter for offender in caught.value.offenders} == {
        "*o_proj*weight_quantizer",
        "*o_proj*input_quantizer",
    }


def test_an_unquantized_model_passes() -> None:
    check_rules(tiny_model())


def test_a_rule_for_grouped_experts_on_sequential_ones() -> None:
    rule = enabling("*mlp.experts.linear_fc1.weight_quantizer.*")
    check_rules(quantized(with_rules(rule)))
    model = quantized(with_rules(enabling("*linear_proj.weight_quantizer"), rule), moe_grouped_gemm=False)
    with pytest.raises(MappingError) as caught:
        check_rules(model)
    (offender,) = caught.value.offenders
    assert offender.parameter == rule["quantizer_name"]
    assert "decoder.layers.*.mlp.experts.local_experts.*.linear_fc1.weight_quantizer" in offender.reason


def test_all_rules_without_a_match_are_named_and_no_others() -> None:
    model = quantized(
        with_rules(
            enabling("*weight_quantizer"),
            enabling("*self_attn.q_proj*"),
            {"quantizer_name": "*o_proj*", "enable": True},
            {"quantizer_name": "*lm_head*", "enable": False},
            disabling("*self_attn.k_proj*"),
        )
    )
    with pytest.raises(MappingError) as caught:
        check_rules(model)
    assert [offender.parameter for offender in caught.value.offenders] == [
        "*self_attn.q_proj*",
        "*o_proj*",
        "*self_attn.k_proj*",
    ]


def test_a_disabling_rule_without_a_match_is_an_error() -> None:
    """What its author wanted left out would be quantized."""
    config = copy.deepcopy(mtq.W4A16_NVFP4_CFG)
    config["quant_cfg"] += [disabling("*nosuchlayer*weight_quantizer"), disabling("*linear_proj.weight_quantizer")]
    with pytest.raises(MappingError, match="is to leave out, but matches nothing") as caught:
        check_rules(quantized(config))
    assert [offender.parameter for offender in caught.value.offenders] == ["*nosuchlayer*weight_quantizer"]


def test_a_disabling_rule_appended_to_a_stock_config_in_place_is_not_excused(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [*mtq.W4A16_NVFP4_CFG["quant_cfg"], disabling("*nosuchlayer*")]
    monkeypatch.setitem(mtq.W4A16_NVFP4_CFG, "quant_cfg", rules)
    with pytest.raises(MappingError, match=r"\*nosuchlayer\*"):
        check_rules(quantized(mtq.W4A16_NVFP4_CFG))


def test_a_stock_disabling_rule_for_one_class_excuses_no_other_class() -> None:
    rules = with_rules(
        enabling("*weight_quantizer"), disabling("*lm_head*", parent_class="te_mcore_RowParallelLinear"), INPUTS_OFF
    )
    with pytest.raises(MappingError, match="in a te_mcore_RowParallelLinear"):
        check_rules(quantized(rules))


def test_a_disabling_rule_excuses_no_enabling_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules for other architectures need something that is quantized beside them."""
    monkeypatch.setenv("MODELOPT_SKIP_WEIGHT_QUANT_CHECK", "1")
    with pytest.raises(MappingError, match="block_sparse_moe"):
        check_rules(quantized(with_rules(enabling("*block_sparse_moe*weight_quantizer"), disabling("*linear_proj*"))))


@pytest.mark.parametrize("name", ["*input_quantizer", "*output_quantizer"])
def test_plain_rules_that_turn_activations_off_are_excused(name: str) -> None:
    model = quantized(with_rules(enabling("*weight_quantizer"), disabling(name)))
    for module_name, _ in list(model.named_modules()):
        if module_name.endswith(name[1:]):
            delattr(model.get_submodule(module_name.rpartition(".")[0]), name[1:])
    check_rules(model)


def test_one_expert_matches_as_modelopt_compares() -> None:
    check_rules(quantized(with_rules(enabling("*linear_fc1.weight_quantizer.7"), enabling("*linear_fc2.weight_quan*"))))
    with pytest.raises(MappingError, match=r"weight_quantizer\.8"):
        check_rules(quantized(with_rules(enabling("*proj.weight_quantizer"), enabling("*.weight_quantizer.8"))))


def test_a_parent_class_is_part_of_the_match() -> None:
    everywhere = enabling("*weight_quantizer", parent_class="te_mcore_RowParallelLinear")
    check_rules(quantized(with_rules(everywhere)))
    nowhere = enabling("*linear_qkv.weight_quantizer", parent_class="te_mcore_RowParallelLinear")
    with pytest.raises(MappingError, match="in a te_mcore_RowParallelLinear"):
        check_rules(quantized(with_rules(everywhere, nowhere)))


def test_one_match_in_one_virtual_stage_is_enough() -> None:
    rules = with_rules(enabling("*mlp.linear_fc1.weight_quantizer"), enabling("*linear_qkv.weight_quantizer"))
    dense, experts = quantized(rules, **DENSE), quantized(rules)
    check_rules([experts, dense])
    with pytest.raises(MappingError, match=r"\*mlp\.linear_fc1"):
        check_rules([experts, experts])


def test_a_model_that_was_quantized_before_it_was_wrapped() -> None:
    model = quantized(with_rules(enabling("decoder.layers.*.linear_qkv.weight_quantizer")))
    wrapped = Float16Module(model.config, model)
    assert next(iter(wrapped.named_modules()))[1] is wrapped
    check_rules(wrapped)


def test_judging_changes_nothing() -> None:
    model = quantized(mtq.W4A16_NVFP4_CFG)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    state = copy.deepcopy(ModeloptStateManager(model).state_dict())
    check_rules(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert str(ModeloptStateManager(model).state_dict()) == str(state)


def test_a_rule_that_matches_on_another_rank_passes() -> None:
    """Two pipeline stages over ranks: each judges what it holds, and one match is enough."""
    rules = with_rules(enabling("*mlp.experts.linear_fc1.weight_quantizer"), enabling("*linear_qkv.weight_quantizer"))
    experts, dense = quantized(rules), quantized(rules, **DENSE)
    refuse_unmatched([*judge_rules(dense), *judge_rules(experts)])
    with pytest.raises(MappingError, match="linear_fc1"):
        refuse_unmatched([*judge_rules(dense), *judge_rules(dense)])
