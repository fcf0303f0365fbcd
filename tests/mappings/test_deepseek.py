"""DeepSeek-V2, DeepSeek-V3 and GLM-4.5: configs in Megatron's words, and what Megatron would compute otherwise."""

from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, Glm4MoeConfig

from quantplug.errors import UnsupportedModelError
from quantplug.mappings.families import find_family
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import LatentSizes
from quantplug.mappings.rows import LayerStack
from quantplug.mappings.table import MegatronConfig

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096}
KINDS = {"DeepseekV2": DeepseekV2Config, "DeepseekV3": DeepseekV3Config, "Glm4Moe": Glm4MoeConfig}


def config_of(kind: str, **settings) -> dict:
    """transformers' defaults, which are the large models', and some settings."""
    needed = {"num_experts_per_tok": 6, "first_k_dense_replace": 1} if kind == "DeepseekV2" else {}
    return {**KINDS[kind]().to_dict(), **needed, **settings}


def converted(kind: str, **settings) -> MegatronConfig:
    return find_family(f"{kind}ForCausalLM").megatron_config(config_of(kind, **settings))


def refused(kind: str, **settings) -> set[str]:
    with pytest.raises(UnsupportedModelError) as caught:
        converted(kind, **settings)
    return {offender.parameter for offender in caught.value.offenders}


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_are_converted(kind):
    assert converted(kind).transformer["num_moe_experts"] == config_of(kind)["n_routed_experts"]


def test_sizes_of_latent_attention():
    dims = find_family("DeepseekV3ForCausalLM").dimensions(config_of("DeepseekV3"))
    assert dims.latent == LatentSizes(query_rank=1536, key_value_rank=512, rotary_dim=64, value_dim=128)
    assert (dims.head_dim, dims.num_query_groups, dims.shared_width, dims.mtp_layers) == (192, 128, 2048, 1)
    assert dims.moe_layers == tuple(range(3, 61))


@pytest.mark.parametrize(("rank", "rows"), [(96, {"q_a_proj", "q_a_layernorm", "q_b_proj"}), (None, {"q_proj"})])
def test_queries_have_a_latent_or_not(rank, rows):
    family = find_family("DeepseekV2ForCausalLM")
    dims = family.dimensions(config_of("DeepseekV2", q_lora_rank=rank))
    names = {name.split(".")[4] for parts, _ in family.expected(dims) for name in parts if ".self_attn.q_" in name}
    assert names == rows


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("normed", [True, False])
def test_options_of_glm(biased, normed):
    family = find_family("Glm4MoeForCausalLM")
    settings = {"attention_bias": biased, "use_qk_norm": normed}
    dims = family.dimensions(config_of("Glm4Moe", **settings))
    names = {name for parts, _ in family.expected(dims) for name in parts}
    for layer in (0, 46):  # The decoder's first, and the MTP layer.
        assert (f"model.layers.{layer}.self_attn.k_proj.bias" in names) is biased
        assert (f"model.layers.{layer}.self_attn.k_norm.weight" in names) is normed
    transformer = converted("Glm4Moe", **settings).transformer
    assert (transformer["add_qkv_bias"], transformer["qk_layernorm"]) == (biased, normed)


def test_glm_rotates_a_part_of_each_head():
    rope = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    assert converted("Glm4Moe", rope_parameters=rope).model["rotary_percent"] == 0.25
    assert converted("Glm4Moe").model["rotary_percent"] == 0.5


@pytest.mark.parametrize("kind", ["DeepseekV3", "Glm4Moe"])
@pytest.mark.parametrize("inner", ["transformer_layer", "mtp_model_layer"])
def test_both_of_megatrons_names_of_the_mtp_layer_are_known(kind, inner):
    family = find_family(f"{kind}ForCausalLM")
    dims = family.dimensions(config_of(kind))
    row = family.by_megatron()[f"mtp.layers.*.{inner}.mlp.experts.linear_fc2.weight*"]
    key = ParamKey(f"mtp.layers.*.{inner}.mlp.experts.linear_fc2.weight*", 0, 5)
    assert row.block is LayerStack.MTP
    assert row.hf_names(key, dims) == (f"model.layers.{dims.num_layers}.mlp.experts.5.down_proj.weight",)


def test_mtp_rows_are_those_of_the_decoder_and_four_of_its_own():
    mappings = find_family("DeepseekV3ForCausalLM").mappings
    decoder = {row.hf for row in mappings if row.block is LayerStack.DECODER and "layers" in row.hf[0]}
    mtp = {row.hf for row in mappings if row.block is LayerStack.MTP}
    own = {("enorm",), ("hnorm",), ("eh_proj",), ("shared_head.norm",)}
    assert decoder < mtp
    assert mtp - decoder == {(f"model.layers.*.{name}.weight",) for (name,) in own}


@pytest.mark.parametrize("kind", ["DeepseekV3", "Glm4Moe"])
def test_a_model_without_mtp(kind):
    family = find_family(f"{kind}ForCausalLM")
    config = config_of(kind, num_nextn_predict_layers=0)
    dims = family.dimensions(config)
    assert not [key for _, key in family.expected(dims) if key.stack == "mtp"]
    assert family.duplicates(dims) == {}
    assert family.megatron_config(config).transformer["mtp_num_layers"] is None


def test_copies_are_named_for_every_mtp_layer():
    family = find_family("DeepseekV3ForCausalLM")
    dims = replace(family.dimensions(config_of("DeepseekV3")), mtp_layers=2)
    assert family.duplicates(dims) == {
        f"model.layers.{layer}.{copy}.weight": original
        for layer in (61, 62)
        for copy, original in (("embed_tokens", "model.embed_tokens.weight"), ("shared_head.head", "lm_head.weight"))
    }


def test_the_correction_bias_is_f32_on_disk():
    table = find_family("DeepseekV3ForCausalLM").by_megatron()
    assert table["decoder.layers.*.mlp.router.expert_bias"].dtype is torch.float32
    assert table["decoder.layers.*.mlp.router.weight"].dtype is None


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 0.7}, (1.0, 0.7)),
        ({"mscale": 0.7}, (1.0, 0.0)),
        ({}, (1.0, 0.0)),
    ],
)
def test_yarn(scaling, expected):
    transformer = converted("DeepseekV3", rope_parameters={**YARN, **scaling}).transformer
    assert (transformer["mscale"], transformer["mscale_all_dim"]) == expected
    assert (transformer["rope_type"], transformer["rotary_scaling_factor"]) == ("yarn", 40.0)
    assert (transformer["beta_fast"], transformer["beta_slow"]) == (32, 1)


def test_yarn_without_a_factor_takes_that_of_the_lengths():
    scaling = {**YARN, "factor": None, "original_max_position_embeddings": 1024}
    transformer = converted("DeepseekV3", rope_parameters=scaling, max_position_embeddings=4096).transformer
    assert transformer["rotary_scaling_factor"] == 4.0


def test_groups_of_experts():
    transformer = converted("DeepseekV3").transformer
    assert (transformer["moe_router_num_groups"], transformer["moe_router_group_topk"]) == (8, 4)
    assert "moe_router_num_groups" not in converted("DeepseekV3", n_group=4, topk_group=4).transformer
    assert "moe_router_num_groups" not in converted("DeepseekV2", n_group=8, topk_group=3).transformer
    assert "moe_router_num_groups" not in converted("Glm4Moe").transformer


LATENT_REFUSALS = {
    "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    "attention_bias": True,
    "num_key_value_heads": 1,
    "rope_interleave": False,
}
LATENT_NAMES = {"rope_type", "attention_bias", "num_key_value_heads", "rope_interleave"}
MOE_REFUSALS = {"hidden_act": "gelu", "moe_layer_freq": 2, "n_shared_experts": 0, "first_k_dense_replace": 100}
MOE_NAMES = {"hidden_act", "moe_layer_freq", "n_shared_experts > 0", "first_k_dense_replace < num_hidden_layers"}
ROUTER_REFUSALS = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False, "n_group": 8}
ROUTER_NAMES = {"scoring_func", "topk_method", "norm_topk_prob", "num_experts_per_tok // topk_group"}


def test_deepseek_v3_names_all_settings_that_megatron_would_compute_otherwise():
    settings = {**LATENT_REFUSALS, **MOE_REFUSALS, **ROUTER_REFUSALS, "topk_group": 3, "num_experts_per_tok": 9}
    assert refused("DeepseekV3", **settings) == LATENT_NAMES | MOE_NAMES | ROUTER_NAMES


def test_glm_names_all_settings_that_megatron_would_compute_otherwise():
    settings = {**MOE_REFUSALS, **ROUTER_REFUSALS, "topk_group": 3, "num_experts_per_tok": 9}
    linear = {"rope_type": "linear", "factor": 2.0}
    assert refused("Glm4Moe", **settings, rope_parameters=linear) == {"rope_type"} | MOE_NAMES | ROUTER_NAMES


def test_deepseek_v2_names_all_settings_that_megatron_would_compute_otherwise():
    """The last one is that of DeepSeek-V2 with 236 B parameters: top 6 of 3 groups, by the best of each."""
    settings = {
        **LATENT_REFUSALS,
        **MOE_REFUSALS,
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "mlp_bias": True,
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
    }
    own = {"scoring_func", "norm_topk_prob", "mlp_bias", "num_experts_per_tok // topk_group"}
    assert refused("DeepseekV2", **settings) == LATENT_NAMES | MOE_NAMES | own
    assert refused("DeepseekV2", topk_method="noaux_tc") == {"topk_method"}


def test_yarn_that_megatron_would_compute_otherwise():
    scaling = {**YARN, "attention_factor": 1.5, "truncate": False, "mscale_all_dim": 0.7}
    names = {"attention_factor", "truncate", "mscale_all_dim without mscale"}
    assert refused("DeepseekV3", rope_parameters=scaling) == names


def test_the_one_score_of_a_token_is_not_normalised_by_megatron():
    assert refused("Glm4Moe", num_experts_per_tok=1, norm_topk_prob=True) == {"norm_topk_prob"}
    assert converted("Glm4Moe", num_experts_per_tok=1, norm_topk_prob=False).transformer["moe_router_topk"] == 1
