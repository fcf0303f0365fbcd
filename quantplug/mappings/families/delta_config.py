"""Sizes and settings of Qwen3-Next and Qwen3.5, from a config.json as it stands or as transformers fills it in."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantplug.errors import Offender, UnsupportedModelError
from quantplug.mappings.families import common
from quantplug.mappings.layouts import DeltaSizes, HybridLayers, ModelDimensions, Option
from quantplug.mappings.table import SizeSetting

_ATTENTION, _DELTA = "full_attention", "linear_attention"

# What the classes of transformers 5.14 have where config.json says nothing.
_DEFAULTS: Mapping[str, int] = {
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
}
_ROTATED = 0.25  # Their partial_rotary_factor.

SIZES = tuple(SizeSetting((name,), optional=True, nullable=True) for name in _DEFAULTS)


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the sizes that it leaves to its class."""
    return {**_DEFAULTS, **{name: value for name, value in config.items() if value is not None}}


def layer_kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What each layer has, by `layer_types`, or without them by `full_attention_interval`.

    Raises:
        UnsupportedModelError: It is neither, or not of all layers.
    """
    layers, kinds = config["num_hidden_layers"], config.get("layer_types")
    if kinds is None:
        # Every interval-th layer has attention, counted from 1: the last of each group.
        interval = with_defaults(config)["full_attention_interval"]
        return tuple(_DELTA if (layer + 1) % interval else _ATTENTION for layer in range(layers))
    if not isinstance(kinds, list | tuple) or len(kinds) != layers:
        raise _unusable("layer_types", f"is no list of one kind for each of the {layers} layers")
    others = [kind for kind in kinds if kind not in (_ATTENTION, _DELTA)]
    if others:
        raise _unusable("layer_types", f"has {str(others[0])[:80]!r}, neither {_ATTENTION} nor {_DELTA}")
    return tuple(kinds)


def _unusable(setting: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "The layers of this model cannot be read from its config.",
        [Offender(setting, reason)],
        "Use the config.json that was saved with the model.",
    )


def delta_dimensions(decoder: ModelDimensions, config: Mapping[str, Any], mtp_layers: int) -> ModelDimensions:
    """The sizes of a decoder with gated delta nets.

    Args:
        decoder: What `common.decoder_dimensions` made of `with_defaults`.

    Raises:
        UnsupportedModelError: The config's layers, or heads of delta nets, cannot be those of a model.
    """
    kinds, said = layer_kinds(config), with_defaults(config)
    sizes = DeltaSizes(
        key_heads=said["linear_num_key_heads"],
        value_heads=said["linear_num_value_heads"],
        key_dim=said["linear_key_head_dim"],
        value_dim=said["linear_value_head_dim"],
        kernel=said["linear_conv_kernel_dim"],
    )
    # On disk Qwen3-Next orders rows by head of keys, each with the same number of heads of values.
    if sizes.value_heads % sizes.key_heads:
        reason = f"{sizes.value_heads} is no multiple of the {sizes.key_heads} of linear_num_key_heads"
        raise _unusable("linear_num_value_heads", reason)
    return replace(
        decoder,
        hybrid=HybridLayers(
            attention=tuple(layer for layer, kind in enumerate(kinds) if kind == _ATTENTION),
            delta=tuple(layer for layer, kind in enumerate(kinds) if kind == _DELTA),
            dense=decoder.dense_layers,
        ),
        delta=sizes,
        options=frozenset({Option.QUERY_GATE}),
        mtp_layers=mtp_layers,
    )


Settings = dict[str, tuple[Any, Any]]
"""Name of a setting to its value and to the one, or the tuple of those, that Megatron computes alike."""


def delta_settings(config: Mapping[str, Any], mtp_setting: str) -> Settings:
    """What these decoders may set, and Megatron would compute otherwise."""
    settings: Settings = {
        "rope_type": (common.rope(config)[1], "default"),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(config.get("attention_bias", False)), False),
        "attn_output_gate": (bool(config.get("attn_output_gate", True)), True),
    }
    if config.get(mtp_setting):
        settings |= {
            mtp_setting: (config[mtp_setting], 1),
            # Megatron makes these layers like the decoder's last one, and theirs have attention.
            f"{mtp_setting} after a last layer of": (layer_kinds(config)[-1], _ATTENTION),
            "mtp_use_dedicated_embeddings": (bool(config.get("mtp_use_dedicated_embeddings", False)), False),
        }
    return settings


def refuse(architecture: str, settings: Settings) -> None:
    """Raises UnsupportedModelError naming every setting whose value is not one that Megatron computes alike."""
    found = {name: value for name, (value, _) in settings.items()}
    common.refuse_settings(architecture, found, {name: converted for name, (_, converted) in settings.items()})


def delta_transformer_config(config: Mapping[str, Any], dims: ModelDimensions) -> dict[str, Any]:
    """`TransformerConfig` arguments of the decoder."""
    assert dims.hybrid is not None
    assert dims.delta is not None
    return {
        **common.decoder_transformer_config(config),
        "qk_layernorm": True,
        "attention_output_gate": True,
        # Norms multiply with 1 + weight, in Hugging Face's Qwen3-Next too.
        "layernorm_zero_centered_gamma": True,
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [int(layer in dims.hybrid.delta) for layer in range(dims.num_layers)],
        "linear_conv_kernel_dim": dims.delta.kernel,
        "linear_key_head_dim": dims.delta.key_dim,
        "linear_value_head_dim": dims.delta.value_dim,
        "linear_num_key_heads": dims.delta.key_heads,
        "linear_num_value_heads": dims.delta.value_heads,
        # Layers of several kinds have keys of their own in a checkpoint.
        "hetereogenous_dist_checkpoint": True,
        "mtp_num_layers": dims.mtp_layers or None,
    }


def delta_model_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """`GPTModel` arguments of the decoder, which rotates a part of each head."""
    said = common.rope_settings(config).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return {**common.decoder_model_arguments(config), "rotary_percent": _ROTATED if said is None else said}


def gated_experts_config(width: int | None) -> dict[str, Any]:
    """`TransformerConfig` arguments of a shared expert of that width behind a gate."""
    return {"moe_shared_expert_intermediate_size": width, "moe_shared_expert_gate": True}
