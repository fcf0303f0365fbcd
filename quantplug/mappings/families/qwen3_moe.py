"""Qwen3-MoE: Qwen3's attention, routed experts without a shared one, dense layers where the config says so.

The router takes a softmax over all experts and keeps the top k. With `norm_topk_prob` the kept probabilities are scaled
to one, which is Megatron's softmax after the top k; without it, Megatron's `moe_router_pre_softmax`.
"""

from collections.abc import Mapping
from typing import Any

from quantplug.mappings.base import Family, MegatronConfig, SizeSetting
from quantplug.mappings.families import common
from quantplug.mappings.families.qwen3 import qwen3_attention_settings
from quantplug.mappings.layouts import ModelDimensions


def _num_experts(config: Mapping[str, Any]) -> int:
    # transformers 5 saves num_experts but keeps num_local_experts in memory.
    return common.setting(config, "num_experts", "num_local_experts")


def _moe_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    step = config.get("decoder_sparse_step") or 1
    dense = config.get("mlp_only_layers") or ()
    return tuple(i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0)


def _dimensions(config: Mapping[str, Any]) -> ModelDimensions:
    return common.decoder_dimensions(config, _num_experts(config), _moe_layers(config))


def _megatron_config(config: Mapping[str, Any]) -> MegatronConfig:
    qwen3_attention_settings(config)
    moe_layers = _moe_layers(config)
    transformer = {
        **common.decoder_transformer_config(config),
        "qk_layernorm": True,
        "num_moe_experts": _num_experts(config),
        "moe_ffn_hidden_size": common.setting(config, "moe_intermediate_size"),
        "moe_layer_freq": [int(i in moe_layers) for i in range(config["num_hidden_layers"])],
        "moe_router_topk": common.setting(config, "num_experts_per_tok"),
        "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
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
    dimensions=_dimensions,
    megatron_config=_megatron_config,
    tied=common.TIED_LM_HEAD,
    sizes=(
        SizeSetting(("num_experts", "num_local_experts")),
        SizeSetting(("moe_intermediate_size",)),
        SizeSetting(("decoder_sparse_step",), optional=True),
    ),
)
