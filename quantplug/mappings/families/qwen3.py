"""Qwen3, dense: grouped-query attention with norms on q and k, SwiGLU, tied or untied embeddings."""

from collections.abc import Mapping
from typing import Any

from quantplug.mappings.base import Family, MegatronConfig
from quantplug.mappings.families import common
from quantplug.mappings.layouts import ModelDimensions


def _dimensions(config: Mapping[str, Any]) -> ModelDimensions:
    return common.decoder_dimensions(config, num_experts=0, moe_layers=())


def qwen3_attention_settings(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedModelError for an attention that Megatron would compute otherwise."""
    found = {
        "rope_type": common.rope(config)[1],
        "attention_bias": bool(config.get("attention_bias", False)),
        "use_sliding_window": bool(config.get("use_sliding_window", False)),
        "hidden_act": config.get("hidden_act", "silu"),
    }
    expected = {"rope_type": "default", "attention_bias": False, "use_sliding_window": False, "hidden_act": "silu"}
    common.refuse_settings("Qwen3", found, expected)


def _megatron_config(config: Mapping[str, Any]) -> MegatronConfig:
    qwen3_attention_settings(config)
    return MegatronConfig(
        transformer={**common.decoder_transformer_config(config), "qk_layernorm": True},
        model=common.decoder_model_arguments(config),
    )


QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    mappings=(
        *common.EMBEDDINGS,
        *common.ATTENTION,
        *common.QK_NORM,
        *common.MLP_NORM,
        *common.DENSE_MLP,
    ),
    dimensions=_dimensions,
    megatron_config=_megatron_config,
    tied=common.TIED_LM_HEAD,
)
