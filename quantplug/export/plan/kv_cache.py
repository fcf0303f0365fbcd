"""Whether the quantizers of attention's keys and values can be written, and as which quantized KV cache.

A cast is said by the config alone, unless readers of the dialect need its scales of 1. A calibrated cache has two
scales an attention layer, `k_scale` and `v_scale`, FP32 and named as the dialect does. Their value is that of
ModelOpt's exporter of Megatron models (`get_kv_cache_scaling_factor` of its export/quant_utils.py): amax / 448, but not
below 1.0. A float type gains nothing from a smaller scale but a few subnormals, and saturates at the first key that is
larger than those of calibration.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from quantplug.errors import CalibrationError, UnsupportedQuantizationError
from quantplug.export.plan.types import QuantizerState
from quantplug.findings import Findings, Kind
from quantplug.formats.names import KVCacheFormat
from quantplug.formats.scale_types import scale_from_amax
from quantplug.formats.table import FP8
from quantplug.mappings.table import ParamKey

_SETTING = Kind(
    UnsupportedQuantizationError,
    "Quantizers of a KV cache are set in a way that is not written.",
    "Use ModelOpt's FP8 (num_bits (4, 3) of '*[kv]_bmm_quantizer', with use_constant_amax or calibrated; "
    'quant_cfg(..., kv_cache="fp8_cast") or "fp8" has it), or disable them.',
)
_UNCALIBRATED = Kind(
    CalibrationError,
    "Quantizers of a KV cache hold no usable amax.",
    'Calibrate with a forward loop; or cast, which needs no data (use_constant_amax; kv_cache="fp8_cast").',
)
_UNLIKE = Kind(
    UnsupportedQuantizationError,
    "The KV cache is not quantized alike for keys and values of all layers, and servers have one type for all of it.",
    "Enable '*[kv]_bmm_quantizer' in all attention layers, with one setting, or in none.",
)
_ALONE = Kind(
    UnsupportedQuantizationError,
    "No weight is quantized, and a checkpoint in 16 bits has no config that a KV cache could be named in.",
    "Quantize linears as well; or export without it, and give the server its own option (vLLM, SGLang: "
    "--kv-cache-dtype fp8).",
)
_UNSAID = Kind(
    UnsupportedQuantizationError,
    "This format's config has no place for a KV cache.",
    "Leave it out, and give the server its own option (vLLM, SGLang: --kv-cache-dtype fp8); or use another format.",
)


@dataclass(frozen=True)
class KVQuantizers:
    """The quantizers of one attention's keys and values, as one rank has them.

    Attributes:
        attention: Name of the module in the model, for messages.
        keys: State of `k_bmm_quantizer`; None if it is disabled.
        values: State of `v_bmm_quantizer`, likewise.
        cast: Whether both have a constant amax in place of a calibrated one (ModelOpt's `use_constant_amax`), which is
            the largest value of FP8 and so a scale of 1.0.
        linear: The weight that makes keys and values, beside whose parts their scales are written; None where there is
            no such one, as in MLA.
        rank: A rank that has it, for messages.
    """

    attention: str
    keys: QuantizerState | None
    values: QuantizerState | None
    cast: bool
    linear: ParamKey | None = None
    rank: int | None = None

    @property
    def states(self) -> tuple[QuantizerState, ...]:
        """Those that are enabled."""
        return tuple(state for state in (self.keys, self.values) if state is not None)

    @property
    def is_left_to_drafts(self) -> bool:
        """Whether it is multi-token prediction's, and not quantized: servers give drafts the cache that all have.

        ModelOpt's recipes leave these layers alone. Without scales of their own keys and values are cast with 1.0,
        which changes no token that the model itself accepts.
        """
        return not self.states and self.linear is not None and self.linear.is_mtp


@dataclass(frozen=True)
class KVCache:
    """The KV cache that a checkpoint asks for.

    Attributes:
        scales: Of the weights that make keys and values: the scale of each; none for a cast.
    """

    format: KVCacheFormat
    scales: Mapping[ParamKey, tuple[float, float]] = field(default_factory=dict)

    def scales_of(self, key: ParamKey, part: str, *, of_cast: bool) -> Iterator[tuple[str, float]]:
        """Kind and value of the scales that are written beside a part of a linear's weight.

        Args:
            part: Hugging Face name of the part, such as `model.layers.0.self_attn.k_proj.weight`.
            of_cast: Whether the scales of a cast, which are all 1, are written too.
        """
        module = part.removesuffix(".weight")
        is_cast = of_cast and self.format is KVCacheFormat.FP8_CAST
        if key in self.scales or is_cast:
            keys, values = self.scales.get(key, (1.0, 1.0))
            if module.endswith(".k_proj"):
                yield "k_scale", keys
            elif module.endswith(".v_proj"):
                yield "v_scale", values


def check_kv_cache(
    attentions: Sequence[KVQuantizers], asked: KVCacheFormat | None, findings: Findings, *, calibrated: bool
) -> KVCache | None:
    """The one KV cache that the quantizers of all attention layers mean; None for one in 16 bits.

    What cannot be written goes into `findings`.

    Args:
        asked: A format that is asked for by name, where no quantizers say it.
        calibrated: Whether calibration is over; before it, no amax is asked for.
    """
    enabled = [it for it in attentions if it.states]
    if not enabled:
        return None if asked is None else KVCache(asked)
    for it in attentions:
        if it.is_left_to_drafts:
            continue
        off = " and ".join(
            name for name, state in (("k_bmm_quantizer", it.keys), ("v_bmm_quantizer", it.values)) if state is None
        )
        if off:
            findings.add(_UNLIKE, it.attention, f"{off} is disabled", rank=it.rank)
        elif it.cast is not enabled[0].cast:
            findings.add(_UNLIKE, it.attention, f"is {_way(it)}, {enabled[0].attention} is not", rank=it.rank)
        for state in it.states:
            _check_setting(it, state, findings)
    if all(it.cast for it in enabled):
        return KVCache(KVCacheFormat.FP8_CAST)
    if calibrated:
        for it in enabled:
            for state in it.states:
                if state.amax is None or not math.isfinite(state.amax) or state.amax <= 0:
                    reason = "has no amax" if state.amax is None else f"has the amax {state.amax}"
                    findings.add(_UNCALIBRATED, state.name, reason, rank=it.rank)
    return KVCache(KVCacheFormat.FP8, _scales(enabled))


def _way(attention: KVQuantizers) -> str:
    return "cast" if attention.cast else "calibrated"


def _check_setting(attention: KVQuantizers, state: QuantizerState, findings: Findings) -> None:
    if state.unsupported:
        findings.add(_SETTING, state.name, ", ".join(state.unsupported), rank=attention.rank)
    elif state.num_bits != (4, 3) or state.block_sizes or state.axis is not None:
        findings.add(_SETTING, state.name, "is not FP8 with one scale", rank=attention.rank)
    elif not attention.cast and attention.linear is None:
        reason = "is calibrated, and of a latent (MLA), whose cache has no scales of keys and values"
        findings.add(_SETTING, state.name, reason, rank=attention.rank)


def _scales(attentions: Sequence[KVQuantizers]) -> dict[ParamKey, tuple[float, float]]:
    """The scales by weight, of the largest amax over all ranks: each has seen the heads that it holds alone."""
    amaxes: dict[ParamKey, tuple[float, float]] = {}
    for it in attentions:
        found = [state.amax for state in (it.keys, it.values) if state is not None and state.amax is not None]
        if it.linear is not None and len(found) == 2:
            keys, values = amaxes.get(it.linear, (0.0, 0.0))
            amaxes[it.linear] = max(keys, found[0]), max(values, found[1])
    return {key: (_scale(keys), _scale(values)) for key, (keys, values) in amaxes.items()}


def _scale(amax: float) -> float:
    return max(1.0, float(scale_from_amax(torch.tensor(amax, dtype=torch.float32), FP8.encoding.largest)))


def check_kv_place(kv_cache: KVCache | None, *, quantized: bool, has_place: bool, findings: Findings) -> None:
    """Whether there is a config that can name the KV cache.

    Args:
        quantized: Whether the plan quantizes any weight.
        has_place: Whether the format's config can name it.
    """
    if kv_cache is not None and not quantized:
        findings.add(_ALONE, "kv_cache", f"is {kv_cache.format}")
    elif kv_cache is not None and not has_place:
        findings.add(_UNSAID, "kv_cache", f"is {kv_cache.format}")
