"""The sums over some rows of one quantized weight against its original, by compiled loops or by PyTorch."""

from dataclasses import dataclass
from functools import reduce
from types import ModuleType
from typing import Any

import torch

from quantplug.verify.inventory.layouts import Int4Layout, Layout, Mxfp4Layout, Nvfp4Layout
from quantplug.verify.numbers import bounds, damage, decode, gains, rounding, sum_columns
from quantplug.verify.numbers.anew import Anew, AnewSums, rounded_both_ways
from quantplug.verify.numbers.bounds import ErrorSum, RowSums
from quantplug.verify.numbers.damage import AgainstRounding
from quantplug.verify.numbers.gains import GainBound
from quantplug.verify.source.input_moments import InputMoments
from quantplug.verify.source.matrices import Matrix
from quantplug.verify.source.originals import Original

_WORTH_COMPILING = 2**28  # bytes of a source; PyTorch is through with fewer before a loop is compiled


@dataclass(frozen=True)
class Rows:
    """Some rows of a quantized weight.

    Attributes:
        codes: U8 [rows, columns] of E4M3, or [rows, columns / 2] of pairs of E2M1.
        block_scales: U8 of E4M3 [rows, columns / 16]; None for FP8.
        scales: FP32; of NVFP4 the multiplier `weight_scale_2`, of FP8 one a block of the whole weight.
        block: Rows and columns that share one of the FP8 scales.
        first: Row of the weight at which these begin.
    """

    codes: torch.Tensor
    block_scales: torch.Tensor | None
    scales: torch.Tensor
    block: tuple[int, int]
    first: int

    @property
    def has_even_blocks(self) -> bool:
        """No 16 columns, counted from the first, have two FP8 scales: what the compiled loops take."""
        return self.block_scales is not None or self.block[1] % decode.NVFP4_BLOCK == 0

    @property
    def spread(self) -> torch.Tensor:
        """FP8 scales [rows, columns]."""
        rows, columns = self.codes.shape
        return decode.spread_blocks(self.scales, self.first, rows, columns, self.block)

    def decoded(self) -> torch.Tensor:
        """FP32 values [rows, columns]."""
        if self.block_scales is None:
            return decode.decode_e4m3(self.codes) * self.spread
        return decode.decode_nvfp4(self.codes, self.block_scales, self.scales)

    def in_blocks(self, values: torch.Tensor) -> torch.Tensor:
        """[rows, columns] to [rows, blocks, columns of one]."""
        return bounds.in_blocks(values)

    def holds(self, values: torch.Tensor) -> torch.Tensor:
        """BOOL [rows, columns]: which values are not beyond the largest that their scales let codes stand for."""
        if self.block_scales is None:
            return values.abs() <= rounding.E4M3_LARGEST * self.spread
        largest = rounding.E2M1_LARGEST * decode.decode_e4m3(self.block_scales) * self.scales.reshape(())
        return (self.in_blocks(values).abs() <= largest.unsqueeze(-1)).flatten(1)

    def anew(self, original: torch.Tensor) -> Anew:
        """The FP32 original, to be rounded anew; FP8 has no scales but those that are stored."""
        values = self.in_blocks(original)
        if self.block_scales is None:
            return Anew(values, self.by_stored(values), self.by_stored)
        plain = rounding.plain_nvfp4_scales(_amaxes(values), self.scales.reshape(()))
        return Anew(values, rounding.e2m1(values, plain), self.by_stored)

    def by_stored(self, blocks: torch.Tensor) -> torch.Tensor:
        """FP32 blocks rounded to nearest by the scales that are stored."""
        if self.block_scales is None:
            return rounding.e4m3(blocks, self.in_blocks(self.spread))
        scales = decode.decode_e4m3(self.block_scales).unsqueeze(-1) * self.scales.reshape(())
        return rounding.e2m1(blocks, scales)

    def margin(self, original: torch.Tensor) -> torch.Tensor:
        """As `AgainstRounding.of` takes it."""
        if self.block_scales is None:
            return self.in_blocks(bounds.fp8_value_bound(original, self.spread))
        return damage.MARGIN * _amaxes(self.in_blocks(original))


@dataclass(frozen=True)
class Int4Rows:
    """Some rows of an INT4 weight.

    Attributes:
        codes: U8 [rows, columns / 2] of pairs.
        scales: FP32 [rows, groups].
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return 2 * self.codes.shape[1] // self.scales.shape[1]

    def decoded(self) -> torch.Tensor:
        """FP32 values [rows, columns]."""
        return decode.decode_int4(self.codes, self.scales)

    def in_blocks(self, values: torch.Tensor) -> torch.Tensor:
        """[rows, columns] to [rows, groups, columns of one]."""
        return bounds.in_blocks(values, self.group)

    def holds(self, values: torch.Tensor) -> torch.Tensor:
        """As of `Rows`."""
        return (self.in_blocks(values).abs() <= rounding.INT4_LARGEST * self.scales.unsqueeze(-1)).flatten(1)

    def anew(self, original: torch.Tensor) -> Anew:
        """As of `Rows`."""
        values = self.in_blocks(original)
        plain = rounding.plain_int4_scales(_amaxes(values))
        return Anew(values, rounding.int4(values, plain), self.by_stored)

    def by_stored(self, blocks: torch.Tensor) -> torch.Tensor:
        """As of `Rows`."""
        return rounding.int4(blocks, self.scales.unsqueeze(-1))

    def margin(self, original: torch.Tensor) -> torch.Tensor:
        """As of `Rows`."""
        return damage.MARGIN * _amaxes(self.in_blocks(original))


@dataclass(frozen=True)
class Mxfp4Rows:
    """Some rows of an MXFP4 weight.

    Attributes:
        blocks: U8 [rows, blocks, 16] of pairs.
        exponents: U8 [rows, blocks].
    """

    blocks: torch.Tensor
    exponents: torch.Tensor

    def decoded(self) -> torch.Tensor:
        """FP32 values [rows, columns]."""
        return decode.decode_mxfp4(self.blocks, self.exponents)

    def in_blocks(self, values: torch.Tensor) -> torch.Tensor:
        """[rows, columns] to [rows, blocks, columns of one]."""
        return bounds.in_blocks(values, decode.MXFP4_BLOCK)

    def holds(self, values: torch.Tensor) -> torch.Tensor:
        """As of `Rows`."""
        largest = rounding.E2M1_LARGEST * decode.decode_e8m0(self.exponents)
        return (self.in_blocks(values).abs() <= largest.unsqueeze(-1)).flatten(1)

    def anew(self, original: torch.Tensor) -> Anew:
        """As of `Rows`."""
        values = self.in_blocks(original)
        plain = rounding.plain_mxfp4_scales(_amaxes(values))
        return Anew(values, rounding.e2m1(values, plain), self.by_stored)

    def by_stored(self, blocks: torch.Tensor) -> torch.Tensor:
        """As of `Rows`."""
        return rounding.e2m1(blocks, decode.decode_e8m0(self.exponents).unsqueeze(-1))

    def margin(self, original: torch.Tensor) -> torch.Tensor:
        """As of `Rows`."""
        return damage.MARGIN * _amaxes(self.in_blocks(original))


AnyRows = Rows | Int4Rows | Mxfp4Rows


def _amaxes(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.abs().amax(dim=-1, keepdim=True)


def read_rows(weight: Matrix, layout: Layout, first: int, last: int) -> AnyRows:
    # As bytes: E4M3 comes as torch's float8, on which tables and loops cannot work.
    codes = weight.rows(layout.codes, first, last).view(torch.uint8)
    if isinstance(layout, Mxfp4Layout):
        return Mxfp4Rows(codes, weight.rows(layout.scale, first, last))
    if isinstance(layout, Int4Layout):
        return Int4Rows(codes, weight.rows("weight_scale", first, last).float())
    if isinstance(layout, Nvfp4Layout):
        stored = weight.scales(layout.tensor_scale)
        # compressed-tensors stores the divisor 2688 / amax, ModelOpt the multiplier amax / 2688.
        scale = stored.reciprocal() if layout.reciprocal else stored
        return Rows(codes, weight.rows("weight_scale", first, last).view(torch.uint8), scale, (1, 1), first)
    stored = weight.scales(layout.scale)
    scales = decode.decode_e8m0(stored) if layout.exponents else stored.float()
    # One scale for all rows or columns is a block that no weight is larger than: one way of spreading serves all
    # layouts.
    everything = 2**40  # more than any side of a weight
    if layout.block is None:
        return Rows(codes, None, scales.reshape(1, 1), (everything, everything), first)
    if layout.per_row:
        return Rows(codes, None, scales.reshape(-1, 1), (1, everything), first)
    return Rows(codes, None, scales, layout.block, first)


@dataclass(frozen=True)
class Meter:
    """Measures weights.

    Attributes:
        loops: The compiled ones; None for PyTorch, with the same results.
        moments: Of the weights' inputs; None where they are not given.
    """

    loops: ModuleType | None
    moments: InputMoments | None = None

    def measure(self, original: Original, weight: Matrix, layout: Layout, rows: int, columns: int) -> ErrorSum:
        """All sums of a weight [rows, columns]; reads some rows at a time."""
        gain, row_gain = gains_of(layout)
        total, step = ErrorSum(feedback=feedback_of(layout)), original.step(columns)
        doubtful: list[int] = []  # Rows with values beyond, or odd blocks.
        for first in range(0, rows, step):
            last = min(first + step, rows)
            values, packed = original.rows(weight.expert, first, last), read_rows(weight, layout, first, last)
            of_rows = self.sums(packed, values)
            total.add(of_rows)
            total.off_rows += _off_rows(of_rows, packed, values, row_gain)
            doubtful += (first + (of_rows.beyond + of_rows.odd).nonzero().flatten()).tolist()
        # What is far from others of its format may still be what rounding gives of few, equal values. The weight is
        # read again to tell, which happens to hardly any.
        sums = total.sums
        if gain.suspicious(sums) or gains.misplaced(sums):
            anew = _rounded(original, weight, layout, rows, columns)
            total.off = bool(gain.off(sums, anew.plain, anew.stored))
            total.misplaced = bool(gains.misplaced(sums, anew.stored))
        if doubtful:
            total.damage = _damage(original, weight, layout, rows, columns, doubtful)
        return total

    def sums(self, packed: AnyRows, original: torch.Tensor) -> RowSums:
        """Of rows of the original in any floating-point type."""
        if isinstance(packed, Mxfp4Rows):
            return bounds.mxfp4_sums(packed.decoded(), original.float())
        if isinstance(packed, Int4Rows):
            if self.loops is not None:
                return _compiled_int4(self.loops, packed, original)
            return bounds.int4_sums(packed.decoded(), original.float(), packed.group)
        # The loops take one scale for 16 columns; blocks of another width are left to PyTorch.
        if self.loops is not None and packed.has_even_blocks:
            return _compiled_sums(self.loops, packed, original)
        values = original.float()
        if packed.block_scales is None:
            return bounds.fp8_sums(packed.decoded(), values, packed.spread)
        return bounds.nvfp4_sums(packed.decoded(), values, packed.scales)


def feedback_of(layout: Layout) -> float:
    """Times its bound that a weight or a row may be off by."""
    return bounds.MXFP4_FEEDBACK if isinstance(layout, Mxfp4Layout) else bounds.FEEDBACK


def gains_of(layout: Layout) -> tuple[GainBound, GainBound]:
    """Of a weight, and of one of its rows."""
    if isinstance(layout, Mxfp4Layout):
        return bounds.MXFP4_GAINS
    if isinstance(layout, Int4Layout):
        return bounds.INT4_GAINS
    if isinstance(layout, Nvfp4Layout):
        return bounds.NVFP4_GAINS
    return bounds.FP8_GAINS


def meter_for(source_bytes: int, moments: InputMoments | None) -> Meter:
    """Compiled loops where there is enough to do, and numba is there."""
    return Meter(compiled_loops() if source_bytes >= _WORTH_COMPILING else None, moments)


def compiled_loops() -> ModuleType | None:
    """The loops; None without numba or NumPy."""
    try:
        from quantplug.verify.numbers import machine_code  # The checker itself needs torch and safetensors alone.
    except ImportError:
        return None
    return machine_code


def _compiled_sums(loops: ModuleType, packed: Rows, original: torch.Tensor) -> RowSums:
    sums, values = _empty_sums(original), _values(original)
    codes = packed.codes.contiguous().numpy()
    if packed.block_scales is None:
        loops.fp8(codes, packed.scales.contiguous().numpy(), packed.first, *packed.block, values, sums.numpy())
    else:
        scale = float(packed.scales.reshape(()))
        loops.nvfp4(codes, packed.block_scales.contiguous().numpy(), scale, values, sums.numpy())
    return _row_sums(sums, original)


def _compiled_int4(loops: ModuleType, packed: Int4Rows, original: torch.Tensor) -> RowSums:
    sums = _empty_sums(original)
    codes, scales = packed.codes.contiguous().numpy(), packed.scales.contiguous().numpy()
    loops.int4(codes, scales, _values(original), sums.numpy())
    return _row_sums(sums, original)


def _empty_sums(original: torch.Tensor) -> torch.Tensor:
    return torch.empty(original.shape[0], sum_columns.COLUMNS, dtype=torch.float64)


def _values(original: torch.Tensor) -> Any:
    """Rows of the original as the loops take them."""
    # NumPy has no BF16. The bits go over as they are, without a copy twice the size.
    bits = original.view(torch.uint16) if original.dtype == torch.bfloat16 else original.float()
    return bits.contiguous().numpy()


def _row_sums(sums: torch.Tensor, original: torch.Tensor) -> RowSums:
    return RowSums(
        error=sums[:, sum_columns.ERROR],
        norm=sums[:, sum_columns.NORM],
        bound=sums[:, sum_columns.BOUND],
        dot=sums[:, sum_columns.DOT],
        quartic=sums[:, sum_columns.QUARTIC],
        along=sums[:, sum_columns.ALONG],
        largest_error=sums[:, sum_columns.LARGEST_ERROR],
        amax=sums[:, sum_columns.AMAX],
        beyond=sums[:, sum_columns.BEYOND],
        lost=sums[:, sum_columns.LOST],
        odd=sums[:, sum_columns.ODD],
        values=original.shape[1],
    )


def _off_rows(sums: RowSums, packed: AnyRows, original: torch.Tensor, gain: GainBound) -> int:
    """How many rows have a gain that chance does not give, nor rounding of these very values."""
    # Only chunks with rows that look wrong are worth rounding anew, and nearly none has one.
    if not gain.suspicious(sums).any():
        return 0
    anew = packed.anew(original.float()).sums()
    return int(gain.off(sums, anew.plain, anew.stored).sum())


def _rounded(original: Original, weight: Matrix, layout: Layout, rows: int, columns: int) -> AnewSums:
    """A weight rounded anew, chunk by chunk."""
    step = original.step(columns)
    chunks = (
        read_rows(weight, layout, first, last).anew(values.float()).sums().over_rows()
        for first in range(0, rows, step)
        for last in (min(first + step, rows),)
        for values in (original.rows(weight.expert, first, last),)
    )
    return reduce(AnewSums.plus, chunks)


def _damage(
    original: Original, weight: Matrix, layout: Layout, rows: int, columns: int, doubtful: list[int]
) -> damage.Damage | None:
    """Where a weight is damaged, some of whose rows have values beyond, or odd blocks."""

    def against_rounding(first: int, last: int) -> AgainstRounding:
        values, packed = original.rows(weight.expert, first, last).float(), read_rows(weight, layout, first, last)
        blocks = packed.in_blocks(values)
        smaller, larger = rounded_both_ways(blocks, packed.by_stored, damage.TIES)
        decoded, margin = packed.in_blocks(packed.decoded()), packed.margin(values)
        return AgainstRounding.of(blocks, decoded, smaller, larger, margin, columns, first)

    step = original.step(columns)
    sample = (against_rounding(*stretch) for stretch in damage.sample_of(rows, step))
    return damage.found(sample, (against_rounding(*stretch) for stretch in damage.stretches_of(doubtful, step)))
