"""The tables against transformers: names, shapes and config of models that transformers itself builds."""

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from quantplug.errors import UnsupportedModelError
from quantplug.mappings.families import FAMILIES, find_family
from tests.mappings.rows import to_hf, to_megatron

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


KINDS = (Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig, LlamaConfig, MixtralConfig)
SETTINGS = {
    Qwen2MoeConfig: {**MOE, "shared_expert_intermediate_size": 288},
    Qwen3MoeConfig: MOE,
    MixtralConfig: {**SMALL, "num_local_experts": 6},
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(kind: type[PreTrainedConfig], **settings):
    config = kind(**{**SETTINGS.get(kind, SMALL), **settings})
    config.architectures = [kind.__name__.replace("Config", "ForCausalLM")]
    return config


def megatron_config(kind: type[PreTrainedConfig], **settings):
    config = config_of(kind, **settings)
    return find_family(config.architectures[0]).megatron_config(config.to_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_table_names_every_tensor_that_transformers_saves(kind, tied, tmp_path):
    config = config_of(kind, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = set(file.keys())

    family = find_family(config.architectures[0])
    dims = family.dimensions(AutoConfig.from_pretrained(tmp_path).to_dict())
    named = {name for row in family.mappings for key in row.keys(dims) for name in row.hf_names(key, dims)}
    assert named - (set(family.tied) if tied else set()) == saved


def test_dense_layers_of_a_moe_model_have_no_experts():
    config = config_of(Qwen3MoeConfig).to_dict()
    assert find_family("Qwen3MoeForCausalLM").dimensions(config).moe_layers == (0, 2)
    assert find_family("Qwen3MoeForCausalLM").megatron_config(config).transformer["moe_layer_freq"] == [1, 0, 1]


@pytest.mark.parametrize("kind", [Qwen2MoeConfig, Qwen3MoeConfig])
@pytest.mark.parametrize("normalised", [True, False])
def test_norm_topk_prob_decides_where_the_softmax_is(kind, normalised):
    transformer = megatron_config(kind, norm_topk_prob=normalised).transformer
    assert transformer["moe_router_pre_softmax"] is not normalised


def test_mixtral_has_its_softmax_after_the_top_k_and_experts_in_every_layer():
    transformer = megatron_config(MixtralConfig).transformer
    assert transformer["moe_router_pre_softmax"] is False
    assert (transformer["moe_layer_freq"], transformer["moe_ffn_hidden_size"]) == ([1, 1, 1], 224)


def test_the_sparse_step_of_qwen2_moe_counts_from_one():
    transformer = megatron_config(Qwen2MoeConfig, decoder_sparse_step=2, mlp_only_layers=[]).transformer
    assert transformer["moe_layer_freq"] == [0, 1, 0]


def test_the_shared_expert_of_qwen2_moe_is_gated_and_as_wide_as_its_config_says():
    transformer = megatron_config(Qwen2MoeConfig).transformer
    assert (transformer["moe_shared_expert_intermediate_size"], transformer["moe_shared_expert_gate"]) == (288, True)


@pytest.mark.parametrize("kind", KINDS)
def test_only_qwen2_has_biases_of_queries_keys_and_values(kind):
    transformer = megatron_config(kind).transformer
    assert transformer.get("add_qkv_bias", False) is (kind in (Qwen2Config, Qwen2MoeConfig))
    assert transformer["add_bias_linear"] is False


def rope_frequencies(config):
    """Megatron's own, of the family's settings."""
    found = find_family(config.architectures[0]).megatron_config(config.to_dict())
    names = ("rotary_percent", "rotary_base", "rope_scaling", "rope_scaling_factor")
    given = {name: found.model[name] for name in names if name in found.model}
    return RotaryEmbedding(found.transformer["kv_channels"], use_cpu_initialization=True, **given).inv_freq


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_the_rotary_frequencies_of_llama_3_are_those_of_transformers(spelling, factor):
    rope = {**LLAMA3_ROPE, "rope_theta": 500000.0, "factor": factor}
    config = config_of(LlamaConfig, max_position_embeddings=131072, head_dim=128, **{spelling: rope})
    expected = LlamaRotaryEmbedding(config).inv_freq
    plain = 500000.0 ** (-torch.arange(0, 128, 2) / 128)
    assert (expected < 0.99 * plain).sum() > 20
    torch.testing.assert_close(rope_frequencies(config), expected)


def test_head_dim_and_key_value_heads_fall_back_to_the_head_count():
    config = {**SMALL, "num_key_value_heads": None, "head_dim": None}
    dims = find_family("Qwen3ForCausalLM").dimensions(config)
    assert (dims.head_dim, dims.num_query_groups) == (40, 4)


@pytest.mark.parametrize("spelling", [{"rope_parameters": {"rope_theta": 5e5}}, {"rope_theta": 5e5}])
def test_the_rotary_base_is_found_in_either_spelling(spelling):
    config = {**SMALL, "rms_norm_eps": 1e-6, "max_position_embeddings": 64, **spelling}
    assert find_family("Qwen3ForCausalLM").megatron_config(config).model["rotary_base"] == 5e5


DECODER_REFUSED = {
    "rope_type": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "use_sliding_window": {"use_sliding_window": True},
    "layer_types": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "hidden_act": {"hidden_act": "gelu"},
}
LLAMA3_REFUSED = {
    name: {"rope_scaling": {**LLAMA3_ROPE, name: value}}
    for name, value in (("low_freq_factor", 2.0), ("high_freq_factor", 8.0), ("original_max_position_embeddings", 4096))
}
SINGLE = "num_experts_per_tok normalized over one expert"
REFUSED = {
    **dict.fromkeys(("Qwen2", "Qwen3", "Llama"), DECODER_REFUSED),
    "Qwen2Moe": {**DECODER_REFUSED, "qkv_bias": {"qkv_bias": False}, SINGLE: {"num_experts_per_tok": 1}},
    "Qwen3Moe": {**DECODER_REFUSED, SINGLE: {"num_experts_per_tok": 1}},
    "Mixtral": {**DECODER_REFUSED, "sliding_window": {"sliding_window": 4096}, SINGLE: {"num_experts_per_tok": 1}},
}  # what is refused, and the settings that ask for it


def refused_settings(name, **settings):
    config = {**MOE, "shared_expert_intermediate_size": 288, "norm_topk_prob": True, **settings}
    with pytest.raises(UnsupportedModelError) as caught:
        find_family(f"{name}ForCausalLM").megatron_config(config)
    return {offender.parameter for offender in caught.value.offenders}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_megatron_would_compute_otherwise_are_refused_all_at_once(name):
    asked = {setting: value for settings in REFUSED[name].values() for setting, value in settings.items()}
    assert refused_settings(name, **asked) == REFUSED[name].keys()


@pytest.mark.parametrize(
    ("name", "refused", "settings"),
    [
        *((name, refused, settings) for name, found in REFUSED.items() for refused, settings in found.items()),
        *(("Llama", refused, settings) for refused, settings in LLAMA3_REFUSED.items()),
    ],
)
def test_each_of_those_settings_is_refused_alone(name, refused, settings):
    assert refused_settings(name, **settings) == {refused}


def test_a_refusal_says_all_values_that_are_converted():
    with pytest.raises(UnsupportedModelError, match="'yarn', only 'default' or 'llama3' is converted"):
        find_family("LlamaForCausalLM").megatron_config({**SMALL, "rope_scaling": {"type": "yarn"}})


def test_llama_3_without_its_factor_is_refused():
    config = config_of(LlamaConfig, rope_parameters={**LLAMA3_ROPE, "rope_theta": 5e5}).to_dict()
    del config["rope_parameters"]["factor"]
    with pytest.raises(UnsupportedModelError, match="factor"):
        find_family("LlamaForCausalLM").megatron_config(config)


@pytest.mark.parametrize("lost", ["layer_types", "sliding_window", "factor"])
def test_gpt_oss_without_a_setting_that_it_needs_is_refused_by_name(lost):
    config = {**SMALL, **GptOssConfig().to_dict()}
    config.pop(lost, None)
    config["rope_parameters"] = {name: it for name, it in config["rope_parameters"].items() if name != lost}
    with pytest.raises(UnsupportedModelError) as caught:
        find_family("GptOssForCausalLM").megatron_config(config)
    assert [offender.parameter for offender in caught.value.offenders] == [lost]


def test_an_unknown_architecture_is_refused_with_the_list_of_known_ones():
    with pytest.raises(UnsupportedModelError, match=r"Use one of: .*LlamaForCausalLM, .*Qwen3ForCausalLM") as caught:
        find_family("Qwen3MoEForCausalLM")
    assert "is spelled Qwen3MoeForCausalLM" in str(caught.value)
    # Which a comparison of letters takes for Glm4MoeForCausalLM.
    with pytest.raises(UnsupportedModelError) as caught:
        find_family("OlmoeForCausalLM")
    assert [offender.reason for offender in caught.value.offenders] == ["is 'OlmoeForCausalLM'"]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_name_stands_for_two_rows(family):
    spellings = [name for row in family.mappings for name in row.megatron]
    tensors = [(row.block, name) for row in family.mappings for name in row.hf]
    assert len(spellings) == len(set(spellings))
    assert len(tensors) == len(set(tensors))


def test_rows_merge_what_they_split():
    family = find_family("Qwen3MoeForCausalLM")
    dims = family.dimensions(config_of(Qwen3MoeConfig).to_dict())
    table = family.by_megatron()
    row = table["decoder.layers.*.mlp.experts.linear_fc1.weight*"]
    key = next(iter(row.keys(dims)))
    weight = torch.randn(192, 160)
    assert torch.equal(to_megatron(row, key, to_hf(row, key, weight, dims), dims), weight)
