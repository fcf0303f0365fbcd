"""Qwen3-MoE: Qwen3's attention, routed experts without a shared one, dense layers where the config says so."""

from collections.abc import Mapping
from typing import Any

from quantplug.mappings.families import common, routed
from quantplug.mappings.table import Family, MegatronConfig


def megatron_config(config: Mapping[str, Any]) -> MegatronConfig:
    normalized = bool(config.get("norm_topk_prob", False))
    common.refuse_decoder_settings("Qwen3-MoE", config, routed.router_settings(config, normalized))
    transformer = {
        **common.decoder_transformer_config(config),
        "qk_layernorm": True,
        **routed.routed_transformer_config(config, routed.sparse_dimensions(config), normalized),
    }
    return MegatronConfig(transformer=transformer, model=common.decoder_model_arguments(config))


QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    mappings=(
        *common.EMBEDDINGS,
        *common.ATTENTION,
        *common.QK_NORM,
        *common.MLP_NORM,
        *common.DENSE_MLP,
        *common.ROUTED_EXPERTS,
    ),
    dimensions=routed.sparse_dimensions,
    megatron_config=megatron_config,
    tied=common.TIED_LM_HEAD,
    sizes=routed.SIZES,
)
