"""The loops of the CPU kernels as numba compiles them: flat NumPy arrays in, flat arrays filled, one thread.

A compiler on the user's machine is not needed. A loop is compiled for the element type that it is called with, which
takes a second or two, and `compiled` keeps the machine code for later processes, which import nothing of this: they
call loops by their names (`machine_code`). So that the code needs nothing of numba's when it runs, no loop allocates
memory, raises, or gives something back: it fills arrays, works in room on its thread's stack, and takes steps that are
known when it is compiled. What it calls of `amaxes`, `codes`, `scales` and `bf16` becomes part of its code.

The loops are written so that LLVM makes vector instructions of them: no branch in an inner loop, no slice, every
integer of 32 bits or fewer.
"""

from typing import Any

import numpy as np
from numba import njit

from quantplug.compiled.arguments import Array
from quantplug.compiled.compiler import OPTIONS, array_at, prefetch_nontemporal, room_of, viewed
from quantplug.formats.constants import (
    E2M1_MAX,
    E4M3_MAX,
    FP8_BLOCK_SIDE,
    INT4_GROUP,
    INT4_SMALL_GROUP,
    MX_BLOCK,
    NVFP4_BLOCK,
)
from quantplug.formats.kernels.cpu.amaxes import block_amaxes
from quantplug.formats.kernels.cpu.bf16 import e2m1, e4m3
from quantplug.formats.kernels.cpu.codes import (
    INT4_LOWEST_VALUE,
    e2m1_code,
    e4m3_code,
    fp32,
    int4_code,
    magnitude_bits,
)
from quantplug.formats.kernels.cpu.group_loops import of_groups, part_of, weights_with
from quantplug.formats.kernels.cpu.scales import (
    a_byte_s,
    e4m3_scale,
    e8m0_scales,
    fill_divisors,
    int4_scales,
    nvfp4_scales,
)
from quantplug.formats.kernels.cpu.tiles import AHEAD, SIDE, TILE

_a_byte_each = room_of(TILE)


@njit(**OPTIONS)
def _pair(codes: Array, packed: Array) -> None:
    """Two codes of 4 bits, of a byte each, to a byte."""
    pairs = viewed(codes, (packed.size,), np.uint16)
    for i in range(packed.size):
        # Two bytes 0H 0L, little-endian, become HL.
        packed[i] = np.uint8(pairs[i] | (pairs[i] >> np.uint16(4)))


def _tile_encoder(width: int, encode: Any, in_a_byte: int) -> Any:
    """Encodes blocks of `width` neighbours under scales that are there already; arguments as of `_groups_packer`."""

    @njit(**OPTIONS)
    def encode_blocks(tile: Array, scales: Array, divisors: Array, codes: Array) -> None:
        """One code a byte [n, width]."""
        blocks = viewed(tile, (scales.size, width), tile.dtype)
        for block in range(scales.size):
            prefetch_nontemporal(tile, AHEAD + block * width)
            divisor = divisors[scales[block]]
            for i in range(width):
                # Divided, though a product with the reciprocal is faster: it breaks ties of BF16 weights otherwise.
                codes[block, i] = encode(np.float32(fp32(blocks[block, i]) / divisor))

    @njit(**OPTIONS)
    def encode_tile(tile: Array, scales: Array, divisors: Array, packed: Array) -> None:
        """Bits of n * width elements, at most a tile, to bytes of codes.

        Args:
            scales: The bytes of scales [n].
            divisors: What elements are divided by, FP32, of all bytes.
        """
        shape = (scales.size, width)
        if in_a_byte == 1:
            encode_blocks(tile, scales, divisors, viewed(packed, shape, packed.dtype))
        else:
            codes = _a_byte_each(np.uint8)
            encode_blocks(tile, scales, divisors, viewed(codes, shape, codes.dtype))
            _pair(codes, packed)

    return encode_tile


def _groups_packer(width: int, fill_scales: Any, encode: Any, in_a_byte: int) -> Any:
    """Packs groups of weights in blocks of `width` neighbours: in each loop that is compiled all of these are known.

    Args:
        fill_scales: Of blocks, from their amaxes.
        encode: FP32 to a code.
        in_a_byte: Codes, 1 or 2.
    """
    fill_amaxes, amaxes_of_a_tile = block_amaxes(width), room_of(TILE // width)
    code = e2m1 if in_a_byte == 2 else e4m3
    room_for_bounds, bounds_of_scales = code.room_for_bounds, code.bounds_of_scales
    encode_blocks = code.blocks_encoder(width, _tile_encoder(width, encode, in_a_byte))

    @njit(**OPTIONS)
    def pack(
        weight: Array,
        weight_scale_2: float,
        scale_values: Array,
        packed: Array,
        block_scales: Array,
    ) -> None:
        """Bits of n elements to n / in_a_byte bytes of codes and n / width scales.

        Args:
            scale_values: What the bytes of scales stand for, FP32.
        """
        scale_2, amaxes, divisors = np.float32(weight_scale_2), amaxes_of_a_tile(np.float32), a_byte_s(np.float32)
        fill_divisors(scale_values, scale_2, divisors)
        bounds = room_for_bounds(np.uint32)
        usual = bounds_of_scales(divisors, bounds)
        # One step after another over a tile: each is a loop simple enough to become vector instructions.
        for start in range(0, weight.size, TILE):
            tile = weight[start : start + TILE]
            blocks, first, first_byte = tile.size // width, start // width, start // in_a_byte
            scales = block_scales[first : first + blocks]
            of_tile = packed[first_byte : first_byte + tile.size // in_a_byte]
            fill_amaxes(tile, amaxes[:blocks])
            fill_scales(amaxes[:blocks], scale_2, scales)
            encode_blocks(tile, scales, divisors, bounds, usual, of_tile)

    return of_groups(pack, width, in_a_byte)


def _blocks_unpacker(width: int, in_a_byte: int) -> Any:
    """Undoes what `_groups_packer` makes, in FP32."""

    @njit(**OPTIONS)
    def unpack_pairs(
        packed: Array, block_scales: Array, weight_scale_2: float, code_values: Array, scale_values: Array, out: Array
    ) -> None:
        scale_2 = np.float32(weight_scale_2)
        pairs = viewed(packed, (block_scales.size, width // 2), packed.dtype)
        values = viewed(out, (block_scales.size, width // 2, 2), out.dtype)
        for block in range(block_scales.size):
            # Both scales first, then the code: another order of the FP32 products would give other last bits.
            scale = np.float32(scale_values[block_scales[block]] * scale_2)
            for i in range(width // 2):
                pair = pairs[block, i]
                values[block, i, 0] = code_values[pair & 15] * scale
                values[block, i, 1] = code_values[pair >> 4] * scale

    @njit(**OPTIONS)
    def unpack(
        packed: Array, block_scales: Array, weight_scale_2: float, code_values: Array, scale_values: Array, out: Array
    ) -> None:
        scale_2 = np.float32(weight_scale_2)
        shape = (block_scales.size, width)
        codes, values = viewed(packed, shape, packed.dtype), viewed(out, shape, out.dtype)
        for block in range(block_scales.size):
            scale = np.float32(scale_values[block_scales[block]] * scale_2)
            for i in range(width):
                values[block, i] = code_values[codes[block, i]] * scale

    return unpack if in_a_byte == 1 else unpack_pairs


encode_nvfp4 = e2m1.blocks_encoder(NVFP4_BLOCK, _tile_encoder(NVFP4_BLOCK, e2m1_code, in_a_byte=2))
pack_nvfp4 = _groups_packer(NVFP4_BLOCK, nvfp4_scales, e2m1_code, in_a_byte=2)
pack_mxfp4 = _groups_packer(MX_BLOCK, e8m0_scales(E2M1_MAX), e2m1_code, in_a_byte=2)
pack_mxfp8 = _groups_packer(MX_BLOCK, e8m0_scales(E4M3_MAX), e4m3_code, in_a_byte=1)
unpack_nvfp4 = _blocks_unpacker(NVFP4_BLOCK, in_a_byte=2)
unpack_mxfp4 = _blocks_unpacker(MX_BLOCK, in_a_byte=2)
unpack_mxfp8 = _blocks_unpacker(MX_BLOCK, in_a_byte=1)


@njit(**OPTIONS)
def copy_transposed(source: Array, column_stride: int, row_stride: int, square: Array, copy: Array) -> None:
    """Copies [columns, rows] of any strides to contiguous [rows, columns], in squares.

    `source` is all memory from its first element to its last, strides count elements.

    Neighbours in a row of the copy are far apart in the source, often by a power of two that lets them displace each
    other from the cache: so each row of a square is read at once, and the square turned in a buffer.
    """
    rows, columns = copy.shape
    for top in range(0, columns, SIDE):
        height = min(SIDE, columns - top)
        for left in range(0, rows, SIDE):
            width = min(SIDE, rows - left)
            for i in range(height):
                for j in range(width):
                    square[i, j] = source[(top + i) * column_stride + (left + j) * row_stride]
            for j in range(width):
                for i in range(height):
                    copy[left + j, top + i] = square[i, j]


@njit(**OPTIONS)
def largest_magnitude(weight: Array, found: Array) -> None:
    """Bits of the largest magnitude, the only element of `found`; those of a NaN where there is one."""
    largest = magnitude_bits(weight[0])
    for i in range(weight.size):
        largest = max(largest, magnitude_bits(weight[i]))
    found[0] = largest


@njit(**OPTIONS)
def bit_sums(rows: Array, first: int, of_columns: Array, found: Array) -> None:
    """The sums of `Kernels.bit_sums` of rows [n, columns] of signed integers, the first of which has number `first`.

    `of_columns` is room for a sum of each, zeros; the two sums become the elements of `found`.
    """
    by_row = np.int64(0)
    for i in range(rows.shape[0]):
        # Weighted once a row and once a column, so that the inner loop only adds; int64 wraps, which is the modulus.
        of_row = np.int64(0)
        for j in range(rows.shape[1]):
            bits = np.int64(rows[i, j])
            of_row += bits
            of_columns[j] += bits
        by_row += of_row * np.int64(2 * (first + i) + 1)
    by_column = np.int64(0)
    for j in range(rows.shape[1]):
        by_column += of_columns[j] * np.int64(2 * j + 1)
    found[0], found[1] = by_row, by_column


@njit(**OPTIONS)
def _divide_to_e4m3(elements: Array, scale: Any, codes: Array) -> None:
    """Bits of n elements to n codes."""
    for i in range(elements.size):
        codes[i] = e4m3_code(np.float32(fp32(elements[i]) / scale))


_encode_e4m3 = e4m3.codes_encoder(_divide_to_e4m3)


@njit(**OPTIONS)
def _pack_fp8(weight: Array, scale: Any, codes: Array) -> None:
    """Bits of n elements to n E4M3 codes, all by one FP32 scale."""
    bounds = e4m3.room_for_bounds_of_one(np.uint32)
    usual = e4m3.bounds_of(scale, bounds)
    _encode_e4m3(weight, scale, bounds, usual, codes)


@njit(**OPTIONS)
def pack_fp8(addresses: Array, like: Array, elements: int, scales: Array, codes: Array, first: int, last: int) -> None:
    """Tiles of n weights to E4M3 codes [n, elements], by their FP32 scales [n]; other arguments as of `of_groups`."""
    for weight in weights_with(first, last, elements):
        start, end = part_of(weight, first, last, elements)
        part = array_at(addresses[weight] + start * like.itemsize, end - start, like)
        _pack_fp8(part, scales[weight], codes[weight, start:end])


@njit(**OPTIONS)
def unpack_fp8(codes: Array, weight_scale: float, e4m3: Array, out: Array) -> None:
    """Undoes `pack_fp8` in FP32."""
    scale = np.float32(weight_scale)
    for i in range(codes.size):
        out[i] = e4m3[codes[i]] * scale


@njit(**OPTIONS)
def pack_fp8_row(rows: Array, row_scales: Array, codes: Array) -> None:
    """Bits of [rows, columns] elements to an FP32 scale for each row and as many E4M3 codes as elements."""
    for row in range(rows.shape[0]):
        largest = magnitude_bits(rows[row, 0])
        for i in range(rows.shape[1]):
            largest = max(largest, magnitude_bits(rows[row, i]))
        scale = e4m3_scale(fp32(largest))
        row_scales[row] = scale
        # A row is short enough to be in a core's cache still.
        _pack_fp8(rows[row], scale, codes[row])


@njit(**OPTIONS)
def unpack_fp8_row(codes: Array, row_scales: Array, e4m3: Array, out: Array) -> None:
    """Undoes `pack_fp8_row` in FP32."""
    for row in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            out[row, i] = e4m3[codes[row, i]] * row_scales[row]


_STRIP = 16
"""Squares side by side of which the amaxes are found before the codes: no more than a core's second cache holds, and
their rows are long enough to be read, and written, one after another: memory is slow at pieces that lie apart."""

_a_column_each, _a_square_each = room_of(_STRIP * FP8_BLOCK_SIDE), room_of(_STRIP)
_encode_squares = e4m3.blocks_encoder(FP8_BLOCK_SIDE, _tile_encoder(FP8_BLOCK_SIDE, e4m3_code, in_a_byte=1))


@njit(**OPTIONS)
def _amaxes_of_columns(rows: Array, left: int, amaxes: Array) -> None:
    """Bits of the largest magnitudes of some columns of all rows, from one on."""
    amaxes[:] = 0
    for row in range(rows.shape[0]):
        # A slice: an index that is a sum could be negative, which numba would ask of each.
        of_row = rows[row, left : left + amaxes.size]
        for i in range(amaxes.size):
            amaxes[i] = max(amaxes[i], magnitude_bits(of_row[i]))


@njit(**OPTIONS)
def _scale_of_square(amaxes: Array) -> Any:
    largest = amaxes[0]
    for i in range(amaxes.size):
        largest = max(largest, amaxes[i])
    return e4m3_scale(fp32(largest))


@njit(**OPTIONS)
def _pack_strip(rows: Array, left: int, scales: Array, codes: Array) -> None:
    """Squares side by side in rows [128, columns], from a column on: their FP32 scales, and as many codes."""
    amaxes, numbers = _a_column_each(rows.dtype), _a_square_each(np.uint8)
    bounds, all_usual = e4m3.room_for_bounds(np.uint32), True
    right = left + scales.size * FP8_BLOCK_SIDE
    _amaxes_of_columns(rows, left, amaxes[: right - left])
    for square in range(scales.size):
        numbers[square] = square
        scales[square] = _scale_of_square(amaxes[square * FP8_BLOCK_SIDE : (square + 1) * FP8_BLOCK_SIDE])
        all_usual &= e4m3.bounds_of(scales[square], bounds[square])
    usual = (0, scales.size - 1) if all_usual else (1, 0)
    for row in range(rows.shape[0]):
        _encode_squares(rows[row, left:right], numbers[: scales.size], scales, bounds, usual, codes[row, left:right])


@njit(**OPTIONS)
def pack_fp8_block(bands: Array, block_scales: Array, codes: Array) -> None:
    """Bits of [bands, 128, blocks, 128] elements to [bands, blocks] FP32 scales and as many E4M3 codes as elements."""
    count, blocks = block_scales.shape
    shape = count, FP8_BLOCK_SIDE, blocks * FP8_BLOCK_SIDE
    rows, codes_of_rows = viewed(bands, shape, bands.dtype), viewed(codes, shape, codes.dtype)
    for band in range(count):
        for first in range(0, blocks, _STRIP):
            scales = block_scales[band, first : first + _STRIP]
            _pack_strip(rows[band], first * FP8_BLOCK_SIDE, scales, codes_of_rows[band])


@njit(**OPTIONS)
def unpack_fp8_block(codes: Array, block_scales: Array, e4m3: Array, out: Array) -> None:
    """Undoes `pack_fp8_block` in FP32."""
    for band in range(block_scales.shape[0]):
        # Row by row across all squares of a band, which is the order in memory.
        for row in range(FP8_BLOCK_SIDE):
            for block in range(block_scales.shape[1]):
                for i in range(FP8_BLOCK_SIDE):
                    out[band, row, block, i] = e4m3[codes[band, row, block, i]] * block_scales[band, block]


_small_group_amaxes, _group_amaxes = block_amaxes(INT4_SMALL_GROUP), block_amaxes(INT4_GROUP)
_scales_of_small_groups = room_of(TILE // INT4_SMALL_GROUP)


@njit(**OPTIONS)
def _int4_codes(tile: Array, parts_a_group: int, scales: Array, codes: Array) -> None:
    """Fills `codes` [n, 32] with one code a byte, from the bits of as many elements."""
    parts = viewed(tile, (len(codes), INT4_SMALL_GROUP), tile.dtype)
    for part in range(parts.shape[0]):
        prefetch_nontemporal(tile, AHEAD + part * INT4_SMALL_GROUP)
        scale = scales[part // parts_a_group]
        for i in range(INT4_SMALL_GROUP):
            codes[part, i] = int4_code(np.float32(fp32(parts[part, i]) / scale))


@njit(**OPTIONS)
def _pack_int4(weight: Array, group: int, packed: Array, group_scales: Array) -> None:
    """Bits of n elements to n/2 bytes of codes and BF16 bits of n/group scales; `group` is 32 or 128."""
    parts_a_group = group // INT4_SMALL_GROUP
    scales, codes = _scales_of_small_groups(np.float32), _a_byte_each(np.uint8)
    for start in range(0, weight.size, TILE):
        tile = weight[start : start + TILE]
        groups, first = tile.size // group, start // group
        if group == INT4_SMALL_GROUP:
            _small_group_amaxes(tile, scales[:groups])
        else:
            _group_amaxes(tile, scales[:groups])
        int4_scales(scales[:groups], group_scales[first : first + groups])
        parts = (tile.size // INT4_SMALL_GROUP, INT4_SMALL_GROUP)
        _int4_codes(tile, parts_a_group, scales, viewed(codes, parts, codes.dtype))
        _pair(codes, packed[start // 2 : start // 2 + tile.size // 2])


@njit(**OPTIONS)
def pack_int4(
    addresses: Array, like: Array, elements: int, packed: Array, group_scales: Array, first: int, last: int
) -> None:
    """Tiles of n weights to codes [n, elements / 2] and BF16 bits of scales [n, elements / 32 or 128].

    The other arguments are those of `of_groups`.
    """
    group = elements // group_scales.shape[1]
    for weight in weights_with(first, last, elements):
        start, end = part_of(weight, first, last, elements)
        part = array_at(addresses[weight] + start * like.itemsize, end - start, like)
        scales = group_scales[weight, start // group : end // group]
        _pack_int4(part, group, packed[weight, start // 2 : end // 2], scales)


@njit(**OPTIONS)
def unpack_int4(packed: Array, group_scales: Array, out: Array) -> None:
    """Undoes `pack_int4` in FP32; the scales are given as FP32."""
    in_a_group = packed.size // group_scales.size
    pairs = viewed(packed, (group_scales.size, in_a_group), packed.dtype)
    values = viewed(out, (group_scales.size, in_a_group, 2), out.dtype)
    for group in range(group_scales.size):
        scale = group_scales[group]
        for i in range(pairs.shape[1]):
            pair = pairs[group, i]
            values[group, i, 0] = (np.float32(pair & np.uint8(15)) + INT4_LOWEST_VALUE) * scale
            values[group, i, 1] = (np.float32(pair >> np.uint8(4)) + INT4_LOWEST_VALUE) * scale
