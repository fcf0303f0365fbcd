"""A `GPTModel`'s checkpoint for a `HybridModel`, by Megatron-Core's own way, which it has from 0.19 on."""

from typing import Any

from quantplug.megatron.releases.installed import MEGATRON_CORE

if MEGATRON_CORE >= (0, 19):
    from megatron.core.dist_checkpointing.gpt_checkpoint_interop import (
        gpt_compatible_layer_maps,
        retarget_sharded_state_dict_to_gpt_checkpoint,
    )
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject


def of_gpt_model(state: dict[str, Any], pattern: str) -> dict[str, Any]:
    """The sharded state of a `HybridModel` as the checkpoint of a `GPTModel` has it, layers stacked.

    Args:
        state: With experts stacked; its entries are changed in place.
        pattern: Of the model, as Megatron has it.

    Raises:
        ValueError: Megatron-Core does not load a `GPTModel`'s checkpoint into such a model; says why.
    """
    if MEGATRON_CORE < (0, 19):
        raise ValueError("Megatron-Core loads it so from 0.19 on")
    retarget_sharded_state_dict_to_gpt_checkpoint(state, gpt_compatible_layer_maps(pattern))
    # What a GPTModel's checkpoint does not have: an empty extra state of the output layer.
    return {name: entry for name, entry in state.items() if not isinstance(entry, LocalNonpersistentObject)}
