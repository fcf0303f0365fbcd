"""Whether the quantizers of attention's keys and values can be written, and as which quantized KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass

from quantplug.errors import UnsupportedQuantizationError
from quantplug.export.plan.types import QuantizerState
from quantplug.findings import Findings, Kind
from quantplug.formats.names import KVCacheFormat

_SETTING = Kind(
    UnsupportedQuantizationError,
    "Quantizers of a KV cache are set in a way that is not written.",
    "Use ModelOpt's FP8 cast (num_bits (4, 3), use_constant_amax, of '*[kv]_bmm_quantizer'; "
    'quant_cfg(..., kv_cache="fp8_cast") has it), or disable them.',
)
_UNLIKE = Kind(
    UnsupportedQuantizationError,
    "The KV cache is quantized in some layers, or for keys or values alone, and servers have one type for all of it.",
    "Enable '*[kv]_bmm_quantizer' in all attention layers, or in none.",
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
    """The quantizers of one attention's keys and values.

    Attributes:
        attention: Name of the module in the model, as its rank has it.
        keys: State of `k_bmm_quantizer`; None if it is disabled.
        values: State of `v_bmm_quantizer`, likewise.
        cast: Whether both have a constant amax in place of a calibrated one (ModelOpt's `use_constant_amax`), which is
            the largest value of FP8 and so a scale of 1.0.
        rank: A rank that has it, for messages.
    """

    attention: str
    keys: QuantizerState | None
    values: QuantizerState | None
    cast: bool
    rank: int | None = None


def check_kv_cache(attentions: Sequence[KVQuantizers], findings: Findings) -> KVCacheFormat | None:
    """The one KV cache that the quantizers of all attention layers mean; None for one in 16 bits.

    What cannot be written goes into `findings`.
    """
    enabled = [it for it in attentions if it.keys is not None or it.values is not None]
    if not enabled:
        return None
    for it in attentions:
        off = " and ".join(
            name for name, state in (("k_bmm_quantizer", it.keys), ("v_bmm_quantizer", it.values)) if state is None
        )
        if off:
            findings.add(_UNLIKE, it.attention, f"{off} is disabled", rank=it.rank)
    for it in enabled:
        for state in (it.keys, it.values):
            problem = None if state is None else _problem(state, cast=it.cast)
            if state is not None and problem is not None:
                findings.add(_SETTING, state.name, problem, rank=it.rank)
    return KVCacheFormat.FP8_CAST


def _problem(state: QuantizerState, *, cast: bool) -> str | None:
    if state.unsupported:
        return ", ".join(state.unsupported)
    if state.num_bits != (4, 3) or state.block_sizes or state.axis is not None:
        return "is not FP8 with one scale"
    return None if cast else "has a calibrated scale"


def check_kv_place(kv_cache: KVCacheFormat | None, *, quantized: bool, has_place: bool, findings: Findings) -> None:
    """Whether there is a config that can name the KV cache.

    Args:
        quantized: Whether the plan quantizes any weight.
        has_place: Whether the format's config can name it.
    """
    if kv_cache is not None and not quantized:
        findings.add(_ALONE, "kv_cache", f"is {kv_cache}")
    elif kv_cache is not None and not has_place:
        findings.add(_UNSAID, "kv_cache", f"is {kv_cache}")
