"""Qwen3.5 with vision, as it is published: the language models of Qwen3.5 under another prefix, MTP beside them."""

from quantplug.mappings.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from quantplug.mappings.families.vision_language import below_model, vision_language

_PLACE = below_model("language_model")

QWEN3_5_VL = vision_language(
    QWEN3_5,
    _PLACE,
    name="qwen3_5_vl",
    architectures=("Qwen3_5ForConditionalGeneration",),
    passthrough=("model.visual.",),
)
QWEN3_5_VL_MOE = vision_language(
    QWEN3_5_MOE,
    _PLACE,
    name="qwen3_5_vl_moe",
    architectures=("Qwen3_5MoeForConditionalGeneration",),
    passthrough=("model.visual.",),
)
