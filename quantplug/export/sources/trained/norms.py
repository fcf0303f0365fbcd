"""Norms of a training checkpoint: its tensors do not show whether a norm multiplies with its weight or with 1 + it."""

from collections.abc import Iterable
from dataclasses import replace

from quantplug.checkpoint.torch_dist.noted.arguments import asks_for_centre
from quantplug.export.plan.types import WholeWeight


def with_norms(weights: Iterable[WholeWeight], zero_centred: bool | None) -> tuple[WholeWeight, ...]:
    """The weights, those of norms with what they multiply with."""
    return tuple(
        replace(weight, zero_centred=zero_centred) if asks_for_centre(weight.key.module) else weight
        for weight in weights
    )
