"""Qwen2 and Qwen2.5, dense: grouped-query attention with biases on q, k and v, SwiGLU, tied or untied embeddings."""

from collections.abc import Mapping
from typing import Any

from quantplug.mappings.families import common
from quantplug.mappings.table import Family, MegatronConfig


def _megatron_config(config: Mapping[str, Any]) -> MegatronConfig:
    common.refuse_decoder_settings("Qwen2", config)
    return MegatronConfig(
        transformer={**common.decoder_transformer_config(config), "add_qkv_bias": True},
        model=common.decoder_model_arguments(config),
    )


QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    mappings=(
        *common.EMBEDDINGS,
        *common.ATTENTION,
        *common.QKV_BIAS,
        *common.MLP_NORM,
        *common.DENSE_MLP,
    ),
    dimensions=common.decoder_dimensions,
    megatron_config=_megatron_config,
    tied=common.TIED_LM_HEAD,
)
