"""Multi-latent attention of Megatron-Core's own modules, whose attention core lacks what the layer hands to it."""

from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


class LatentDotProductAttention(DotProductAttention):
    """Megatron-Core's attention over heads of values that may be narrower than those of queries and keys.

    In Megatron-Core 0.16 `MultiLatentAttention` passes the width of both to its core, as TE's attention takes them;
    the local one does not, and would give its output the width of the keys.

    Args:
        k_channels: Entries of a head of queries and keys.
        v_channels: Entries of a head of values. The base class of the layer makes a core without both, and drops it.
    """

    def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **settings: Any) -> None:
        super().__init__(*args, **settings)
        # The base class computed both from one width for all heads. The scale of the scores it did not compute: the
        # latent layer hands that in (softmax_scale).
        self.hidden_size_per_attention_head = k_channels
        self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


def use_local_core(block: TransformerBlockSubmodules) -> None:
    """Gives every layer of a block of the local spec this attention core, in place."""
    for layer in block.layer_specs:
        attention: ModuleSpec = layer.submodules.self_attention
        attention.submodules.core_attention = LatentDotProductAttention
