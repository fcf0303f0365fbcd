"""Architectures that a server does not load in a format, though it reads both: found by running it (docs/readers.md).

SGLang 0.5.23 goes on where a checkpoint has tensors that it does not look for, and where it looks for some that are not
there: it then computes with memory that nobody has filled.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from quantplug.choices import DialectName, QuantFormat
from quantplug.verify.checks import Check
from quantplug.verify.inventory.modules import Inventory
from quantplug.verify.inventory.spellings import dialect_of, format_of
from quantplug.verify.report import Finding, warning

_Spelled = tuple[DialectName, QuantFormat]

_NVFP4: frozenset[_Spelled] = frozenset(
    (DialectName.MODELOPT, name) for name in (QuantFormat.NVFP4, QuantFormat.W4A16_NVFP4)
)
_FP8_BLOCKS: frozenset[_Spelled] = frozenset({(DialectName.DEEPSEEK, QuantFormat.FP8_BLOCKWISE)})
_MXFP8: frozenset[_Spelled] = frozenset({(DialectName.MODELOPT, QuantFormat.MXFP8)})


@dataclass(frozen=True)
class _Unread:
    """What SGLang does not load of an architecture.

    Attributes:
        forms: The formats, each in the spelling of which this is so.
        reason: What goes wrong, and a way out where there is one.
        part: What the names of the modules have in them with which it does; empty for any.
    """

    forms: frozenset[_Spelled]
    reason: str
    part: str = ""


_UNREAD: Mapping[str, _Unread] = {
    # `load_weights` of llama.py.
    "LlamaForCausalLM": _Unread(
        _FP8_BLOCKS,
        "renames `weight_scale_inv` in Llama and loses it; `--dialect compressed-tensors` has another name",
    ),
    # mllama4.py, llama4.py.
    "Llama4ForConditionalGeneration": _Unread(_NVFP4, "loads no packed experts in one tensor", "experts"),
    "Llama4ForCausalLM": _Unread(
        _NVFP4 | _FP8_BLOCKS, "loads quantized experts by vision-language names alone", "experts"
    ),
    # glm4v_moe.py, which asks for the vision model's linears by names of its own.
    "Glm4vMoeForConditionalGeneration": _Unread(
        _NVFP4 | _FP8_BLOCKS, "builds the vision model quantized, whatever is excluded"
    ),
    # The loader of mamba.py.
    "NemotronHForCausalLM": _Unread(
        _NVFP4 | _FP8_BLOCKS, "cuts Mamba's quantized `in_proj` amiss, or stops at it", "in_proj"
    ),
    # Some of its models rename them.
    "Qwen3MoeForCausalLM": _Unread(_MXFP8, "looks for scales of MXFP8 as `weight_scale_inv` in Qwen3-MoE"),
}


def sglang(inventory: Inventory) -> Iterator[Finding]:
    """Formats that SGLang does not load of this architecture; said once."""
    unread = None if inventory.known is None else _UNREAD.get(inventory.known.name)
    method = inventory.scheme.method
    if unread is not None and any(
        unread.part in module.name and (dialect_of(method), format_of(method, module.layout)) in unread.forms
        for module in inventory.quantized
    ):
        yield warning(Check.SGLANG, inventory.scheme.label, f"SGLang 0.5.23 {unread.reason}")


RULES = (sglang,)
