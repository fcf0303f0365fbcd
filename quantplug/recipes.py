"""ModelOpt's general recipes by name, as far as they need no data: what each asks of a checkpoint.

ModelOpt ships them as YAML (modelopt_recipes/general/ptq of 0.47), which a live model takes through its own
`load_recipe`. Here they are data, so that a checkpoint is quantized by one of them where no ModelOpt is installed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from quantplug.choices import KVCacheFormat, Preset, QuantFormat, Scales
from quantplug.errors import ArgumentError, Offender


@dataclass(frozen=True)
class Recipe:
    """What a recipe asks for.

    Attributes:
        preset: Which linears it quantizes.
        input_scale: The scale of all inputs, of which nothing is calibrated; None for a format without.
        kv_cache: The format of the KV cache; None for 16 bits.
        scales: How the scales of blocks are found.
        experts: The format of routed experts; None where it is that of all.
    """

    format: QuantFormat
    preset: Preset = Preset.ALL
    input_scale: float | None = None
    kv_cache: KVCacheFormat | None = None
    scales: Scales = Scales.MAX
    experts: QuantFormat | None = None


_CAST = KVCacheFormat.FP8_CAST
RECIPES: Mapping[str, Recipe] = {
    "int4_blockwise_weight_only": Recipe(QuantFormat.INT4),
    "nvfp4_weight_only-kv_fp16": Recipe(QuantFormat.W4A16_NVFP4),
    "nvfp4_weight_only-kv_fp8_cast": Recipe(QuantFormat.W4A16_NVFP4, kv_cache=_CAST),
    # Published as nvidia/Kimi-K2.7-Code and GLM-5.2: inputs of experts get ModelOpt's constant_amax 2688, so 1.0.
    "nvfp4_experts_only_input_scale1-kv_fp8_cast": Recipe(QuantFormat.NVFP4, Preset.EXPERTS_ONLY, 1.0, _CAST),
}


def recipe_named(name: str, argument: str) -> Recipe:
    """The recipe of a name.

    Args:
        argument: What the name was given as, for the message.

    Raises:
        ArgumentError: No recipe that needs no data has this name.
    """
    if name not in RECIPES:
        raise ArgumentError(
            "There is no such recipe that needs no data.",
            [Offender(argument, f"is {name!r}")],
            f"Use one of: {', '.join(RECIPES)}. Others of ModelOpt's are calibrated: quantize a model by "
            "quantplug.recipe_cfg, and export that.",
        )
    return RECIPES[name]
