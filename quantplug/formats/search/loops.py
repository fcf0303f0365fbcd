"""The search for scales on a CPU, as numba compiles it: `candidates` says what is computed, `reference` shows it.

Blocks lie side by side in memory, and a sum over each is no vector instruction. So a tile is turned first: row i of
[16, blocks] holds element i of every block, and all steps after that are of whole rows.
"""

from typing import Any

import numpy as np
from numba import njit

from quantplug.compiled.arguments import Array
from quantplug.compiled.compiler import OPTIONS, room_of, viewed
from quantplug.formats.constants import E2M1_MAX, NVFP4_BLOCK
from quantplug.formats.kernels.cpu.bf16.e2m1 import bounds_of_scales, room_for_bounds
from quantplug.formats.kernels.cpu.codes import fp32, magnitude_bits
from quantplug.formats.kernels.cpu.loops.blocks import encode_nvfp4
from quantplug.formats.kernels.cpu.loops.groups import of_groups
from quantplug.formats.kernels.cpu.scales import a_byte_s, fill_divisors, nvfp4_scales
from quantplug.formats.kernels.cpu.tiles import TILE

_E2M1_LARGEST = np.float32(E2M1_MAX)
_ONE_BITS, _EXPONENT, _E2M1_STEP = np.uint32(0x3F800000), np.uint32(0x7F800000), np.uint32(22 << 23)
_E4M3_SHIFT, _E4M3_BIAS = np.uint32(20), np.float32(2.0**120)
_LEAST_CODE, _LARGEST_CODE = np.int32(1), np.int32(126)

_BLOCKS = TILE // NVFP4_BLOCK
_a_tile = room_of(TILE)
_two_a_block, _six_a_block = room_of(2, _BLOCKS), room_of(6, _BLOCKS)


@njit(**OPTIONS)
def _part(source: Array, parted: Array) -> None:
    """Elements of even places before those of odd ones."""
    half = source.size // 2
    for i in range(half):
        parted[i] = source[2 * i]
        parted[half + i] = source[2 * i + 1]


@njit(**OPTIONS)
def _turn(tile: Array, turned: Array, room: Array) -> None:
    """Bits of blocks of 16 to 16 rows, one behind the other; row i holds element i of every block."""
    # Each step rotates the bits of a place by one, lowest to highest: after four the place in a block comes first.
    _part(tile, room)
    _part(room, turned)
    _part(turned, room)
    _part(room, turned)


@njit(**OPTIONS)
def _magnitudes(turned: Array, unit: Any, rows: Array) -> None:
    for i in range(turned.size):
        rows[i] = np.float32(abs(fp32(turned[i])) * unit)


@njit(**OPTIONS)
def _larger(turned: Array, other: Array, largest: Array) -> None:
    for i in range(largest.size):
        largest[i] = max(magnitude_bits(turned[i]), magnitude_bits(other[i]))


@njit(**OPTIONS)
def _amaxes(turned: Array, room: Array, amaxes: Array) -> None:
    """Of each block, FP32: as bits, of which those of a NaN are the largest. Both buffers are written over."""
    half = turned.size // 2
    # From one buffer to the other: read and written in one, the loop would not become vector instructions.
    _larger(turned[:half], turned[half:], room[:half])
    _larger(room[: half // 2], room[half // 2 : half], turned[: half // 2])
    _larger(turned[: half // 4], turned[half // 4 : half // 2], room[: half // 4])
    _larger(room[: half // 8], room[half // 8 : half // 4], turned[: half // 8])
    for i in range(amaxes.size):
        amaxes[i] = fp32(turned[i])


@njit(**OPTIONS)
def _square(magnitude: Any, reciprocal: Any) -> Any:
    """What rounding to E2M1 leaves over of a quotient, squared."""
    quotient = np.float32(magnitude * reciprocal)
    saturated = np.float32(min(quotient, _E2M1_LARGEST))
    # `kernels.cpu.codes.rounded` says why adding such a number rounds.
    binade = np.uint32(max(np.uint32(np.float32(saturated).view(np.uint32) & _EXPONENT), _ONE_BITS))
    rounder = np.uint32(binade + _E2M1_STEP).view(np.float32)
    left = np.float32(quotient - np.float32(np.float32(saturated + rounder) - rounder))
    return np.float32(left * left)


@njit(**OPTIONS)
def _errors(rows: Array, reciprocals: Array, errors: Array) -> None:
    """Sums of 16 squares, neighbours first: written out, as LLVM would sum in another order or element by element."""
    for i in range(errors.size):
        by = reciprocals[i]
        first = np.float32(_square(rows[0, i], by) + _square(rows[1, i], by))
        second = np.float32(_square(rows[2, i], by) + _square(rows[3, i], by))
        third = np.float32(_square(rows[4, i], by) + _square(rows[5, i], by))
        fourth = np.float32(_square(rows[6, i], by) + _square(rows[7, i], by))
        lower = np.float32(np.float32(first + second) + np.float32(third + fourth))
        first = np.float32(_square(rows[8, i], by) + _square(rows[9, i], by))
        second = np.float32(_square(rows[10, i], by) + _square(rows[11, i], by))
        third = np.float32(_square(rows[12, i], by) + _square(rows[13, i], by))
        fourth = np.float32(_square(rows[14, i], by) + _square(rows[15, i], by))
        errors[i] = np.float32(lower + np.float32(np.float32(first + second) + np.float32(third + fourth)))


@njit(**OPTIONS)
def _importance_rows(importance: Array, first_block: int, rows: Array) -> None:
    """The importance of columns, laid out as the elements of a tile: row i has that of element i of every block."""
    blocks_a_row = importance.size // NVFP4_BLOCK
    for block in range(rows.shape[1]):
        column = (first_block + block) % blocks_a_row * NVFP4_BLOCK
        for i in range(NVFP4_BLOCK):
            rows[i, block] = importance[column + i]


@njit(**OPTIONS)
def _weighted(magnitude: Any, reciprocal: Any, importance: Any) -> Any:
    return np.float32(_square(magnitude, reciprocal) * importance)


@njit(**OPTIONS)
def _weighted_errors(rows: Array, importance: Array, reciprocals: Array, errors: Array) -> None:
    """`_errors`, each square times the importance of its column."""
    for i in range(errors.size):
        by = reciprocals[i]
        first = np.float32(_weighted(rows[0, i], by, importance[0, i]) + _weighted(rows[1, i], by, importance[1, i]))
        second = np.float32(_weighted(rows[2, i], by, importance[2, i]) + _weighted(rows[3, i], by, importance[3, i]))
        third = np.float32(_weighted(rows[4, i], by, importance[4, i]) + _weighted(rows[5, i], by, importance[5, i]))
        fourth = np.float32(_weighted(rows[6, i], by, importance[6, i]) + _weighted(rows[7, i], by, importance[7, i]))
        lower = np.float32(np.float32(first + second) + np.float32(third + fourth))
        first = np.float32(_weighted(rows[8, i], by, importance[8, i]) + _weighted(rows[9, i], by, importance[9, i]))
        second = np.float32(
            _weighted(rows[10, i], by, importance[10, i]) + _weighted(rows[11, i], by, importance[11, i])
        )
        third = np.float32(
            _weighted(rows[12, i], by, importance[12, i]) + _weighted(rows[13, i], by, importance[13, i])
        )
        fourth = np.float32(
            _weighted(rows[14, i], by, importance[14, i]) + _weighted(rows[15, i], by, importance[15, i])
        )
        errors[i] = np.float32(lower + np.float32(np.float32(first + second) + np.float32(third + fourth)))


@njit(**OPTIONS)
def _candidates(nearest: Array, offset: Any, codes: Array, scales: Array, reciprocals: Array) -> None:
    """E4M3 codes at an offset from the nearest ones, which stay as they are at offset 0, and what they stand for."""
    least, largest = (_LEAST_CODE, _LARGEST_CODE) if offset else (np.int32(0), np.int32(127))
    for i in range(codes.size):
        code = np.uint32(min(max(np.int32(np.int32(nearest[i]) + offset), least), largest))
        codes[i] = code
        scales[i] = np.float32(np.uint32(code << _E4M3_SHIFT).view(np.float32) * _E4M3_BIAS)
        reciprocals[i] = np.float32(np.float32(1) / scales[i])


@njit(**OPTIONS)
def _keep_less(errors: Array, scales: Array, codes: Array, least: Array, found: Array) -> None:
    for i in range(errors.size):
        # Read before they are compared: a read that depends on the comparison would not become a vector instruction.
        error, code, best, kept = (
            np.float32(errors[i] * np.float32(scales[i] * scales[i])),
            codes[i],
            least[i],
            found[i],
        )
        found[i] = code if error < best else kept
        least[i] = error if error < best else best


@njit(**OPTIONS)
def pack_nvfp4(
    weight: Array,
    weight_scale_2: float,
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
    scale_2 = np.float32(weight_scale_2)
    divisors, bounds = a_byte_s(np.float32), room_for_bounds(np.uint32)
    fill_divisors(scale_values, scale_2, divisors)
    usual = bounds_of_scales(divisors, bounds)
    unit = np.float32(np.float32(1) / scale_2)
    turned, room = _a_tile(weight.dtype), _a_tile(weight.dtype)
    in_units, of_columns = _a_tile(np.float32), _a_tile(np.float32)
    # Rows: amax, its multiple, value, reciprocal, error and least error; and candidates and what is found among them.
    floats, numbers = _six_a_block(np.float32), _two_a_block(np.uint32)
    for start in range(0, weight.size, TILE):
        tile = weight[start : start + TILE]
        blocks, first = tile.size // NVFP4_BLOCK, start // NVFP4_BLOCK
        scales = block_scales[first : first + blocks]
        amaxes, multiplied, values = floats[0, :blocks], floats[1, :blocks], floats[2, :blocks]
        reciprocals, errors, least = floats[3, :blocks], floats[4, :blocks], floats[5, :blocks]
        candidates, found = numbers[0, :blocks], numbers[1, :blocks]
        _turn(tile, turned[: tile.size], room[: tile.size])
        _magnitudes(turned[: tile.size], unit, in_units[: tile.size])
        _amaxes(turned[: tile.size], room[: tile.size], amaxes)
        rows = viewed(in_units, (NVFP4_BLOCK, blocks), np.float32)
        weighted = viewed(of_columns, (NVFP4_BLOCK, blocks), np.float32)
        if importance.size:
            _importance_rows(importance, first_block + first, weighted)
        for i in range(blocks):
            least[i] = np.float32(np.inf)
        for multiple in range(multiples.size):
            for i in range(blocks):
                multiplied[i] = np.float32(amaxes[i] * multiples[multiple])
            nvfp4_scales(multiplied, scale_2, scales)
            for offset in range(offsets.size):
                _candidates(scales, offsets[offset], candidates, values, reciprocals)
                if multiple == 0 and offset == 0:
                    for i in range(blocks):
                        found[i] = candidates[i]
                if importance.size:
                    _weighted_errors(rows, weighted, reciprocals, errors)
                else:
                    _errors(rows, reciprocals, errors)
                _keep_less(errors, values, candidates, least, found)
        for i in range(blocks):
            scales[i] = np.uint8(found[i])
        encode_nvfp4(tile, scales, divisors, bounds, usual, packed[start // 2 : start // 2 + tile.size // 2])


@njit(**OPTIONS)
def _pack_nvfp4_given(
    weight: Array,
    weight_scale_2: float,
    scale_values: Array,
    packed: Array,
    block_scales: Array,
) -> None:
    """Bits of n elements to n/2 bytes of codes, by the n/16 bytes of E4M3 scales that are there already.

    Args:
        scale_values: What the bytes of scales stand for, FP32.
    """
    divisors, bounds = a_byte_s(np.float32), room_for_bounds(np.uint32)
    fill_divisors(scale_values, np.float32(weight_scale_2), divisors)
    usual = bounds_of_scales(divisors, bounds)
    for start in range(0, weight.size, TILE):
        tile = weight[start : start + TILE]
        blocks, first = tile.size // NVFP4_BLOCK, start // NVFP4_BLOCK
        scales = block_scales[first : first + blocks]
        of_tile = packed[start // 2 : start // 2 + tile.size // 2]
        encode_nvfp4(tile, scales, divisors, bounds, usual, of_tile)


pack_nvfp4_given = of_groups(_pack_nvfp4_given, NVFP4_BLOCK, in_a_byte=2)
