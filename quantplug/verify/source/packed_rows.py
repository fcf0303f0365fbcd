"""Some rows of a quantized weight, as they lie on disk, one class a format: decoded, summed and rounded anew."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch

from quantplug.verify.inventory.layouts import Int4Layout, Layout, Mxfp4Layout, Nvfp4Layout
from quantplug.verify.numbers import bounds, damage, decode, rounding
from quantplug.verify.numbers.anew import Anew
from quantplug.verify.numbers.bounds import RowSums
from quantplug.verify.source.matrices import Matrix

Loop = Callable[[Any, Any], None]
"""Fills sums, FP64 [rows, `sum_columns.COLUMNS`], of the rows of an original: both as arrays of NumPy."""


class PackedRows(ABC):
    """What is asked of rows in any format."""

    @abstractmethod
    def decoded(self) -> torch.Tensor:
        """FP32 values [rows, columns]."""

    @abstractmethod
    def in_blocks(self, values: torch.Tensor) -> torch.Tensor:
        """[rows, columns] to [rows, blocks, columns of one]."""

    @abstractmethod
    def holds(self, values: torch.Tensor) -> torch.Tensor:
        """BOOL [rows, columns]: which values are not beyond the largest that their scales let codes stand for."""

    @abstractmethod
    def anew(self, original: torch.Tensor) -> Anew:
        """The FP32 original, to be rounded anew."""

    @abstractmethod
    def by_stored(self, blocks: torch.Tensor) -> torch.Tensor:
        """FP32 blocks rounded to nearest by the scales that are stored."""

    @abstractmethod
    def sums(self, original: torch.Tensor) -> RowSums:
        """Against the FP32 original, by PyTorch."""

    def loop(self, loops: ModuleType) -> Loop | None:
        """That of the compiled ones which makes the same sums; None where there is none."""
        del loops
        return None

    def margin(self, original: torch.Tensor) -> torch.Tensor:
        """As `AgainstRounding.of` takes it."""
        return damage.MARGIN * _amaxes(self.in_blocks(original))


@dataclass(frozen=True)
class Nvfp4Rows(PackedRows):
    """Some rows of an NVFP4 weight.

    Attributes:
        codes: U8 [rows, columns / 2] of pairs of E2M1.
        block_scales: U8 of E4M3 [rows, columns / 16].
        tensor_scale: FP32, one value: the multiplier `weight_scale_2`.
    """

    codes: torch.Tensor
    block_scales: torch.Tensor
    tensor_scale: torch.Tensor

    def decoded(self) -> torch.Tensor:
        return decode.decode_nvfp4(self.codes, self.block_scales, self.tensor_scale)

    def in_blocks(self, values: torch.Tensor) -> torch.Tensor:
        return bounds.in_blocks(values)

    def holds(self, values: torch.Tensor) -> torch.Tensor:
        largest = rounding.E2M1_LARGEST * decode.decode_e4m3(self.block_scales) * self.tensor_scale.reshape(())
        return (self.in_blocks(values).abs() <= largest.unsqueeze(-1)).flatten(1)

    def anew(self, original: torch.Tensor) -> Anew:
        values = self.in_blocks(original)
        plain = rounding.plain_nvfp4_scales(_amaxes(values), self.tensor_scale.reshape(()))
        return Anew(values, rounding.e2m1(values, plain), self.by_stored)

    def by_stored(self, blocks: torch.Tensor) -> torch.Tensor:
        scales = decode.decode_e4m3(self.block_scales).unsqueeze(-1) * self.tensor_scale.reshape(())
        return rounding.e2m1(blocks, scales)

    def sums(self, original: torch.Tensor) -> RowSums:
        return bounds.nvfp4_sums(self.decoded(), original, self.tensor_scale)

    def loop(self, loops: ModuleType) -> Loop | None:
        scale = float(self.tensor_scale.reshape(()))
        return partial(loops.nvfp4, _array(self.codes), _array(self.block_scales), scale)


@dataclass(frozen=True)
class Fp8Rows(PackedRows):
    """Some rows of an FP8 weight.

    Attributes:
        codes: U8 [rows, columns] of E4M3.
        scales: FP32, one a block of the whole weight.
        block: Rows and columns that share one of the scales.
        first: Row of the weight at which these begin.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int]
    first: int

    @property
    def spread(self) -> torch.Tensor:
        """Scales [rows, columns]."""
        rows, columns = self.codes.shape
        return decode.spread_blocks(self.scales, self.first, rows, columns, self.block)

    def decoded(self) -> torch.Tensor:
        return decode.decode_e4m3(self.codes) * self.spread

    def in_blocks(self, values: torch.Tensor) -> torch.Tensor:
        return bounds.in_blocks(values)

    def holds(self, values: torch.Tensor) -> torch.Tensor:
        return values.abs() <= rounding.E4M3_LARGEST * self.spread

    def anew(self, original: torch.Tensor) -> Anew:
        """There are no scales but those that are stored."""
        values = self.in_blocks(original)
        return Anew(values, self.by_stored(values), self.by_stored)

    def by_stored(self, blocks: torch.Tensor) -> torch.Tensor:
        return rounding.e4m3(blocks, self.in_blocks(self.spread))

    def sums(self, original: torch.Tensor) -> RowSums:
        return bounds.fp8_sums(self.decoded(), original, self.spread)

    def loop(self, loops: ModuleType) -> Loop | None:
        # It takes one scale for 16 columns, counted from the first; blocks of another width are left to PyTorch.
        if self.block[1] % decode.NVFP4_BLOCK:
            return None
        return partial(loops.fp8, _array(self.codes), _array(self.scales), self.first, *self.block)

    def margin(self, original: torch.Tensor) -> torch.Tensor:
        # What a float may be moved by is its own, not its block's.
        return self.in_blocks(bounds.fp8_value_bound(original, self.spread))


@dataclass(frozen=True)
class Int4Rows(PackedRows):
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
        return decode.decode_int4(self.codes, self.scales)

    def in_blocks(self, values: torch.Tensor) -> torch.Tensor:
        return bounds.in_blocks(values, self.group)

    def holds(self, values: torch.Tensor) -> torch.Tensor:
        return (self.in_blocks(values).abs() <= rounding.INT4_LARGEST * self.scales.unsqueeze(-1)).flatten(1)

    def anew(self, original: torch.Tensor) -> Anew:
        values = self.in_blocks(original)
        plain = rounding.plain_int4_scales(_amaxes(values))
        return Anew(values, rounding.int4(values, plain), self.by_stored)

    def by_stored(self, blocks: torch.Tensor) -> torch.Tensor:
        return rounding.int4(blocks, self.scales.unsqueeze(-1))

    def sums(self, original: torch.Tensor) -> RowSums:
        return bounds.int4_sums(self.decoded(), original, self.group)

    def loop(self, loops: ModuleType) -> Loop | None:
        return partial(loops.int4, _array(self.codes), _array(self.scales))


@dataclass(frozen=True)
class Mxfp4Rows(PackedRows):
    """Some rows of an MXFP4 weight.

    Attributes:
        blocks: U8 [rows, blocks, 16] of pairs.
        exponents: U8 [rows, blocks].
    """

    blocks: torch.Tensor
    exponents: torch.Tensor

    def decoded(self) -> torch.Tensor:
        return decode.decode_mxfp4(self.blocks, self.exponents)

    def in_blocks(self, values: torch.Tensor) -> torch.Tensor:
        return bounds.in_blocks(values, decode.MXFP4_BLOCK)

    def holds(self, values: torch.Tensor) -> torch.Tensor:
        largest = rounding.E2M1_LARGEST * decode.decode_e8m0(self.exponents)
        return (self.in_blocks(values).abs() <= largest.unsqueeze(-1)).flatten(1)

    def anew(self, original: torch.Tensor) -> Anew:
        values = self.in_blocks(original)
        plain = rounding.plain_mxfp4_scales(_amaxes(values))
        return Anew(values, rounding.e2m1(values, plain), self.by_stored)

    def by_stored(self, blocks: torch.Tensor) -> torch.Tensor:
        return rounding.e2m1(blocks, decode.decode_e8m0(self.exponents).unsqueeze(-1))

    def sums(self, original: torch.Tensor) -> RowSums:
        return bounds.mxfp4_sums(self.decoded(), original)


def _amaxes(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.abs().amax(dim=-1, keepdim=True)


def _array(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().numpy()


def read_rows(weight: Matrix, layout: Layout, first: int, last: int) -> PackedRows:
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
        return Nvfp4Rows(codes, weight.rows("weight_scale", first, last).view(torch.uint8), scale)
    stored = weight.scales(layout.scale)
    scales = decode.decode_e8m0(stored) if layout.exponents else stored.float()
    # One scale for all rows or columns is a block that no weight is larger than: one way of spreading serves all
    # layouts.
    everything = 2**40  # more than any side of a weight
    if layout.block is None:
        return Fp8Rows(codes, scales.reshape(1, 1), (everything, everything), first)
    if layout.per_row:
        return Fp8Rows(codes, scales.reshape(-1, 1), (1, everything), first)
    return Fp8Rows(codes, scales, layout.block, first)
