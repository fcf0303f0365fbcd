"""In FP32, what vLLM's build for CPUs computes in BF16 alone, or not at all: gated delta nets, experts without a gate.

Written for these tests from the papers' formulas. vLLM's modules above them, their parameters, names and loaders stay.
"""

from itertools import pairwise

import torch
from torch.nn import functional
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name


class UngatedExperts(FusedMoEMethodBase):
    """Experts of two matrices, with the square of a ReLU between them (https://arxiv.org/abs/2109.08668)."""

    def create_weights(self, layer: RoutedExperts, *args: object, **kwargs: object) -> None:
        raise NotImplementedError  # Takes over from methods that have made them.

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """None: the weights are dense."""

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        **kwargs: object,
    ) -> torch.Tensor:
        """[tokens, hidden]: the routed experts alone; whoever calls adds the shared ones."""
        assert layer.moe_config.activation.value == "relu2_no_mul"
        out = torch.zeros_like(x)
        for expert in topk_ids.unique().tolist():
            token, slot = (topk_ids == expert).nonzero(as_tuple=True)
            inner = functional.relu(x[token] @ layer.w13_weight[expert].T).square()
            out.index_add_(0, token, inner @ layer.w2_weight[expert].T * topk_weights[token, slot, None])
        return out


def delta_attention(
    mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, core_attn_out: torch.Tensor, layer_name: LayerNameType
) -> None:
    """Gated delta rule over whole prompts, token by token (https://arxiv.org/abs/2412.06464, equation 10).

    Args:
        mixed_qkv: FP32 [tokens, channels of q, k and v], before the convolution.
        b: [tokens, heads of values], of which beta is the sigmoid.
        a: [tokens, heads of values], of which the decay is made.
        core_attn_out: [tokens, heads of values, head], which is written.
        layer_name: Of the layer whose parameters these are.
    """
    context = get_forward_context()
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    if context.attn_metadata is None:
        return
    starts = context.attn_metadata[layer.prefix].non_spec_query_start_loc.tolist()
    for first, last in pairwise(starts):
        rows = slice(first, last)
        core_attn_out[rows] = _delta_of_prompt(layer, mixed_qkv[rows], b[rows], a[rows])


def _delta_of_prompt(layer: torch.nn.Module, mixed: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    taps = layer.conv1d.weight
    padded = functional.pad(mixed.T, (taps.shape[-1] - 1, 0))
    mixed = functional.silu(functional.conv1d(padded, taps.reshape(-1, 1, taps.shape[-1]), groups=taps.shape[0])).T
    query, key, value = (part[0].float() for part in layer.rearrange_mixed_qkv(mixed))
    per_key = value.shape[1] // key.shape[1]
    query = functional.normalize(query, dim=-1).repeat_interleave(per_key, 1) * query.shape[-1] ** -0.5
    key = functional.normalize(key, dim=-1).repeat_interleave(per_key, 1)
    decay = torch.exp(-layer.A_log.float().exp() * functional.softplus(a.float() + layer.dt_bias.float()))
    beta = b.float().sigmoid()
    state = torch.zeros(value.shape[1], key.shape[2], value.shape[2])
    out = []
    for token in range(mixed.shape[0]):
        state = state * decay[token, :, None, None]
        known = (state * key[token, :, :, None]).sum(1)
        change = (value[token] - known) * beta[token, :, None]
        state = state + key[token, :, :, None] * change[:, None]
        out.append((state * query[token, :, :, None]).sum(1))
    return torch.stack(out)


def replace_operators() -> None:
    """Puts them in the place of vLLM's, before any model is built."""
    gdn_attention.cpu_gdn_attention_core = delta_attention
