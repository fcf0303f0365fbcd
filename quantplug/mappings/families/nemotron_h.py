"""Nemotron-H, Nemotron Nano 2 and Nemotron 3: each layer is a Mamba-2 mixer, attention, or a feed-forward network.

https://arxiv.org/abs/2504.03624. On disk every layer is `backbone.layers.*.norm` and `backbone.layers.*.mixer`,
whatever the mixer is. Feed-forward networks are not gated: relu(x) ** 2 of up_proj alone. Nemotron 3 Super has its
routed experts in a latent of their own.

Layers of multi-token prediction (`mtp.*`) are carried from the source as they are: Megatron-Core 0.16 has none in its
MambaModel.
"""

from dataclasses import replace

import torch

from quantplug.mappings.experts import grouped_mlp
from quantplug.mappings.families import nemotron_h_config
from quantplug.mappings.layouts import COLUMN, QKV, ROW, VOCABULARY, MambaSizes, ModelDimensions, Option
from quantplug.mappings.segments import SegmentedAlike
from quantplug.mappings.table import Family, Role, Scope, WeightMapping

_MIXER = "backbone.layers.*.mixer"


def _mamba(dims: ModelDimensions) -> MambaSizes:
    # Every Nemotron-H config has these sizes: `nemotron_h_config.dimensions` reads them or refuses the config.
    assert dims.mamba is not None
    return dims.mamba


def projected(dims: ModelDimensions) -> tuple[int, ...]:
    """Rows of z, x, B, C and dt."""
    sizes = _mamba(dims)
    return sizes.inner, sizes.inner, sizes.states, sizes.states, sizes.num_heads


def convolved(dims: ModelDimensions) -> tuple[int, ...]:
    """Rows of x, B and C."""
    return projected(dims)[1:4]


# Rows lie alike in both. Only a tensor parallel slice is no run of them: it has a share of every segment.
PROJECTED = SegmentedAlike(projected)
CONVOLVED = SegmentedAlike(convolved)


def _embedding(hf: str) -> WeightMapping:
    return WeightMapping(("embedding.word_embeddings.weight",), (hf,), Scope.MODEL, VOCABULARY, Role.EMBEDDING)


EMBEDDINGS = (
    _embedding("backbone.embeddings.weight"),
    WeightMapping(("output_layer.weight",), ("lm_head.weight",), Scope.MODEL, VOCABULARY, Role.OUTPUT_LAYER),
    WeightMapping(("decoder.final_norm.weight",), ("backbone.norm_f.weight",), Scope.MODEL),
)

# transformers 5.14 writes it so (https://github.com/huggingface/transformers/pull/48075 mends that), and reads both.
# vLLM 0.32 and SGLang 0.5.23 (models/nemotron_h.py of both) rename `embeddings` alone; vLLM stops at the other one.
WITHOUT_S = (replace(_embedding("backbone.embedding.weight"), served=("backbone.embeddings.weight",)),)

# One norm before the one module of a layer: part of its first linear with Transformer Engine, apart in the local spec.
NORM = WeightMapping(
    (
        "decoder.layers.*.mixer.in_proj.layer_norm_weight",
        "decoder.layers.*.norm.weight",
        "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.*.input_layernorm.weight",
        "decoder.layers.*.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.*.pre_mlp_layernorm.weight",
    ),
    ("backbone.layers.*.norm.weight",),
    Scope.LAYER,
)


def _of_mamba(name: str) -> WeightMapping:
    """One value a head, or a channel: cut as the heads are."""
    return WeightMapping((f"decoder.layers.*.mixer.{name}",), (f"{_MIXER}.{name}",), Scope.MAMBA_LAYER, COLUMN)


MAMBA = (
    WeightMapping(
        ("decoder.layers.*.mixer.in_proj.weight",),
        (f"{_MIXER}.in_proj.weight",),
        Scope.MAMBA_LAYER,
        PROJECTED,
        Role.LINEAR,
    ),
    # [d + 2gn, 1, 4]: servers have no quantized convolution. From Megatron-Core 0.19 on it is the mixer's own.
    WeightMapping(
        ("decoder.layers.*.mixer.conv1d.weight", "decoder.layers.*.mixer.conv1d_weight"),
        (f"{_MIXER}.conv1d.weight",),
        Scope.MAMBA_LAYER,
        CONVOLVED,
        Role.HIGH_PRECISION,
    ),
    WeightMapping(
        ("decoder.layers.*.mixer.conv1d.bias", "decoder.layers.*.mixer.conv1d_bias"),
        (f"{_MIXER}.conv1d.bias",),
        Scope.MAMBA_LAYER,
        CONVOLVED,
    ),
    # The mixer computes with these in FP32, and not all sources hold them so.
    *(replace(_of_mamba(name), keep_source_dtype=True) for name in ("A_log", "D", "dt_bias")),
    _of_mamba("norm.weight"),
    WeightMapping(
        ("decoder.layers.*.mixer.out_proj.weight",), (f"{_MIXER}.out_proj.weight",), Scope.MAMBA_LAYER, ROW, Role.LINEAR
    ),
)

ATTENTION = (
    WeightMapping(
        ("decoder.layers.*.self_attention.linear_qkv.weight",),
        (f"{_MIXER}.q_proj.weight", f"{_MIXER}.k_proj.weight", f"{_MIXER}.v_proj.weight"),
        Scope.ATTENTION_LAYER,
        QKV,
        Role.LINEAR,
    ),
    WeightMapping(
        ("decoder.layers.*.self_attention.linear_proj.weight",),
        (f"{_MIXER}.o_proj.weight",),
        Scope.ATTENTION_LAYER,
        ROW,
        Role.LINEAR,
    ),
)


def _feed_forward(megatron: str, hf: str, scope: Scope) -> tuple[WeightMapping, ...]:
    """The two linears of a network without a gate, so that each is one tensor in both."""
    return (
        WeightMapping((f"{megatron}.linear_fc1.weight",), (f"{hf}.up_proj.weight",), scope, COLUMN, Role.LINEAR),
        WeightMapping((f"{megatron}.linear_fc2.weight",), (f"{hf}.down_proj.weight",), scope, ROW, Role.LINEAR),
    )


def _latent(name: str) -> WeightMapping:
    """Whole on every tensor parallel rank.

    vLLM would read them quantized; NVIDIA's own checkpoints and ModelOpt's configs for Mamba with experts keep them.
    """
    return WeightMapping(
        (f"decoder.layers.*.mlp.{name}.weight",),
        (f"{_MIXER}.{name}.weight",),
        Scope.MOE_LAYER,
        role=Role.LINEAR,
        option=Option.EXPERT_LATENT,
        min_bits=16,
    )


EXPERTS = (
    WeightMapping(
        ("decoder.layers.*.mlp.router.weight",), (f"{_MIXER}.gate.weight",), Scope.MOE_LAYER, role=Role.ROUTER
    ),
    # Added to the scores for the choice of experts alone; rounded to 16 bits it would choose others.
    WeightMapping(
        ("decoder.layers.*.mlp.router.expert_bias",),
        (f"{_MIXER}.gate.e_score_correction_bias",),
        Scope.MOE_LAYER,
        dtype=torch.float32,
    ),
    _latent("fc1_latent_proj"),
    _latent("fc2_latent_proj"),
    grouped_mlp("linear_fc1", (f"{_MIXER}.experts.*.up_proj.weight",), COLUMN),
    grouped_mlp("linear_fc2", (f"{_MIXER}.experts.*.down_proj.weight",), ROW),
    *_feed_forward("decoder.layers.*.mlp.shared_experts", f"{_MIXER}.shared_experts", Scope.MOE_LAYER),
)

NEMOTRON_H = Family(
    name="nemotron_h",
    architectures=("NemotronHForCausalLM",),
    mappings=(
        *EMBEDDINGS,
        NORM,
        *MAMBA,
        *ATTENTION,
        *_feed_forward("decoder.layers.*.mlp", _MIXER, Scope.DENSE_LAYER),
        *EXPERTS,
    ),
    dimensions=nemotron_h_config.dimensions,
    megatron_config=nemotron_h_config.megatron_config,
    sizes=nemotron_h_config.SIZES,
    passthrough=("mtp.",),
    needs_source=nemotron_h_config.has_mtp,
    forms=(WITHOUT_S,),
)
