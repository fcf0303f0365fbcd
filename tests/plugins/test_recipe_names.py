"""Names of ModelOpt's recipes in Megatron-Core's words."""

import pytest

from quantplug.plugins.rules.recipe_names import in_megatron, meaning

NAMES = {
    "*o_proj*weight_quantizer": "*linear_proj*weight_quantizer",
    "*self_attn.q_proj.input_quantizer": "*self_attention.linear_qkv.input_quantizer",
    "*linear_attn.in_proj_qkv*weight_quantizer": "*self_attention.in_proj*weight_quantizer",
    "*linear_attn.in_proj_z*weight_quantizer": "*self_attention.in_proj*weight_quantizer",
    "*linear_attn.out_proj*": "*self_attention.out_proj*",
    # A part of `in_proj` in Megatron-Core, which keeps it plain: as a rule of all of it, it would say something else.
    "*linear_attn.in_proj_a*": "*linear_attn.in_proj_a*",
    "*language_model*mlp.experts.*weight_quantizer": "*mlp.experts.*weight_quantizer",
    "*mixer.shared_experts.*input_quantizer": "*mlp.shared_experts.*input_quantizer",
    "*mixer.in_proj*weight_quantizer": "*mixer.in_proj*weight_quantizer",
    "*.mixer.down_proj.weight_quantizer": "*.mixer.down_proj.weight_quantizer",
    "*layers.12.mixer.down_proj*weight_quantizer": "*layers.12.mlp.linear_fc2*weight_quantizer",
    "*layers.7.mixer.o_proj*": "*layers.7.self_attention.linear_proj*",
    "lm_head.weight_quantizer": "output_layer.weight_quantizer",
    "*kv_o_proj*": "*kv_o_proj*",
    "*q_a_proj*": "*q_a_proj*",
}


@pytest.mark.parametrize("name", NAMES)
def test_in_megatron(name: str) -> None:
    assert in_megatron(name) == NAMES[name]
    # What is said in Megatron-Core's words stays.
    assert in_megatron(NAMES[name]) == NAMES[name]


def test_two_names_of_the_same_quantizers() -> None:
    assert meaning("*mixer.experts.*weight_quantizer") == meaning("*mlp.experts*weight_quantizer")
    assert meaning("*mixer.experts.*weight_quantizer") != meaning("*mlp.experts*input_quantizer")
    assert meaning("*lm_head*") == meaning("*output_layer*")
