"""Gated delta nets of Megatron-Core (Qwen3-Next, Qwen3.5): which modules such a model is built of.

With Transformer Engine by Megatron-Core's own spec. Of its local modules there is none in 0.16.1: it is put together
here, with the zero-centred norm that Megatron's local norms refuse to be.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_linear_attention_pattern,
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import nn


class ZeroCentredNorm(nn.Module):
    """x / rms(x) * (1 + weight), in FP32, as Transformer Engine computes it with a zero-centred gamma.

    Args:
        hidden_size: Entries of the last axis.
        eps: Added to the mean of squares.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **settings: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of [..., hidden_size], in the type of x."""
        # The square of a BF16 activation, summed over thousands of entries, is too coarse in BF16.
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * (1.0 + self.weight.float())).to(x.dtype)


def has_delta_nets(config: TransformerConfig) -> bool:
    """Whether some layers of the model have a gated delta net in place of attention."""
    return config.experimental_attention_variant == "gated_delta_net"


def block_with_delta_nets(
    config: TransformerConfig, *, use_transformer_engine: bool, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The specs of the layers of this pipeline stage, delta nets and attention as the config's pattern has them.

    Args:
        use_transformer_engine: Whether the layers are made of Transformer Engine's modules. If not,
            `config.deterministic_mode` is turned on.
        vp_stage: Which virtual stage; None without virtual pipelining.
    """
    if use_transformer_engine:
        return get_transformer_block_with_experimental_attention_variant_spec(config, vp_stage=vp_stage)
    # FLA's kernels need a GPU; this chooses Megatron's own loop, and it is read as the model runs.
    config.deterministic_mode = True
    # Asked of a config that does not say it, as Megatron-Core 0.19 wants: attention everywhere, and nets put in below.
    plain = copy(config)
    plain.experimental_attention_variant = None
    block = get_gpt_decoder_block_spec(
        plain, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    is_delta = get_linear_attention_pattern(config)[get_transformer_layer_offset(config, vp_stage=vp_stage) :]
    # The pattern goes on to the last layer of the model, the block ends with the last one of this stage.
    layers = [_local_layer(spec, bool(delta)) for spec, delta in zip(block.layer_specs, is_delta, strict=False)]
    return replace(block, layer_specs=layers, layer_norm=ZeroCentredNorm)


def with_zero_centred_norms(mtp: MultiTokenPredictionBlockSubmodules) -> MultiTokenPredictionBlockSubmodules:
    """Layers of multi-token prediction made of local modules, with the norms that the decoder's layers have."""
    layers = [
        _with_submodules(spec, enorm=ZeroCentredNorm, hnorm=ZeroCentredNorm, layer_norm=ZeroCentredNorm)
        for spec in mtp.layer_specs
    ]
    return replace(mtp, layer_specs=layers)


def weights_in_fp32(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights that hold in FP32 what 16 bits do not.

    The norm's values on disk are these + 1, a difference that 16 bits do not hold below one half; the decay's are FP32
    in some sources, and the net computes with them so.
    """
    for module in model.modules():
        if isinstance(module, GatedDeltaNet):
            yield from (module.out_norm.weight, module.A_log, module.dt_bias)


def _local_layer(spec: ModuleSpec, is_delta: bool) -> ModuleSpec:
    norms = {"input_layernorm": ZeroCentredNorm, "pre_mlp_layernorm": ZeroCentredNorm}
    # A layer of full attention has norms on queries and keys too, and these are zero-centred like the others.
    if not is_delta:
        attention = spec.submodules.self_attention
        attention = _with_submodules(attention, q_layernorm=ZeroCentredNorm, k_layernorm=ZeroCentredNorm)
        return _with_submodules(spec, self_attention=attention, **norms)
    net = GatedDeltaNetSubmodules(ColumnParallelLinear, out_norm=ZeroCentredNorm, out_proj=RowParallelLinear)
    # In a checkpoint the norm has the name that it has with Transformer Engine.
    keys = {"input_layernorm.": "self_attention.in_proj.layer_norm_"}
    keys = {**spec.submodules.sharded_state_dict_keys_map, **keys}
    mixer = ModuleSpec(GatedDeltaNet, submodules=net)
    return _with_submodules(spec, self_attention=mixer, sharded_state_dict_keys_map=keys, **norms)


def _with_submodules(spec: ModuleSpec, **changes: Any) -> ModuleSpec:
    return replace(spec, submodules=replace(spec.submodules, **changes))
