"""GLM-4.5V: the language model is GLM-4.5 without layers of multi-token prediction, and without norms on q and k.

Positions of text alone turn heads as plain rotary embeddings do.
"""

from dataclasses import replace

from quantplug.mappings.families.glm4_moe import GLM4_MOE
from quantplug.mappings.families.vision_language import below_model, vision_language
from quantplug.mappings.table import LayerStack

# Rows of MTP layers are left out, and the copies of the embedding that are their tensors with them.
_LANGUAGE = replace(
    GLM4_MOE,
    mappings=tuple(replace(row, duplicates=()) for row in GLM4_MOE.mappings if row.block is LayerStack.DECODER),
)

GLM4V_MOE = vision_language(
    _LANGUAGE,
    below_model("language_model"),
    name="glm4v_moe",
    architectures=("Glm4vMoeForConditionalGeneration",),
    passthrough=("model.visual.",),
)
