"""What a model was trained with, by the arguments that its trainer noted, against what it is taken for now.

Shapes do not show how many experts a token goes to, or how fast queries and keys turn. Megatron-LM's arguments have the
names of Megatron-Core's settings but for two (megatron/training/arguments.py, `core_transformer_config_from_args`,
core_v0.16.1). Megatron-Bridge (0.3) notes the settings themselves, under `model:` in run_config.yaml.
"""

import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from quantplug.checkpoint.torch_dist.files import read_file, read_own_file
from quantplug.checkpoint.torch_dist.index import Index
from quantplug.checkpoint.torch_dist.noted.common import Plain, is_endless, read_common
from quantplug.errors import CheckpointError, Offender

Settings = Mapping[str, Any]
"""By the names of Megatron-Core; what is not there has its default."""

_MOST_LAYERS = 100_000
_RUN_CONFIG, _MOST_RUN_CONFIG_BYTES = "run_config.yaml", 2**22
_MODEL_SECTION = re.compile(r"^model:\n(?:[ #].*\n|\n)*", re.MULTILINE)
_SETTING = re.compile(r"^  (\w+): (\S.*)$", re.MULTILINE)

ZERO_CENTRED_NORMS = "zero_centred_norms"
"""In `quantplug.json`: whether the norms of the model that was saved multiply with 1 + weight."""

_ZERO_CENTRED = "apply_layernorm_1p"
_OTHER_NAMES = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": _ZERO_CENTRED,
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}
_NORMS = (
    *("layernorm.weight", "layer_norm_weight", ".final_norm.weight", ".out_norm.weight"),
    *(".enorm.weight", ".hnorm.weight"),
)


def is_zero_centred(arguments: Mapping[str, Plain]) -> bool | None:
    """Whether the norms of the model multiply with 1 + weight; None where the trainer did not say."""
    said = arguments.get(_ZERO_CENTRED)
    return said if isinstance(said, bool) else None


def asks_for_centre(module: str) -> bool:
    """Whether a parameter is the weight of a norm of which that says how it is stored, by its name in Megatron.

    Of a Mamba mixer's norm, `mixer.norm.weight`, it says nothing.
    """
    return module.endswith(_NORMS)


def read_arguments(directory: Path, index: Index) -> Mapping[str, Plain]:
    """What a trainer noted of a checkpoint, by the names of Megatron-LM's arguments; empty where it noted nothing.

    Raises:
        CheckpointError: What it noted is damaged.
    """
    noted = read_common(directory, index) or _arguments_of_bridge(directory)
    return noted or _arguments_of_quantplug(directory)


def _arguments_of_quantplug(directory: Path) -> dict[str, Plain]:
    """What `save_checkpoint` notes of a live model, which nothing but its norms need."""
    said = read_own_file(directory).get(ZERO_CENTRED_NORMS)
    return {_ZERO_CENTRED: said} if isinstance(said, bool) else {}


def _arguments_of_bridge(directory: Path) -> dict[str, Plain]:
    if not os.path.lexists(directory / _RUN_CONFIG):
        return {}
    text = read_file(directory, _RUN_CONFIG, _MOST_RUN_CONFIG_BYTES).decode(errors="replace")
    # Of all that YAML can say, one setting a line is what is asked for: no reader of YAML is needed.
    section = _MODEL_SECTION.search(text)
    settings = {it[1]: _scalar(it[2]) for it in _SETTING.finditer(section[0])} if section is not None else {}
    arguments = {_OTHER_NAMES.get(name, name): value for name, value in settings.items()}
    # Its Llamas scale by a function of their own, whatever this says.
    arguments.pop("use_rope_scaling", None)
    # With None each head has a group of its own.
    arguments["group_query_attention"] = arguments.get("num_query_groups") is not None
    if arguments.get("should_pad_vocab") is False:
        arguments |= {"make_vocab_size_divisible_by": 1, "tensor_model_parallel_size": 1}
    return arguments


def _scalar(text: str) -> Plain:
    try:
        value: Plain = json.loads(text)
    except (ValueError, RecursionError):
        return text.strip("'\" ")
    return text if is_endless(value) else value


def _plain(name: str, default: object) -> Callable[[Settings], object]:
    return lambda settings: default if (value := settings.get(name)) is None else value


def _of_experts(value: Callable[[Settings], object]) -> Callable[[Settings], object]:
    return lambda settings: value(settings) if settings.get("num_moe_experts") else None


def _of_heads(name: str) -> Callable[[Settings], object]:
    # The shapes of latent attention tell its heads. Elsewhere other heads may have the same shapes all together.
    return lambda settings: None if settings.get("multi_latent_attention") else settings.get(name)


def _of_rotary(name: str, default: float) -> Callable[[Settings], object]:
    # Said of models that do not rotate, too; latent attention always does.
    rotates = ("rope", "yarn", "mrope")

    def value(settings: Settings) -> object:
        does = settings.get("multi_latent_attention") or settings.get("position_embedding_type") in rotates
        return _plain(name, default)(settings) if does else None

    return value


def _positions(settings: Settings) -> object:
    """How positions are told, if not by MLA, which rotates in any case; of text alone two ways are the same."""
    kind = settings.get("position_embedding_type")
    return None if settings.get("multi_latent_attention") or kind == "none" else {"mrope": "rope"}.get(str(kind), kind)


def _rope_scaling(settings: Settings) -> object:
    """Llama 3's factor; None where rotation is not scaled so."""
    return _of_rotary("rope_scaling_factor", 8.0)(settings) if settings.get("rope_scaling") else None


def _interpolation(settings: Settings) -> object:
    factor = settings.get("seq_len_interpolation_factor")
    return None if factor == 1 else factor


def _of_latent_yarn(name: str) -> Callable[[Settings], object]:
    return lambda it: it.get(name) if it.get("multi_latent_attention") and it.get("rope_type") == "yarn" else None


def _latent_rope(settings: Settings) -> object:
    return settings.get("rope_type") if settings.get("multi_latent_attention") else None


def _windows(settings: Settings) -> object:
    """Which layers see how many tokens before their own (`is_layer_window_attention` of Megatron-Core)."""
    size, skip, layers = (settings.get(name) for name in ("window_size", "window_attn_skip_freq", "num_layers"))
    before = size[0] if isinstance(size, list | tuple) and size else size
    if before in (None, -1):
        return None
    if isinstance(skip, list | tuple):
        return before, tuple(map(bool, skip))
    every = skip if isinstance(skip, int) and skip > 0 else None
    numbers = range(1, layers + 1) if isinstance(layers, int) and layers < _MOST_LAYERS else ()
    return before, tuple(every is None or number % every != 0 for number in numbers)


def _pre_softmax(settings: Settings) -> bool:
    is_softmax = _plain("moe_router_score_function", "softmax")(settings) == "softmax"
    return is_softmax and bool(settings.get("moe_router_pre_softmax"))


def _scaling(settings: Settings) -> float:
    return settings.get("moe_router_topk_scaling_factor") or 1.0


def _groups(settings: Settings) -> tuple[object, object] | None:
    """Of how many groups of experts a token may use how many; None where it may use all of them."""
    groups, used = settings.get("moe_router_num_groups"), settings.get("moe_router_group_topk")
    if isinstance(groups, int) and isinstance(used, int) and used >= groups:
        return None
    # What is no number is none of a model's, and so differs from what it is held against.
    return (groups, used) if groups and used else None


def _routing(settings: Settings) -> str:
    """How experts are chosen: all kinds of balancing but Sinkhorn choose alike."""
    kinds = settings.get("moe_router_load_balancing_type")
    return "sinkhorn" if "sinkhorn" in (kinds if isinstance(kinds, list | tuple) else [kinds]) else "the highest scores"


# The defaults are Megatron-Core's (TransformerConfig, GPTModel).
_COMPUTED_WITH: Mapping[str, Callable[[Settings], object]] = {
    "num_attention_heads": _of_heads("num_attention_heads"),
    "num_query_groups": _of_heads("num_query_groups"),
    "kv_channels": _of_heads("kv_channels"),
    "normalization": _plain("normalization", "LayerNorm"),
    "layernorm_epsilon": _plain("layernorm_epsilon", 1e-5),
    "rotary_base": _of_rotary("rotary_base", 10000),
    "rotary_percent": _of_rotary("rotary_percent", 1.0),
    "rotary_interleaved": _of_rotary("rotary_interleaved", False),
    "position_embedding_type": _positions,
    "rope_scaling": _rope_scaling,
    "seq_len_interpolation_factor": _interpolation,
    "rope_type": _latent_rope,
    "rotary_scaling_factor": _of_latent_yarn("rotary_scaling_factor"),
    "original_max_position_embeddings": _of_latent_yarn("original_max_position_embeddings"),
    "mscale": _of_latent_yarn("mscale"),
    "mscale_all_dim": _of_latent_yarn("mscale_all_dim"),
    "window_size": _windows,
    "moe_router_topk": _of_experts(_plain("moe_router_topk", 2)),
    "moe_router_score_function": _of_experts(_plain("moe_router_score_function", "softmax")),
    "moe_router_pre_softmax": _of_experts(_pre_softmax),
    "moe_router_topk_scaling_factor": _of_experts(_scaling),
    "moe_router_group_topk": _of_experts(_groups),
    "moe_router_load_balancing_type": _of_experts(_routing),
}
_BESIDE = {"moe_router_num_groups", "rope_scaling_factor", "window_attn_skip_freq"}
_SAID = frozenset({*_COMPUTED_WITH, *_BESIDE}) - {"num_query_groups"}


def require_as_trained(
    arguments: Mapping[str, Plain], settings: Settings, what: str, unchecked: Collection[str] = ()
) -> None:
    """Refuses a model that computes otherwise than the one that was trained.

    Args:
        arguments: By the names of Megatron-LM; what they do not say is not asked for.
        settings: Of the model, or those that a config means.
        what: Where these are: `in the model`.
        unchecked: Settings that may differ.

    Raises:
        CheckpointError: Names every setting with both values.
    """
    offenders = [
        Offender(name, f"is {_short(trained)} by the trainer's arguments, {_short(here)} {what}")
        for name, trained, here in _differing(arguments, settings)
        if name not in unchecked
    ]
    if offenders:
        raise CheckpointError(
            f"The checkpoint was trained with other settings than are {what}.",
            offenders,
            "Make config.json say what the model was trained with, and build the model by it: a server runs what it "
            "says. A setting that differs on purpose can be named in unchecked_settings (--unchecked-setting).",
        )


def _short(value: object) -> str:
    return str(value)[:100]


def _differing(arguments: Mapping[str, Plain], settings: Settings) -> Iterator[tuple[str, object, object]]:
    said = _as_settings(arguments)
    # What became of it is in the frequencies of a live model, and those are held against the config at its export.
    if "rope_scaling" not in settings:
        said.pop("rope_scaling", None)
    trained = {**settings, **said}
    for name, value in _COMPUTED_WITH.items():
        there, here = value(trained), value(settings)
        if not _same(there, here):
            yield name, there, here


def _as_settings(arguments: Mapping[str, Plain]) -> dict[str, Plain]:
    said = {name: arguments.get(_OTHER_NAMES.get(name, name)) for name in _SAID}
    # It is there whether or not groups are used.
    if arguments.get("group_query_attention") is True:
        said["num_query_groups"] = arguments.get("num_query_groups")
    return {name: value for name, value in said.items() if value is not None}


def _same(first: object, second: object) -> bool:
    numbers = [value for value in (first, second) if isinstance(value, int | float) and not isinstance(value, bool)]
    return math.isclose(*numbers, rel_tol=1e-6) if len(numbers) == 2 else first == second
