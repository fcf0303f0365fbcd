"""Sizes and settings of what DeepSeek-V2 and V3 brought, and others took over; `deepseek_rows` has the rows."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantplug.mappings.families import common
from quantplug.mappings.layouts import LatentSizes, ModelDimensions, Option
from quantplug.mappings.table import SizeSetting

MOE_SIZES = (
    SizeSetting(("n_routed_experts",)),
    SizeSetting(("moe_intermediate_size",)),
    SizeSetting(("n_shared_experts",)),
    SizeSetting(("first_k_dense_replace",), optional=True, least=0),
    SizeSetting(("num_nextn_predict_layers",), optional=True, nullable=True, least=0),
)
LATENT_SIZES = (
    SizeSetting(("q_lora_rank",), optional=True, nullable=True),
    *(SizeSetting((name,)) for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")),
)


def moe_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Global ids of the layers with experts: all but the first `first_k_dense_replace`."""
    return tuple(range(config.get("first_k_dense_replace") or 0, config["num_hidden_layers"]))


def shared_width(config: Mapping[str, Any]) -> int:
    """Feed-forward width of all shared experts of a layer, which are one MLP in both."""
    return int(common.setting(config, "n_shared_experts") * common.setting(config, "moe_intermediate_size"))


def dimensions(config: Mapping[str, Any]) -> ModelDimensions:
    """Sizes of a decoder with routed and shared experts, and of its layers of multi-token prediction."""
    decoder = common.decoder_dimensions(config, common.setting(config, "n_routed_experts"), moe_layers(config))
    mtp_layers = config.get("num_nextn_predict_layers") or 0
    return replace(decoder, shared_width=shared_width(config), mtp_layers=mtp_layers)


def latent_dimensions(config: Mapping[str, Any]) -> ModelDimensions:
    """What `dimensions` reads, and the sizes of multi-latent attention (https://arxiv.org/abs/2405.04434, 2.1)."""
    rank, rotary = config.get("q_lora_rank"), common.setting(config, "qk_rope_head_dim")
    return replace(
        dimensions(config),
        # Keys and values are made of their latent for each head, so there are no groups that share them.
        num_query_groups=config["num_attention_heads"],
        head_dim=common.setting(config, "qk_nope_head_dim") + rotary,
        latent=LatentSizes(rank, common.setting(config, "kv_lora_rank"), rotary, common.setting(config, "v_head_dim")),
        options=frozenset({Option.QUERY_DIRECT if rank is None else Option.QUERY_LATENT}),
    )


def moe_transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`TransformerConfig` arguments of routed and shared experts and of multi-token prediction."""
    experts = moe_layers(config)
    return {
        "num_moe_experts": common.setting(config, "n_routed_experts"),
        "moe_ffn_hidden_size": common.setting(config, "moe_intermediate_size"),
        "moe_shared_expert_intermediate_size": shared_width(config),
        # One entry a layer: 1 with experts, 0 dense.
        "moe_layer_freq": [int(layer in experts) for layer in range(config["num_hidden_layers"])],
        "moe_router_topk": common.setting(config, "num_experts_per_tok"),
        "moe_router_topk_scaling_factor": config.get("routed_scaling_factor"),
        # No balancing loss: it has no effect on what the router chooses, and a model is only run here.
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "mtp_num_layers": config.get("num_nextn_predict_layers") or None,
    }


def is_group_limited(config: Mapping[str, Any]) -> bool:
    """Whether the router chooses experts among those of the best groups alone."""
    return (config.get("n_group") or 1) > (config.get("topk_group") or 1)


def group_limits(config: Mapping[str, Any]) -> dict[str, Any]:
    """Further arguments of a router that is group-limited."""
    return {"moe_router_num_groups": config["n_group"], "moe_router_group_topk": config["topk_group"]}


def corrected_router_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Further arguments of a router that takes sigmoid scores, corrects them by a bias, and normalises those it keeps.

    DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 2.1.2.
    """
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        **(group_limits(config) if is_group_limited(config) else {}),
    }


Settings = dict[str, tuple[Any, Any]]
"""Name of a setting to its value and to the one that Megatron computes alike."""


def moe_settings(config: Mapping[str, Any]) -> Settings:
    """What any of these decoders may set, and Megatron would compute otherwise."""
    return {
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "moe_layer_freq": (config.get("moe_layer_freq", 1), 1),
        # Megatron makes MTP layers like the decoder's last one.
        "first_k_dense_replace < num_hidden_layers": (bool(moe_layers(config)), True),
        # The table has rows of shared experts for every layer with experts.
        "n_shared_experts > 0": (bool(config.get("n_shared_experts")), True),
    }


def corrected_router_settings(config: Mapping[str, Any]) -> Settings:
    """What a router of sigmoid scores may set, and Megatron would compute otherwise."""
    top_k = common.setting(config, "num_experts_per_tok")
    settings = {
        "scoring_func": (config.get("scoring_func", "sigmoid"), "sigmoid"),
        "topk_method": (config.get("topk_method", "noaux_tc"), "noaux_tc"),
        # Megatron normalises the scores of several experts, and leaves that of one as it is.
        "norm_topk_prob": (bool(config.get("norm_topk_prob", True)), top_k > 1),
    }
    if is_group_limited(config):
        # The score of a group is the sum of its best two; in Megatron of its best top_k // topk_group.
        settings["num_experts_per_tok // topk_group"] = (top_k // config["topk_group"], 2)
    return settings


def latent_settings(config: Mapping[str, Any]) -> Settings:
    """What multi-latent attention may set, and Megatron would compute otherwise."""
    kind, scaling = common.rope(config)[1], common.rope_settings(config)
    heads = config["num_attention_heads"]
    settings = {
        "rope_type": (kind, kind if kind in ("default", "yarn") else "default or yarn"),
        "attention_bias": (bool(config.get("attention_bias", False)), False),
        "num_key_value_heads": (config.get("num_key_value_heads") or heads, heads),
        "rope_interleave": (config.get("rope_interleave", True), True),
    }
    if kind == "yarn":
        settings["attention_factor"] = (scaling.get("attention_factor"), None)
        settings["truncate"] = (scaling.get("truncate", True), True)
        # transformers scales the softmax by it, but the rotary embeddings only if mscale is there too.
        settings["mscale_all_dim without mscale"] = (
            bool(scaling.get("mscale_all_dim") and not scaling.get("mscale")),
            False,
        )
    return settings


def refuse(architecture: str, settings: Settings) -> None:
    """Raises UnsupportedModelError naming every setting whose value is not the one that Megatron computes alike."""
    found = {name: value for name, (value, _) in settings.items()}
    common.refuse_settings(architecture, found, {name: value for name, (_, value) in settings.items()})


def latent_transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`MLATransformerConfig` arguments of multi-latent attention."""
    base, kind = common.rope(config)
    return {
        **common.decoder_transformer_config(config),
        "num_query_groups": config["num_attention_heads"],
        "multi_latent_attention": True,
        # The norms on the two latents, which Megatron calls so.
        "qk_layernorm": True,
        "q_lora_rank": config.get("q_lora_rank"),
        "kv_lora_rank": common.setting(config, "kv_lora_rank"),
        # Megatron counts the entries without a position here, and those with one in the next.
        "qk_head_dim": common.setting(config, "qk_nope_head_dim"),
        "qk_pos_emb_head_dim": common.setting(config, "qk_rope_head_dim"),
        "v_head_dim": common.setting(config, "v_head_dim"),
        "rotary_base": base,
        **(_yarn(config) if kind == "yarn" else {"rope_type": "rope", "rotary_scaling_factor": 1.0}),
    }


def _yarn(config: Mapping[str, Any]) -> dict[str, Any]:
    """YaRN (https://arxiv.org/abs/2309.00071) with transformers' defaults."""
    scaling = common.rope_settings(config)
    original = common.setting(scaling, "original_max_position_embeddings")
    # Without both, transformers takes 0.1 ln(factor) + 1, which these values give in Megatron.
    given = bool(scaling.get("mscale") and scaling.get("mscale_all_dim"))
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": scaling.get("factor") or config["max_position_embeddings"] / original,
        "original_max_position_embeddings": original,
        "beta_fast": scaling.get("beta_fast") or 32,
        "beta_slow": scaling.get("beta_slow") or 1,
        "mscale": scaling["mscale"] if given else 1.0,
        "mscale_all_dim": scaling["mscale_all_dim"] if given else 0.0,
    }
