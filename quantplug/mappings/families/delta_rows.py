"""Rows of Qwen3-Next and Qwen3.5: gated delta nets among attention with an output gate, and multi-token prediction.

`*` is the layer, then the expert. Norms are zero-centred in both (1 + weight), but for the one after a delta net, which
only Megatron keeps so. That one and the kernels of the convolution are all that is not plainly another's row.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from quantplug.mappings.delta_layouts import DELTA_CONVOLUTION, GATED_QKV
from quantplug.mappings.families import common
from quantplug.mappings.families.deepseek_rows import in_mtp
from quantplug.mappings.layouts import COLUMN, ROW
from quantplug.mappings.table import LayerStack, Role, Scope, WeightMapping

Row = TypeVar("Row", bound=WeightMapping)

# Half of q_proj is the gate that attention's output is multiplied by, in_proj makes that of a delta net. Quantized in
# four bits they are reported to raise perplexity two to six times; ModelOpt's recipes for Qwen3.5 keep them in FP8
# (modelopt_recipes/huggingface/qwen3_5/ptq of 0.47).
INPUTS_MIN_BITS = 8

# With Transformer Engine it is part of whichever linear reads it.
INPUT_NORM = WeightMapping(
    (
        "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.*.self_attention.in_proj.layer_norm_weight",
        "decoder.layers.*.input_layernorm.weight",
    ),
    ("model.layers.*.input_layernorm.weight",),
    Scope.LAYER,
)

ATTENTION = (
    INPUT_NORM,
    WeightMapping(
        ("decoder.layers.*.self_attention.linear_qkv.weight",),
        (
            "model.layers.*.self_attn.q_proj.weight",
            "model.layers.*.self_attn.k_proj.weight",
            "model.layers.*.self_attn.v_proj.weight",
        ),
        Scope.ATTENTION_LAYER,
        GATED_QKV,
        Role.LINEAR,
        default_min_bits=INPUTS_MIN_BITS,
    ),
    # Only some layers have attention; the decoders of `common` have it in all.
    replace(common.OUTPUT_PROJECTION, scope=Scope.ATTENTION_LAYER),
    *(replace(row, scope=Scope.ATTENTION_LAYER) for row in common.QK_NORM),
)

# All but the input projection, which the two families have in other parts.
# The convolution [rows, 1, taps] is no matrix product that a server quantizes. A_log and dt_bias are exponentiated or
# added in FP32, one value a head, and rounding them to BF16 would change the decay of the states.
DELTA_NET = (
    WeightMapping(
        ("decoder.layers.*.self_attention.conv1d.weight",),
        ("model.layers.*.linear_attn.conv1d.weight",),
        Scope.DELTA_LAYER,
        DELTA_CONVOLUTION,
        Role.HIGH_PRECISION,
    ),
    WeightMapping(
        ("decoder.layers.*.self_attention.A_log",),
        ("model.layers.*.linear_attn.A_log",),
        Scope.DELTA_LAYER,
        COLUMN,
        keep_source_dtype=True,
    ),
    WeightMapping(
        ("decoder.layers.*.self_attention.dt_bias",),
        ("model.layers.*.linear_attn.dt_bias",),
        Scope.DELTA_LAYER,
        COLUMN,
        keep_source_dtype=True,
    ),
    WeightMapping(
        ("decoder.layers.*.self_attention.out_norm.weight",),
        ("model.layers.*.linear_attn.norm.weight",),
        Scope.DELTA_LAYER,
        offset=1.0,
    ),
    WeightMapping(
        ("decoder.layers.*.self_attention.out_proj.weight",),
        ("model.layers.*.linear_attn.out_proj.weight",),
        Scope.DELTA_LAYER,
        ROW,
        Role.LINEAR,
    ),
)

_MTP_ONLY = (
    WeightMapping(
        ("mtp.layers.*.enorm.weight",), ("mtp.pre_fc_norm_embedding.weight",), Scope.MTP, block=LayerStack.MTP_APART
    ),
    WeightMapping(
        ("mtp.layers.*.hnorm.weight",), ("mtp.pre_fc_norm_hidden.weight",), Scope.MTP, block=LayerStack.MTP_APART
    ),
    # [H, 2H]: the embedding's columns, then the hidden state's, in both.
    WeightMapping(
        ("mtp.layers.*.eh_proj.weight",),
        ("mtp.fc.weight",),
        Scope.MTP,
        COLUMN,
        Role.HIGH_PRECISION,
        block=LayerStack.MTP_APART,
    ),
    WeightMapping(
        ("mtp.layers.*.final_layernorm.weight",), ("mtp.norm.weight",), Scope.MTP, block=LayerStack.MTP_APART
    ),
)


def with_mtp(rows: Iterable[WeightMapping]) -> tuple[WeightMapping, ...]:
    """A table's rows of decoder layers, and the same for the layer of multi-token prediction, which has attention."""
    rows = tuple(rows)
    inner = (row for row in rows if row.scope not in (Scope.MODEL, Scope.DELTA_LAYER))
    return (*rows, *_MTP_ONLY, *(in_own_mtp(row) for row in inner))


def in_own_mtp(row: Row) -> Row:
    """A row of the decoder's layers for those of multi-token prediction, which have names of their own."""
    names = (name.replace("model.layers.", "mtp.layers.", 1) for name in row.hf)
    return replace(in_mtp(row), hf=tuple(names), block=LayerStack.MTP_APART)
