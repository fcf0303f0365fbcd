"""Formats by name where nothing is calibrated with data: one for all linears, or another one for routed experts."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from quantplug.errors import ArgumentError, Offender
from quantplug.formats.names import Scheme, in_groups, scheme_named, scheme_without_data
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.table import Family
from quantplug.selection.policy import Decision, Decisions, Policy, decide


@dataclass(frozen=True)
class Formats:
    """How weights are packed, if they are: routed experts may have a scheme of their own."""

    linears: Scheme
    experts: Scheme

    def of(self, key: ParamKey) -> Scheme:
        """The scheme of a weight."""
        return self.linears if key.expert is None else self.experts

    @property
    def searched(self) -> Scheme:
        """The one whose scales can be searched for, where one can."""
        return self.experts if self.experts.weight.encoding.can_search else self.linears

    def decide(self, keys: Iterable[ParamKey], family: Family, policy: Policy) -> Decisions:
        """The decision on every weight of a matrix product, each by its own scheme.

        Args:
            policy: What is asked for beside the formats.
        """
        by_scheme: defaultdict[Scheme, list[ParamKey]] = defaultdict(list)
        for key in keys:
            by_scheme[self.of(key)].append(key)
        decisions: dict[ParamKey, Decision] = {}
        for scheme, of_scheme in by_scheme.items():
            decisions |= decide(of_scheme, family, policy.in_format(scheme))
        return decisions


def asked_formats(
    name: str,
    expert_format: str | None = None,
    group_size: int | None = None,
    input_scale: float | None = None,
    *,
    argument: str = "format",
) -> Formats:
    """The schemes of formats where nothing is calibrated with data.

    Args:
        name: The format of all linears.
        expert_format: The argument of that name; None where experts have no format of their own.
        group_size: How many input features share a scale, in each of the two that leaves the choice.
        input_scale: The scale of all inputs in place of calibrated ones; None where inputs are to have none.
        argument: What `name` was given as, for messages.

    Raises:
        ArgumentError: No format has a name, or none of them this group size; or `input_scale` is none, or goes with no
            input.
        UnsupportedQuantizationError: A format has scales of inputs, and none is given.
    """
    named = scheme_without_data if input_scale is None else scheme_named
    linears = named(name, argument)
    experts = linears if expert_format is None else named(expert_format, "expert_format")
    if group_size is not None:
        linears, experts = in_groups((linears, experts), group_size)
    _check_input_scale(input_scale, linears, experts)
    return Formats(linears, experts)


def require_experts(expert_format: str | None, *, has_experts: bool) -> None:
    """Refuses a format of experts for a model that has none.

    Raises:
        ArgumentError: It is one.
    """
    if expert_format is not None and not has_experts:
        raise ArgumentError(
            "The model has no routed experts.",
            [Offender("expert_format", f"is {expert_format}")],
            "Leave it out: the other format is that of all linears.",
        )


def _check_input_scale(input_scale: float | None, *schemes: Scheme) -> None:
    """Refuses a scale of inputs that is none, or goes with no input.

    Raises:
        ArgumentError: It is no number above 0, or none of the schemes has a scale of inputs.
    """
    if input_scale is None:
        return
    offenders = []
    # As FP32, which is what is written.
    if not math.isfinite(input_scale) or not float(torch.tensor(input_scale, dtype=torch.float32)) > 0:
        offenders.append(Offender("input_scale", f"is {input_scale}"))
    if not any(scheme.has_input_scale for scheme in schemes):
        offenders.append(Offender("format", f"is {schemes[0].format}, which has no scale of inputs"))
    if offenders:
        raise ArgumentError(
            "The scale of inputs cannot be served.", offenders, "Give a number above 0, and a format such as nvfp4."
        )
