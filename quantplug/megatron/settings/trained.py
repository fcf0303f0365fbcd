"""A live model held against the arguments of Megatron-LM that a checkpoint was trained with.

Shapes do not show how many experts a token goes to, or how fast queries and keys turn. Arguments have the names of
Megatron-Core's settings but for those below (megatron/training/arguments.py, `core_transformer_config_from_args`,
core_v0.16.1).
"""

import copy
from collections.abc import Collection, Iterator, Mapping

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from quantplug.checkpoint.torch_dist.common import Plain
from quantplug.errors import CheckpointError, Offender
from quantplug.megatron.parameters import LanguageModel
from quantplug.megatron.settings.computed import Value, computed, same

_OF_CONFIG: Mapping[str, str] = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    **{
        name: name
        for name in (
            *("num_attention_heads", "kv_channels", "normalization", "rotary_interleaved", "softmax_type"),
            *("moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax"),
            *("moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk"),
            *("moe_router_load_balancing_type", "moe_apply_probs_on_input"),
        )
    },
}
"""Setting of Megatron-Core to the argument that becomes it."""
_OF_MODEL = ("rotary_base", "rotary_percent")
_ZERO_CENTRED = "layernorm_zero_centered_gamma"


def require_as_trained(
    chunks: Collection[LanguageModel], arguments: Mapping[str, Plain], unchecked: Collection[str]
) -> None:
    """Refuses a model that computes otherwise than the one that was trained. No collective.

    Args:
        arguments: Of Megatron-LM, by name; what is not there is not asked for.
        unchecked: Settings that may differ.

    Raises:
        CheckpointError: Names every setting with both values.
    """
    found = {
        name: (trained, live)
        for chunk in chunks
        for name, trained, live in (*_of_config(chunk.config, arguments), *_of_rotary(chunk, arguments))
        if name not in unchecked and not same(trained, live)
    }
    if found:
        raise CheckpointError(
            "The checkpoint was trained with other settings than this model has.",
            [
                Offender(name, f"is {trained} by the trainer's arguments, {live} in the model")
                for name, (trained, live) in found.items()
            ],
            "Build the model as it was trained: config.json must say so too, for a server runs what it says. A setting "
            "that differs on purpose can be named in unchecked_settings.",
        )


def _of_config(config: TransformerConfig, arguments: Mapping[str, Plain]) -> Iterator[tuple[str, Value, Value]]:
    trained = copy.copy(config)
    named = {setting: arguments[argument] for setting, argument in _OF_CONFIG.items() if argument in arguments}
    vars(trained).update({setting: value for setting, value in named.items() if value is not None})
    # It is there whether or not groups are used.
    if arguments.get("group_query_attention") is True and isinstance(arguments.get("num_query_groups"), int):
        vars(trained)["num_query_groups"] = arguments["num_query_groups"]
    for (setting, there), (_, here) in zip(computed(trained, config), computed(config, config), strict=True):
        yield setting.name, there, here
    # An export writes what norms multiply with, whichever way the model has it; but a checkpoint has what it has.
    yield _ZERO_CENTRED, vars(trained)[_ZERO_CENTRED], config.layernorm_zero_centered_gamma


def _of_rotary(chunk: LanguageModel, arguments: Mapping[str, Plain]) -> Iterator[tuple[str, Value, Value]]:
    if isinstance(chunk, GPTModel) and chunk.position_embedding_type in ("rope", "yarn"):
        for name in _OF_MODEL:
            trained = arguments.get(name)
            if isinstance(trained, int | float):
                yield name, trained, vars(chunk)[name]
