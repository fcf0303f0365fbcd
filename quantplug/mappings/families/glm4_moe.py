"""GLM-4.5: grouped-query attention that rotates a part of each head, the experts and the router of DeepSeek-V3."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantplug.mappings.families import common, deepseek_config, deepseek_rows
from quantplug.mappings.layouts import ModelDimensions, Option
from quantplug.mappings.table import Family, MegatronConfig

_QK_NORM = tuple(replace(row, option=Option.QK_NORM) for row in common.QK_NORM)
_QKV_BIAS = tuple(replace(row, option=Option.QKV_BIAS) for row in common.QKV_BIAS)
# GLM-4.5 has both, GLM-4.5-Air no norms: the config says which rows a model has.
_SWITCHES = {"use_qk_norm": Option.QK_NORM, "attention_bias": Option.QKV_BIAS}


def _dimensions(config: Mapping[str, Any]) -> ModelDimensions:
    options = frozenset(option for name, option in _SWITCHES.items() if config.get(name))
    return replace(deepseek_config.dimensions(config), options=options)


def _megatron_config(config: Mapping[str, Any]) -> MegatronConfig:
    settings: deepseek_config.Settings = {"rope_type": (common.rope(config)[1], "default")}
    settings |= deepseek_config.moe_settings(config) | deepseek_config.corrected_router_settings(config)
    deepseek_config.refuse("GLM-4.5", settings)
    transformer = {
        **common.decoder_transformer_config(config),
        "add_qkv_bias": bool(config.get("attention_bias")),
        "qk_layernorm": bool(config.get("use_qk_norm")),
        **deepseek_config.moe_transformer_config(config),
        **deepseek_config.corrected_router_config(config),
    }
    # 0.5 is what transformers has where the config does not say it.
    rotated = common.rope_settings(config).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    model = {**common.decoder_model_arguments(config), "rotary_percent": 0.5 if rotated is None else rotated}
    return MegatronConfig(transformer=transformer, model=model)


GLM4_MOE = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    mappings=deepseek_rows.with_mtp(
        (
            *deepseek_rows.EMBEDDINGS,
            *common.ATTENTION,
            *_QKV_BIAS,
            *_QK_NORM,
            *common.MLP_NORM,
            *common.DENSE_MLP,
            *common.ROUTED_EXPERTS,
            *deepseek_rows.CORRECTION_BIAS,
            *deepseek_rows.SHARED_EXPERTS,
        )
    ),
    dimensions=_dimensions,
    megatron_config=_megatron_config,
    tied=common.TIED_LM_HEAD,
    sizes=deepseek_config.MOE_SIZES,
)
