"""Qwen3-Next: gated delta nets among gated attention, routed experts and one behind a gate, dense layers by config."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantplug.mappings.delta_layouts import DELTA_BY_KEY_HEAD
from quantplug.mappings.families import common, delta_config, delta_rows, routed
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import Family, MegatronConfig, Role, Scope, SizeSetting, WeightMapping

MTP_SETTING = "num_nextn_predict_layers"

# Betas and alphas are one linear of a few rows, which no block of FP8 fits, and which ships in BF16.
IN_PROJECTION = WeightMapping(
    ("decoder.layers.*.self_attention.in_proj.weight",),
    ("model.layers.*.linear_attn.in_proj_qkvz.weight", "model.layers.*.linear_attn.in_proj_ba.weight"),
    Scope.DELTA_LAYER,
    DELTA_BY_KEY_HEAD,
    Role.LINEAR,
    high_precision=("model.layers.*.linear_attn.in_proj_ba.weight",),
    default_min_bits=delta_rows.INPUTS_MIN_BITS,
)


def _dimensions(config: Mapping[str, Any]) -> ModelDimensions:
    decoder = routed.sparse_dimensions(delta_config.with_defaults(config))
    width = common.setting(config, "shared_expert_intermediate_size")
    return delta_config.delta_dimensions(replace(decoder, shared_width=width), config, config.get(MTP_SETTING) or 0)


def _megatron_config(config: Mapping[str, Any]) -> MegatronConfig:
    config = delta_config.with_defaults(config)
    normalized = bool(config.get("norm_topk_prob", True))
    settings = delta_config.delta_settings(config, MTP_SETTING) | routed.router_settings(config, normalized)
    delta_config.refuse("Qwen3-Next", settings)
    dims = _dimensions(config)
    transformer = {
        **delta_config.delta_transformer_config(config, dims),
        **routed.routed_transformer_config(config, dims, normalized),
        **delta_config.gated_experts_config(dims.shared_width),
    }
    return MegatronConfig(transformer=transformer, model=delta_config.delta_model_arguments(config))


# vLLM 0.32's qwen3_next.py. That of Qwen3.5 hands the config on.
EMBEDDINGS = common.embeddings_beside_plain_head("output layer, which vLLM loads in 16 bits in Qwen3-Next")

QWEN3_NEXT = Family(
    name="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    mappings=delta_rows.with_mtp(
        (
            *EMBEDDINGS,
            *delta_rows.ATTENTION,
            IN_PROJECTION,
            *delta_rows.DELTA_NET,
            *common.MLP_NORM,
            *common.DENSE_MLP,
            *common.ROUTED_EXPERTS,
            *common.GATED_SHARED_EXPERT,
        )
    ),
    dimensions=_dimensions,
    megatron_config=_megatron_config,
    tied=common.TIED_LM_HEAD,
    sizes=(
        *routed.SIZES,
        SizeSetting(("shared_expert_intermediate_size",)),
        *delta_config.SIZES,
        SizeSetting((MTP_SETTING,), optional=True, nullable=True, least=0),
    ),
    mtp_setting=MTP_SETTING,
    zero_centred=True,
    # The published config does not count them, and the tensors are there.
    passthrough=("mtp.",),
)
