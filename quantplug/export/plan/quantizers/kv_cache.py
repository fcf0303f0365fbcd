"""Whether the quantizers of attention's keys and values can be written, and as which quantized KV cache.

A cast is said by the config alone, unless readers of the dialect need its scales of 1. A calibrated cache has two
scales an attention layer, `k_scale` and `v_scale`, FP32 and named as the dialect does. Their value is that of
ModelOpt's exporter of Megatron models (`get_kv_cache_scaling_factor` of its export/quant_utils.py): of FP8 amax / 448,
but not below 1.0, of NVFP4 amax / (6 * 448).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from quantplug.errors import CalibrationError, UnsupportedQuantizationError
from quantplug.export.plan.dialects.dialect import Dialect
from quantplug.export.plan.quantizers.scheme import weight_format
from quantplug.export.plan.types import QuantizerState, Schemes
from quantplug.findings import Findings, Kind
from quantplug.formats.names import KV_CACHES, CacheScheme, KVCacheFormat
from quantplug.formats.scale_types import scale_from_amax
from quantplug.formats.table import FP8
from quantplug.mappings.keys import ParamKey

_SETTING = Kind(
    UnsupportedQuantizationError,
    "Quantizers of a KV cache are set in a way that is not written.",
    "Use ModelOpt's FP8 or NVFP4 (of '*[kv]_bmm_quantizer', with use_constant_amax or calibrated; "
    f"quant_cfg(..., kv_cache=) has them: {', '.join(KV_CACHES)}), or disable them.",
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
    "This format's config has no place for the KV cache.",
    "Leave it out, and give the server its own option (vLLM, SGLang: --kv-cache-dtype); or use another format, of the "
    "cache or of the weights.",
)
_LATENT = Kind(
    UnsupportedQuantizationError,
    "vLLM does not keep the latent of this model's attention (MLA) so.",
    "Use fp8_cast, or leave the cache in 16 bits.",
)


@dataclass(frozen=True)
class KVQuantizers:
    """The quantizers of one attention's keys and values, as one rank has them.

    Attributes:
        attention: Name of the module in the model, for messages.
        keys: State of `k_bmm_quantizer`; None if it is disabled.
        values: State of `v_bmm_quantizer`, likewise.
        cast: Whether both have a constant amax in place of a calibrated one (ModelOpt's `use_constant_amax`), so that
            no scale is written, and servers take 1.0.
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
        is_cast = of_cast and not self.format.needs_data
        if key in self.scales or is_cast:
            keys, values = self.scales.get(key, (1.0, 1.0))
            if module.endswith(".k_proj"):
                yield "k_scale", keys
            elif module.endswith(".v_proj"):
                yield "v_scale", values


def check_kv_cache(
    attentions: Sequence[KVQuantizers],
    asked: KVCacheFormat | None,
    findings: Findings,
    *,
    calibrated: bool,
    latent: bool = False,
) -> KVCache | None:
    """The one KV cache that the quantizers of all attention layers mean; None for one in 16 bits.

    What cannot be written goes into `findings`.

    Args:
        asked: A format that is asked for by name, where no quantizers say it.
        calibrated: Whether calibration is over; before it, no amax is asked for.
        latent: Whether the cache is that of multi-latent attention.
    """
    enabled = [it for it in attentions if it.states]
    if not enabled:
        if latent and asked is not None:
            _check_latent("kv_cache", asked, findings)
        return None if asked is None else KVCache(asked)
    first = _meant(enabled[0], enabled[0].states[0])
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
            meant = _meant(it, state)
            if it.cast is enabled[0].cast and None not in (meant, first) and meant is not first:
                findings.add(_UNLIKE, state.name, f"is {meant}, {enabled[0].states[0].name} is {first}", rank=it.rank)
    # Where there is none, it has a finding.
    cache = first or KVCacheFormat.FP8_CAST
    if latent:
        for it in enabled:
            _check_latent(it.attention, cache, findings)
    if not cache.needs_data:
        return KVCache(cache)
    if calibrated:
        for it in enabled:
            for state in it.states:
                if state.amax is None or not math.isfinite(state.amax) or state.amax <= 0:
                    reason = "has no amax" if state.amax is None else f"has the amax {state.amax}"
                    findings.add(_UNCALIBRATED, state.name, reason, rank=it.rank)
    return KVCache(cache, _scales(enabled, KV_CACHES[cache]))


def _meant(attention: KVQuantizers, state: QuantizerState) -> KVCacheFormat | None:
    """The format that a quantizer's settings stand for; None where there is none."""
    # Static scales of blocks are of some tokens, and no others.
    values = None if state.search.is_given else weight_format(state)
    found = (name for name, row in KV_CACHES.items() if row.values == values)
    return next((name for name in found if name.needs_data is not attention.cast), None)


def _check_latent(name: str, cache: KVCacheFormat, findings: Findings) -> None:
    # vLLM 0.32's backends of MLA know FP8 and layouts of their own (`nvfp4_ds_mla`), which no checkpoint asks for.
    if KV_CACHES[cache].values is not FP8:
        findings.add(_LATENT, name, f"is {cache}")


def _way(attention: KVQuantizers) -> str:
    return "cast" if attention.cast else "calibrated"


def _check_setting(attention: KVQuantizers, state: QuantizerState, findings: Findings) -> None:
    if state.unsupported:
        findings.add(_SETTING, state.name, ", ".join(state.unsupported), rank=attention.rank)
    elif _meant(attention, state) is None:
        findings.add(_SETTING, state.name, "is neither FP8 with one scale nor NVFP4", rank=attention.rank)
    elif not attention.cast and attention.linear is None:
        reason = "is calibrated, and of a latent (MLA), whose cache has no scales of keys and values"
        findings.add(_SETTING, state.name, reason, rank=attention.rank)


def _scales(attentions: Sequence[KVQuantizers], scheme: CacheScheme) -> dict[ParamKey, tuple[float, float]]:
    """The scales by weight, of the largest amax over all ranks: each has seen the heads that it holds alone."""
    amaxes: dict[ParamKey, tuple[float, float]] = {}
    for it in attentions:
        found = [state.amax for state in (it.keys, it.values) if state is not None and state.amax is not None]
        if it.linear is not None and len(found) == 2:
            keys, values = amaxes.get(it.linear, (0.0, 0.0))
            amaxes[it.linear] = max(keys, found[0]), max(values, found[1])
    return {key: (_scale(keys, scheme), _scale(values, scheme)) for key, (keys, values) in amaxes.items()}


def _scale(amax: float, scheme: CacheScheme) -> float:
    scale = scale_from_amax(torch.tensor(amax, dtype=torch.float32), scheme.values.encoding.largest)
    return max(scheme.least_scale, float(scale))


def check_kv_place(kv_cache: KVCache | None, dialect: Dialect | None, schemes: Schemes, findings: Findings) -> None:
    """Whether there is a config that can name the KV cache.

    Args:
        dialect: That of the checkpoint; None where no weight is quantized.
    """
    if kv_cache is None:
        return
    if dialect is None:
        findings.add(_ALONE, "kv_cache", f"is {kv_cache.format}")
    elif problem := dialect.cache_problem(kv_cache.format, {scheme.format for scheme in schemes.values()}):
        findings.add(_UNSAID, "kv_cache", f"is {kv_cache.format}: {problem}")
