"""GPT-OSS: attention with sinks and biases, some layers in a sliding window; all experts of a layer in one tensor.

On disk `mlp.experts.gate_up_proj` is [experts, hidden, 2 * width], columns of gate and up in turn, and `down_proj`
[experts, width, hidden]: transposed, as transformers' GptOssExperts multiplies them. The activation is
`gate * sigmoid(1.702 * gate) * (up + 1)` of clamped values, 1.702 and the clamp at 7 being fixed in that class.
"""

from collections.abc import Mapping
from typing import Any

from quantplug.mappings.experts import FusedExpertMapping, FusedGatedExpertMapping, spellings
from quantplug.mappings.families import common, routed
from quantplug.mappings.layouts import COLUMN, GATED_INTERLEAVED, IDENTITY, ROW, ModelDimensions
from quantplug.mappings.table import Activation, Family, MegatronConfig, Role, Scope, WeightMapping

CLAMP = 7.0

_EXPERTS = "model.layers.*.mlp.experts"
_ATTENTION = "model.layers.*.self_attn"

# Sinks go with the heads.
ATTENTION_BIASES = (
    *common.QKV_BIAS,
    common.OUTPUT_BIAS,
    WeightMapping(
        ("decoder.layers.*.self_attention.core_attention.softmax_offset",),
        (f"{_ATTENTION}.sinks",),
        Scope.LAYER,
        COLUMN,
    ),
)

# vLLM 0.32 stops at the biases in NVFP4 and FP8, and skips the scales of FP8 blocks; it loads MXFP4 and BF16.
_UNSERVED = "experts with biases in one tensor, which servers load in MXFP4 or 16 bits alone"

# Weights are stored [in, out] and so transposed; a bias has one axis, and its entries are in turn as the columns are.
FUSED_EXPERTS = (
    WeightMapping(
        ("decoder.layers.*.mlp.router.weight",),
        ("model.layers.*.mlp.router.weight",),
        Scope.MOE_LAYER,
        role=Role.ROUTER,
    ),
    WeightMapping(
        ("decoder.layers.*.mlp.router.bias",),
        ("model.layers.*.mlp.router.bias",),
        Scope.MOE_LAYER,
        role=Role.ROUTER_BIAS,
    ),
    FusedGatedExpertMapping(
        spellings("linear_fc1", "weight"),
        (f"{_EXPERTS}.gate_up_proj",),
        Scope.EXPERT,
        GATED_INTERLEAVED,
        Role.LINEAR,
        unserved=_UNSERVED,
        served_in_mxfp4=True,
        transposed=True,
    ),
    FusedGatedExpertMapping(
        spellings("linear_fc1", "bias"), (f"{_EXPERTS}.gate_up_proj_bias",), Scope.EXPERT, GATED_INTERLEAVED
    ),
    FusedExpertMapping(
        spellings("linear_fc2", "weight"),
        (f"{_EXPERTS}.down_proj",),
        Scope.EXPERT,
        ROW,
        Role.LINEAR,
        unserved=_UNSERVED,
        served_in_mxfp4=True,
        transposed=True,
    ),
    FusedExpertMapping(spellings("linear_fc2", "bias"), (f"{_EXPERTS}.down_proj_bias",), Scope.EXPERT, IDENTITY),
)


def _dimensions(config: Mapping[str, Any]) -> ModelDimensions:
    # Every layer has experts, and intermediate_size is their width.
    widths = {**config, "moe_intermediate_size": config["intermediate_size"], "intermediate_size": None}
    return common.decoder_dimensions(widths, routed.num_experts(config), tuple(range(config["num_hidden_layers"])))


def _megatron_config(config: Mapping[str, Any]) -> MegatronConfig:
    found = {
        "rope_type": common.rope(config)[1],
        "attention_bias": bool(config.get("attention_bias", True)),
        # config.json says silu, and transformers' GptOssExperts does not look at it.
        "hidden_act": config.get("hidden_act", "silu"),
        "swiglu_limit": config.get("swiglu_limit", CLAMP),
    }
    expected = {"rope_type": "yarn", "attention_bias": True, "hidden_act": "silu", "swiglu_limit": CLAMP}
    common.refuse_settings("GPT-OSS", found, expected)
    in_window = [kind == "sliding_attention" for kind in common.setting(config, "layer_types")]
    transformer = {
        **common.decoder_transformer_config(config),
        "add_bias_linear": True,
        "glu_linear_offset": 1.0,  # The 1 of (up + 1).
        "activation_func_clamp_value": CLAMP,
        "bias_activation_fusion": False,
        # The sinks: one logit a head that takes part in the softmax and has no value.
        "softmax_type": "learnable",
        # transformers counts the query's own position in the window, Megatron those before it.
        "window_size": (common.setting(config, "sliding_window") - 1, 0) if any(in_window) else None,
        "window_attn_skip_freq": [int(windowed) for windowed in in_window],
        "num_moe_experts": routed.num_experts(config),
        "moe_ffn_hidden_size": config["intermediate_size"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
    }
    model = {**common.decoder_model_arguments(config), "position_embedding_type": "yarn"}
    return MegatronConfig(transformer, model, Activation.QUICK_GELU, common.yarn(config))


# vLLM 0.32 and SGLang 0.5.23, each in its gpt_oss.py.
EMBEDDINGS = common.embeddings_beside_plain_head("output layer, which vLLM and SGLang load in 16 bits in GPT-OSS")

GPT_OSS = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    mappings=(*EMBEDDINGS, *common.ATTENTION, *ATTENTION_BIASES, *common.MLP_NORM, *FUSED_EXPERTS),
    dimensions=_dimensions,
    megatron_config=_megatron_config,
    tied=common.TIED_LM_HEAD,
    sizes=(routed.EXPERTS,),
)
