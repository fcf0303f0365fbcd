"""Second moments of linears' inputs, made of sums over rows, and what stands for those of experts that saw few.

Of an expert that saw few tokens they say little, and of one that saw none nothing. What is known beside them is what
the other experts of the layer saw. The channels of the first linear's inputs are the same for all of them: those of the
hidden states. The channels of the second one's are each expert's own, so that only their common size can be taken over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from quantplug.calibration.inputs.linears import Linear
from quantplug.calibration.inputs.sums import InputSums, add_over
from quantplug.errors import CalibrationError, Offender
from quantplug.mappings.keys import ParamKey
from quantplug.megatron.agreement import all_or_none

FEW_TOKENS = 32
"""How many tokens of its own weigh as much as the layer's, by default."""


class ExpertInputs(StrEnum):
    """What is taken for the inputs of a routed expert."""

    OWN = "own"
    """Its own tokens alone; of an expert that saw none nothing is known, and its columns count alike."""
    MIXED = "mixed"
    """Its own tokens, and as many of the layer's as `few_tokens` says, by whatever experts they were seen."""


class InputSource(StrEnum):
    """Whose tokens the moments of a weight are of."""

    OWN = "own"
    MIXED = "own and the layer's"
    LAYER = "the layer's"
    NONE = "none"


@dataclass(frozen=True)
class WeightInputs:
    """What calibration saw of one weight's inputs.

    Attributes:
        key: The weight.
        tokens: Rows that it multiplied, over all ranks.
        source: Whose moments were used for it.
    """

    key: ParamKey
    tokens: int
    source: InputSource


@dataclass(frozen=True)
class InputPolicy:
    """How the moments of experts are made of tokens.

    Attributes:
        expert_inputs: Of whose tokens.
        few_tokens: Under `MIXED`: how many of the layer's are put to an expert's own; above 0.
    """

    expert_inputs: ExpertInputs = ExpertInputs.MIXED
    few_tokens: float = FEW_TOKENS


@dataclass(frozen=True)
class Moments:
    """Second moments of the inputs of one linear.

    Attributes:
        values: FP64 [weights, in], [weights, in, in] or [weights, in / 16, 16, 16]: means over rows. Where nothing is
            known ones, or the identity.
        inputs: What they are of, for each weight.
    """

    values: torch.Tensor
    inputs: tuple[WeightInputs, ...]


def moments_of(linear: Linear, found: InputSums, policy: InputPolicy) -> Moments:
    """The moments of a linear. A collective over its expert and tensor parallel ranks, if it is one of routed experts.

    Args:
        linear: The linear.
        found: Its sums over all ranks that see its rows.
        policy: Whose tokens are taken for an expert's.
    """
    rows = found.rows.to(found.sums)
    mixes = linear.is_routed and policy.expert_inputs is ExpertInputs.MIXED
    prior = layer_moments(linear, found) if mixes else None
    shape = (-1,) + (1,) * (found.sums.ndim - 1)
    if prior is None:
        values = found.sums / rows.clamp(min=1).view(shape)
    else:
        few = policy.few_tokens
        values = (found.sums + few * prior) / (rows + few).view(shape)
    sources = [_source(count, prior is not None) for count in found.rows.tolist()]
    nothing = torch.tensor([source is InputSource.NONE for source in sources], device=values.device)
    alike = torch.ones_like(values[0]) if values.ndim == 2 else torch.eye(values.shape[-1]).to(values)
    values = torch.where(nothing.view(shape), alike, values)
    pairs = zip(linear.weights, found.rows.tolist(), sources, strict=True)
    return Moments(values, tuple(WeightInputs(weight.key, count, source) for weight, count, source in pairs))


def means_of(linear: Linear, totals: InputSums, policy: InputPolicy) -> torch.Tensor:
    """FP64 [weights, in]: means of the channels of inputs, of the rows that `moments_of` takes. A collective, as that.

    Args:
        linear: The linear.
        totals: Sums of its channels over all ranks that see its rows.
        policy: Whose tokens are taken for an expert's.
    """
    rows = totals.rows.to(totals.sums)[:, None]
    if not linear.is_routed or policy.expert_inputs is not ExpertInputs.MIXED:
        return totals.sums / rows.clamp(min=1)
    few = policy.few_tokens
    if linear.is_row_parallel:
        # Of the layer's no more is taken than their size.
        return totals.sums / (rows + few)
    total = add_over(linear.expert_group, rows.sum().reshape(1)).clamp(min=1)
    return (totals.sums + few * add_over(linear.expert_group, totals.sums.sum(0)) / total) / (rows + few)


def known_moments(linears: Sequence[Linear], sums: Sequence[InputSums], policy: InputPolicy) -> list[Moments]:
    """What sums over all ranks make of the inputs of each linear. A collective.

    Raises:
        CalibrationError: Inputs that are not finite, or linears of all tokens that saw none, on whichever rank.
    """
    found = [moments_of(linear, of_linear, policy) for linear, of_linear in zip(linears, sums, strict=True)]
    all_or_none(lambda: require_known(linears, found))
    return found


def require_known(linears: Sequence[Linear], moments: Sequence[Moments]) -> None:
    """Refuses inputs that are not finite, and linears of all tokens that saw none.

    Raises:
        CalibrationError: Names every weight.
    """
    offenders: list[Offender] = []
    for linear, found in zip(linears, moments, strict=True):
        for weight, values, inputs in zip(linear.weights, found.values, found.inputs, strict=True):
            if not bool(values.isfinite().all()):
                offenders.append(weight.offender("has inputs that are not finite numbers"))
            elif not linear.is_routed and not inputs.tokens:
                offenders.append(weight.offender("saw no data on any rank"))
    if offenders:
        raise CalibrationError(
            "The inputs of linears are not known.",
            offenders,
            "Run the forward loop on every rank, over data that reaches every module and overflows nowhere.",
        )


def layer_moments(linear: Linear, found: InputSums) -> torch.Tensor | None:
    """Mean over the rows of all experts of the layer, of the shape of one weight's; None where none saw any.

    A collective over the expert and tensor parallel ranks of a linear.
    """
    total = add_over(linear.expert_group, found.rows.to(found.sums).sum().reshape(1))
    sums = found.sums.sum(0)
    if not linear.is_row_parallel:
        mean = add_over(linear.expert_group, sums) / total.clamp(min=1)
    else:
        # One number for all channels. Sums of all products are of all ranks' channels, others of this rank's.
        squares = sums if sums.ndim == 1 else sums.diagonal(dim1=-2, dim2=-1)
        channels = torch.tensor([squares.numel()], dtype=torch.float64, device=sums.device)
        square = squares.sum().reshape(1)
        if sums.ndim != 2:
            square, channels = add_over(linear.tensor_group, square), add_over(linear.tensor_group, channels)
        size = add_over(linear.expert_group, square) / (total.clamp(min=1) * channels)
        mean = size.expand(len(sums)) if sums.ndim == 1 else (torch.eye(sums.shape[-1]).to(sums) * size).expand_as(sums)
    return mean if bool(total > 0) else None


def _source(tokens: int, is_mixed: bool) -> InputSource:
    if is_mixed:
        return InputSource.MIXED if tokens else InputSource.LAYER
    return InputSource.OWN if tokens else InputSource.NONE
