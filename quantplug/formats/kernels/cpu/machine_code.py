"""The loops of `loops` and of `search.loops`, by name, so that numba is imported only where one has to be compiled."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from quantplug.compiled.arguments import Array
from quantplug.compiled.loop import Home
from quantplug.formats.kernels.cpu.tiles import SIDE

_FORMATS = Path(__file__).parents[2]
_BLOCKS = Home("quantplug.formats.kernels.cpu.loops.blocks", _FORMATS)
_FP8 = Home("quantplug.formats.kernels.cpu.loops.fp8", _FORMATS)
_INT4 = Home("quantplug.formats.kernels.cpu.loops.int4", _FORMATS)
_WHOLE = Home("quantplug.formats.kernels.cpu.loops.whole", _FORMATS)
_SEARCH = Home("quantplug.formats.search.loops", _FORMATS)
_BLOCKS.require()

PackBlocks = Callable[[Array, Array, int, Array, Array, Array, Array, int, int], None]
"""Arguments as of `loops.groups.of_groups`."""

unpack_nvfp4 = _BLOCKS.loop("unpack_nvfp4")
unpack_mxfp4 = _BLOCKS.loop("unpack_mxfp4")
unpack_mxfp8 = _BLOCKS.loop("unpack_mxfp8")
unpack_int4 = _INT4.loop("unpack_int4")
pack_fp8 = _FP8.loop("pack_fp8")
unpack_fp8 = _FP8.loop("unpack_fp8")
pack_fp8_row = _FP8.loop("pack_fp8_row")
unpack_fp8_row = _FP8.loop("unpack_fp8_row")
pack_fp8_block = _FP8.loop("pack_fp8_block")
unpack_fp8_block = _FP8.loop("unpack_fp8_block")

pack_nvfp4: PackBlocks = _BLOCKS.loop("pack_nvfp4")
pack_mxfp4: PackBlocks = _BLOCKS.loop("pack_mxfp4")
pack_mxfp8: PackBlocks = _BLOCKS.loop("pack_mxfp8")
pack_int4 = _INT4.loop("pack_int4")
pack_nvfp4_given: PackBlocks = _SEARCH.loop("pack_nvfp4_given")
pack_nvfp4_searched = _SEARCH.loop("pack_nvfp4")

_copy_transposed = _WHOLE.loop("copy_transposed")
_largest_magnitude = _WHOLE.loop("largest_magnitude")
_bit_sums = _WHOLE.loop("bit_sums")


def copy_transposed(source: Array, copy: Array) -> None:
    """Copies a piece [rows, columns] whose neighbours of a row lie apart to contiguous memory."""
    size = source.itemsize
    strides = [stride // size for stride in source.strides]
    reach = sum(stride * (length - 1) for stride, length in zip(strides, source.shape, strict=True)) + 1
    memory = np.lib.stride_tricks.as_strided(source, (reach,), (size,))
    _copy_transposed(memory, strides[1], strides[0], np.empty((SIDE, SIDE), source.dtype), copy)


def largest_magnitude(weight: Array) -> int:
    """Bits of the largest magnitude; those of a NaN where there is one."""
    found = np.empty(1, weight.dtype)
    _largest_magnitude(weight, found)
    return int(found[0])


def bit_sums(rows: Array, first: int) -> tuple[int, int]:
    """The sums of `Kernels.bit_sums` of rows [n, columns] of signed integers, the first of which has number `first`."""
    found = np.empty(2, np.int64)
    _bit_sums(rows, first, np.zeros(rows.shape[1], np.int64), found)
    return int(found[0]), int(found[1])
