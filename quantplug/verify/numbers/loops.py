"""The sums of `bounds.py` as loops that numba compiles: one pass over the bytes, without the interpreter's lock.

They share nothing with the packers' loops but the compiler: values come from the tables of `decode.py`. They are called
by their names (`machine_code.py`), and so that their code needs nothing of numba's when it runs they are given the room
that they work in. To compile one takes a second or two, once on a machine, so `bounds.py` is used for small models, and
where numba is missing.

The original arrives as FP32 values, or as the bits of BF16 in uint16, for which NumPy has no type. Sums are FP64 and
may be taken in any order ("reassoc"), which makes vector instructions of them; products are rounded to FP32 as readers
do.
"""

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from quantplug.compiled.arguments import Array
from quantplug.compiled.compiler import OPTIONS
from quantplug.verify.numbers import bounds
from quantplug.verify.numbers.decode import E2M1_VALUES, E4M3_VALUES, NVFP4_BLOCK
from quantplug.verify.numbers.sum_columns import (
    ALONG,
    AMAX,
    BEYOND,
    BOUND,
    DOT,
    ERROR,
    LARGEST_ERROR,
    LOST,
    NORM,
    ODD,
    QUARTIC,
)

_OPTIONS = {**OPTIONS, "fastmath": {"reassoc"}}

_E2M1, _E4M3 = E2M1_VALUES.numpy(), E4M3_VALUES.numpy()
_SMALLEST_NORMAL, _SMALLEST = np.float32(bounds.E4M3_SMALLEST_NORMAL), np.float32(bounds.E4M3_SMALLEST)
_BLOCK_BOUND_2 = bounds.NVFP4_BLOCK_BOUND**2
_VALUE_BOUND = np.float32(bounds.NVFP4_VALUE_BOUND * bounds.SLACK)
_SLACK = np.float32(bounds.SLACK)
_RELATIVE, _ABSOLUTE = np.float32(bounds.FP8_RELATIVE_BOUND), np.float32(bounds.FP8_ABSOLUTE_BOUND)
_INT4_OFFSET, _INT4_VALUE = np.float32(8), np.float32(bounds.INT4_VALUE_BOUND)
_REBIAS, _NAN = np.float32(2.0**120), np.float32(np.nan)
_SEGMENT = bounds.FP8_SEGMENT


def _fp32(bits: Any) -> Any:
    """FP32 value of an element of the original; numba takes the overload that fits its type."""


@overload(_fp32, strict=False)
def _fp32_of_type(bits: Any) -> Any:
    # BF16 is the upper half of FP32: moved there, its bits are the same number.
    if bits == types.uint16:
        return lambda bits: np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)
    return lambda bits: bits


@njit(**_OPTIONS)
def _along(dot: Any, norm: Any) -> Any:
    """Squared error of a block that lies along it (`gains.along_blocks`)."""
    return (dot - norm) * (dot - norm) / norm if norm > 0 else 0.0


@njit(**_OPTIONS)
def _is_odd(dot: Any, norm: Any) -> Any:
    """Whether a block as a whole is larger or smaller than rounding makes all but a few."""
    return int(abs(dot - norm) > bounds.ODD_BLOCK * norm)


@njit(**_OPTIONS)
def nvfp4(
    packed: Array, scales: Array, scale_of_tensor: Any, original: Array, values: Array, decoded: Array, sums: Array
) -> None:
    """Fills the sums [rows, COLUMNS] of `packed` [rows, columns / 2] and E4M3 bytes `scales` [rows, columns / 16].

    `values` and `decoded` are room for a block of FP32.
    """
    tensor_scale = np.float32(scale_of_tensor)
    for row in range(packed.shape[0]):
        error = norm = bound = dot = quartic = along = 0.0
        beyond = lost = odd = 0
        largest = row_amax = np.float32(0)
        for block in range(scales.shape[1]):
            scale = np.float32(_E4M3[scales[row, block]] * tensor_scale)
            for pair in range(NVFP4_BLOCK // 2):
                byte = packed[row, block * (NVFP4_BLOCK // 2) + pair]
                decoded[2 * pair] = np.float32(_E2M1[byte & 15] * scale)
                decoded[2 * pair + 1] = np.float32(_E2M1[byte >> 4] * scale)
            amax = np.float32(0)
            for place in range(NVFP4_BLOCK):
                values[place] = _fp32(original[row, block * NVFP4_BLOCK + place])
                amax = max(amax, abs(values[place]))
            block_norm = block_dot = 0.0
            worst = np.float32(0)
            zeros = part_beyond = np.int32(0)
            # The scale that the source's values ask for, not the stored one, which may be what is wrong (`bounds.py`).
            asked = np.float32(amax / np.float32(np.float32(6) * abs(tensor_scale)))
            normal = asked >= _SMALLEST_NORMAL
            allowed = np.float32((_VALUE_BOUND if normal else _SLACK) * amax)
            for place in range(NVFP4_BLOCK):
                difference = abs(np.float32(decoded[place] - values[place]))
                error += np.float64(difference) * np.float64(difference)
                block_norm += np.float64(values[place]) * np.float64(values[place])
                block_dot += np.float64(values[place]) * np.float64(decoded[place])
                worst = max(worst, difference)
                part_beyond += np.int32(difference > allowed)
                zeros += np.int32(decoded[place] == 0)
            beyond += int(part_beyond)
            norm += block_norm
            dot += block_dot
            quartic += block_norm * block_norm
            along += _along(block_dot, block_norm)
            bound += block_norm * (_BLOCK_BOUND_2 if normal else 1.0)
            lost += int(asked >= _SMALLEST and zeros == NVFP4_BLOCK)
            odd += _is_odd(block_dot, block_norm) if normal else 0
            largest, row_amax = max(largest, worst), max(row_amax, amax)
        _store(sums[row], error, norm, bound, dot, quartic, along, largest, row_amax, beyond, lost, odd)


@njit(**_OPTIONS)
def _e4m3(code: Any) -> Any:
    """Value of an E4M3 byte without a table, which would not become vector instructions.

    Exponent and mantissa, moved to where FP32 has them, are the value with FP32's bias in place of 7: 2^-120 of it,
    below the smallest normal too.
    """
    magnitude = np.uint32(code) & np.uint32(0x7F)
    value = np.uint32(magnitude << np.uint32(20)).view(np.float32) * _REBIAS
    value = _NAN if magnitude == np.uint32(0x7F) else value
    return -value if code >= 128 else value


@njit(**_OPTIONS)
def fp8(
    codes: Array,
    scales: Array,
    first_row: int,
    block_rows: int,
    block_columns: int,
    original: Array,
    values: Array,
    decoded: Array,
    sums: Array,
) -> None:
    """Fills the sums of E4M3 bytes `codes` [rows, columns], with one scale for each block of the whole weight.

    Args:
        first_row: Row of the weight at which these begin.
        scales: FP32 [block rows, block columns].
        block_columns: A multiple of 16, or more than the weight has.
        values: Room for 16 numbers of FP32, as `decoded`.
    """
    columns = codes.shape[1]
    for row in range(codes.shape[0]):
        error = norm = bound = dot = quartic = along = 0.0
        beyond = lost = odd = 0
        largest = row_amax = np.float32(0)
        row_scales = scales[(first_row + row) // block_rows]
        for segment in range(0, columns, _SEGMENT):
            held = 0
            filled = np.float32(0)
            for start in range(segment, min(segment + _SEGMENT, columns), NVFP4_BLOCK):
                scale = row_scales[start // block_columns]
                width = min(NVFP4_BLOCK, columns - start)
                for place in range(width):
                    values[place] = _fp32(original[row, start + place])
                    decoded[place] = np.float32(_e4m3(codes[row, start + place]) * scale)
                # The last columns of a row may be fewer than 16. Zeros add nothing to any sum.
                for place in range(width, NVFP4_BLOCK):
                    values[place] = decoded[place] = 0
                part_norm = part_bound = part_dot = 0.0
                part_beyond = np.int32(0)
                amax = worst = np.float32(0)
                for place in range(NVFP4_BLOCK):
                    value, difference = values[place], abs(np.float32(decoded[place] - values[place]))
                    magnitude = abs(value)
                    absolute = np.float32(0) if value == 0 else np.float32(_ABSOLUTE * scale)
                    allowed = np.float32(np.float32(magnitude * _RELATIVE) + absolute)
                    error += np.float64(difference) * np.float64(difference)
                    part_norm += np.float64(value) * np.float64(value)
                    part_bound += np.float64(allowed) * np.float64(allowed)
                    part_dot += np.float64(value) * np.float64(decoded[place])
                    part_beyond += np.int32(difference > np.float32(allowed * _SLACK))
                    worst, amax = max(worst, difference), max(amax, magnitude)
                    filled = max(filled, abs(decoded[place]))
                norm += part_norm
                bound += part_bound
                dot += part_dot
                along += _along(part_dot, part_norm)
                quartic += part_norm * part_norm
                beyond += int(part_beyond)
                largest, row_amax = max(largest, worst), max(row_amax, amax)
                # In units of the scale, which differs from block to block of the weight.
                held += int(amax >= np.float32(_SMALLEST * scale) and amax > 0)
                odd += _is_odd(part_dot, part_norm) if amax >= np.float32(_SMALLEST_NORMAL * scale) else 0
            lost += int(held > 0 and filled == 0)
        _store(sums[row], error, norm, bound, dot, quartic, along, largest, row_amax, beyond, lost, odd)


@njit(**_OPTIONS)
def int4(packed: Array, scales: Array, original: Array, values: Array, decoded: Array, sums: Array) -> None:
    """Fills the sums of `packed` bytes [rows, columns / 2] of INT4 codes and FP32 `scales` [rows, groups].

    `values` and `decoded` are room for a group of FP32.
    """
    width = 2 * packed.shape[1] // scales.shape[1]
    for row in range(packed.shape[0]):
        error = norm = bound = dot = quartic = along = 0.0
        beyond = lost = odd = 0
        largest = row_amax = np.float32(0)
        for group in range(scales.shape[1]):
            scale = scales[row, group]
            for pair in range(width // 2):
                byte = packed[row, group * (width // 2) + pair]
                decoded[2 * pair] = np.float32((np.float32(byte & 15) - _INT4_OFFSET) * scale)
                decoded[2 * pair + 1] = np.float32((np.float32(byte >> 4) - _INT4_OFFSET) * scale)
            amax = np.float32(0)
            for place in range(width):
                values[place] = _fp32(original[row, group * width + place])
                amax = max(amax, abs(values[place]))
            most = np.float32(_INT4_VALUE * amax)
            group_norm = group_dot = 0.0
            worst = np.float32(0)
            zeros = group_beyond = np.int32(0)
            for place in range(width):
                value, difference = values[place], abs(np.float32(decoded[place] - values[place]))
                allowed = min(abs(value), most)
                error += np.float64(difference) * np.float64(difference)
                group_norm += np.float64(value) * np.float64(value)
                bound += np.float64(allowed) * np.float64(allowed)
                group_dot += np.float64(value) * np.float64(decoded[place])
                group_beyond += np.int32(difference > np.float32(allowed * _SLACK))
                worst = max(worst, difference)
                zeros += np.int32(decoded[place] == 0)
            norm += group_norm
            dot += group_dot
            quartic += group_norm * group_norm
            along += _along(group_dot, group_norm)
            beyond += int(group_beyond)
            lost += int(amax > 0 and zeros == width)
            odd += _is_odd(group_dot, group_norm)
            largest, row_amax = max(largest, worst), max(row_amax, amax)
        _store(sums[row], error, norm, bound, dot, quartic, along, largest, row_amax, beyond, lost, odd)


@njit(**_OPTIONS)
def _store(
    sums: Array,
    error: Any,
    norm: Any,
    bound: Any,
    dot: Any,
    quartic: Any,
    along: Any,
    largest: Any,
    amax: Any,
    beyond: Any,
    lost: Any,
    odd: Any,
) -> None:
    sums[ERROR], sums[NORM], sums[BOUND], sums[DOT], sums[QUARTIC] = error, norm, bound, dot, quartic
    sums[ALONG], sums[LARGEST_ERROR], sums[AMAX] = along, largest, amax
    sums[BEYOND], sums[LOST], sums[ODD] = beyond, lost, odd
