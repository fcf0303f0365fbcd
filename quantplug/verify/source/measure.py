"""The sums over some rows of one quantized weight against its original, by compiled loops or by PyTorch."""

from dataclasses import dataclass
from functools import reduce
from types import ModuleType
from typing import Any

import torch

from quantplug.verify.inventory.layouts import Int4Layout, Layout, Mxfp4Layout, Nvfp4Layout
from quantplug.verify.numbers import bounds, damage, gains, sum_columns
from quantplug.verify.numbers.anew import AnewSums, rounded_both_ways
from quantplug.verify.numbers.bounds import ErrorSum, RowSums
from quantplug.verify.numbers.damage import AgainstRounding
from quantplug.verify.numbers.gains import GainBound
from quantplug.verify.source.input_moments import InputMoments
from quantplug.verify.source.matrices import Matrix
from quantplug.verify.source.originals import Original
from quantplug.verify.source.packed_rows import PackedRows, read_rows

_WORTH_COMPILING = 2**28  # bytes of a source; PyTorch is through with fewer before a loop is compiled


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

    def sums(self, packed: PackedRows, original: torch.Tensor) -> RowSums:
        """Of rows of the original in any floating-point type."""
        loop = None if self.loops is None else packed.loop(self.loops)
        if loop is None:
            return packed.sums(original.float())
        sums = torch.empty(original.shape[0], sum_columns.COLUMNS, dtype=torch.float64)
        loop(_values(original), sums.numpy())
        return _row_sums(sums, original)


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


def _off_rows(sums: RowSums, packed: PackedRows, original: torch.Tensor, gain: GainBound) -> int:
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
