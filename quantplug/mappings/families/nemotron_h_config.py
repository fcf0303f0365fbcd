"""Nemotron-H's config.json: which layer is what, in both spellings, and the settings in Megatron's words.

Published checkpoints say the layers as `hybrid_override_pattern`, one symbol a layer, or as `layers_block_type`, one
word a layer, the words being old ones (mamba, attention) or those that transformers writes (linear_attention,
full_attention). The symbols are Megatron's own (megatron/core/ssm/mamba_hybrid_layer_allocation.py).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from quantplug.errors import Offender, UnsupportedModelError
from quantplug.mappings.families import common, deepseek_config
from quantplug.mappings.layouts import HybridLayers, MambaSizes, ModelDimensions, Option
from quantplug.mappings.table import Activation, MegatronConfig, ModelKind, SizeSetting
from quantplug.printable import shown


class LayerKind(Enum):
    """What a layer is, by Megatron's symbol."""

    MAMBA = "M"
    ATTENTION = "*"
    DENSE = "-"
    MOE = "E"


_SYMBOLS = {kind.value: kind for kind in LayerKind}
_WORDS = {
    "mamba": LayerKind.MAMBA,
    "linear_attention": LayerKind.MAMBA,
    "attention": LayerKind.ATTENTION,
    "full_attention": LayerKind.ATTENTION,
    "mlp": LayerKind.DENSE,
    "moe": LayerKind.MOE,
}
_LIST = "layers_block_type"
_PATTERN = "hybrid_override_pattern"

_HEAD_DIM = ("head_dim", "attention_head_dim")  # The first Nemotron-H have the second.
_GROUPS = ("n_groups", "mamba_n_groups")
_KERNEL = ("conv_kernel", "mamba_d_conv")
_OF_EXPERTS = ("n_routed_experts", "moe_intermediate_size", "moe_shared_expert_intermediate_size")

SIZES = (
    SizeSetting(("num_hidden_layers",), optional=True, nullable=True),
    SizeSetting(_HEAD_DIM),
    *(SizeSetting((name,)) for name in ("mamba_num_heads", "mamba_head_dim", "ssm_state_size")),
    *(SizeSetting(names) for names in (_GROUPS, _KERNEL)),
    # In a model without experts these say nothing.
    *(SizeSetting((name,), optional=True, nullable=True, least=0) for name in _OF_EXPERTS),
    SizeSetting(("moe_latent_size",), optional=True, nullable=True),
)

MEGATRON_KERNEL = 4
"""Taps of the convolution in Megatron: the default of `MambaMixer`'s d_conv."""
MEGATRON_EPSILON = 1e-5
"""Epsilon of the gated norm in Megatron's `MambaMixer`."""


def _faults(config: Mapping[str, Any]) -> Iterator[Offender]:
    """What is wrong with the list of layers, and with sizes that are needed for what it lists."""
    listed, pattern = config.get(_LIST), config.get(_PATTERN)
    said = {
        name: _read(value, kind, known)
        for name, value, kind, known in ((_LIST, listed, list, _WORDS), (_PATTERN, pattern, str, _SYMBOLS))
        if value is not None
    }
    # None now says that a setting is there and cannot be read, while one that is absent has no entry.
    if not said:
        yield Offender(f"{_LIST} / {_PATTERN}", "not set")
    if said.get(_LIST, ()) is None:
        yield Offender(_LIST, f"is {shown(listed)}, not a list of {', '.join(_WORDS)}")
    if said.get(_PATTERN, ()) is None:
        yield Offender(_PATTERN, f"is {shown(pattern)}, not a text of {' '.join(_SYMBOLS)}, one a layer")
    # Where a config carries both, any server may read either: they must agree.
    kinds = [(name, found) for name, found in said.items() if found]
    if len(kinds) == 2 and kinds[0][1] != kinds[1][1]:
        yield Offender(_PATTERN, f"says other layers than {_LIST}")
    for name, found in kinds:
        count = config.get("num_hidden_layers")
        if count is not None and count != len(found):
            yield Offender("num_hidden_layers", f"is {shown(count)}, {name} has {len(found)} layers")
        if LayerKind.MOE in found:
            missing = [size for size in _OF_EXPERTS if not config.get(size)]
            yield from (Offender(size, f"is not above zero, and {name} has layers with experts") for size in missing)


def _read(value: Any, kind: type[Any], known: Mapping[str, LayerKind]) -> tuple[LayerKind, ...] | None:
    """The layers that a list or a text says; None where it is neither, or says what is not known."""
    # A text is a sequence of its symbols, as a list is of its words, and so both are read alike.
    words: Sequence[Any] = value if isinstance(value, kind) else ()
    if not words or not all(isinstance(word, str) and word in known for word in words):
        return None
    return tuple(known[word] for word in words)


def layers(config: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    """What every layer is.

    Raises:
        UnsupportedModelError: The config does not say it, or says it in two ways; names every setting at fault.
    """
    offenders = list(_faults(config))
    if offenders:
        raise UnsupportedModelError(
            "The config does not say which layers a Nemotron-H model has.",
            offenders,
            "Use the config.json that was saved with the model.",
        )
    if config.get(_LIST) is not None:
        return tuple(_WORDS[word] for word in config[_LIST])
    return tuple(_SYMBOLS[symbol] for symbol in config[_PATTERN])


def dimensions(config: Mapping[str, Any]) -> ModelDimensions:
    """Sizes of a Nemotron-H model.

    Raises:
        UnsupportedModelError: The config does not say which layers the model has.
    """
    kinds = layers(config)
    # In this hybrid a layer has one module, so each layer is in one of these lists, by its id.
    of_kind = {kind: tuple(i for i, found in enumerate(kinds) if found is kind) for kind in LayerKind}
    # Configs of models without experts carry sizes of experts too, which must not count.
    with_experts = bool(of_kind[LayerKind.MOE])
    latent = config.get("moe_latent_size") if with_experts else None
    return ModelDimensions(
        num_layers=len(kinds),
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=common.setting(config, *_HEAD_DIM),
        vocab_size=config["vocab_size"],
        num_experts=config["n_routed_experts"] if with_experts else 0,
        moe_layers=of_kind[LayerKind.MOE],
        mlp_width=config["intermediate_size"],
        expert_width=config["moe_intermediate_size"] if with_experts else None,
        shared_width=config["moe_shared_expert_intermediate_size"] if with_experts else None,
        expert_latent=latent,
        hybrid=HybridLayers(of_kind[LayerKind.ATTENTION], of_kind[LayerKind.DENSE], mamba=of_kind[LayerKind.MAMBA]),
        mamba=MambaSizes(
            num_heads=common.setting(config, "mamba_num_heads"),
            head_dim=common.setting(config, "mamba_head_dim"),
            num_groups=common.setting(config, *_GROUPS),
            state_dim=common.setting(config, "ssm_state_size"),
            kernel=common.setting(config, *_KERNEL),
        ),
        options=frozenset() if latent is None else frozenset({Option.EXPERT_LATENT}),
    )


def megatron_config(config: Mapping[str, Any]) -> MegatronConfig:
    """The config in the words of Megatron's `MambaModel`.

    Raises:
        UnsupportedModelError: Settings that Megatron would compute otherwise; names them all.
    """
    dims = dimensions(config)
    settings = _settings(config, dims)
    if dims.moe_layers:
        settings |= deepseek_config.corrected_router_settings(config)
        # vLLM makes the shared expert so many times as wide; transformers does not look at it.
        settings["n_shared_experts"] = (config.get("n_shared_experts", 1), 1)
    deepseek_config.refuse("Nemotron-H", settings)
    model = {
        "vocab_size": dims.vocab_size,
        "max_sequence_length": config["max_position_embeddings"],
        "hybrid_override_pattern": "".join(kind.value for kind in layers(config)),
        "position_embedding_type": "none",  # Whatever rope_theta a config carries, no layer rotates.
    }
    transformer = {**_transformer(config, dims), **(_experts(config, dims) if dims.moe_layers else {})}
    return MegatronConfig(transformer, model, Activation.SQUARED_RELU, kind=ModelKind.MAMBA)


def _settings(config: Mapping[str, Any], dims: ModelDimensions) -> deepseek_config.Settings:
    """What a Nemotron-H may set, and Megatron would compute otherwise."""
    # `MambaMixer` takes neither the number of taps nor epsilon nor the limits of time steps from its config: Megatron
    # would not refuse other values, and compute with its own.
    off = ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias", "residual_in_fp32", "tie_word_embeddings")
    convolution = config.get("mamba_conv_bias", config.get("use_conv_bias", True))
    limit = config.get("mamba_dt_limit", config.get("time_step_limit"))
    sizes = dims.mamba
    return {
        **{name: (bool(config.get(name, False)), False) for name in off},
        "mlp_hidden_act": (config.get("mlp_hidden_act", "relu2"), "relu2"),
        "mamba_hidden_act": (config.get("mamba_hidden_act", "silu"), "silu"),
        "sliding_window": (config.get("sliding_window"), None),
        "use_conv_bias": (bool(convolution), True),
        "conv_kernel": (sizes.kernel if sizes else None, MEGATRON_KERNEL),
        "layer_norm_epsilon": (common.setting(config, "layer_norm_epsilon"), MEGATRON_EPSILON),
        "time_step_limit": (None if _is_unlimited(limit) else limit, None),
    }


def _is_unlimited(limit: object) -> bool:
    """Whether time steps may be anything above 0. transformers writes infinity as {"__float__": "Infinity"}."""
    if limit is None:
        return True
    if not isinstance(limit, list | tuple) or len(limit) != 2:
        return False
    least, most = (float(end.get("__float__", "nan")) if isinstance(end, dict) else end for end in limit)
    return least == 0 and most == math.inf


def _transformer(config: Mapping[str, Any], dims: ModelDimensions) -> dict[str, Any]:
    assert dims.mamba is not None
    return {
        "num_layers": dims.num_layers,
        "hidden_size": dims.hidden_size,
        "ffn_hidden_size": dims.mlp_width,
        "num_attention_heads": dims.num_attention_heads,
        "num_query_groups": dims.num_query_groups,
        "kv_channels": dims.head_dim,
        "is_hybrid_model": True,
        "mamba_num_heads": dims.mamba.num_heads,
        "mamba_head_dim": dims.mamba.head_dim,
        "mamba_num_groups": dims.mamba.num_groups,
        "mamba_state_dim": dims.mamba.state_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": common.setting(config, "layer_norm_epsilon"),
        "gated_linear_unit": False,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _experts(config: Mapping[str, Any], dims: ModelDimensions) -> dict[str, Any]:
    return {
        "num_moe_experts": dims.num_experts,
        "moe_ffn_hidden_size": dims.expert_width,
        "moe_shared_expert_intermediate_size": dims.shared_width,
        "moe_latent_size": dims.expert_latent,
        "moe_router_topk": common.setting(config, "num_experts_per_tok"),
        "moe_router_topk_scaling_factor": config.get("routed_scaling_factor"),
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        **deepseek_config.corrected_router_config(config),
    }


def has_mtp(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint has layers of multi-token prediction, which `MambaModel` has not."""
    return bool(config.get("num_nextn_predict_layers"))
