"""Llama 4: layers with experts among dense ones, some without rotary embeddings, one shared expert, a sigmoid router.

On disk `feed_forward.experts.gate_up_proj` is [experts, hidden, 2 * width], columns of gate before those of up, and
`down_proj` [experts, width, hidden], as transformers' Llama4TextExperts multiplies them. In ModelOpt's formats servers
read all experts in one tensor, in FP8 blocks one by one. Rotary embeddings turn neighbouring entries of a head.

Megatron-Core knows neither attention in chunks nor the temperature of layers without rotary embeddings: it computes the
same for sequences that are shorter than both, which have at least `LEAST_LENGTH` tokens.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantplug.mappings.experts import joined_experts
from quantplug.mappings.families import common
from quantplug.mappings.families.vision_language import vision_language
from quantplug.mappings.layouts import GATED, ROW, ModelDimensions
from quantplug.mappings.table import Family, MegatronConfig, Role, Scope, SizeSetting, WeightMapping

LEAST_LENGTH = 8192

_NETWORK = "model.layers.*.feed_forward"


def _network(megatron: str, hf: str, scope: Scope) -> tuple[WeightMapping, ...]:
    """The two linears of a feed-forward network."""
    return (
        WeightMapping(
            (f"decoder.layers.*.{megatron}.linear_fc1.weight",),
            (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"),
            scope,
            GATED,
            Role.LINEAR,
        ),
        WeightMapping(
            (f"decoder.layers.*.{megatron}.linear_fc2.weight",), (f"{hf}.down_proj.weight",), scope, ROW, Role.LINEAR
        ),
    )


def _routed_experts(*, fused_where_read: bool) -> tuple[WeightMapping, ...]:
    router = WeightMapping(
        ("decoder.layers.*.mlp.router.weight",), (f"{_NETWORK}.router.weight",), Scope.MOE_LAYER, role=Role.ROUTER
    )
    return (router, *joined_experts(f"{_NETWORK}.experts", transposed=True, fused_where_read=fused_where_read))


# Servers reorder the rows of q and k for their kernels; SGLang takes packed FP4 for the values.
_ATTENTION = tuple(replace(row, min_bits=8) if len(row.hf) == 3 else row for row in common.ATTENTION)


def _widths(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the widths under the names that other decoders have for them."""
    # Llama 4's intermediate_size is an expert's, and that of the shared expert too.
    width = common.setting(config, "intermediate_size")
    dense = common.setting(config, "intermediate_size_mlp")
    return {**config, "moe_intermediate_size": width, "intermediate_size": dense}


def moe_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Every `interleave_moe_layer_step`-th layer, where the config does not list them."""
    if config.get("moe_layers") is not None:
        return tuple(config["moe_layers"])
    step = config.get("interleave_moe_layer_step") or 1
    return tuple(range(step - 1, config["num_hidden_layers"], step))


def _dimensions(config: Mapping[str, Any]) -> ModelDimensions:
    decoder = common.decoder_dimensions(
        _widths(config), common.setting(config, "num_local_experts"), moe_layers(config)
    )
    return replace(decoder, shared_width=decoder.expert_width)


def _megatron_config(config: Mapping[str, Any]) -> MegatronConfig:
    rotary, (_, kind) = common.rope_settings(config), common.rope(config)
    chunk, floor = config.get("attention_chunk_size"), config.get("floor_scale") or LEAST_LENGTH
    found = {
        "rope_type": kind,
        "attention_bias": bool(config.get("attention_bias", False)),
        "hidden_act": config.get("hidden_act", "silu"),
        "num_experts_per_tok": config.get("num_experts_per_tok", 1),
        f"attention_chunk_size < {LEAST_LENGTH}": chunk is not None and chunk < LEAST_LENGTH,
        f"floor_scale < {LEAST_LENGTH}": bool(config.get("attn_temperature_tuning")) and floor < LEAST_LENGTH,
    }
    expected = dict.fromkeys(found, False) | {
        "rope_type": ("default", "llama3"),
        "hidden_act": "silu",
        "num_experts_per_tok": 1,
    }
    common.refuse_settings("Llama 4", found, expected)
    # transformers lists for each layer whether it rotates, Megatron which layers it leaves out.
    dims, widths = _dimensions(config), _widths(config)
    rotated = [bool(turns) for turns in common.setting(config, "no_rope_layers")]
    transformer = {
        **common.decoder_transformer_config(widths),
        "rotary_interleaved": True,
        "apply_rope_fusion": False,
        "no_rope_freq": [int(not turns) for turns in rotated],
        "num_moe_experts": dims.num_experts,
        "moe_ffn_hidden_size": dims.expert_width,
        "moe_shared_expert_intermediate_size": dims.shared_width,
        "moe_layer_freq": [int(layer in dims.moe_layers) for layer in range(dims.num_layers)],
        "moe_router_topk": 1,
        "moe_router_score_function": "sigmoid",
        # transformers' Llama4TextMoe multiplies what goes into an expert by its score, not what comes out.
        "moe_apply_probs_on_input": True,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
    }
    return MegatronConfig(
        transformer=transformer,
        # Megatron has fixed the numbers of Llama 3 here; Llama 4's go beside it, as `MegatronConfig.rope_scaling`.
        model={**common.decoder_model_arguments(config), "rope_scaling": False},
        rope_scaling=common.llama3_scaling(rotary) if kind == "llama3" else {},
        # Llama4TextAttention normalizes queries and keys only where it has rotated them, and without weights.
        unit_norm_layers=tuple(
            layer for layer, turns in enumerate(rotated) if turns and config.get("use_qk_norm", True)
        ),
    )


# `_rename_weight_for_modelopt_checkpoint` of vLLM 0.32's mllama4.py renames `lm_head.weight*`, and no `input_scale`.
EMBEDDINGS = common.embeddings_beside_plain_head("output layer, whose scales vLLM does not find in Llama 4")


def _text(*, fused_where_read: bool) -> Family:
    return Family(
        name="llama4_text",
        architectures=("Llama4ForCausalLM",),
        mappings=(
            *EMBEDDINGS,
            *_ATTENTION,
            *common.MLP_NORM,
            *_network("mlp", _NETWORK, Scope.DENSE_LAYER),
            *_routed_experts(fused_where_read=fused_where_read),
            *_network("mlp.shared_experts", f"{_NETWORK}.shared_expert", Scope.MOE_LAYER),
        ),
        dimensions=_dimensions,
        megatron_config=_megatron_config,
        tied=common.TIED_LM_HEAD,
        sizes=(
            SizeSetting(("num_local_experts",)),
            SizeSetting(("intermediate_size_mlp",)),
            SizeSetting(("interleave_moe_layer_step",), optional=True, nullable=True),
        ),
        # 4 in what Meta published of Scout and Maverick.
        flags=("attn_temperature_tuning",),
    )


# vLLM 0.32 maps all experts in one tensor for the multimodal model alone: of the text model it asks for a parameter
# `w2_weight_weight_scale`, and stops (models/llama4.py). One by one it reads both.
LLAMA4_TEXT = _text(fused_where_read=False)
LLAMA4 = vision_language(
    _text(fused_where_read=True),
    "language_model.{}".format,
    name="llama4",
    architectures=("Llama4ForConditionalGeneration",),
    passthrough=("vision_model.", "multi_modal_projector."),
)
