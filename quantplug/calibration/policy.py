"""What calibration does where there is a choice: the amax of expert weights, and experts that saw no token."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from quantplug.calibration.quantizers import leaf_quantizers, needs_amax
from quantplug.calibration.tokens import ExpertLayer, LayerTokens
from quantplug.errors import CalibrationError, Offender, UnsupportedQuantizationError

_FP8, _FP4 = (4, 3), (2, 1)


class ExpertWeights(StrEnum):
    """Which expert weights share one amax."""

    PER_EXPERT = "per_expert"  # Every expert has its own.
    SHARED = "shared"  # All experts of a layer have the largest one, on all expert parallel ranks.


class ColdExperts(StrEnum):
    """What becomes of an expert that no calibration token was routed to, where its inputs are quantized."""

    ERROR = "error"  # A CalibrationError names every one.
    WEIGHT_ONLY_FALLBACK = "weight_only_fallback"  # Its inputs are not quantized; not in FP8 or NVFP4, see below.
    LAYER_MAX = "layer_max"  # Its input amax is the largest of its layer's experts.


@dataclass(frozen=True)
class CalibrationPolicy:
    """The choices of a calibration; the defaults never invent a value."""

    expert_weights: ExpertWeights = ExpertWeights.PER_EXPERT
    cold_experts: ColdExperts = ColdExperts.ERROR


def refuse_weight_only_fallback(layers: Iterable[ExpertLayer]) -> None:
    """Refuses `weight_only_fallback` before any data has run, where one expert cannot go without an input scale.

    FP8 and NVFP4 checkpoints hold an input_scale for every expert: what loads them runs all experts of a layer in one
    grouped GEMM, and takes one that is missing for uninitialized memory (vLLM) or refuses it (TensorRT-LLM). And the
    experts of a grouped linear layer share one input quantizer, which cannot be off for one of them.

    Raises:
        UnsupportedQuantizationError: Names every layer and why.
    """
    offenders = [
        Offender(f"{layer.name}.{name}", reason)
        for layer in layers
        for name, leaf in layer.activation_quantizers()
        if (reason := _needs_input_scale(layer, leaf)) is not None
    ]
    if offenders:
        raise UnsupportedQuantizationError(
            "A cold expert cannot fall back to weight-only quantization here.",
            offenders,
            "Use the policy layer_max or error, or quantize the weights alone.",
        )


def _needs_input_scale(layer: ExpertLayer, leaf: TensorQuantizer) -> str | None:
    if layer.is_grouped:
        return "is one input quantizer for all local experts"
    # (exponent bits, mantissa bits), as ModelOpt writes formats: E4M3 and E2M1.
    if leaf.num_bits in (_FP8, _FP4):
        return "its format needs an input_scale of every expert"
    return None


def cold_experts(
    layers: Sequence[ExpertLayer], tokens: Sequence[LayerTokens]
) -> Iterator[tuple[ExpertLayer, LayerTokens, int]]:
    """Every expert, by global id, that saw no token in a layer whose experts quantize their inputs statically."""
    for layer, counted in zip(layers, tokens, strict=True):
        # Where inputs are not quantized nothing is missing of an expert that saw no token.
        if any(True for _ in layer.activation_quantizers()):
            yield from ((layer, counted, expert) for expert, count in enumerate(counted.by_expert) if not count)


def apply_to_cold_experts(
    policy: ColdExperts, layers: Sequence[ExpertLayer], tokens: Sequence[LayerTokens]
) -> frozenset[tuple[int, int]]:
    """Does what the policy says with every cold expert.

    Nothing is left to do for `layer_max`: the input amax of a layer's experts is reduced over all of them.

    Returns:
        (layer, global expert) of every expert whose input amax is its layer's.

    Raises:
        CalibrationError: Under `error`: names every cold expert of the layers that this rank holds.
    """
    # The tokens are those of all ranks, so every rank that holds the layer comes to the same list.
    cold = list(cold_experts(layers, tokens))
    match policy:
        case ColdExperts.ERROR:
            _refuse(cold)
            return frozenset()
        case ColdExperts.WEIGHT_ONLY_FALLBACK:
            for layer, _, expert in cold:
                _leave_inputs(layer.local_experts().get(expert))
            return frozenset()
        case ColdExperts.LAYER_MAX:
            return frozenset((layer.layer, expert) for layer, _, expert in cold)


def _refuse(cold: Sequence[tuple[ExpertLayer, LayerTokens, int]]) -> None:
    if cold:
        raise CalibrationError(
            "Experts saw no calibration token, so that nothing is known of their inputs.",
            [
                Offender(layer.name, f"none of {counted.routed} routed tokens in layer {layer.layer}", expert)
                for layer, counted, expert in cold
            ],
            "Calibrate on more or other data, or choose the policy layer_max.",
        )


def _leave_inputs(expert: nn.Module | None) -> None:
    """Turns the input quantizers of an expert off; None is one that another rank holds."""
    for name, module in expert.named_modules() if expert is not None else ():
        if name.endswith("input_quantizer"):
            for leaf in filter(needs_amax, leaf_quantizers(module)):
                # A disabled quantizer with an amax would still be saved and shown as if its inputs were quantized.
                leaf.reset_amax()
                leaf.disable()
