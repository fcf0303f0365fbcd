"""The language models of Qwen3.5, dense and with experts: Qwen3-Next's layers, in other parts on disk."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantplug.mappings.delta_layouts import DELTA_PARTS
from quantplug.mappings.experts import joined_experts
from quantplug.mappings.families import common, delta_config, delta_rows, routed
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import Family, MegatronConfig, Merged, Role, Scope, SizeSetting, WeightMapping

MTP_SETTING = "mtp_num_hidden_layers"

_NET = "model.layers.*.linear_attn"
_QKV, _Z, _B, _A = (f"{_NET}.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a"))

# Servers make two linears of the four. Betas and alphas have a row a head of values, too few for a block of FP8.
IN_PROJECTION = WeightMapping(
    ("decoder.layers.*.self_attention.in_proj.weight",),
    (_QKV, _Z, _B, _A),
    Scope.DELTA_LAYER,
    DELTA_PARTS,
    Role.LINEAR,
    high_precision=(_B, _A),
    default_min_bits=delta_rows.INPUTS_MIN_BITS,
    merged=(Merged(f"{_NET}.in_proj_qkvz", (_QKV, _Z)), Merged(f"{_NET}.in_proj_ba", (_B, _A))),
)


# The experts of a layer in one tensor, as published: not transposed, and one by one where experts are quantized.
_IN_ONE_TENSOR = joined_experts("model.layers.*.mlp.experts", transposed=False)


_MTP_IN_ONE_TENSOR = tuple(
    replace(delta_rows.in_own_mtp(row), packed=delta_rows.in_own_mtp(packed))
    for row, packed in zip(_IN_ONE_TENSOR, common.EXPERTS, strict=True)
)

_DECODER = (*common.EMBEDDINGS, *delta_rows.ATTENTION, IN_PROJECTION, *delta_rows.DELTA_NET, *common.MLP_NORM)
_SIZES = (*delta_config.SIZES, SizeSetting((MTP_SETTING,), optional=True, nullable=True, least=0))


def _settings(config: Mapping[str, Any]) -> delta_config.Settings:
    return delta_config.delta_settings(config, MTP_SETTING)


def _dense_dimensions(config: Mapping[str, Any]) -> ModelDimensions:
    decoder = common.decoder_dimensions(delta_config.with_defaults(config))
    return delta_config.delta_dimensions(decoder, config, config.get(MTP_SETTING) or 0)


def _dense_config(config: Mapping[str, Any]) -> MegatronConfig:
    config = delta_config.with_defaults(config)
    delta_config.refuse("Qwen3.5", _settings(config))
    transformer = delta_config.delta_transformer_config(config, _dense_dimensions(config))
    return MegatronConfig(transformer=transformer, model=delta_config.delta_model_arguments(config))


def _moe_dimensions(config: Mapping[str, Any]) -> ModelDimensions:
    every_layer = tuple(range(config["num_hidden_layers"]))
    said = delta_config.with_defaults(config)
    decoder = common.decoder_dimensions(said, routed.num_experts(config), every_layer)
    width = common.setting(config, "shared_expert_intermediate_size")
    return delta_config.delta_dimensions(replace(decoder, shared_width=width), config, config.get(MTP_SETTING) or 0)


def _moe_config(config: Mapping[str, Any]) -> MegatronConfig:
    config = delta_config.with_defaults(config)
    settings = {
        "norm_topk_prob": (bool(config.get("norm_topk_prob", True)), True),
        "mlp_only_layers": (list(config.get("mlp_only_layers") or []), []),
        "decoder_sparse_step": (config.get("decoder_sparse_step") or 1, 1),
    }
    delta_config.refuse("Qwen3.5-MoE", _settings(config) | settings | routed.router_settings(config, normalized=True))
    dims = _moe_dimensions(config)
    # No layer is dense, and the config need not say how wide one would be.
    # (`with_defaults` has made a copy, so the caller's config stays as it is.)
    config.setdefault("intermediate_size", dims.expert_width)
    transformer = {
        **delta_config.delta_transformer_config(config, dims),
        **routed.routed_transformer_config(config, dims, normalized=True),
        **delta_config.gated_experts_config(dims.shared_width),
    }
    return MegatronConfig(transformer=transformer, model=delta_config.delta_model_arguments(config))


QWEN3_5 = Family(
    name="qwen3_5",
    architectures=("Qwen3_5ForCausalLM",),
    mappings=delta_rows.with_mtp((*_DECODER, *common.DENSE_MLP)),
    dimensions=_dense_dimensions,
    megatron_config=_dense_config,
    tied=common.TIED_LM_HEAD,
    sizes=_SIZES,
    mtp_setting=MTP_SETTING,
    zero_centred=True,
    # Of a model whose config does not count them.
    passthrough=("mtp.",),
)

QWEN3_5_MOE = Family(
    name="qwen3_5_moe",
    architectures=("Qwen3_5MoeForCausalLM",),
    mappings=delta_rows.with_mtp((*_DECODER, *common.ROUTED_EXPERTS, *common.GATED_SHARED_EXPERT)),
    dimensions=_moe_dimensions,
    megatron_config=_moe_config,
    tied=common.TIED_LM_HEAD,
    sizes=(
        routed.EXPERTS,
        SizeSetting(("moe_intermediate_size",)),
        SizeSetting(("shared_expert_intermediate_size",)),
        SizeSetting(("intermediate_size",), optional=True, nullable=True),
        *_SIZES,
    ),
    mtp_setting=MTP_SETTING,
    zero_centred=True,
    passthrough=("mtp.",),
    # Decoder and layers of multi-token prediction may each be held in either form, by who wrote the checkpoint.
    forms=(_IN_ONE_TENSOR, (*_IN_ONE_TENSOR, *_MTP_IN_ONE_TENSOR), _MTP_IN_ONE_TENSOR),
)
