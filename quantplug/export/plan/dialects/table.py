"""The dialects that there are, what each can say, and which is taken."""

from collections.abc import Mapping

from quantplug.choices import DialectName as DialectName
from quantplug.errors import UnsupportedQuantizationError
from quantplug.export.plan.dialects.compressed_tensors import CompressedTensorsDialect
from quantplug.export.plan.dialects.deepseek import DeepSeekDialect
from quantplug.export.plan.dialects.dialect import Dialect
from quantplug.export.plan.dialects.gpt_oss import GptOssDialect
from quantplug.export.plan.dialects.modelopt import ModelOptDialect
from quantplug.export.plan.match import Mapped
from quantplug.export.plan.types import Schemes
from quantplug.findings import Findings, Kind, choice_named
from quantplug.formats.names import QuantFormat
from quantplug.mappings.rows import Role, Scope

# Of several that can say a format the first is taken where none is asked for.
DIALECTS: Mapping[DialectName, Dialect] = {
    dialect.name: dialect
    for dialect in (ModelOptDialect(), DeepSeekDialect(), CompressedTensorsDialect(), GptOssDialect())
}

_PLAIN = Kind(
    UnsupportedQuantizationError,
    "Nothing is quantized that a dialect could be for.",
    "Quantize weights, by a format or a model's quantizers; or leave the dialect out.",
)
_SOME_EXPERTS = Kind(
    UnsupportedQuantizationError,
    "Experts of some layers are quantized, and readers of this format take those of all layers for quantized.",
    "Quantize the experts of all layers, or of none.",
)
_UNSAID = "Nothing that servers read says these formats side by side."
_NOT_BY_IT = "The dialect that is asked for cannot say the formats."


def dialect_named(name: str | None, argument: str) -> DialectName | None:
    """The dialect of a name; None where none is asked for.

    Args:
        argument: What the name was given as, for the message.

    Raises:
        ArgumentError: No dialect has this name.
    """
    return None if name is None else choice_named(DialectName, name, argument, "There is no such dialect.")


def choose_dialect(mapped: Mapped, schemes: Schemes, asked: DialectName | None, findings: Findings) -> Dialect | None:
    """The dialect of a checkpoint: the one that is asked for, or the default of its formats; None for a plain one.

    What it cannot say goes into `findings`.
    """
    formats = frozenset(scheme.format for scheme in schemes.values())
    if not formats:
        if asked is not None and not findings.found:
            findings.add(_PLAIN, "dialect", f"is {asked}")
        return None
    several = len(set(schemes.values())) > 1  # One name may stand for several, with groups of other sizes.
    problems = {
        name: problem for name, dialect in DIALECTS.items() if (problem := _problem(dialect, formats, several=several))
    }
    able = [name for name in DIALECTS if name not in problems]
    if asked is not None and asked in problems:
        remedy = f"Use {' or '.join(able)}, or leave the dialect out." if able else _all_of(problems)
        kind = Kind(UnsupportedQuantizationError, _NOT_BY_IT, remedy)
        findings.add(kind, "dialect", f"is {asked}, which {problems[asked]}")
    elif not able:
        kind = Kind(UnsupportedQuantizationError, _UNSAID, _all_of(problems))
        for whole, _ in mapped:
            if whole.key in schemes:
                findings.add_weight(kind, whole, f"is {schemes[whole.key].label}")
    else:
        dialect = DIALECTS[asked or able[0]]
        if dialect.all_experts:
            _check_all_experts(mapped, schemes, findings)
        return dialect
    return None


def _check_all_experts(mapped: Mapped, schemes: Schemes, findings: Findings) -> None:
    for whole, row in mapped:
        if row.role is Role.LINEAR and row.scope is Scope.EXPERT and whole.key not in schemes:
            findings.add_weight(_SOME_EXPERTS, whole, "is not quantized, experts of other layers are")


def _problem(dialect: Dialect, formats: frozenset[QuantFormat], *, several: bool) -> str | None:
    """Why a dialect cannot say formats, in words that go on after `which`; None if it can."""
    unknown = sorted(formats - dialect.formats)
    if unknown:
        return f"has no name for {', '.join(unknown)}"
    return dialect.mix_problem(formats) if several else None


def _all_of(problems: Mapping[DialectName, str]) -> str:
    reasons = "; ".join(f"{name} {problem}" for name, problem in problems.items())
    return f"Quantize all linears in one format, or in several that one dialect has: {reasons}."
