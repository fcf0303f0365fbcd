"""The loops of `loops` and of `search.loops`, by name, so that numba is imported only where one has to be compiled.

Each is given the room that it works in: a loop that allocates would need numba's runtime.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from quantplug.compiled.arguments import Array
from quantplug.compiled.loop import Home, Loop
from quantplug.formats.constants import MX_BLOCK, NVFP4_BLOCK
from quantplug.formats.kernels.cpu.tiles import E2M1_BOUNDS, SIDE, TILE

_FORMATS = Path(__file__).parents[2]
_LOOPS = Home("quantplug.formats.kernels.cpu.loops", _FORMATS)
_SEARCH = Home("quantplug.formats.search.loops", _FORMATS)
_LOOPS.require()

PackBlocks = Callable[[Array, float, Array, Array, Array], None]
"""Of bits of a weight, the scale above its blocks, the FP32 values of the bytes of scales, and the bytes of codes and
scales to fill."""

unpack_nvfp4 = _LOOPS.loop("unpack_nvfp4")
unpack_mxfp4 = _LOOPS.loop("unpack_mxfp4")
unpack_mxfp8 = _LOOPS.loop("unpack_mxfp8")
unpack_int4 = _LOOPS.loop("unpack_int4")
pack_fp8 = _LOOPS.loop("pack_fp8")
unpack_fp8 = _LOOPS.loop("unpack_fp8")
pack_fp8_row = _LOOPS.loop("pack_fp8_row")
unpack_fp8_row = _LOOPS.loop("unpack_fp8_row")
pack_fp8_block = _LOOPS.loop("pack_fp8_block")
unpack_fp8_block = _LOOPS.loop("unpack_fp8_block")

_copy_transposed = _LOOPS.loop("copy_transposed")
_largest_magnitude = _LOOPS.loop("largest_magnitude")
_bit_sums = _LOOPS.loop("bit_sums")
_pack_int4 = _LOOPS.loop("pack_int4")
_pack_searched = _SEARCH.loop("pack_nvfp4")
_pack_given = _SEARCH.loop("pack_nvfp4_given")


def _blocks_packer(loop: Loop, width: int) -> PackBlocks:
    def pack(weight: Array, scale_2: float, scale_values: Array, packed: Array, block_scales: Array) -> None:
        loop(weight, scale_2, scale_values, _bounds(), *_room(weight, width), packed, block_scales)

    return pack


pack_nvfp4 = _blocks_packer(_LOOPS.loop("pack_nvfp4"), NVFP4_BLOCK)
pack_mxfp4 = _blocks_packer(_LOOPS.loop("pack_mxfp4"), MX_BLOCK)
pack_mxfp8 = _blocks_packer(_LOOPS.loop("pack_mxfp8"), MX_BLOCK)


def pack_int4(weight: Array, group: int, packed: Array, group_scales: Array) -> None:
    """Bits of n elements to n/2 bytes of codes and BF16 bits of n/group scales."""
    _pack_int4(weight, group, *_room(weight, group), packed, group_scales)


def _room(weight: Array, width: int) -> tuple[Array, Array, Array, Array]:
    """For half the elements of a tile, for a quarter, for its FP32 scales, and a byte for each of its codes."""
    halves = np.empty(TILE // 2, weight.dtype), np.empty(TILE // 4, weight.dtype)
    return *halves, np.empty(TILE // width, np.float32), np.empty(TILE, np.uint8)


def _bounds() -> Array:
    """For the bounds of E2M1 of all scales of blocks."""
    return np.empty(E2M1_BOUNDS, np.uint32)


def pack_nvfp4_given(weight: Array, scale_2: float, scale_values: Array, packed: Array, block_scales: Array) -> None:
    """Bits of n elements to n/2 bytes of codes, by the n/16 bytes of E4M3 scales that are there already."""
    divisors, codes = np.empty(TILE // NVFP4_BLOCK, np.float32), np.empty(TILE, np.uint8)
    _pack_given(weight, scale_2, scale_values, _bounds(), divisors, codes, packed, block_scales)


def pack_nvfp4_searched(
    weight: Array,
    scale_2: float,
    scale_values: Array,
    multiples: Array,
    offsets: Array,
    importance: Array,
    first_block: int,
    packed: Array,
    block_scales: Array,
) -> None:
    """Bits of n elements to n/2 bytes of codes and n/16 bytes of the E4M3 scales that are found for them.

    Args:
        scale_values: What the bytes of E4M3 scales stand for, FP32.
        multiples: Of amaxes, FP32.
        offsets: Of codes, int32; the candidates are all offsets of the first multiple, then those of the next.
        importance: Of the columns of a row, FP32; without any element where all count alike.
        first_block: How many blocks of the whole weight lie before these.
    """
    blocks = TILE // NVFP4_BLOCK
    room = np.empty(TILE, weight.dtype), np.empty(TILE, weight.dtype), np.empty(TILE, np.float32)
    of_columns = np.empty(TILE if importance.size else 0, np.float32)
    of_blocks = np.empty((6, blocks), np.float32), np.empty((2, blocks), np.uint32)
    of_tile = *room, of_columns, *of_blocks, np.empty(TILE, np.uint8)
    searched = scale_2, scale_values, multiples, offsets, importance, first_block
    _pack_searched(weight, *searched, _bounds(), *of_tile, packed, block_scales)


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
