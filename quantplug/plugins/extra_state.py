"""The settings of an expert's quantizers in a checkpoint, on their own for every expert.

ModelOpt keeps a module's quantizer settings (format, axis, enabled) as bytes in its `_extra_state`, by the names its
quantizers have on the rank that saved: `weight_quantizer.{local expert}`. Another expert parallel size gives other
local indices. In a sharded checkpoint Megatron gives every expert an `_extra_state` of its own, so there each one holds
its own weight quantizer as `weight_quantizer.0`; a rank that loads puts its experts' together again.

ModelOpt's own checkpoints have the saving rank's whole state in every expert's place; its `weight_quantizer.0` is then
read for each, as ModelOpt itself does where the number of local experts has changed.
"""

import re
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import torch
from modelopt.torch.utils import safe_load

QUANTIZER_STATE = "modelopt_quantizer_state"
_EXPERT_QUANTIZER = re.compile(r"(?P<group>weight_quantizer)\.(?P<expert>\d+)(?P<rest>.*)")


def of_expert(module_state: torch.Tensor, expert: int) -> torch.Tensor:
    """One expert's extra state [bytes] from its module's.

    Args:
        module_state: uint8 bytes, as ModelOpt serializes them.
        expert: Local expert whose weight quantizer to keep, as `weight_quantizer.0`.
    """
    return _edit(module_state, lambda names: _take_expert(names, source=expert, target=0))


def of_module(expert_states: Sequence[torch.Tensor]) -> torch.Tensor:
    """The extra state [bytes] of a module from those of all its experts, in local order."""
    merged: dict[str, Any] = {}
    for expert, state in enumerate(expert_states):
        quantizers = _decode(state).get(QUANTIZER_STATE) or {}
        merged |= _take_expert(quantizers, source=0, target=expert)
    return _edit(expert_states[0], lambda _: merged)


def _take_expert(quantizers: dict[str, Any], source: int, target: int) -> dict[str, Any]:
    """Keeps the weight quantizer of one expert under another number, and whatever belongs to no expert."""
    taken: dict[str, Any] = {}
    for name, state in quantizers.items():
        match = _EXPERT_QUANTIZER.fullmatch(name)
        if match is None:
            taken[name] = state
        elif int(match["expert"]) == source:
            taken[f"{match['group']}.{target}{match['rest']}"] = state
    return taken


def _edit(state: torch.Tensor, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> torch.Tensor:
    decoded = _decode(state)
    if QUANTIZER_STATE not in decoded:
        return state
    decoded[QUANTIZER_STATE] = edit(decoded[QUANTIZER_STATE])
    buffer = BytesIO()
    torch.save(decoded, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def _decode(state: torch.Tensor) -> dict[str, Any]:
    return safe_load(state.detach().cpu().numpy().tobytes()) if state.numel() else {}
