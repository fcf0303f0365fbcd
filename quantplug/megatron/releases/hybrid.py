"""Megatron-Core's models whose layers are of one module each: `HybridModel`, which was `MambaModel` before 0.18."""

from quantplug.mappings.hybrid_pattern import MAMBA, HybridPattern, parse
from quantplug.megatron.releases.installed import MEGATRON_CORE

HAS_ALL_LAYERS = MEGATRON_CORE >= (0, 19)
"""Whether one can have all layers that a `GPTModel` can: before 0.19 there is no multi-latent attention."""

if MEGATRON_CORE >= (0, 18):
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel
else:
    from megatron.core.models.mamba import MambaModel as HybridModel
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec as hybrid_stack_spec
    from megatron.core.ssm.mamba_block import MambaStack as HybridStack
    from megatron.core.ssm.mamba_block import MambaStackSubmodules as HybridStackSubmodules

# A module is one that a rule of quantization must leave out. Since then its tensors are the mixer's own.
CONVOLUTION_IS_A_MODULE = MEGATRON_CORE < (0, 19)
PATTERN = "hybrid_override_pattern" if MEGATRON_CORE < (0, 17) else "hybrid_layer_pattern"

__all__ = [
    "CONVOLUTION_IS_A_MODULE",
    "HAS_ALL_LAYERS",
    "PATTERN",
    "HybridModel",
    "HybridStack",
    "HybridStackSubmodules",
    "hybrid_stack_spec",
    "layer_pattern",
    "pattern_text",
]


def pattern_text(model: HybridModel) -> str | None:
    """The pattern of a model as Megatron has it; None of one that was made by ratios."""
    text: str | None = vars(model)[PATTERN]
    return text


def layer_pattern(model: HybridModel) -> HybridPattern:
    """Which layers a model has, on all pipeline stages.

    Raises:
        UnsupportedModelError: It has layers that are not converted.
    """
    text = pattern_text(model)
    # By ratios, which were there before patterns, a model has Mamba mixers: every layer is one by itself.
    return HybridPattern(MAMBA * model.config.num_layers) if text is None else parse(text)
