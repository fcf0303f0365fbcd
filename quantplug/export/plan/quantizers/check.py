"""Whether the quantizers of a model can be written, and by which scheme each."""

import math
from collections.abc import Mapping, Sequence

from quantplug.choices import Preset
from quantplug.errors import CalibrationError, ShapeError, UnsupportedQuantizationError
from quantplug.export.plan.dialects.dialect import Dialect
from quantplug.export.plan.match import Mapped
from quantplug.export.plan.quantizers import scheme as schemes
from quantplug.export.plan.types import QuantizerState, Schemes, WholeWeight
from quantplug.findings import Findings, Kind
from quantplug.formats.names import SCHEMES, Scheme, in_smaller_groups
from quantplug.mappings.keys import ParamKey, fill
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.rows import Role, Scope, WeightMapping
from quantplug.selection.advice import NONE_LEFT, LeaveOut, quantizer_rules
from quantplug.selection.output_layer import unread_output_layer
from quantplug.selection.policy import Kept, Policy

_SETTING = Kind(UnsupportedQuantizationError, "Quantizers are set in a way that cannot be written.", schemes.WAY_OUT)
# Where a weight's format is not known: bits enough for every row, so that the policy judges by role alone.
_ANY_FORMAT = Policy(16, quantize_mtp=True, quantize_lm_head=True, preset=Preset.ALL)
_UNCLAIMED = Kind(
    UnsupportedQuantizationError,
    "Quantizers are enabled that no part of the checkpoint expresses.",
    "Disable them: served without them, the checkpoint would not compute what was calibrated.",
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
_WITHOUT = Kind(
    UnsupportedQuantizationError,
    "Layers have no quantizers, and others of the model have.",
    "Quantize the whole model by one config: on every rank, and every virtual stage (for chunk in model: "
    "mtq.quantize(chunk, config)). What is to stay in high precision is turned off by a rule of the config.",
)
_COPIED = "The output layer is quantized, and copies of it in layers of multi-token prediction are not."
_DIVISOR = "Weights do not divide as their format needs."
_UNSERVED = "No server loads these weights in this format."


def check_quantizers(mapped: Mapped, unclaimed: Sequence[str], findings: Findings) -> Schemes:
    """The scheme of every quantized weight; what cannot be written goes into `findings`, and has none."""
    _check_coverage(mapped, findings)
    for name in unclaimed:
        findings.add(_UNCLAIMED, name, "is enabled")
    found: dict[ParamKey, Scheme] = {}
    against_policy: list[tuple[WholeWeight, Kept]] = []
    for whole, mapping in mapped:
        if whole.weight is None:
            if whole.activation is not None:
                findings.add_weight(_SETTING, whole, "its input quantizer is enabled, its weight quantizer is not")
            continue
        # Settings are judged only where a format may pack the weight. Elsewhere the policy refuses the quantizer
        # whatever it says, and a complaint about its settings would advise to change what must be turned off.
        scheme = _scheme(whole, whole.weight, findings) if mapping.role.may_be_packed else None
        # Layers of multi-token prediction, and the output layer, are quantized where a config of the user's has enabled
        # their quantizers.
        kept = (_ANY_FORMAT.in_format(scheme) if scheme else _ANY_FORMAT).why_kept(mapping)
        if kept is not None:
            against_policy.append((whole, kept))
        elif scheme is not None:
            found[whole.key] = scheme
    _refuse_against_policy(against_policy, findings)
    _check_experts(mapped, findings)
    return found


def check_calibrated(mapped: Mapped, findings: Findings) -> None:
    """Every enabled quantizer has a usable amax.

    A weight's may be 0 (an all-zero expert); an input's may not: served, a scale of 0 divides by zero. A dynamic one
    has none.
    """
    for whole, _ in mapped:
        for state, zero_allowed in ((whole.weight, True), (whole.activation, False)):
            if state is None or state.dynamic:
                continue
            if state.amax is None:
                findings.add(_UNCALIBRATED, state.name, "has no amax", whole.key.expert, whole.rank)
            # An all-zero weight packs to codes of 0 with a scale of 1, so that amax 0 is right for it.
            elif not math.isfinite(state.amax) or state.amax < 0 or (state.amax == 0 and not zero_allowed):
                findings.add(_UNCALIBRATED, state.name, f"has amax {state.amax}", whole.key.expert, whole.rank)


def _scheme(whole: WholeWeight, weight: QuantizerState, findings: Findings) -> Scheme | None:
    scheme = schemes.scheme_for(weight, whole.activation)
    if isinstance(scheme, Scheme):
        return scheme
    findings.add_weight(_SETTING, whole, scheme)
    return None


def _refuse_against_policy(against_policy: Sequence[tuple[WholeWeight, Kept]], findings: Findings) -> None:
    """Quantizers that are enabled for what the policy keeps, with the very rules that turn them off."""
    rules = quantizer_rules(whole.key.module for whole, _ in against_policy)
    kind = Kind(
        UnsupportedQuantizationError,
        "Quantizers are enabled where servers load high precision.",
        f"Append to quant_cfg, as quantplug.plugins.quant_cfg does for you: {rules}.",
    )
    for whole, kept in against_policy:
        findings.add_weight(kind, whole, f"enabled for the {kept.words}")


def check_shapes(
    mapped: Mapped,
    shapes: Mapping[ParamKey, tuple[tuple[int, ...], ...]],
    schemes: Schemes,
    dims: ModelDimensions,
    leave_out: LeaveOut,
    findings: Findings,
) -> None:
    """Whether the packed parts of quantized weights divide as their formats need; else what to leave out.

    Shapes are [out_features, in_features] of each part; what does not divide goes into `findings`.
    """
    uneven: list[tuple[WholeWeight, str]] = []
    of_uneven: list[tuple[Scheme, tuple[int, ...]]] = []
    for whole, mapping in mapped:
        if whole.key not in schemes:
            continue
        packing = schemes[whole.key].weight
        for name, shape in zip(mapping.hf, shapes[whole.key], strict=True):
            problem = None if name in mapping.high_precision else packing.problem(shape)
            if problem is not None:
                uneven.append((whole, f"{packing.name}: {problem}"))
                of_uneven.append((schemes[whole.key], shape))
    if not uneven:
        return
    way_out = leave_out([whole.key for whole, _ in uneven], _quantized_rows(mapped), dims)
    kind = Kind(
        ShapeError, _DIVISOR, _or_else(f"{_finer(of_uneven)}Choose a format whose block size divides them.", way_out)
    )
    for whole, problem in uneven:
        findings.add_weight(kind, whole, problem)


def _finer(uneven: Sequence[tuple[Scheme, tuple[int, ...]]]) -> str:
    """The advice to take smaller groups, where the format has some that divide all of these shapes."""
    sizes = [
        {row.group_size for row in in_smaller_groups(scheme) if not row.weight.problem(shape)}
        for scheme, shape in uneven
    ]
    found = max((size for size in set.intersection(*sizes) if size is not None), default=None)
    if found is None:
        return ""
    words = f"group_size={found}, --group-size {found}; in a quant_cfg block_sizes {{-1: {found}}}"
    return f"Use groups of {found} ({words}). Or: "


def check_served(
    mapped: Mapped, schemes: Schemes, dims: ModelDimensions, leave_out: LeaveOut, findings: Findings
) -> None:
    """Whether some server loads each quantized weight in its scheme; else what to leave out, in `findings`."""
    unserved = [
        (whole, scheme, why)
        for whole, row in mapped
        if (scheme := schemes.get(whole.key)) and (why := Policy.of(scheme).why_unserved(row))
    ]
    if not unserved:
        return
    rows = _quantized_rows(mapped)
    way_out = leave_out([whole.key for whole, *_ in unserved], rows, dims)
    others = [row for row in SCHEMES.values() if row.loads_experts and not row.has_input_scale]
    # Of experts that no format serves, another format would be the next refusal.
    served = [
        row.format
        for row in others
        if not any(Policy.of(row).why_unserved(mapping) for mapping in rows.values() if mapping.scope is Scope.EXPERT)
    ]
    if served and any(whole.key.expert is not None for whole, *_ in unserved):
        way_out = _or_else(f"Choose {' or '.join(served)}, in which servers load experts.", way_out)
    kind = Kind(UnsupportedQuantizationError, _UNSERVED, way_out)
    for whole, scheme, why in unserved:
        findings.add_weight(kind, whole, f"{scheme.format}: {why}")


def check_output_layer(
    mapped: Mapped, schemes: Schemes, dialect: Dialect, dims: ModelDimensions, leave_out: LeaveOut, findings: Findings
) -> None:
    """Whether the config can ask for an output layer in its scheme, and nothing holds its tensor a second time."""
    for whole, row in mapped:
        scheme = schemes.get(whole.key)
        if scheme is None or row.role is not Role.OUTPUT_LAYER:
            continue
        way_out = leave_out([whole.key], _quantized_rows(mapped), dims)
        if unread := unread_output_layer(dialect.name, scheme.format):
            kind = Kind(UnsupportedQuantizationError, _UNSERVED, _or_else("Choose another format.", way_out))
            findings.add_weight(kind, whole, f"{scheme.label}, an output layer: {unread.words}")
        # Servers find a copy by the name of the layer that it is in, which an exclude list spares as a whole.
        elif copies := row.duplicate_names(dims):
            kind = Kind(UnsupportedQuantizationError, _COPIED, _or_else("Export with drop_mtp (--drop-mtp).", way_out))
            findings.add_weight(kind, whole, f"is {', '.join(copies)} too")


def _or_else(remedy: str, leaving_out: str) -> str:
    """Both pieces of advice; the first alone where nothing would be left to quantize."""
    return remedy if leaving_out == NONE_LEFT else f"{remedy} Or: {leaving_out}"


def _quantized_rows(mapped: Mapped) -> dict[ParamKey, WeightMapping]:
    """All weights whose quantizers are enabled, with or without a scheme: what advice to leave some out is made of."""
    return {whole.key: row for whole, row in mapped if whole.weight is not None and row.role.may_be_packed}


def _check_coverage(mapped: Mapped, findings: Findings) -> None:
    """Linears without any quantizer in a model that has quantized ones: they would stay in 16 bits without a word.

    A disabled quantizer is one. Either nothing of their model chunk has been quantized; or they themselves have not,
    and the same linear of other layers has. Said once for all experts of a layer.
    """
    linears = [whole for whole, mapping in mapped if mapping.role is Role.LINEAR]
    if not any(whole.weight is not None for whole in linears):
        return  # A plain export.
    # A kind of linear that has a quantizer in no layer is one that ModelOpt does not know.
    known = {whole.key.module for whole in linears if whole.unquantized is None}
    said: set[tuple[str, int | None]] = set()
    for whole in linears:
        without, place = whole.unquantized, (whole.key.module, whole.key.layer)
        if without is None or place in said or not (without.whole_chunk or whole.key.module in known):
            continue
        said.add(place)
        reason = f"no quantizer, as all of model[{without.chunk}]" if without.whole_chunk else "no quantizer"
        findings.add(_WITHOUT, fill(*place, None), reason, rank=whole.rank)


def _check_experts(mapped: Mapped, findings: Findings) -> None:
    # By stack and layer, and in each by whether the weight is quantized. vLLM makes one FusedMoE of all experts of a
    # layer, with one method: were one of them plain, all would be, and loading would fail.
    layers: dict[tuple[str, int | None], dict[bool, list[WholeWeight]]] = {}
    for whole, mapping in mapped:
        if whole.key.expert is not None and mapping.role is Role.LINEAR:
            layer = (whole.key.stack, whole.key.layer)
            layers.setdefault(layer, {}).setdefault(whole.weight is not None, []).append(whole)
    for (_, number), by_state in layers.items():
        if len(by_state) == 2:
            for whole in by_state[False]:
                findings.add_weight(_PARTIAL, whole, f"unquantized, others of layer {number} are")
