"""Settings of routed experts that a softmax over all of them chooses among."""

from collections.abc import Mapping
from typing import Any

from quantplug.mappings.families.common import decoder_dimensions, setting
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import SizeSetting

# transformers 5 saves Qwen's num_experts but keeps num_local_experts in memory; Mixtral's is num_local_experts.
EXPERTS = SizeSetting(("num_experts", "num_local_experts"))
SIZES = (EXPERTS, SizeSetting(("moe_intermediate_size",)), SizeSetting(("decoder_sparse_step",), optional=True))


def sparse_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Global ids of the layers with experts, as Qwen's configs say it: every so many, without those that are listed."""
    step = config.get("decoder_sparse_step") or 1
    dense = config.get("mlp_only_layers") or ()
    return tuple(i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0)


def num_experts(config: Mapping[str, Any]) -> int:
    """Routed experts of a layer, in either spelling.

    Raises:
        UnsupportedModelError: Neither is set.
    """
    return int(setting(config, *EXPERTS.names))


def sparse_dimensions(config: Mapping[str, Any]) -> ModelDimensions:
    """Sizes of a decoder of which some layers have experts, as Qwen's configs say it."""
    return decoder_dimensions(config, num_experts(config), sparse_layers(config))


def router_settings(config: Mapping[str, Any], normalized: bool) -> dict[str, tuple[Any, Any]]:
    """What a softmax router may set, and Megatron would compute otherwise: it cannot normalize over a single expert."""
    single = setting(config, "num_experts_per_tok") == 1
    return {"num_experts_per_tok normalized over one expert": (single and normalized, False)}


def routed_transformer_config(config: Mapping[str, Any], dims: ModelDimensions, normalized: bool) -> dict[str, Any]:
    """`TransformerConfig` arguments of routed experts whose router takes a softmax and keeps the top k.

    Args:
        normalized: Whether the kept probabilities are scaled to one. That is Megatron's softmax after the top k;
            without it, the softmax is before (`moe_router_pre_softmax`).
    """
    return {
        "num_moe_experts": dims.num_experts,
        "moe_ffn_hidden_size": dims.expert_width,
        "moe_layer_freq": [int(i in dims.moe_layers) for i in range(dims.num_layers)],
        "moe_router_topk": setting(config, "num_experts_per_tok"),
        "moe_router_pre_softmax": not normalized,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
    }
