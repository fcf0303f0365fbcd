"""Rows and settings that decoder-only families share. `*` is the layer, in expert rows the second one the expert."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from quantplug.errors import Offender, UnsupportedModelError
from quantplug.mappings.experts import grouped_mlp
from quantplug.mappings.layouts import GATED, QKV, ROW, VOCABULARY, ModelDimensions
from quantplug.mappings.table import Role, Scope, WeightMapping

# Checkpoints of tied models mostly have no lm_head: `TIED_LM_HEAD` says whose data it is.
EMBEDDINGS = (
    WeightMapping(
        ("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), Scope.MODEL, VOCABULARY, Role.EMBEDDING
    ),
    WeightMapping(("output_layer.weight",), ("lm_head.weight",), Scope.MODEL, VOCABULARY, Role.OUTPUT_LAYER),
    WeightMapping(("decoder.final_layernorm.weight",), ("model.norm.weight",), Scope.MODEL),
)


def embeddings_beside_plain_head(why: str) -> tuple[WeightMapping, ...]:
    """`EMBEDDINGS` of an architecture whose output layer some server loads in 16 bits alone.

    Servers make it a `ParallelLMHead`, which is quantized as its `get_quant_method` says, but only where the model's
    class hands it the config.
    """
    return tuple(replace(row, unserved=why) if row.role is Role.OUTPUT_LAYER else row for row in EMBEDDINGS)


# Row parallel: tensor parallelism cuts the columns, which are the entries of the heads that a rank has.
OUTPUT_PROJECTION = WeightMapping(
    ("decoder.layers.*.self_attention.linear_proj.weight",),
    ("model.layers.*.self_attn.o_proj.weight",),
    Scope.LAYER,
    ROW,
    Role.LINEAR,
)

# With Transformer Engine the norm before a linear is part of that linear; the local spec keeps it apart.
ATTENTION = (
    WeightMapping(
        (
            "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight",
            "decoder.layers.*.input_layernorm.weight",
        ),
        ("model.layers.*.input_layernorm.weight",),
        Scope.LAYER,
    ),
    WeightMapping(
        ("decoder.layers.*.self_attention.linear_qkv.weight",),
        (
            "model.layers.*.self_attn.q_proj.weight",
            "model.layers.*.self_attn.k_proj.weight",
            "model.layers.*.self_attn.v_proj.weight",
        ),
        Scope.LAYER,
        QKV,
        Role.LINEAR,
    ),
    OUTPUT_PROJECTION,
)

# Interleaved as the rows of the weight are. A bias has no role in quantization: no format packs it.
QKV_BIAS = (
    WeightMapping(
        ("decoder.layers.*.self_attention.linear_qkv.bias",),
        (
            "model.layers.*.self_attn.q_proj.bias",
            "model.layers.*.self_attn.k_proj.bias",
            "model.layers.*.self_attn.v_proj.bias",
        ),
        Scope.LAYER,
        QKV,
    ),
)

# Added once, after the sum over ranks: whole on each.
OUTPUT_BIAS = WeightMapping(
    ("decoder.layers.*.self_attention.linear_proj.bias",), ("model.layers.*.self_attn.o_proj.bias",), Scope.LAYER
)

# One weight [D] for all heads, so every tensor parallel rank holds it whole.
QK_NORM = (
    WeightMapping(
        ("decoder.layers.*.self_attention.q_layernorm.weight",),
        ("model.layers.*.self_attn.q_norm.weight",),
        Scope.LAYER,
    ),
    WeightMapping(
        ("decoder.layers.*.self_attention.k_layernorm.weight",),
        ("model.layers.*.self_attn.k_norm.weight",),
        Scope.LAYER,
    ),
)

# Part of linear_fc1 in dense layers with Transformer Engine. Before experts it is apart, as the router reads it too.
MLP_NORM = (
    WeightMapping(
        ("decoder.layers.*.mlp.linear_fc1.layer_norm_weight", "decoder.layers.*.pre_mlp_layernorm.weight"),
        ("model.layers.*.post_attention_layernorm.weight",),
        Scope.LAYER,
    ),
)

DENSE_MLP = (
    WeightMapping(
        ("decoder.layers.*.mlp.linear_fc1.weight",),
        ("model.layers.*.mlp.gate_proj.weight", "model.layers.*.mlp.up_proj.weight"),
        Scope.DENSE_LAYER,
        GATED,
        Role.LINEAR,
    ),
    WeightMapping(
        ("decoder.layers.*.mlp.linear_fc2.weight",),
        ("model.layers.*.mlp.down_proj.weight",),
        Scope.DENSE_LAYER,
        ROW,
        Role.LINEAR,
    ),
)

EXPERTS = (
    grouped_mlp(
        "linear_fc1",
        ("model.layers.*.mlp.experts.*.gate_proj.weight", "model.layers.*.mlp.experts.*.up_proj.weight"),
        GATED,
    ),
    grouped_mlp("linear_fc2", ("model.layers.*.mlp.experts.*.down_proj.weight",), ROW),
)
"""The two linears of every routed expert; gate_proj and up_proj are one in Megatron."""

ROUTED_EXPERTS = (
    WeightMapping(
        ("decoder.layers.*.mlp.router.weight",), ("model.layers.*.mlp.gate.weight",), Scope.MOE_LAYER, role=Role.ROUTER
    ),
    *EXPERTS,
)

# The gate of Qwen's shared expert is one row [1, H], whole on every tensor parallel rank.
GATED_SHARED_EXPERT = (
    WeightMapping(
        ("decoder.layers.*.mlp.shared_experts.linear_fc1.weight",),
        ("model.layers.*.mlp.shared_expert.gate_proj.weight", "model.layers.*.mlp.shared_expert.up_proj.weight"),
        Scope.MOE_LAYER,
        GATED,
        Role.LINEAR,
    ),
    WeightMapping(
        ("decoder.layers.*.mlp.shared_experts.linear_fc2.weight",),
        ("model.layers.*.mlp.shared_expert.down_proj.weight",),
        Scope.MOE_LAYER,
        ROW,
        Role.LINEAR,
    ),
    WeightMapping(
        ("decoder.layers.*.mlp.shared_experts.gate_weight",),
        ("model.layers.*.mlp.shared_expert_gate.weight",),
        Scope.MOE_LAYER,
        role=Role.HIGH_PRECISION,
    ),
)

TIED_LM_HEAD = {"lm_head.weight": "model.embed_tokens.weight"}


def setting(config: Mapping[str, Any], *names: str) -> Any:
    """The first of a config's spellings that is set.

    Raises:
        UnsupportedModelError: None of them is.
    """
    # null in config.json says no more than a setting that is not there.
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise UnsupportedModelError(
        "The Hugging Face config lacks a setting that its architecture needs.",
        [Offender(" / ".join(names), "not set")],
        "Use the config.json that was saved with the model.",
    )


def refuse_settings(architecture: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises UnsupportedModelError naming every setting whose value differs from those we convert.

    Args:
        expected: The value of each setting that is converted, or a tuple of them.
    """
    # All at once: a user who mends one setting should not meet the next one only then.
    converted = {name: value if isinstance(value, tuple) else (value,) for name, value in expected.items()}
    offenders = [
        Offender(name, f"is {found[name]!r}, only {' or '.join(map(repr, values))} is converted")
        for name, values in converted.items()
        if found[name] not in values
    ]
    if offenders:
        raise UnsupportedModelError(
            f"This {architecture} uses settings that are not converted to Megatron.",
            offenders,
            "Build the Megatron model yourself, then export it with export_mcore_gpt_to_hf, naming these settings in "
            "unchecked_settings; or quantize the checkpoint without a model: quantplug quantize.",
        )


def head_dim(config: Mapping[str, Any]) -> int:
    """Entries of a head: what the config says, as Qwen3 has others than hidden_size / heads; else just these."""
    explicit = config.get("head_dim")
    return explicit if explicit else config["hidden_size"] // config["num_attention_heads"]


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says of rotary embeddings: `rope_parameters` in transformers 5, `rope_scaling` before."""
    return {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def rope(config: Mapping[str, Any]) -> tuple[float, str]:
    """Rotary base and kind of scaling, as transformers names it: 10000 and `default` where the config says nothing."""
    said = rope_settings(config)
    base = said.get("rope_theta") or config.get("rope_theta") or 10000.0
    return base, said.get("rope_type") or said.get("type") or "default"


def yarn(config: Mapping[str, Any]) -> dict[str, Any]:
    """What Megatron reads of YaRN (arXiv 2309.00071), in the spelling of its GPTModel.

    The attention factor must be the paper's own, 0.1 ln(factor) + 1, which is what Megatron computes without mscale.
    """
    parameters = rope_settings(config)
    # Any of the three would be another factor, and attention that is scaled otherwise fails nowhere: it is only worse.
    found = {name: parameters.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim")}
    refuse_settings("YaRN", found, dict.fromkeys(found))
    return {
        "yarn_rotary_scaling_factor": float(setting(parameters, "factor")),
        "yarn_original_max_position_embeddings": parameters.get("original_max_position_embeddings")
        or config["max_position_embeddings"],
        "yarn_beta_fast": float(parameters.get("beta_fast") or 32.0),
        "yarn_beta_slow": float(parameters.get("beta_slow") or 1.0),
        "yarn_mscale": None,
        "yarn_mscale_all_dim": None,
        "yarn_correction_range_round_to_int": bool(parameters.get("truncate", True)),
    }


# What RotaryEmbedding._apply_scaling has fixed (megatron/core/models/common/embeddings/rotary_pos_embedding.py).
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# What the settings of a Llama-like decoder must be. Megatron would build a model of the same shapes for other values
# too, which loads without an error and computes something else.
_DECODER_SETTINGS = {
    "rope_type": ("default", "llama3"),
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "layer_types": "full_attention",
    "hidden_act": "silu",
}


def refuse_decoder_settings(
    architecture: str, config: Mapping[str, Any], more: Mapping[str, tuple[Any, Any]] = MappingProxyType({})
) -> None:
    """Raises UnsupportedModelError for a Llama-like decoder that Megatron would compute otherwise.

    Args:
        more: Settings of this family alone: what each is, and what is converted.
    """
    rotary, (_, kind) = rope_settings(config), rope(config)
    found = {
        "rope_type": kind,
        "partial_rotary_factor": rotary.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0,
        "attention_bias": bool(config.get("attention_bias", False)),
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "use_sliding_window": bool(config.get("use_sliding_window", False)),
        "layer_types": " and ".join(sorted(set(config.get("layer_types") or ["full_attention"]))),
        "hidden_act": config.get("hidden_act", "silu"),
        **{name: value for name, (value, _) in more.items()},
    }
    expected = {**_DECODER_SETTINGS, **{name: converted for name, (_, converted) in more.items()}}
    # Megatron takes the factor alone; its other numbers are fixed, so the config's must be the same.
    if kind == "llama3":
        found |= {name: rotary.get(name) for name in _LLAMA3_ROPE}
        expected |= _LLAMA3_ROPE
    refuse_settings(architecture, found, expected)


def llama3_scaling(rotary: Mapping[str, Any]) -> dict[str, float]:
    """The settings that scale rotary frequencies as Llama 3 does, also with other numbers than Llama 3's own.

    Raises:
        UnsupportedModelError: One of them is not set.
    """
    names = ("factor", *_LLAMA3_ROPE)
    return {name: setting(rotary, name) for name in names}


def _llama3_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_scaling": True, "rope_scaling_factor": setting(rope_settings(config), "factor")}


def decoder_dimensions(
    config: Mapping[str, Any], num_experts: int = 0, moe_layers: tuple[int, ...] = ()
) -> ModelDimensions:
    """Sizes of a Llama-like decoder.

    Args:
        num_experts: Routed experts of a layer, 0 in a dense model.
        moe_layers: Global ids of the layers that have experts.
    """
    return ModelDimensions(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        # Without the setting every head has keys of its own (Llama 2's multi-head attention).
        num_query_groups=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=head_dim(config),
        vocab_size=config["vocab_size"],
        num_experts=num_experts,
        moe_layers=moe_layers,
        mlp_width=config.get("intermediate_size"),
        expert_width=config.get("moe_intermediate_size"),
    )


def decoder_transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`TransformerConfig` arguments of a Llama-like decoder: RMSNorm, SwiGLU, rotary embeddings, no linear biases."""
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config.get("num_key_value_heads") or config["num_attention_heads"],
        "kv_channels": head_dim(config),
        "normalization": "RMSNorm",
        "layernorm_epsilon": config["rms_norm_eps"],
        "gated_linear_unit": True,
        "add_bias_linear": False,
        # Megatron's defaults are 0.1, and would make calibration in training mode random.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def decoder_model_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """`GPTModel` arguments of the same decoder; `vocab_size` is unpadded."""
    base, kind = rope(config)
    return {
        "vocab_size": config["vocab_size"],
        "max_sequence_length": config["max_position_embeddings"],
        "position_embedding_type": "rope",
        "rotary_base": base,
        "rotary_percent": 1.0,
        **(_llama3_rope(config) if kind == "llama3" else {"rope_scaling": False}),
        "share_embeddings_and_output_weights": bool(config.get("tie_word_embeddings", False)),
    }
