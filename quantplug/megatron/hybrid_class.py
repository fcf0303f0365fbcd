"""Megatron-Core's models whose layers are of one module each: `HybridModel`, which was `MambaModel` before 0.17."""

from quantplug.mappings.hybrid_pattern import MAMBA, HybridPattern, parse

try:
    from megatron.core.models.hybrid.hybrid_block import HybridStack
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    HAS_HYBRID_MODEL = True
    _PATTERN = "hybrid_layer_pattern"
except ImportError:
    from megatron.core.models.mamba import MambaModel as HybridModel
    from megatron.core.ssm.mamba_block import MambaStack as HybridStack

    HAS_HYBRID_MODEL = False
    _PATTERN = "hybrid_override_pattern"

__all__ = ["HAS_HYBRID_MODEL", "HybridModel", "HybridStack", "layer_pattern"]


def layer_pattern(model: HybridModel) -> HybridPattern:
    """Which layers a model has, on all pipeline stages.

    Raises:
        UnsupportedModelError: It has layers that are not converted.
    """
    text = vars(model)[_PATTERN]
    # By ratios, which were there before patterns, a model has Mamba mixers: every layer is one by itself.
    return HybridPattern(MAMBA * model.config.num_layers) if text is None else parse(text)
