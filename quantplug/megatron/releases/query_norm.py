"""Latent attention whose queries are projected at once (no `q_lora_rank`): DeepSeek-V2-Lite has no norm before them.

Megatron-Core 0.19 has one setting for the norms of queries and of keys and values (`qk_layernorm`), and fuses one into
`linear_q_proj` where there is no latent of queries (transformer/mla_qk_norm_config.py). That would be a second norm of
hidden states, behind `input_layernorm`. Releases before have none there.
"""

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
    for layer in block.layer_specs if MEGATRON_CORE >= (0, 19) else ():
        attention: ModuleSpec = layer.submodules.self_attention
        attention.module = DirectQueries
        # The local spec names one, which would not be used: that is refused.
        attention.submodules.q_layernorm = IdentityOp
