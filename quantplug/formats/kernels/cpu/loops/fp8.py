"""Weights in E4M3, by a scale of the tensor, of a row or of a square."""

from typing import Any

import numpy as np
from numba import njit

from quantplug.compiled.arguments import Array
from quantplug.compiled.compiler import OPTIONS, array_at, room_of, viewed
from quantplug.formats.constants import FP8_BLOCK_SIDE
from quantplug.formats.kernels.cpu.bf16 import e4m3
from quantplug.formats.kernels.cpu.codes import e4m3_code, fp32, magnitude_bits
from quantplug.formats.kernels.cpu.loops.groups import part_of, weights_with
from quantplug.formats.kernels.cpu.loops.tile_codes import tile_encoder
from quantplug.formats.kernels.cpu.scales import e4m3_scale


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
def unpack_fp8(codes: Array, weight_scale: float, e4m3_values: Array, out: Array) -> None:
    """Undoes `pack_fp8` in FP32."""
    scale = np.float32(weight_scale)
    for i in range(codes.size):
        out[i] = e4m3_values[codes[i]] * scale


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
def unpack_fp8_row(codes: Array, row_scales: Array, e4m3_values: Array, out: Array) -> None:
    """Undoes `pack_fp8_row` in FP32."""
    for row in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            out[row, i] = e4m3_values[codes[row, i]] * row_scales[row]


_STRIP = 16
"""Squares side by side of which the amaxes are found before the codes: no more than a core's second cache holds, and
their rows are long enough to be read, and written, one after another: memory is slow at pieces that lie apart."""

_a_column_each, _a_square_each = room_of(_STRIP * FP8_BLOCK_SIDE), room_of(_STRIP)
_encode_squares = e4m3.blocks_encoder(FP8_BLOCK_SIDE, tile_encoder(FP8_BLOCK_SIDE, e4m3_code, in_a_byte=1))


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
def unpack_fp8_block(codes: Array, block_scales: Array, e4m3_values: Array, out: Array) -> None:
    """Undoes `pack_fp8_block` in FP32."""
    for band in range(block_scales.shape[0]):
        # Row by row across all squares of a band, which is the order in memory.
        for row in range(FP8_BLOCK_SIDE):
            for block in range(block_scales.shape[1]):
                for i in range(FP8_BLOCK_SIDE):
                    out[band, row, block, i] = e4m3_values[codes[band, row, block, i]] * block_scales[band, block]
