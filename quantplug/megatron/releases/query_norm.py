"""Latent attention whose queries are projected at once (no `q_lora_rank`): DeepSeek-V2-Lite has no norm before them.

Megatron-Core 0.19 has one setting for the norms of queries and of keys and values (`qk_layernorm`), and fuses one into
`linear_q_proj` where there is no latent of queries (transformer/mla_qk_norm_config.py). That would be a second norm of
hidden states, behind `input_layernorm`. Releases before have none there.
"""

from dataclasses import replace
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from quantplug.megatron.releases.installed import MEGATRON_CORE


class DirectQueries(MLASelfAttention):
    """Megatron-Core's, with the projection of queries that its spec names."""

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        return {**super()._resolve_qk_norm_config(submodules), "linear_q_proj": submodules.linear_q_proj}


def project_queries_directly(block: TransformerBlockSubmodules) -> None:
    """Gives every layer of a block of latent attention queries without a norm, in place."""
    block.layer_specs = [with_direct_queries(layer) for layer in block.layer_specs]


def with_direct_queries(layer: ModuleSpec) -> ModuleSpec:
    """The spec of a layer of latent attention whose queries have no norm."""
    if MEGATRON_CORE < (0, 19):
        return layer
    attention: ModuleSpec = layer.submodules.self_attention
    # The local spec names a norm of queries, which would not be used: that is refused.
    submodules = replace(attention.submodules, q_layernorm=IdentityOp)
    attention = replace(attention, module=DirectQueries, submodules=submodules)
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))
