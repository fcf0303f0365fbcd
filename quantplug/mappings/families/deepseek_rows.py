"""Rows of what DeepSeek-V2 and V3 brought, and others took over. `*` is the layer, then the expert.

Multi-latent attention, shared experts, a router that corrects its scores by a bias, multi-token prediction (MTP).
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import torch

from quantplug.mappings.families import common
from quantplug.mappings.layouts import COLUMN, GATED, ROW, Option
from quantplug.mappings.table import LayerStack, Role, Scope, WeightMapping

Row = TypeVar("Row", bound=WeightMapping)

# vLLM and SGLang load the two down projections of a layer into one linear (`fused_qkv_a_proj`): one scale for both.
_DOWN_PROJECTIONS = "model.layers.*.self_attn.fused_qkv_a_proj"

# The down projections are whole on every rank with Transformer Engine, and column parallel with the local spec.
LATENT_ATTENTION = (
    WeightMapping(
        ("decoder.layers.*.input_layernorm.weight",), ("model.layers.*.input_layernorm.weight",), Scope.LAYER
    ),
    WeightMapping(
        ("decoder.layers.*.self_attention.linear_q_proj.weight",),
        ("model.layers.*.self_attn.q_proj.weight",),
        Scope.LAYER,
        COLUMN,
        Role.LINEAR,
        option=Option.QUERY_DIRECT,
    ),
    WeightMapping(
        ("decoder.layers.*.self_attention.linear_q_down_proj.weight",),
        ("model.layers.*.self_attn.q_a_proj.weight",),
        Scope.LAYER,
        COLUMN,
        Role.LINEAR,
        scale_group=_DOWN_PROJECTIONS,
        option=Option.QUERY_LATENT,
    ),
    WeightMapping(
        (
            "decoder.layers.*.self_attention.linear_q_up_proj.layer_norm_weight",
            "decoder.layers.*.self_attention.q_layernorm.weight",
        ),
        ("model.layers.*.self_attn.q_a_layernorm.weight",),
        Scope.LAYER,
        option=Option.QUERY_LATENT,
    ),
    WeightMapping(
        ("decoder.layers.*.self_attention.linear_q_up_proj.weight",),
        ("model.layers.*.self_attn.q_b_proj.weight",),
        Scope.LAYER,
        COLUMN,
        Role.LINEAR,
        option=Option.QUERY_LATENT,
    ),
    WeightMapping(
        ("decoder.layers.*.self_attention.linear_kv_down_proj.weight",),
        ("model.layers.*.self_attn.kv_a_proj_with_mqa.weight",),
        Scope.LAYER,
        COLUMN,
        Role.LINEAR,
        scale_group=_DOWN_PROJECTIONS,
    ),
    WeightMapping(
        (
            "decoder.layers.*.self_attention.linear_kv_up_proj.layer_norm_weight",
            "decoder.layers.*.self_attention.kv_layernorm.weight",
        ),
        ("model.layers.*.self_attn.kv_a_layernorm.weight",),
        Scope.LAYER,
    ),
    # Servers cut it into two and multiply these into other weights; SGLang takes packed FP4 for its values.
    WeightMapping(
        ("decoder.layers.*.self_attention.linear_kv_up_proj.weight",),
        ("model.layers.*.self_attn.kv_b_proj.weight",),
        Scope.LAYER,
        COLUMN,
        Role.LINEAR,
        min_bits=8,
    ),
    common.OUTPUT_PROJECTION,
)

# All shared experts of a layer are one MLP, as wide as they are together, in Megatron and on disk.
SHARED_EXPERTS = (
    WeightMapping(
        ("decoder.layers.*.mlp.shared_experts.linear_fc1.weight",),
        ("model.layers.*.mlp.shared_experts.gate_proj.weight", "model.layers.*.mlp.shared_experts.up_proj.weight"),
        Scope.MOE_LAYER,
        GATED,
        Role.LINEAR,
    ),
    WeightMapping(
        ("decoder.layers.*.mlp.shared_experts.linear_fc2.weight",),
        ("model.layers.*.mlp.shared_experts.down_proj.weight",),
        Scope.MOE_LAYER,
        ROW,
        Role.LINEAR,
    ),
)

# Added to the scores for the choice of experts alone; rounded to 16 bits it would choose others.
CORRECTION_BIAS = (
    WeightMapping(
        ("decoder.layers.*.mlp.router.expert_bias",),
        ("model.layers.*.mlp.gate.e_score_correction_bias",),
        Scope.MOE_LAYER,
        dtype=torch.float32,
    ),
)

# DeepSeek-V3's own files hold both once more as tensors of layer 61. Megatron's MTP layers use the decoder's.
_COPIES = {
    "model.embed_tokens.weight": "model.layers.*.embed_tokens.weight",
    "lm_head.weight": "model.layers.*.shared_head.head.weight",
}
EMBEDDINGS = tuple(
    replace(row, duplicates=tuple(_COPIES[name] for name in row.hf if name in _COPIES)) for row in common.EMBEDDINGS
)
"""The embedding and output layer of all decoders, whose tensors are there again in every layer of MTP."""

_MTP_ONLY = (
    WeightMapping(("mtp.layers.*.enorm.weight",), ("model.layers.*.enorm.weight",), Scope.LAYER, block=LayerStack.MTP),
    WeightMapping(("mtp.layers.*.hnorm.weight",), ("model.layers.*.hnorm.weight",), Scope.LAYER, block=LayerStack.MTP),
    # [H, 2H]: the embedding's columns, then the hidden state's, in both. vLLM's is a plain nn.Linear.
    WeightMapping(
        ("mtp.layers.*.eh_proj.weight",),
        ("model.layers.*.eh_proj.weight",),
        Scope.LAYER,
        COLUMN,
        Role.HIGH_PRECISION,
        block=LayerStack.MTP,
    ),
    WeightMapping(
        ("mtp.layers.*.final_layernorm.weight",),
        ("model.layers.*.shared_head.norm.weight",),
        Scope.LAYER,
        block=LayerStack.MTP,
    ),
)


def with_mtp(rows: Iterable[WeightMapping]) -> tuple[WeightMapping, ...]:
    """A table's rows of decoder layers, and the same for the layers of multi-token prediction.

    Megatron-Core names the decoder layer inside one of them `transformer_layer`, later versions `mtp_model_layer`.
    """
    # Rows of the whole model, such as the embedding, are not repeated: MTP layers use the decoder's.
    rows = tuple(rows)
    return (*rows, *_MTP_ONLY, *(in_mtp(row) for row in rows if row.scope is not Scope.MODEL))


def in_mtp(row: Row) -> Row:
    """The row of the same tensor in a layer of multi-token prediction, under both of Megatron's spellings."""
    inner = ("transformer_layer", "mtp_model_layer")
    names = tuple(name.removeprefix("decoder.layers.*") for name in row.megatron)
    return replace(
        row, megatron=tuple(f"mtp.layers.*.{layer}{name}" for layer in inner for name in names), block=LayerStack.MTP
    )
