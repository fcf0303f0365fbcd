"""The dialects that there are, what each can say, and which is taken."""

from collections.abc import Mapping
from enum import StrEnum

from quantplug.errors import UnsupportedQuantizationError
from quantplug.export.plan.dialects.compressed_tensors import CompressedTensorsDialect
from quantplug.export.plan.dialects.deepseek import DeepSeekDialect
from quantplug.export.plan.dialects.dialect import Dialect
from quantplug.export.plan.dialects.modelopt import ModelOptDialect
from quantplug.export.plan.match import Mapped
from quantplug.export.plan.types import Schemes
from quantplug.findings import Findings, Kind, choice_named
from quantplug.formats.names import QuantFormat


class DialectName(StrEnum):
    """The dialects by name."""

    MODELOPT = "modelopt"
    DEEPSEEK = "deepseek"
    COMPRESSED_TENSORS = "compressed-tensors"


# Of several that can say a format the first is taken where none is asked for.
DIALECTS: Mapping[DialectName, Dialect] = {
    DialectName.MODELOPT: ModelOptDialect(),
    DialectName.DEEPSEEK: DeepSeekDialect(),
    DialectName.COMPRESSED_TENSORS: CompressedTensorsDialect(),
}

_PLAIN = Kind(
    UnsupportedQuantizationError,
    "Nothing is quantized that a dialect could be for.",
    "Quantize weights, by a format or a model's quantizers; or leave the dialect out.",
)
_MIXED = Kind(
    UnsupportedQuantizationError,
    "The model mixes quantization schemes, which is not written yet.",
    "Quantize all linears by one config; disable the quantizers of those that should stay in high precision.",
)


def dialect_named(name: str | None, argument: str) -> DialectName | None:
    """The dialect of a name; None where none is asked for.

    Args:
        argument: What the name was given as, for the message.

    Raises:
        ArgumentError: No dialect has this name.
    """
    return None if name is None else choice_named(DialectName, name, argument, "There is no such dialect.")


def dialects_of(quant_format: QuantFormat) -> tuple[DialectName, ...]:
    """Names of the dialects that can say a format, its default first."""
    return tuple(name for name, dialect in DIALECTS.items() if quant_format in dialect.formats)


def choose_dialect(mapped: Mapped, schemes: Schemes, asked: DialectName | None, findings: Findings) -> Dialect | None:
    """The dialect of a checkpoint: the one that is asked for, or the default of its formats; None for a plain one.

    What it cannot say goes into `findings`.
    """
    # One name may stand for several, with groups of other sizes.
    formats = {scheme.format for scheme in schemes.values()}
    if len(set(schemes.values())) > 1:
        for whole, _ in mapped:
            if (scheme := schemes.get(whole.key)) is not None:
                groups = f" in groups of {scheme.group_size}" if scheme.group_size else ""
                findings.add_weight(_MIXED, whole, f"is {scheme.format}{groups}")
    if asked is not None and not formats and not findings.found:
        findings.add(_PLAIN, "dialect", f"is {asked}")
    if len(set(schemes.values())) != 1:
        return None
    (quant_format,) = formats
    names = dialects_of(quant_format)
    if asked is None or asked in names:
        return DIALECTS[asked or names[0]]
    kind = Kind(
        UnsupportedQuantizationError,
        "The format cannot be said in the dialect.",
        f"Use {' or '.join(names)}, or leave the dialect out.",
    )
    findings.add(kind, "dialect", f"is {asked}, which has no name for {quant_format}")
    return None
