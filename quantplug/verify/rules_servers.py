"""Architectures that a server does not load in a format, though it reads both: found by running it (docs/readers.md).

SGLang 0.5.23 goes on where a checkpoint has tensors that it does not look for, and where it looks for some that are not
there: it then computes with memory that nobody has filled.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from quantplug.verify.checks import Check
from quantplug.verify.layouts import Fp8Layout, Layout, Nvfp4Layout
from quantplug.verify.modules import Inventory
from quantplug.verify.report import Finding, warning


class _Form(Enum):
    """A format in a spelling, as far as SGLang tells them apart here."""

    NVFP4 = auto()
    FP8_BLOCKS = auto()
    MXFP8 = auto()


@dataclass(frozen=True)
class _Unread:
    """What SGLang does not load of an architecture.

    Attributes:
        forms: In which these are.
        reason: What goes wrong, and a way out where there is one.
        part: What the names of the modules have in them with which it does; empty for any.
    """

    forms: frozenset[_Form]
    reason: str
    part: str = ""


_UNREAD: Mapping[str, _Unread] = {
    # `load_weights` of llama.py.
    "LlamaForCausalLM": _Unread(
        frozenset({_Form.FP8_BLOCKS}),
        "renames `weight_scale_inv` in Llama and loses it; `--dialect compressed-tensors` has another name",
    ),
    # mllama4.py, llama4.py.
    "Llama4ForConditionalGeneration": _Unread(
        frozenset({_Form.NVFP4}), "loads no packed experts in one tensor", "experts"
    ),
    "Llama4ForCausalLM": _Unread(
        frozenset({_Form.NVFP4, _Form.FP8_BLOCKS}), "loads quantized experts by vision-language names alone", "experts"
    ),
    # glm4v_moe.py, which asks for the vision model's linears by names of its own.
    "Glm4vMoeForConditionalGeneration": _Unread(
        frozenset({_Form.NVFP4, _Form.FP8_BLOCKS}), "builds the vision model quantized, whatever is excluded"
    ),
    # The loader of mamba.py.
    "NemotronHForCausalLM": _Unread(
        frozenset({_Form.NVFP4, _Form.FP8_BLOCKS}), "cuts Mamba's quantized `in_proj` amiss, or stops at it", "in_proj"
    ),
    # Some of its models rename them.
    "Qwen3MoeForCausalLM": _Unread(
        frozenset({_Form.MXFP8}), "looks for scales of MXFP8 as `weight_scale_inv` in Qwen3-MoE"
    ),
}


def sglang(inventory: Inventory) -> Iterator[Finding]:
    """Formats that SGLang does not load of this architecture; said once."""
    unread = None if inventory.known is None else _UNREAD.get(inventory.known.name)
    if unread is not None and any(
        unread.part in module.name and _form(inventory.scheme.method, module.layout) in unread.forms
        for module in inventory.quantized
    ):
        yield warning(Check.SGLANG, inventory.scheme.label, f"SGLang 0.5.23 {unread.reason}")


def _form(method: str, layout: Layout | None) -> _Form | None:
    if isinstance(layout, Nvfp4Layout) and method == "modelopt":
        return _Form.NVFP4
    if isinstance(layout, Fp8Layout) and method == "fp8":
        return _Form.FP8_BLOCKS
    return _Form.MXFP8 if isinstance(layout, Fp8Layout) and layout.exponents else None


RULES = (sglang,)
