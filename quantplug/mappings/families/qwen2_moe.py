"""Qwen2-MoE: Qwen2's attention, routed experts and one shared expert behind a sigmoid gate, dense layers by config."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantplug.mappings.families import common, routed
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import Family, MegatronConfig, SizeSetting


def _dimensions(config: Mapping[str, Any]) -> ModelDimensions:
    width = common.setting(config, "shared_expert_intermediate_size")
    return replace(routed.sparse_dimensions(config), shared_width=width)


def _megatron_config(config: Mapping[str, Any]) -> MegatronConfig:
    normalized = bool(config.get("norm_topk_prob", False))
    more = {"qkv_bias": (config.get("qkv_bias", True), True), **routed.router_settings(config, normalized)}
    common.refuse_decoder_settings("Qwen2-MoE", config, more)
    dims = _dimensions(config)
    transformer = {
        **common.decoder_transformer_config(config),
        "add_qkv_bias": True,
        **routed.routed_transformer_config(config, dims, normalized),
        "moe_shared_expert_intermediate_size": dims.shared_width,
        "moe_shared_expert_gate": True,  # sigmoid(gate(x)) times what the shared expert gives.
    }
    return MegatronConfig(transformer=transformer, model=common.decoder_model_arguments(config))


QWEN2_MOE = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    mappings=(
        *common.EMBEDDINGS,
        *common.ATTENTION,
        *common.QKV_BIAS,
        *common.MLP_NORM,
        *common.DENSE_MLP,
        *common.ROUTED_EXPERTS,
        *common.GATED_SHARED_EXPERT,
    ),
    dimensions=_dimensions,
    megatron_config=_megatron_config,
    tied=common.TIED_LM_HEAD,
    sizes=(*routed.SIZES, SizeSetting(("shared_expert_intermediate_size",))),
)
