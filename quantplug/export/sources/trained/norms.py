"""Norms of a training checkpoint: its tensors do not show whether a norm multiplies with its weight or with 1 + it."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from quantplug.checkpoint.torch_dist.common import Plain
from quantplug.export.plan.types import WholeWeight

ZERO_CENTRED = "layernorm_zero_centered_gamma"
_ARGUMENT = "apply_layernorm_1p"  # What the setting is called among Megatron-LM's arguments.
# Of a Mamba mixer's norm, `mixer.norm.weight`, the setting says nothing.
_NORMS = (
    *("layernorm.weight", "layer_norm_weight", ".final_norm.weight", ".out_norm.weight"),
    *(".enorm.weight", ".hnorm.weight"),
)


def is_zero_centred(arguments: Mapping[str, Plain]) -> bool | None:
    """Whether the norms multiply with 1 + weight, by what the trainer noted; None where it did not."""
    said = arguments.get(_ARGUMENT)
    return said if isinstance(said, bool) else None


def with_norms(weights: Iterable[WholeWeight], zero_centred: bool | None) -> tuple[WholeWeight, ...]:
    """The weights, those of norms with what they multiply with."""
    return tuple(
        replace(weight, zero_centred=zero_centred) if weight.key.module.endswith(_NORMS) else weight
        for weight in weights
    )
