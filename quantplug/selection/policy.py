"""Which linears of a model are quantized in a format, which are not, and why: the one policy that every way asks.

What servers can read is data of a family's rows: their role, the fewest bits (`min_bits`), what they fuse. A user may
ask for less, by excluding modules (`exclude`), or for multi-token prediction, which is kept otherwise, as ModelOpt's
own configs keep it. Nothing here knows an architecture by name, a tensor's values or a rank.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from quantplug.choices import Preset
from quantplug.errors import UnsupportedQuantizationError
from quantplug.findings import Findings, Kind, choice_named
from quantplug.formats.names import Scheme
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.rows import Role, Scope, WeightMapping
from quantplug.mappings.table import Family

_NOTHING_CHOSEN = Kind(
    UnsupportedQuantizationError,
    "No linear of the model would be quantized.",
    "Choose another format or preset; a plain copy needs no tool.",
)


class Reason(Enum):
    """Why a weight of a matrix product is not quantized: for code to tell apart; `Kept.words` is for people."""

    ROLE = "what it is to the model"
    BITS = "too few bits for some server"
    FORMAT = "a format of experts alone"
    MTP = "multi-token prediction"
    HEAD = "the output layer"
    PRESET = "outside the preset"
    ACCURACY = "too few bits for its accuracy"
    EXCLUDED = "excluded by the user"


def in_preset(preset: Preset, row: WeightMapping) -> bool:
    """Whether weights of a row are quantized: routed experts; all of the MLPs; these and attention's o_proj."""
    if preset in (Preset.DEFAULT, Preset.ALL) or row.scope is Scope.EXPERT:
        return True
    (name, *_) = row.megatron
    # By Megatron's names, which are the same in every architecture: dense MLPs and shared experts are below `mlp`.
    in_mlp = ".mlp." in name and preset is not Preset.EXPERTS_ONLY
    return in_mlp or (preset is Preset.OMLP_ONLY and name.endswith(".self_attention.linear_proj.weight"))


def preset_named(name: str, argument: str) -> Preset:
    """The preset of a name.

    Args:
        argument: What the name was given as, for the message.

    Raises:
        ArgumentError: There is no such preset.
    """
    return choice_named(Preset, name, argument, "There is no such preset.")


@dataclass(frozen=True)
class Kept:
    """That a weight stays in high precision.

    Attributes:
        words: The reason in full, for tables and messages.
    """

    reason: Reason
    words: str


@dataclass(frozen=True)
class Policy:
    """What is asked for, as far as it concerns which rows of a table are quantized.

    Attributes:
        weight_bits: Bits of a code of the format.
        quantize_mtp: Whether layers of multi-token prediction are quantized too.
        quantize_lm_head: Whether the output layer is.
        loads_experts: Whether servers load routed experts in the format.
        preset: Which linears are quantized at all.
        of_gpt_oss: Whether the format is one of GPT-OSS's experts, and of nothing else.
    """

    weight_bits: int
    quantize_mtp: bool = False
    quantize_lm_head: bool = False
    loads_experts: bool = True
    preset: Preset = Preset.DEFAULT
    of_gpt_oss: bool = False

    @classmethod
    def of(
        cls,
        scheme: Scheme,
        quantize_mtp: bool = False,
        preset: Preset = Preset.DEFAULT,
        *,
        quantize_lm_head: bool = False,
    ) -> "Policy":
        """That of a format."""
        return cls(scheme.weight_bits, quantize_mtp, quantize_lm_head, scheme.loads_experts, preset, scheme.of_gpt_oss)

    def in_format(self, scheme: Scheme) -> "Policy":
        """The same of another format."""
        return Policy.of(scheme, self.quantize_mtp, self.preset, quantize_lm_head=self.quantize_lm_head)

    def why_kept(self, row: WeightMapping) -> Kept | None:
        """Why weights of a row stay in high precision; None where they are quantized."""
        # The order matters for the words: what no choice of the user's can change is told before what one can.
        if row.role is Role.OUTPUT_LAYER:
            return None if self.quantize_lm_head else Kept(Reason.HEAD, row.role.value)
        if row.role is not Role.LINEAR:
            return Kept(Reason.ROLE, row.role.value)
        if row.min_bits > self.weight_bits:
            return Kept(Reason.BITS, f"linear weight that not every server reads in {self.weight_bits} bits")
        if self.of_gpt_oss and row.scope is not Scope.EXPERT:
            return Kept(Reason.FORMAT, "linear weight of no expert, which servers read in 16 bits beside this format")
        if row.block.is_mtp and not self.quantize_mtp:
            return Kept(Reason.MTP, "linear weight of multi-token prediction, kept unless quantize_mtp asks for it")
        if not in_preset(self.preset, row):
            return Kept(Reason.PRESET, f"linear weight that {self.preset} leaves out")
        if row.default_min_bits > self.weight_bits and self.preset is not Preset.ALL:
            # These are few of a model's bytes, and much of what it loses.
            words = f"linear weight that loses much in {self.weight_bits} bits, kept unless the preset all asks for it"
            return Kept(Reason.ACCURACY, words)
        return None

    def why_part_kept(self, row: WeightMapping, part: int) -> Kept | None:
        """Why one of the tensors that a weight stands for (`row.hf[part]`) stays in high precision."""
        if row.role is Role.LINEAR and row.hf[part] in row.high_precision:
            return Kept(Reason.ROLE, Role.HIGH_PRECISION.value)
        return self.why_kept(row)

    def why_unserved(self, row: WeightMapping) -> str | None:
        """Why no server would load weights of a row that are quantized in the format; None where some do.

        Such weights are not kept in silence, as they may be nearly all of a model: whoever wants the rest quantized has
        to leave them out by name.
        """
        if not row.role.may_be_packed:
            return None
        if self.of_gpt_oss and row.scope is Scope.EXPERT:
            return None if row.served_in_mxfp4 else "expert, which servers load in this format of GPT-OSS alone"
        if row.unserved is None and row.scope is Scope.EXPERT and not self.loads_experts:
            return "expert, which no server loads in this format"
        return row.unserved


@dataclass(frozen=True)
class Decision:
    """What becomes of one weight of a matrix product.

    Attributes:
        kept: Why it stays in high precision; None where it is quantized.
    """

    row: WeightMapping
    kept: Kept | None


Decisions = Mapping[ParamKey, Decision]


def decide(keys: Iterable[ParamKey], family: Family, policy: Policy) -> Decisions:
    """The decision on every weight of a matrix product that the table knows; other parameters have none."""
    table = family.by_megatron()
    rows = {key: table[key.module] for key in keys if key.module in table}
    return {key: Decision(row, policy.why_kept(row)) for key, row in rows.items() if row.role.multiplies}


def refuse_nothing(decisions: Decisions) -> None:
    """Refuses a choice by which nothing is quantized, before anybody has left anything out.

    Raises:
        UnsupportedQuantizationError: Names what each kind of linear is kept for.
    """
    if quantized(decisions):
        return
    findings = Findings()
    kept = {it.row.megatron[0]: it.kept.words for it in decisions.values() if it.kept and it.row.role is Role.LINEAR}
    for module, words in kept.items():
        findings.add(_NOTHING_CHOSEN, module, words)
    findings.raise_if_any()


def quantized(decisions: Decisions) -> dict[ParamKey, WeightMapping]:
    """The weights that are quantized, with their rows."""
    return {key: decision.row for key, decision in decisions.items() if decision.kept is None}
