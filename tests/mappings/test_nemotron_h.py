"""Nemotron-H's config in every spelling, and what Megatron would compute otherwise."""

import math
from typing import Any

import pytest

from quantplug.errors import UnsupportedModelError
from quantplug.mappings.families import find_family
from quantplug.mappings.layouts import HybridLayers, MambaSizes, Option
from quantplug.mappings.table import ModelKind
from tests.families import hybrid_cases as hybrid

FAMILY = find_family("NemotronHForCausalLM")
WORDS = ["linear_attention", "moe", "full_attention", "mlp"]
OLD_WORDS = ["mamba", "moe", "attention", "mlp"]


def config(**changes: Any) -> dict[str, Any]:
    """What transformers says of a tiny model, without `num_hidden_layers`."""
    return {**hybrid.nemotron_h(WORDS).to_dict(), **changes}


def published(**changes: Any) -> dict[str, Any]:
    """The same as published checkpoints have it in config.json."""
    said = config(hybrid_override_pattern="ME*-", num_hidden_layers=4, time_step_limit=[0.0, math.inf])
    del said["layers_block_type"]
    return {**said, **changes}


def refused(settings: dict[str, Any]) -> set[str]:
    with pytest.raises(UnsupportedModelError) as caught:
        FAMILY.megatron_config(settings)
    return {offender.parameter for offender in caught.value.offenders}


SPELLINGS = {
    "transformers": config(),
    "old words": config(layers_block_type=OLD_WORDS),
    "pattern": published(),
    "both": published(layers_block_type=OLD_WORDS),
    "aliases": published(n_groups=None, mamba_n_groups=2, conv_kernel=None, mamba_d_conv=4),
    "the first ones": published(head_dim=None, attention_head_dim=48),
    "infinity as transformers writes it": published(time_step_limit=[0.0, {"__float__": "Infinity"}]),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_says_the_same(spelling: str) -> None:
    settings = SPELLINGS[spelling]
    dims = FAMILY.dimensions(settings)
    assert dims == FAMILY.dimensions(config())
    assert dims.hybrid == HybridLayers(attention=(2,), dense=(3,), mamba=(0,))
    assert (dims.moe_layers, dims.num_layers, dims.attention_layers) == ((1,), 4, (2,))
    assert dims.mamba == MambaSizes(num_heads=6, head_dim=40, num_groups=2, state_dim=24, kernel=4)
    assert (dims.mamba.inner, dims.mamba.states) == (240, 48)
    found = FAMILY.megatron_config(settings)
    assert found == FAMILY.megatron_config(config())
    assert found.kind is ModelKind.MAMBA
    assert found.model["hybrid_override_pattern"] == "ME*-"
    assert (found.model["position_embedding_type"], found.transformer["gated_linear_unit"]) == ("none", False)


def test_a_model_without_experts_has_none_whatever_its_config_says() -> None:
    settings = config(layers_block_type=["mamba", "mlp"], n_routed_experts=None, n_shared_experts=None)
    dims = FAMILY.dimensions({**settings, "moe_latent_size": 64})
    assert (dims.num_experts, dims.expert_width, dims.expert_latent, dims.options) == (0, None, None, frozenset())
    assert not any("moe" in name for name in FAMILY.megatron_config(settings).transformer)


def test_a_latent_of_experts_is_an_option() -> None:
    dims = FAMILY.dimensions(config(moe_latent_size=64))
    assert (dims.expert_latent, dims.options) == (64, {Option.EXPERT_LATENT})
    assert FAMILY.megatron_config(config(moe_latent_size=64)).transformer["moe_latent_size"] == 64


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layers_block_type": None}, {"layers_block_type / hybrid_override_pattern"}),
        ({"layers_block_type": ["mamba", "conv"]}, {"layers_block_type"}),
        ({"layers_block_type": "mamba"}, {"layers_block_type"}),
        ({"layers_block_type": [["mamba"]]}, {"layers_block_type"}),
        ({"layers_block_type": []}, {"layers_block_type"}),
        ({"layers_block_type": 7, "hybrid_override_pattern": ["M"]}, {"layers_block_type", "hybrid_override_pattern"}),
        ({"hybrid_override_pattern": "ME*-/E"}, {"hybrid_override_pattern"}),
        ({"hybrid_override_pattern": "ME-*"}, {"hybrid_override_pattern"}),
        ({"num_hidden_layers": 5}, {"num_hidden_layers"}),
        ({"n_routed_experts": 0, "moe_intermediate_size": None}, {"n_routed_experts", "moe_intermediate_size"}),
    ],
)
def test_layers_that_cannot_be_read_are_refused_by_name(changes: dict[str, Any], named: set[str]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        FAMILY.dimensions(config(**changes))
    assert {offender.parameter for offender in caught.value.offenders} == named


REFUSED: dict[str, dict[str, Any]] = {
    **{
        name: {name: True}
        for name in (
            "attention_bias",
            "mlp_bias",
            "use_bias",
            "mamba_proj_bias",
            "residual_in_fp32",
            "tie_word_embeddings",
        )
    },
    "mlp_hidden_act": {"mlp_hidden_act": "silu"},
    "mamba_hidden_act": {"mamba_hidden_act": "relu"},
    "sliding_window": {"sliding_window": 512},
    "use_conv_bias": {"use_conv_bias": False},
    "conv_kernel": {"conv_kernel": 3},
    "layer_norm_epsilon": {"layer_norm_epsilon": 1e-6},
    "time_step_limit": {"time_step_limit": [0.001, 0.1]},
    "norm_topk_prob": {"norm_topk_prob": False},
    "num_experts_per_tok // topk_group": {"n_group": 4, "topk_group": 1},
    "n_shared_experts": {"n_shared_experts": 2},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_megatron_would_compute_otherwise_is_refused_by_name(name: str) -> None:
    assert refused(config(**REFUSED[name])) == {name}


def test_all_such_settings_are_named_at_once() -> None:
    changes = {key: value for each in REFUSED.values() for key, value in each.items()}
    assert refused(config(**changes)) == REFUSED.keys()


def test_settings_of_a_router_are_not_asked_of_a_model_without_experts() -> None:
    FAMILY.megatron_config(config(layers_block_type=["mamba", "mlp"], norm_topk_prob=False, n_shared_experts=0))
