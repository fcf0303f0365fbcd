"""Whether the quantizers of a model can be written, and by which one scheme."""

import math
from collections.abc import Mapping, Sequence

from quantplug.errors import CalibrationError, ShapeError, UnsupportedQuantizationError
from quantplug.export.plan import scheme as schemes
from quantplug.export.plan.match import Mapped
from quantplug.export.plan.types import QuantizerState, WholeWeight
from quantplug.findings import Findings, Kind
from quantplug.formats.names import Scheme
from quantplug.mappings.table import ParamKey, Role

_SETTING = Kind(UnsupportedQuantizationError, "Quantizers are set in a way that cannot be written.", schemes.WAY_OUT)
_KEPT = Kind(
    UnsupportedQuantizationError,
    "Quantizers are enabled where servers load high precision.",
    "Append a rule that disables them to quant_cfg, such as {'quantizer_name': '*output_layer*', 'enable': False}, "
    "'*router*', '*conv1d*' or '*eh_proj*'.",
)
_UNCLAIMED = Kind(
    UnsupportedQuantizationError,
    "Quantizers are enabled that no part of the checkpoint expresses.",
    "Disable them: served without them, the checkpoint would not compute what was calibrated.",
)
_MIXED = Kind(
    UnsupportedQuantizationError,
    "The model mixes quantization schemes, which is not written yet.",
    "Quantize all linears by one config; disable the quantizers of those that should stay in high precision.",
)
_PARTIAL = Kind(
    UnsupportedQuantizationError,
    "Only some experts of a layer are quantized, and servers load all experts of a layer alike.",
    "Enable or disable the weight quantizers of all experts of a layer together.",
)
_UNCALIBRATED = Kind(
    CalibrationError,
    "Quantizers are enabled but hold no usable amax.",
    "Run mtq.quantize: weights need no data, inputs a forward loop that reaches every expert; or quantize weight-only.",
)
_DIVISOR = Kind(
    ShapeError,
    "Weights do not divide as their format needs.",
    "Choose a format whose block size divides them, or leave these linears in high precision: disable their "
    "quantizers, or exclude these modules where there is no model.",
)


def check_quantizers(
    mapped: Mapped, shapes: Mapping[ParamKey, tuple[tuple[int, ...], ...]], unclaimed: Sequence[str], findings: Findings
) -> Scheme | None:
    """The scheme of all quantized weights, None if there are none; what cannot be written goes into `findings`."""
    for name in unclaimed:
        findings.add(_UNCLAIMED, name, "is enabled")
    by_scheme: dict[Scheme, list[WholeWeight]] = {}
    for whole, mapping in mapped:
        if whole.weight is None:
            if whole.activation is not None:
                findings.add_weight(_SETTING, whole, "its input quantizer is enabled, its weight quantizer is not")
            continue
        if mapping.role is not Role.LINEAR:
            findings.add_weight(_KEPT, whole, f"enabled for the {mapping.role.value}")
            continue
        scheme = _scheme(whole, whole.weight, findings)
        if scheme is not None:
            by_scheme.setdefault(scheme, []).append(whole)
            packed = [
                shape
                for name, shape in zip(mapping.hf, shapes[whole.key], strict=True)
                if name not in mapping.high_precision
            ]
            _check_shapes(whole, scheme, packed, findings)
    _check_experts(mapped, findings)
    _check_uniform(by_scheme, findings)
    return next(iter(by_scheme), None)


def check_calibrated(mapped: Mapped, findings: Findings) -> None:
    """Every enabled quantizer has a usable amax.

    A weight's may be 0 (an all-zero expert); an input's may not: served, a scale of 0 divides by zero.
    """
    for whole, _ in mapped:
        for state, zero_allowed in ((whole.weight, True), (whole.activation, False)):
            if state is None:
                continue
            if state.amax is None:
                findings.add(_UNCALIBRATED, state.name, "has no amax", whole.key.expert, whole.rank)
            elif not math.isfinite(state.amax) or state.amax < 0 or (state.amax == 0 and not zero_allowed):
                findings.add(_UNCALIBRATED, state.name, f"has amax {state.amax}", whole.key.expert, whole.rank)


def _scheme(whole: WholeWeight, weight: QuantizerState, findings: Findings) -> Scheme | None:
    scheme = schemes.scheme_for(weight, whole.activation)
    if isinstance(scheme, Scheme):
        return scheme
    findings.add_weight(_SETTING, whole, scheme)
    return None


def _check_shapes(whole: WholeWeight, scheme: Scheme, shapes: Sequence[tuple[int, ...]], findings: Findings) -> None:
    for shape in shapes:
        problem = scheme.weight.problem(shape)
        if problem is not None:
            findings.add_weight(_DIVISOR, whole, f"{scheme.weight.name}: {problem}")


def _check_experts(mapped: Mapped, findings: Findings) -> None:
    layers: dict[tuple[str, int | None], dict[bool, list[WholeWeight]]] = {}
    for whole, mapping in mapped:
        if whole.key.expert is not None and mapping.role is Role.LINEAR:
            layer = (whole.key.stack, whole.key.layer)
            layers.setdefault(layer, {}).setdefault(whole.weight is not None, []).append(whole)
    for (_, number), by_state in layers.items():
        if len(by_state) == 2:
            for whole in by_state[False]:
                findings.add_weight(_PARTIAL, whole, f"unquantized, others of layer {number} are")


def _check_uniform(by_scheme: Mapping[Scheme, list[WholeWeight]], findings: Findings) -> None:
    if len(by_scheme) < 2:
        return
    for scheme, wholes in by_scheme.items():
        for whole in wholes:
            findings.add_weight(_MIXED, whole, f"is {scheme.format}")
