"""Llama 2 and 3, dense: attention of as many or fewer query groups than heads, SwiGLU, Llama 3's scaled rotary base.

With `attention_bias` all four projections of attention have biases: vLLM 0.32 and SGLang load them (llama.py of each).
Megatron-Core has biases of all linears, or of queries, keys and values alone, so that such a checkpoint is quantized
without a model. `mlp_bias` is not served at all: SGLang skips those biases without a word.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantplug.mappings.families import common
from quantplug.mappings.layouts import ModelDimensions, Option
from quantplug.mappings.table import Family, MegatronConfig

_BIASES = (
    *(replace(row, option=Option.QKV_BIAS) for row in common.QKV_BIAS),
    replace(common.OUTPUT_BIAS, option=Option.OUTPUT_BIAS),
)


def _dimensions(config: Mapping[str, Any]) -> ModelDimensions:
    options = frozenset({Option.QKV_BIAS, Option.OUTPUT_BIAS}) if config.get("attention_bias") else frozenset()
    return replace(common.decoder_dimensions(config), options=options)


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
        *_BIASES,
        *common.MLP_NORM,
        *common.DENSE_MLP,
    ),
    dimensions=_dimensions,
    megatron_config=_megatron_config,
    tied=common.TIED_LM_HEAD,
)
