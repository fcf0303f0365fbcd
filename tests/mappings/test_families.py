"""The tables against transformers: names, shapes and config of models that transformers itself builds."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from quantplug.errors import UnsupportedModelError
from quantplug.mappings.families import FAMILIES, find_family

SMALL = {
    "vocab_size": 523,
    "hidden_size": 160,
    "intermediate_size": 224,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
}
MOE = {
    **SMALL,
    "moe_intermediate_size": 96,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
}


def config_of(kind: type, **settings):
    config = kind(**settings)
    config.architectures = [{Qwen3Config: "Qwen3ForCausalLM", Qwen3MoeConfig: "Qwen3MoeForCausalLM"}[kind]]
    return config


@pytest.mark.parametrize("kind", [Qwen3Config, Qwen3MoeConfig])
@pytest.mark.parametrize("tied", [False, True])
def test_the_table_names_every_tensor_that_transformers_saves(kind, tied, tmp_path):
    settings = MOE if kind is Qwen3MoeConfig else SMALL
    config = config_of(kind, **settings, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = set(file.keys())

    family = find_family(config.architectures[0])
    dims = family.dimensions(AutoConfig.from_pretrained(tmp_path).to_dict())
    named = {name for row in family.mappings for key in row.keys(dims) for name in row.hf_names(key, dims)}
    assert named - (set(family.tied) if tied else set()) == saved


def test_dense_layers_of_a_moe_model_have_no_experts():
    config = config_of(Qwen3MoeConfig, **MOE).to_dict()
    assert find_family("Qwen3MoeForCausalLM").dimensions(config).moe_layers == (0, 2)
    assert find_family("Qwen3MoeForCausalLM").megatron_config(config).transformer["moe_layer_freq"] == [1, 0, 1]


@pytest.mark.parametrize("normalised", [True, False])
def test_norm_topk_prob_decides_where_the_softmax_is(normalised):
    config = config_of(Qwen3MoeConfig, **MOE, norm_topk_prob=normalised).to_dict()
    transformer = find_family("Qwen3MoeForCausalLM").megatron_config(config).transformer
    assert transformer["moe_router_pre_softmax"] is not normalised


def test_head_dim_and_key_value_heads_fall_back_to_the_head_count():
    config = {**SMALL, "num_key_value_heads": None, "head_dim": None}
    dims = find_family("Qwen3ForCausalLM").dimensions(config)
    assert (dims.head_dim, dims.num_query_groups) == (40, 4)


@pytest.mark.parametrize("spelling", [{"rope_parameters": {"rope_theta": 5e5}}, {"rope_theta": 5e5}])
def test_the_rotary_base_is_found_in_either_spelling(spelling):
    config = {**SMALL, "rms_norm_eps": 1e-6, "max_position_embeddings": 64, **spelling}
    assert find_family("Qwen3ForCausalLM").megatron_config(config).model["rotary_base"] == 5e5


def test_settings_that_megatron_would_compute_otherwise_are_refused_all_at_once():
    config = {
        **SMALL,
        "rope_scaling": {"type": "yarn", "factor": 4.0},
        "attention_bias": True,
        "use_sliding_window": True,
        "hidden_act": "gelu",
    }
    with pytest.raises(UnsupportedModelError) as caught:
        find_family("Qwen3ForCausalLM").megatron_config(config)
    settings = {offender.parameter for offender in caught.value.offenders}
    assert settings == {"rope_type", "attention_bias", "use_sliding_window", "hidden_act"}


def test_an_unknown_architecture_is_refused_with_the_list_of_known_ones():
    with pytest.raises(UnsupportedModelError, match=r"Use one of: .*Qwen3ForCausalLM, Qwen3MoeForCausalLM") as caught:
        find_family("Qwen3MoEForCausalLM")
    assert "nearest is Qwen3MoeForCausalLM" in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_name_stands_for_two_rows(family):
    spellings = [name for row in family.mappings for name in row.megatron]
    tensors = [(row.block, name) for row in family.mappings for name in row.hf]
    assert len(spellings) == len(set(spellings))
    assert len(tensors) == len(set(tensors))


def test_rows_merge_what_they_split():
    family = find_family("Qwen3MoeForCausalLM")
    dims = family.dimensions(config_of(Qwen3MoeConfig, **MOE).to_dict())
    table = family.by_megatron()
    row = table["decoder.layers.*.mlp.experts.linear_fc1.weight*"]
    key = next(iter(row.keys(dims)))
    weight = torch.randn(192, 160)
    assert torch.equal(row.to_megatron(key, row.to_hf(key, weight, dims), dims), weight)
