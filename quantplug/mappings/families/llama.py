"""Llama 2 and 3, dense: attention of as many or fewer query groups than heads, SwiGLU, Llama 3's scaled rotary base."""

from collections.abc import Mapping
from typing import Any

from quantplug.mappings.families import common
from quantplug.mappings.table import Family, MegatronConfig


def _megatron_config(config: Mapping[str, Any]) -> MegatronConfig:
    common.refuse_decoder_settings("Llama", config)
    return MegatronConfig(
        transformer=common.decoder_transformer_config(config), model=common.decoder_model_arguments(config)
    )


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    mappings=(
        *common.EMBEDDINGS,
        *common.ATTENTION,
        *common.MLP_NORM,
        *common.DENSE_MLP,
    ),
    dimensions=common.decoder_dimensions,
    megatron_config=_megatron_config,
    tied=common.TIED_LM_HEAD,
)
