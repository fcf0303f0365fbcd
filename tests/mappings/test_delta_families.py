"""Qwen3-Next and Qwen3.5: configs as published and as transformers fills them in, and what is refused of them."""

import json
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from transformers import PreTrainedConfig, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRotaryEmbedding

from quantplug.errors import UnsupportedModelError, UnsupportedQuantizationError
from quantplug.mappings.amax import convert_to_amax_map
from quantplug.mappings.delta_layouts import DELTA_PARTS
from quantplug.mappings.families import find_family
from quantplug.mappings.rows import LayerStack
from quantplug.mappings.table import Family
from tests.families.cases import DELTA, GATED_EXPERTS

KINDS: dict[str, type[PreTrainedConfig]] = {
    "Qwen3NextForCausalLM": Qwen3NextConfig,
    "Qwen3_5ForCausalLM": Qwen3_5TextConfig,
    "Qwen3_5MoeForCausalLM": Qwen3_5MoeTextConfig,
}
# What is published says how often attention is, and where the rotary settings stand differs.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen3NextForCausalLM": {"rope_theta": 10_000_000, "partial_rotary_factor": 0.25, "rope_scaling": None},
    "Qwen3_5ForCausalLM": {
        "attn_output_gate": True,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [3, 2, 1],
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
            "rope_type": "default",
        },
    },
}
PUBLISHED["Qwen3_5MoeForCausalLM"] = PUBLISHED["Qwen3_5ForCausalLM"]


def published(name: str, **changes: Any) -> dict[str, Any]:
    """A config.json as it lies on the hub: no layer_types, sizes of heads left to the class where it has them so."""
    config = {key: value for key, value in DELTA.items() if key not in ("layer_types", "linear_key_head_dim")}
    experts = {} if name == "Qwen3_5ForCausalLM" else GATED_EXPERTS
    if name == "Qwen3_5MoeForCausalLM":
        del config["intermediate_size"]
    settings = {"full_attention_interval": 4, "rms_norm_eps": 1e-6, **PUBLISHED[name]}
    return {"architectures": [name], **config, **experts, **settings, **changes}


def filled_in(name: str, **changes: Any) -> dict[str, Any]:
    config = {key: value for key, value in published(name, **changes).items() if key != "architectures"}
    return {"architectures": [name], **KINDS[name](**json.loads(json.dumps(config))).to_dict()}


def family(name: str) -> Family:
    return find_family(name)


@pytest.mark.parametrize("name", KINDS)
def test_a_published_config_says_what_transformers_makes_of_it(name: str) -> None:
    one, other = published(name), filled_in(name)
    assert "layer_types" not in one
    assert other["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
    assert family(name).dimensions(one) == family(name).dimensions(other)
    assert family(name).megatron_config(one) == family(name).megatron_config(other)
    dims = family(name).dimensions(one)
    assert (dims.hybrid.attention, dims.hybrid.delta, dims.delta.key_dim) == ((3,), (0, 1, 2), 128)


@pytest.mark.parametrize("name", KINDS)
def test_settings_in_megatrons_words(name: str) -> None:
    found = family(name).megatron_config(filled_in(name))
    assert found.transformer["linear_attention_freq"] == [1, 1, 1, 0]
    assert found.transformer["linear_num_value_heads"] == 4
    assert found.transformer["mtp_num_layers"] == (None if name == "Qwen3NextForCausalLM" else 1)
    assert found.transformer.get("moe_shared_expert_gate", False) is (name != "Qwen3_5ForCausalLM")
    assert (found.model["rotary_percent"], found.model["rotary_base"]) == (0.25, 10_000_000)


@pytest.mark.parametrize(
    ("name", "rotary"),
    [("Qwen3NextForCausalLM", Qwen3NextRotaryEmbedding), ("Qwen3_5ForCausalLM", Qwen3_5TextRotaryEmbedding)],
)
def test_the_rotary_frequencies_are_those_of_transformers(name: str, rotary: type[torch.nn.Module]) -> None:
    config = filled_in(name)
    found = family(name).megatron_config(published(name))
    settings = {key: found.model[key] for key in ("rotary_percent", "rotary_base")}
    ours = RotaryEmbedding(found.transformer["kv_channels"], use_cpu_initialization=True, **settings).inv_freq
    torch.testing.assert_close(ours, rotary(KINDS[name](**config)).inv_freq)
    assert len(ours) == 6


def refused(name: str, **changes: Any) -> set[str]:
    with pytest.raises(UnsupportedModelError) as caught:
        family(name).megatron_config(published(name, **changes))
    return {offender.parameter for offender in caught.value.offenders}


REFUSALS: dict[str, dict[str, Any]] = {
    "rope_type": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
    "hidden_act": {"hidden_act": "gelu"},
    "attention_bias": {"attention_bias": True},
    "attn_output_gate": {"attn_output_gate": False},
}


@pytest.mark.parametrize("name", KINDS)
def test_what_megatron_would_compute_otherwise_is_refused_by_name(name: str) -> None:
    asked = {key: value for settings in REFUSALS.values() for key, value in settings.items()}
    assert refused(name, **asked) == REFUSALS.keys()
    for setting, changes in REFUSALS.items():
        assert refused(name, **changes) == {setting}


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"mtp_num_hidden_layers": 2}, "mtp_num_hidden_layers"),
        ({"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings"),
        ({"full_attention_interval": 3}, "mtp_num_hidden_layers after a last layer of"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok normalized over one expert"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "layer_types"),
        ({"layer_types": "full"}, "layer_types"),
        ({"linear_num_value_heads": 5}, "linear_num_value_heads"),
    ],
)
def test_settings_that_are_refused_of_one_family(changes: dict[str, Any], setting: str) -> None:
    assert refused("Qwen3_5MoeForCausalLM", **changes) == {setting}


def test_a_last_layer_without_attention_is_no_fault_without_multi_token_prediction() -> None:
    config = published("Qwen3_5MoeForCausalLM", full_attention_interval=3, mtp_num_hidden_layers=0)
    assert family("Qwen3_5MoeForCausalLM").megatron_config(config).transformer["linear_attention_freq"] == [1, 1, 0, 1]


@pytest.mark.parametrize("name", KINDS)
def test_layers_of_multi_token_prediction_have_numbers_and_names_of_their_own(name: str) -> None:
    found = family(name)
    dims = found.dimensions(filled_in(name, **{found.mtp_setting: 1}))
    rows = [row for row in found.mappings if row.block is LayerStack.MTP_APART]
    names = {name for row in rows for key in row.keys(dims) for name in row.hf_names(key, dims)}
    assert {"mtp.fc.weight", "mtp.norm.weight", "mtp.layers.0.self_attn.q_norm.weight"} <= names
    assert all(name.startswith("mtp.") for name in names)
    assert not any("linear_attn" in name for name in names)
    without = found.dimensions(filled_in(name, **{found.mtp_setting: 0}))
    assert not any(True for row in rows for _ in row.keys(without))


def test_parts_that_are_kept_have_no_amax() -> None:
    """Their weight has one quantizer in Megatron, and they have none on disk."""
    found = family("Qwen3_5ForCausalLM")
    dims = found.dimensions(filled_in("Qwen3_5ForCausalLM"))
    (row,) = (row for row in convert_to_amax_map(found.mappings).mappings if ".in_proj." in row.megatron[0])
    key, amax = next(row.keys(dims)), torch.tensor(3.0)
    names = [f"model.layers.0.linear_attn.in_proj_{part}.weight_quantizer._amax" for part in ("qkv", "z")]
    assert row.to_hf(key, amax, dims) == dict.fromkeys(names, amax)
    assert list(row.members([key], dims)) == names
    assert row.to_megatron(key, dict(zip(names, (amax, torch.tensor(5.0)), strict=True)), dims) == 5
    by_row = torch.arange(sum(DELTA_PARTS.sizes(dims)))[:, None].float()
    assert list(row.to_hf(key, by_row, dims)) == names
    with pytest.raises(UnsupportedQuantizationError, match="parts of its weight that are not quantized"):
        row.to_megatron(key, row.to_hf(key, by_row, dims), dims)
