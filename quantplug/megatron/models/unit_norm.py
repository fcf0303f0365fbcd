"""Norms without weights on queries and keys in some layers: Megatron-Core's specs have them in all layers or none."""

import copy
from collections.abc import Container
from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig


class UnitNormAttention(SelfAttention):
    """Megatron-Core's, with `L2Norm` on queries and keys whatever its config says, which is one for all layers.

    Named in the spec alone, the norms are refused by Megatron-Core 0.19.

    Args:
        normed: Megatron's numbers of the layers that have them; None for all that are made by this spec.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, normed: Container[int] | None = None, **settings: Any
    ) -> None:
        super().__init__(config, *args, **settings)
        if normed is None or self.layer_number in normed:
            # It has no weights, so that its size does not matter.
            self.q_layernorm = L2Norm(self.hidden_size_per_attention_head, config.layernorm_epsilon)
            self.k_layernorm = L2Norm(self.hidden_size_per_attention_head, config.layernorm_epsilon)


def add_unit_norms(block: TransformerBlockSubmodules, layers: Container[int], first: int) -> None:
    """Gives these layers of a block `L2Norm`, in place.

    Args:
        layers: Global ids.
        first: Global id of the block's first layer.
    """
    block.layer_specs = [
        _with_unit_norm(spec) if layer in layers else spec for layer, spec in enumerate(block.layer_specs, start=first)
    ]


def _with_unit_norm(spec: ModuleSpec) -> ModuleSpec:
    """A copy of the spec of a layer, with norms on its queries and keys."""
    # Megatron puts one and the same spec object at every layer of a kind: changed in place, all of them would get the
    # norm.
    layer = copy.deepcopy(spec)
    attention: ModuleSpec = layer.submodules.self_attention
    attention.module = UnitNormAttention
    return layer
