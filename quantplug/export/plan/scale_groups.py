"""Weights that servers fuse into one linear share one amax, and so one `weight_scale_2` and one `input_scale`.

The parts of one Megatron weight (q, k and v; gate and up) share theirs anyway. This is for groups of several Megatron
weights, such as the two down projections of multi-latent attention, which a row's `scale_group` names.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from quantplug.errors import UnsupportedQuantizationError
from quantplug.export.plan.match import Mapped
from quantplug.export.plan.types import QuantizerState, WholeWeight
from quantplug.findings import Findings, Kind
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import ParamKey, WeightMapping

_PARTIAL = Kind(
    UnsupportedQuantizationError,
    "Only some weights of a group are quantized, and servers fuse the group into one linear.",
    "Enable or disable the weight quantizers of the whole group together.",
)


def group_names(
    mapped: Mapped, written: Mapping[ParamKey, WeightMapping], dims: ModelDimensions
) -> dict[ParamKey, str]:
    """The scale group of every weight that has one, by the row that it is written by."""
    named = ((whole.key, written[whole.key].group(whole.key, dims)) for whole, _ in mapped)
    return {key: group for key, group in named if group is not None}


def with_shared_amaxes(mapped: Mapped, groups: Mapping[ParamKey, str], findings: Findings) -> Mapped:
    """The weights with the largest amax of their group; a group quantized in part goes into `findings`."""
    members: defaultdict[str, list[WholeWeight]] = defaultdict(list)
    for whole, _ in mapped:
        if whole.key in groups:
            members[groups[whole.key]].append(whole)
    weights = {group: _largest([whole.weight for whole in wholes]) for group, wholes in members.items()}
    activations = {group: _largest([whole.activation for whole in wholes]) for group, wholes in members.items()}
    for group, wholes in members.items():
        plain = [whole for whole in wholes if whole.weight is None]
        for whole in plain if len(plain) < len(wholes) else ():
            findings.add_weight(_PARTIAL, whole, f"unquantized, others of {group} are")
    return [
        (
            replace(
                whole,
                weight=_with_amax(whole.weight, weights.get(groups.get(whole.key, ""))),
                activation=_with_amax(whole.activation, activations.get(groups.get(whole.key, ""))),
            ),
            mapping,
        )
        for whole, mapping in mapped
    ]


def _largest(states: Sequence[QuantizerState | None]) -> float | None:
    """The largest amax that can be used; what cannot be used is found by the check of the calibration."""
    amaxes = [state.amax for state in states if state is not None and state.amax is not None]
    return max((amax for amax in amaxes if math.isfinite(amax)), default=None)


def _with_amax(state: QuantizerState | None, largest: float | None) -> QuantizerState | None:
    usable = state is not None and state.amax is not None and math.isfinite(state.amax) and state.amax >= 0
    return replace(state, amax=largest) if state is not None and usable and largest is not None else state
