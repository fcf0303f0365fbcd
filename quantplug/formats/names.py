"""The one table of formats by public name: what each name says of weights and of activations.

Python, the command line, the examples and the documents all use these names. How a format is spelled on disk is said
in `export/plan/dialects`, which settings of ModelOpt's quantizers mean it in `export/plan/quantizers/scheme.py`; both
are keyed by this table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

# Known by this module's name too: it is the table that they are the keys of.
from quantplug.choices import KVCacheFormat as KVCacheFormat
from quantplug.choices import QuantFormat as QuantFormat
from quantplug.choices import Scales
from quantplug.errors import ArgumentError, Offender, UnsupportedQuantizationError
from quantplug.findings import choice_named
from quantplug.formats.block_format import BlockFormat
from quantplug.formats.table import FP8, FP8_BLOCK, FP8_ROW, INT4, INT4_32, MXFP4, MXFP8, NVFP4
from quantplug.formats.weight_format import WeightFormat


class Activations(Enum):
    """How the inputs of quantized linears are read by a server."""

    PLAIN = "in 16 bits"
    STATIC = "quantized by a scale that was calibrated with data"
    DYNAMIC = "quantized by scales that the server makes of what it sees"


@dataclass(frozen=True)
class Scheme:
    """One row of the table: how a linear is quantized. A name may have several, which differ in their groups alone.

    Attributes:
        format: Its public name.
        weight: How the weight becomes bytes.
        activations: How the input is read.
        loads_experts: Whether servers load routed experts so.
        of_gpt_oss: Whether servers load it as GPT-OSS has it, and no otherwise: experts in one tensor, and these alone.
    """

    format: QuantFormat
    weight: BlockFormat
    activations: Activations
    loads_experts: bool = True
    of_gpt_oss: bool = False

    @property
    def weight_bits(self) -> int:
        """Bits of one code of the weight, without its scales."""
        return self.weight.encoding.code.bits

    @property
    def group_size(self) -> int | None:
        """How many consecutive input features share a scale; None where that is no small part of a row."""
        block = self.weight.encoding.block
        return block.columns if block.rows == 1 else None

    @property
    def label(self) -> str:
        """Its name for messages, with the size of groups where that is a user's choice."""
        one_of_several = sum(row.format is self.format for row in _ROWS) > 1
        return f"{self.format} in groups of {self.group_size}" if one_of_several else str(self.format)

    @property
    def weight_words(self) -> str:
        """What the weight is stored as, for people."""
        encoding = self.weight.encoding
        block = encoding.block
        match (block.rows, block.columns):
            case (None, None):
                of = "the tensor"
            case (1, None):
                of = "a row"
            case (1, columns):
                of = f"{columns} input features"
            case (rows, columns):
                of = f"{rows}x{columns} weights"
        above = ", below one of the tensor" if encoding.levels == 2 else ""
        return f"{encoding.code.name.upper()}, {encoding.scale.name.upper()} scale for {of}{above}"

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight on disk, its share of scales too, of a large matrix."""
        side = 4096
        return sum(spec.nbytes for spec in self.weight.outputs((side, side))) * 8 / side**2

    @property
    def has_input_scale(self) -> bool:
        """Whether an `input_scale` is written, which takes calibration with data."""
        return self.activations is Activations.STATIC


# NVFP4 activations get their block scales from the server at run time; what is calibrated is the FP32 scale above them.
# No two rows have the same weights and the same answer to `has_input_scale`, which the look-ups below rely on.
_ROWS = (
    Scheme(QuantFormat.W4A16_NVFP4, NVFP4, Activations.PLAIN),
    Scheme(QuantFormat.NVFP4, NVFP4, Activations.STATIC),
    Scheme(QuantFormat.FP8, FP8, Activations.STATIC),
    # vLLM 0.32 has no method for FP8 experts without quantized activations and stops; transformers refuses them too.
    Scheme(QuantFormat.W8A16_FP8, FP8, Activations.PLAIN, loads_experts=False),
    Scheme(QuantFormat.FP8_BLOCKWISE, FP8_BLOCK, Activations.DYNAMIC),
    Scheme(QuantFormat.FP8_DYNAMIC, FP8_ROW, Activations.DYNAMIC),
    # llm-compressor's W4A16 has groups of 128; the smaller ones go with weights that these do not divide.
    Scheme(QuantFormat.INT4, INT4, Activations.PLAIN),
    Scheme(QuantFormat.INT4, INT4_32, Activations.PLAIN),
    # vLLM loads experts by `ModelOptMxFp8FusedMoE` (modelopt.py).
    Scheme(QuantFormat.MXFP8, MXFP8, Activations.DYNAMIC),
    # transformers' `Mxfp4GptOssExperts`, vLLM's `Mxfp4MoEMethod` with the loader of its GPT-OSS; kernels that quantize
    # inputs too do so by themselves.
    Scheme(QuantFormat.MXFP4, MXFP4, Activations.PLAIN, of_gpt_oss=True),
)
SCHEMES: Mapping[QuantFormat, Scheme] = {name: next(row for row in _ROWS if row.format is name) for name in QuantFormat}
"""The row of each name where no size of groups is asked for."""


@dataclass(frozen=True)
class CacheScheme:
    """How keys and values are quantized.

    Attributes:
        values: How they become codes.
        least_scale: The smallest scale that is written.
    """

    values: BlockFormat
    least_scale: float = 0.0


# ModelOpt's exporter of Megatron models does not let scales of FP8 go below 1.0: a float type gains nothing from a
# smaller one but a few subnormals, and saturates at the first key that is larger than those of calibration
# (`get_kv_cache_scaling_factor` of its export/quant_utils.py). Those of NVFP4 are as they are.
KV_CACHES: Mapping[KVCacheFormat, CacheScheme] = {
    KVCacheFormat.FP8_CAST: CacheScheme(FP8, least_scale=1.0),
    KVCacheFormat.FP8: CacheScheme(FP8, least_scale=1.0),
    KVCacheFormat.NVFP4_CAST: CacheScheme(NVFP4),
    KVCacheFormat.NVFP4: CacheScheme(NVFP4),
}


def all_schemes() -> tuple[Scheme, ...]:
    """Every row of the table, those with smaller groups too."""
    return _ROWS


def scheme_of(weight: WeightFormat, *, has_input_scale: bool) -> Scheme | None:
    """The row of a weight's format, with a calibrated scale of the input or without; None if no name stands for it."""
    # By equality: formats are frozen data, and one that was built elsewhere is as good as the table's own.
    return next((row for row in _ROWS if row.weight == weight and row.has_input_scale is has_input_scale), None)


def in_smaller_groups(scheme: Scheme) -> tuple[Scheme, ...]:
    """The rows of the same name whose groups are smaller, the largest of them first."""
    size = scheme.group_size or 0
    smaller = (row for row in _ROWS if row.format is scheme.format and (row.group_size or size) < size)
    return tuple(sorted(smaller, key=lambda row: row.group_size or 0, reverse=True))


def without_input_scale(scheme: Scheme) -> Scheme:
    """The row of the same weights whose activations need no data: the row itself where they need none anyway."""
    return next(row for row in _ROWS if row.weight == scheme.weight and not row.has_input_scale)


def scheme_named(name: str, argument: str, group_size: int | None = None) -> Scheme:
    """The row of a name.

    Args:
        argument: What the name was given as, for the message.
        group_size: How many input features are to share a scale; None for what the format has where nobody asks.

    Raises:
        ArgumentError: No format has this name, or it has no groups of this size.
    """
    scheme = SCHEMES[choice_named(QuantFormat, name, argument, "There is no such format.")]
    return scheme if group_size is None else in_groups((scheme,), group_size)[0]


def in_groups(schemes: Sequence[Scheme], group_size: int) -> tuple[Scheme, ...]:
    """The rows of the same names with groups of a size: of each that leaves the choice, while others stay.

    Where none of them leaves it, the size must be that of one of them.

    Raises:
        ArgumentError: A format that leaves the choice has no groups of this size, or none of any format has it.
    """
    rows = {scheme.format: {row.group_size: row for row in _ROWS if row.format is scheme.format} for scheme in schemes}
    choosing = {name: sizes for name, sizes in rows.items() if len(sizes) > 1}
    without = {name: sizes for name, sizes in (choosing or rows).items() if group_size not in sizes}
    if without and (choosing or without == rows):
        known = " or ".join(str(size) for sizes in without.values() for size in sizes if size is not None)
        names = " and ".join(without)
        raise ArgumentError(
            "The format has no groups of this size.",
            [Offender("group_size", f"is {group_size}, with {names}")],
            f"Use {known}, or leave it out." if known else f"Leave it out: {names} has no groups.",
        )
    return tuple(choosing[scheme.format][group_size] if scheme.format in choosing else scheme for scheme in schemes)


def scales_named(name: str, argument: str, scheme: Scheme | None) -> Scales:
    """How the scales of blocks are found, by a name.

    Args:
        argument: What the name was given as, for the message.
        scheme: How weights are quantized; None where that is not asked for, and nothing can be searched.

    Raises:
        ArgumentError: There is no such search, or the format has no scales to search for.
    """
    found = choice_named(Scales, name, argument, "There is no such way to find the scales of blocks.")
    if found is not Scales.MAX and (scheme is None or not scheme.weight.encoding.can_search):
        able = ", ".join(row.format for row in SCHEMES.values() if row.weight.encoding.can_search)
        reason = "without a format" if scheme is None else f"with {scheme.format}"
        raise ArgumentError(
            "The scales of this format are not searched for.",
            [Offender(argument, f"is {found}, {reason}")],
            f"Leave it out, or choose a format whose blocks have scales of few bits: {able}.",
        )
    return found


def kv_cache_named(name: str, argument: str) -> KVCacheFormat:
    """The format of a KV cache of a name.

    Args:
        argument: What the name was given as, for the message.

    Raises:
        ArgumentError: No format has this name.
    """
    return choice_named(KVCacheFormat, name, argument, "There is no such format of a KV cache.")


def kv_cache_without_data(name: str, argument: str) -> KVCacheFormat:
    """The format of a KV cache of a name where nothing is calibrated with data.

    Raises:
        ArgumentError: No format has this name.
        UnsupportedQuantizationError: The format has scales that only data can give.
    """
    kv_cache = kv_cache_named(name, argument)
    if kv_cache.needs_data:
        raise UnsupportedQuantizationError(
            "A KV cache has scales that are calibrated with data, and there is none here.",
            [Offender(argument, f"is {str(name)!r}")],
            f"Use {kv_cache.cast}: the same type, with a scale of 1.0. For {name} itself calibrate a model "
            "with data, and export that.",
        )
    return kv_cache


def scheme_without_data(name: str, argument: str, group_size: int | None = None) -> Scheme:
    """The row of a name where nothing is calibrated with data.

    Raises:
        ArgumentError: No format has this name, or it has no groups of this size.
        UnsupportedQuantizationError: The format has scales of inputs, which only data can give.
    """
    # Made up input scales would load everywhere and saturate activations: a way without data has to be asked for.
    scheme = scheme_named(name, argument, group_size)
    if scheme.has_input_scale:
        raise UnsupportedQuantizationError(
            "Activations are quantized by scales that are calibrated with data, and there is none here.",
            [Offender(argument, f"is {str(name)!r}, which quantizes activations")],
            f"Use {without_input_scale(scheme).format}: the same weights, with activations in 16 bits. For {name} "
            "itself calibrate a model with data, and export that; or give one scale for all inputs, unseen "
            "(input_scale=1.0, --input-scale 1).",
        )
    return scheme
