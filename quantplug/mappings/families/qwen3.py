"""Qwen3, dense: grouped-query attention with norms on q and k, SwiGLU, tied or untied embeddings."""

from collections.abc import Mapping
from typing import Any

from quantplug.mappings.families import common
from quantplug.mappings.table import Family, MegatronConfig


def _megatron_config(config: Mapping[str, Any]) -> MegatronConfig:
    common.refuse_decoder_settings("Qwen3", config)
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
    dimensions=common.decoder_dimensions,
    megatron_config=_megatron_config,
    tied=common.TIED_LM_HEAD,
)
