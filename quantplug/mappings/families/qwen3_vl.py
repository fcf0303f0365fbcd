"""Qwen3-VL: the language models are Qwen3 and Qwen3-MoE.

Positions of text alone turn heads as plain rotary embeddings do (`mrope_section` matters for images). On disk all
experts of a layer are one tensor, [experts, in, out] as Qwen publishes them and servers read them, [experts, out, in]
as transformers 5 saves them; both are read, and written as they came. Quantized, servers load experts one by one.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantplug.mappings.experts import joined_experts
from quantplug.mappings.families.qwen3 import QWEN3
from quantplug.mappings.families.qwen3_moe import QWEN3_MOE, megatron_config
from quantplug.mappings.families.vision_language import below_model, vision_language
from quantplug.mappings.table import MegatronConfig

_EXPERTS = "model.layers.*.mlp.experts"
_PLACE = below_model("language_model")


def _moe_megatron_config(config: Mapping[str, Any]) -> MegatronConfig:
    """Qwen3-MoE's, told to scale the kept probabilities to one, which the router of Qwen3-VL always does."""
    return megatron_config({**config, "norm_topk_prob": True})


# Whether tensors are transposed is found by `source_fit.in_form`, which holds their shapes against the config's widths.
_PUBLISHED = {row.megatron: row for row in joined_experts(_EXPERTS, transposed=True)}
_LANGUAGE_MOE = replace(
    QWEN3_MOE,
    mappings=tuple(_PUBLISHED.get(row.megatron, row) for row in QWEN3_MOE.mappings),
    megatron_config=_moe_megatron_config,
    forms=(joined_experts(_EXPERTS, transposed=False),),
)

QWEN3_VL = vision_language(
    QWEN3,
    _PLACE,
    name="qwen3_vl",
    architectures=("Qwen3VLForConditionalGeneration",),
    passthrough=("model.visual.",),
)
QWEN3_VL_MOE = vision_language(
    _LANGUAGE_MOE,
    _PLACE,
    name="qwen3_vl_moe",
    architectures=("Qwen3VLMoeForConditionalGeneration",),
    passthrough=("model.visual.",),
)
