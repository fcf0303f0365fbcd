"""The settings of an expert's quantizers in a checkpoint, on their own for every expert.

ModelOpt keeps a module's quantizer settings (format, axis, enabled) as bytes in its `_extra_state`, by the names its
quantizers have on the rank that saved: `weight_quantizer.{local expert}`. Another expert parallel size gives other
local indices. In a sharded checkpoint Megatron gives every expert an `_extra_state` of its own, so there each one holds
its own weight quantizer as `weight_quantizer.0`; a rank that loads puts its experts' together again.

ModelOpt's own checkpoints have the saving rank's whole state in every expert's place. With 0.47 it holds as many weight
quantizers as that rank had experts, so the place of a global expert in it is known; with 0.46, which had one weight
quantizer for all experts, it holds that one's settings, for each.
"""

import re
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import torch
from modelopt.torch.utils import safe_load

QUANTIZER_STATE = "modelopt_quantizer_state"
_GROUP = "weight_quantizer"
_EXPERT_QUANTIZER = re.compile(_GROUP + r"\.(?P<expert>\d+)(?P<rest>.*)")


def of_experts(module_states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each local expert's extra state [bytes], with its own weight quantizer alone, as `weight_quantizer.0`.

    Args:
        module_states: Of each expert its module's state, in local order: uint8 bytes, as ModelOpt serializes them.
    """
    # Without FP8 of Transformer Engine's own it is one tensor for all experts, with the settings of all: read once.
    decoded = {number: _decode(state) for number, state in {id(state): state for state in module_states}.items()}
    own = []
    for expert, state in enumerate(module_states):
        quantizers = decoded[id(state)].get(QUANTIZER_STATE) or {}
        own.append(_with_quantizers(state, decoded[id(state)], _take_expert(quantizers, source=expert, target=0)))
    return own


def of_module(expert_states: Sequence[torch.Tensor], first_expert: int = 0) -> torch.Tensor:
    """The extra state [bytes] of a module from those of all its experts, in local order.

    Args:
        expert_states: Of each expert, with its own weight quantizer alone, or ModelOpt's with those of a whole rank.
        first_expert: Global id of the first expert.
    """
    # A state holds n weight quantizers: ours 1, ModelOpt 0.47's as many as the saving rank had experts. Ranks hold
    # blocks of n experts in order, so the global id modulo n is the place among them, and always 0 in ours.
    merged: dict[str, Any] = {}
    decoded = [_decode(state) for state in expert_states]
    for expert, state in enumerate(decoded):
        quantizers = state.get(QUANTIZER_STATE) or {}
        held = {int(match["expert"]) for match in map(_EXPERT_QUANTIZER.fullmatch, quantizers) if match}
        merged |= _take_expert(quantizers, source=(first_expert + expert) % max(len(held), 1), target=expert)
    return _with_quantizers(expert_states[0], decoded[0], merged)


def _take_expert(quantizers: dict[str, Any], source: int, target: int) -> dict[str, Any]:
    """Keeps the weight quantizer of one expert, or of all, under another number, and whatever belongs to no expert."""
    # A plain `weight_quantizer` is ModelOpt 0.46's one for all experts, whose settings each of them gets.
    taken: dict[str, Any] = {}
    for name, state in quantizers.items():
        match = _EXPERT_QUANTIZER.fullmatch(name)
        if name == _GROUP:
            taken[f"{_GROUP}.{target}"] = state
        elif match is None:
            taken[name] = state
        elif int(match["expert"]) == source:
            taken[f"{_GROUP}.{target}{match['rest']}"] = state
    return taken


def _with_quantizers(state: torch.Tensor, decoded: dict[str, Any], quantizers: dict[str, Any]) -> torch.Tensor:
    """The extra state with other quantizers' settings, and all else that TE or ModelOpt keeps in it as it was."""
    if QUANTIZER_STATE not in decoded:
        return state
    buffer = BytesIO()
    torch.save({**decoded, QUANTIZER_STATE: quantizers}, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def _decode(state: torch.Tensor) -> dict[str, Any]:
    # Bytes out of a checkpoint: `safe_load` is torch.load with weights_only, which runs no code that they name. TE's
    # state of a layer without FP8 is empty.
    return safe_load(state.detach().cpu().numpy().tobytes()) if state.numel() else {}
