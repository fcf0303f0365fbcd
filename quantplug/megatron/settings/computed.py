"""What Megatron's config makes a model compute, so that two spellings of the same give the same value."""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core import activations
from megatron.core.fusions import fused_bias_geglu
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn import functional

_ACTIVATIONS: Mapping[Callable[..., Any], str] = {
    functional.silu: "silu",
    functional.gelu: "gelu",
    functional.relu: "relu",
    activations.squared_relu: "squared_relu",
    activations.fast_gelu: "gelu by tanh",
    # The same formula, in two places.
    activations.quick_gelu: "quick_gelu",
    fused_bias_geglu.quick_gelu: "quick_gelu",
}
_MAMBA_EXPANSION = 2  # Of MambaMixer, whose heads follow from it where the config does not count them.

Value = Hashable | tuple["Value", ...]


@dataclass(frozen=True)
class Computed:
    """Something that a model computes with.

    Attributes:
        name: The setting of Megatron's that says it.
        fields: All settings that decide it.
        value: Reads it off a config.
        of_layers: Whether the value is one for each layer of the decoder.
        where: Whether a config's model has it at all.
    """

    name: str
    fields: tuple[str, ...]
    value: Callable[[TransformerConfig], Value]
    of_layers: bool = False
    where: Callable[[TransformerConfig], bool] = lambda config: True


def _plain(
    name: str, where: Callable[[TransformerConfig], bool] = lambda config: True, absent: Value = None
) -> Computed:
    """A setting that is what is computed with.

    Args:
        absent: What a Megatron-Core computes with that lacks the setting.
    """
    return Computed(name, (name,), partial(_field, name, absent), where=where)


def _field(name: str, absent: Value, config: TransformerConfig) -> Any:
    return vars(config).get(name, absent)


def _activation(config: TransformerConfig) -> str:
    function = config.activation_func
    known = _ACTIVATIONS.get(function)
    # A function of the user's is known by nothing but its name, and is none of these.
    return known or f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(function))}"


def _linear_offset(config: TransformerConfig) -> float:
    return config.glu_linear_offset if config.gated_linear_unit else 0.0


def _clamp(config: TransformerConfig) -> float | None:
    return config.activation_func_clamp_value if config.gated_linear_unit else None


def _windows(config: TransformerConfig) -> tuple[int | None, ...]:
    """How many tokens before its own each layer sees; None for all of them."""
    # The mask is causal, so that the other side of the window does not matter.
    size = config.window_size
    return tuple(
        size[0] if is_layer_window_attention(size, config.window_attn_skip_freq, layer + 1) and size[0] >= 0 else None
        for layer in range(config.num_layers)
    )


def _softmax_scale(config: TransformerConfig) -> float | None:
    """What scores are multiplied with; None for the usual 1 / sqrt(entries of a head), as Megatron spells it."""
    if isinstance(config, MLATransformerConfig) and config.multi_latent_attention:
        # DeepSeek-V3's reading of YaRN: `MultiLatentAttention` scales by it whether or not it rotates by YaRN.
        scaling = config.rotary_scaling_factor
        factor = 0.1 * config.mscale_all_dim * math.log(scaling) + 1.0 if scaling > 1 else 1.0
        entries = config.qk_head_dim + config.qk_pos_emb_head_dim
        scale = factor**2 / math.sqrt(entries)
    else:
        entries = config.kv_channels
        scale = config.softmax_scale
    return None if scale is None or same(scale, entries**-0.5) else scale


def _unrotated(config: TransformerConfig) -> tuple[bool, ...]:
    """Whether each layer leaves queries and keys as they are. Megatron has made a list of a number."""
    pattern = config.no_rope_freq or [0] * config.num_layers
    return tuple(map(bool, pattern))


def _pre_softmax(config: TransformerConfig) -> bool:
    return bool(config.moe_router_pre_softmax) and config.moe_router_score_function == "softmax"


def _scaling(config: TransformerConfig) -> float:
    return config.moe_router_topk_scaling_factor or 1.0


def _groups(config: TransformerConfig) -> tuple[int, int] | None:
    """Of how many groups of experts a token may use how many; None where it may use all of them."""
    groups, used = config.moe_router_num_groups, config.moe_router_group_topk
    return (groups, used) if groups and used and used < groups else None


def _routing(config: TransformerConfig) -> str:
    """How experts are chosen. Most kinds of balancing choose alike; these two do not, in an evaluation either."""
    # Sinkhorn has other scores, quantile balancing a bias of its own beside the router's.
    kinds = config.moe_router_load_balancing_type
    others = {"sinkhorn", "quantile_balancing"} & set(kinds if isinstance(kinds, list) else [kinds])
    return min(others, default="the highest scores")


def _of_mup(name: str, config: TransformerConfig) -> float:
    """A multiplier of maximal update parametrization (Megatron-Core 0.17), which is 1 where that is off."""
    settings = vars(config)
    return float(settings[name]) if settings.get("use_mup", False) else 1.0


def _mamba_heads(config: TransformerConfig) -> int:
    return config.mamba_num_heads or config.hidden_size * _MAMBA_EXPANSION // config.mamba_head_dim


def _has_experts(config: TransformerConfig) -> bool:
    return bool(config.num_moe_experts)


def _has_heads(config: TransformerConfig) -> bool:
    return not config.multi_latent_attention


def _has_mixers(config: TransformerConfig) -> bool:
    return bool(config.is_hybrid_model)


COMPUTED = (
    # Of MLA the shapes tell the heads. Elsewhere other heads may have the same shapes all together.
    *(_plain(name, _has_heads) for name in ("num_attention_heads", "num_query_groups", "kv_channels")),
    Computed("activation_func", ("activation_func",), _activation),
    Computed("gated_linear_unit", ("gated_linear_unit",), lambda config: bool(config.gated_linear_unit)),
    Computed("glu_linear_offset", ("glu_linear_offset",), _linear_offset),
    Computed("activation_func_clamp_value", ("activation_func_clamp_value",), _clamp),
    _plain("normalization"),
    _plain("layernorm_epsilon"),
    _plain("apply_residual_connection_post_layernorm"),
    # A maximal update parametrization has set softmax_scale to what its two settings say.
    Computed(
        "softmax_scale",
        ("softmax_scale", "mscale_all_dim", "mup_base_head_dim", "mup_attn_scale_power"),
        _softmax_scale,
    ),
    Computed("mup_embedding_mult", ("use_mup", "mup_embedding_mult"), partial(_of_mup, "mup_embedding_mult")),
    # Of logits; the other two are what it is made of.
    Computed(
        "mup_output_mult",
        ("mup_output_mult", "mup_width_mult", "mup_base_hidden_size"),
        partial(_of_mup, "mup_output_mult"),
    ),
    _plain("softmax_type"),
    Computed("window_size", ("window_size", "window_attn_skip_freq"), _windows, of_layers=True),
    _plain("attention_output_gate"),
    Computed("no_rope_freq", ("no_rope_freq",), _unrotated, of_layers=True),
    _plain("rotary_interleaved"),
    _plain("moe_router_topk", _has_experts),
    _plain("moe_router_score_function", _has_experts),
    Computed("moe_router_pre_softmax", ("moe_router_pre_softmax",), _pre_softmax, where=_has_experts),
    Computed("moe_router_topk_scaling_factor", ("moe_router_topk_scaling_factor",), _scaling, where=_has_experts),
    Computed("moe_router_group_topk", ("moe_router_num_groups", "moe_router_group_topk"), _groups, where=_has_experts),
    _plain("moe_router_enable_expert_bias", _has_experts),
    Computed("moe_router_load_balancing_type", ("moe_router_load_balancing_type",), _routing, where=_has_experts),
    _plain("moe_router_force_load_balancing", _has_experts),
    _plain("moe_router_force_biased", _has_experts),
    # Rows of gate and up in turns: the shapes are the same.
    _plain("moe_mlp_glu_interleave_size", _has_experts),
    _plain("moe_shared_expert_glu_interleave_size", _has_experts),
    _plain("moe_apply_probs_on_input", _has_experts),
    # Two groups of 64 states have the shapes of four of 32.
    *(_plain(name, _has_mixers) for name in ("mamba_state_dim", "mamba_head_dim", "mamba_num_groups")),
    Computed("mamba_num_heads", ("mamba_num_heads",), _mamba_heads, where=_has_mixers),
)
"""All that a config alone says."""

BY_MODULES = (
    "qk_l2_norm",
    "rope_type",
    "rotary_base",
    "rotary_percent",
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
)
"""What is read off the modules that these settings have made."""


def computed(config: TransformerConfig, of: TransformerConfig) -> Iterator[tuple[Computed, Value]]:
    """What a config makes a model compute, of all that the model of another has."""
    for setting in COMPUTED:
        if setting.where(of):
            yield setting, setting.value(config)


def same(first: Value, second: Value) -> bool:
    """Whether two values are the same; numbers as FP32 has them."""
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if _is_number(first) and _is_number(second):
        return math.isclose(float(first), float(second), rel_tol=1e-6)  # type: ignore[arg-type]
    return first == second


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
