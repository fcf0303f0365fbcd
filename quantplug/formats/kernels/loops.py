"""The loops of the CPU kernels as numba compiles them: flat NumPy arrays in, flat arrays filled, one thread.

A compiler on the user's machine is not needed. A loop is compiled for the element type that it is called with, which
takes a second or two, and `compiled` keeps the machine code for later processes, which import nothing of this: they
call loops by their names (`machine_code`). So that the code needs nothing of numba's when it runs, no loop allocates
memory, raises, or gives something back: it fills arrays, is given room to work in, and takes steps that are known when
it is compiled.

A weight arrives as the integers of its bits, and their type says which float they are: uint16 is BF16, int16 is FP16,
uint32 is FP32 (NumPy has no BF16, numba's CPU code no FP16). The loops are written so that LLVM makes vector
instructions of them: no branch in an inner loop, no slice, every integer of 32 bits or fewer.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from quantplug.compiled.arguments import Array
from quantplug.compiled.compiler import OPTIONS, prefetch, viewed
from quantplug.formats.constants import (
    E2M1_MAX,
    E4M3_MAX,
    E4M3_SMALLEST_SUBNORMAL,
    E8M0_BIAS,
    E8M0_NAN,
    F32_SMALLEST_NORMAL,
    FP8_BLOCK_SIDE,
    INT4_HIGHEST,
    INT4_LARGEST,
    INT4_LOWEST,
    INT4_SMALL_GROUP,
    MX_BLOCK,
    NVFP4_BLOCK,
    ZERO_AMAX_SCALE,
)
from quantplug.formats.kernels.tiles import SIDE, TILE

_F32_SIGN = np.uint32(0x80000000)
_F32_EXPONENT = np.uint32(0x7F800000)
_F32_MANTISSA_BITS = 23
_BELOW_A_BINADE = np.uint32((1 << _F32_MANTISSA_BITS) - 1)
_F32_E8M0_SMALLEST = np.uint32(1 << (_F32_MANTISSA_BITS - 1))
"""The bits of 2^-127, which E8M0's exponent 0 stands for: a subnormal of FP32."""

# E2M1 changes its code in the middle between two of its values: at 0.25, 0.75, 1.25, 1.75, and at 2.5, 5 and 3.5, which
# are the last two of these doubled. A quotient is rounded to FP32 before it is rounded to a code, so that it reaches a
# middle half a step of FP32 before it, and passes it half a step behind. Ties go to the even code: up at 0.75 and 1.75,
# which are to be reached, down at the others, which are to be passed.
_PAST_025, _FROM_075 = 0.25 + 2.0**-26, 0.75 - 2.0**-25
_PAST_125, _FROM_175 = 1.25 + 2.0**-24, 1.75 - 2.0**-24
# FP64 holds the product of such a number, of 27 bits, and of a divisor, of 24; and BF16 the upper 16 bits of FP32.
_F64_BELOW_BF16 = np.int64(52 - 7)
_BF16_STEP = np.int64(1 << (52 - 7))
_F64_TO_BF16_BIAS = np.int64((1023 - 127) << 7)
_BF16_BINADE, _BF16_MAGNITUDE = np.int16(1 << 7), np.int16(0x7FFF)
# Between these divisors no bound is a subnormal of BF16, and no quotient is 0 but that of 0.
_LEAST_DIVISOR, _MOST_DIVISOR = np.float32(2.0**-100), np.float32(2.0**16)

# 1.0 is E2M1's smallest normal magnitude (exponent bias 1), 2^-6 is E4M3's (bias 7).
# Codes as (mantissa bits, FP32 bits of the smallest normal magnitude, largest magnitude).
_E2M1_MANTISSA, _E2M1_NORMAL, _E2M1_LARGEST = 1, np.uint32(0x3F800000), np.float32(E2M1_MAX)
_E4M3_MANTISSA, _E4M3_NORMAL, _E4M3_LARGEST = 3, np.uint32(0x3C800000), np.float32(E4M3_MAX)
_E2M1_SIGN, _E4M3_SIGN_SHIFT, _E4M3_NAN = np.uint32(8), np.uint32(24), np.uint32(0x7F)
_E8M0_NAN = np.uint32(E8M0_NAN)

_INT4_HIGHEST, _INT4_LOWEST, _INT4_LARGEST = (np.float32(it) for it in (INT4_HIGHEST, INT4_LOWEST, INT4_LARGEST))
# FP32 holds no fractions beside this number, so that a small one is rounded when it is added; the low bits are then
# those of its two's complement.
_INTEGERS = np.float32(1.5 * 2**_F32_MANTISSA_BITS)

_SMALLEST_BLOCK_SCALE = np.float32(E4M3_SMALLEST_SUBNORMAL)
_SMALLEST_SCALE = np.float32(F32_SMALLEST_NORMAL)
_ZERO_AMAX_SCALE = np.float32(ZERO_AMAX_SCALE)


def fp32(bits: Any) -> Any:
    """FP32 value of one element's bits; numba takes the one of the overloads below that fits their type."""


def magnitude_bits(bits: Any) -> Any:
    """An element's bits without the sign: integers in the order of the magnitudes, NaN above Inf."""


@overload(fp32, strict=False)
def _fp32_of_type(bits: Any) -> Callable[[Any], Any]:
    if bits == types.uint16:
        return lambda bits: np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)
    return _fp32_of_fp16 if bits == types.int16 else lambda bits: np.uint32(bits).view(np.float32)


@overload(magnitude_bits, strict=False)
def _magnitude_of_type(bits: Any) -> Callable[[Any], Any]:
    if bits == types.uint16:
        return lambda bits: np.uint16(bits & np.uint16(0x7FFF))
    if bits == types.int16:
        return lambda bits: np.int16(bits & np.int16(0x7FFF))
    return lambda bits: np.uint32(bits & np.uint32(0x7FFFFFFF))


def _fp32_of_fp16(bits: Any) -> Any:
    """Moves exponent and mantissa into place, and the bias of the exponent from 15 to 127."""
    half = np.uint32(np.uint16(bits))
    shifted = np.uint32(np.uint32(half & np.uint32(0x7FFF)) << np.uint32(13))
    exponent = np.uint32(shifted & np.uint32(0x0F800000))
    normal = np.uint32(shifted + np.uint32(112 << 23)).view(np.float32)
    # Of a subnormal the mantissa counts units of 2^-24: as mantissa of 2^-14 it is 2^-14 too much, exactly.
    subnormal = np.uint32(shifted + np.uint32(113 << 23)).view(np.float32) - np.float32(2.0**-14)
    finite = subnormal if exponent == np.uint32(0) else normal
    special = np.uint32(shifted | _F32_EXPONENT).view(np.float32)
    magnitude = special if exponent == np.uint32(0x0F800000) else finite
    sign = np.uint32(np.uint32(half & np.uint32(0x8000)) << np.uint32(16))
    return np.uint32(np.float32(magnitude).view(np.uint32) | sign).view(np.float32)


@njit(**OPTIONS)
def _rounded(magnitude: Any, mantissa_bits: Any, smallest_normal: Any) -> Any:
    """Code, without sign, and value of a magnitude that is at most the format's largest: to nearest, ties to even.

    Adding 2^e, with e so large that FP32 can only hold multiples of the format's step, rounds to such a multiple; the
    low bits of the sum then count the steps. Below the smallest normal magnitude the step stays the same.
    """
    shift = np.uint32(_F32_MANTISSA_BITS - mantissa_bits)
    bits = np.float32(magnitude).view(np.uint32)
    binade = np.uint32(max(np.uint32(bits & _F32_EXPONENT), smallest_normal))
    rounder = np.uint32(binade + np.uint32(shift << np.uint32(_F32_MANTISSA_BITS))).view(np.float32)
    # FP32 addition rounds to nearest, ties to even, and the format's own even codes are those of an even step count.
    total = np.float32(np.float32(magnitude) + rounder)
    # 2^(m + 1) of them are the first code of the next binade: rounding up carries into the exponent by itself.
    steps = np.uint32(total.view(np.uint32) & np.uint32((4 << mantissa_bits) - 1))
    return np.uint32(steps + np.uint32(np.uint32(binade - smallest_normal) >> shift)), np.float32(total - rounder)


@njit(**OPTIONS)
def _e2m1(quotient: Any) -> Any:
    """The E2M1 code of an FP32 quotient, as `e2m1.encode` gives it: also code 0 for -0.0 and NaN."""
    magnitude = np.float32(abs(quotient))
    # A comparison with NaN is false, so NaN becomes the largest magnitude here and is told apart by the last line.
    magnitude = magnitude if magnitude < _E2M1_LARGEST else _E2M1_LARGEST
    code, _ = _rounded(magnitude, _E2M1_MANTISSA, _E2M1_NORMAL)
    signed = np.uint32(code | (_E2M1_SIGN if quotient < np.float32(0) else np.uint32(0)))
    return np.uint8(signed if quotient == quotient else np.uint32(0))


@njit(**OPTIONS)
def _e4m3(quotient: Any) -> Any:
    """The E4M3 code of an FP32 quotient, as `codes.saturate_to_e4m3` gives it: the sign bit is kept, of -0.0 too."""
    bits = np.float32(quotient).view(np.uint32)
    magnitude = np.float32(abs(quotient))
    magnitude = magnitude if magnitude < _E4M3_LARGEST else _E4M3_LARGEST
    code, _ = _rounded(magnitude, _E4M3_MANTISSA, _E4M3_NORMAL)
    code = code if quotient == quotient else _E4M3_NAN
    return np.uint8(np.uint32(code | np.uint32(np.uint32(bits & _F32_SIGN) >> _E4M3_SIGN_SHIFT)))


@njit(**OPTIONS)
def _pairwise_max(values: Array, half: Array, count: int) -> None:
    """The larger of each two neighbours."""
    for i in range(count):
        half[i] = max(values[2 * i], values[2 * i + 1])


@njit(**OPTIONS)
def _block_amax(weight: Array, longer: Array, shorter: Array, amax: Array) -> None:
    """Largest magnitude of each block of neighbours, a power of two of them.

    As a tree: a loop over each block would not become vector instructions.

    Args:
        longer: For half as many elements.
        shorter: For a quarter.
    """
    count = weight.size // 2
    for i in range(count):
        longer[i] = max(magnitude_bits(weight[2 * i]), magnitude_bits(weight[2 * i + 1]))
    while count > amax.size:
        count //= 2
        _pairwise_max(longer, shorter, count)
        longer, shorter = shorter, longer
    for i in range(amax.size):
        amax[i] = fp32(longer[i])


@njit(**OPTIONS)
def nvfp4_scales(scales: Array, weight_scale_2: Any, block_scales: Array) -> None:
    """Writes each block's E4M3 scale, and replaces its FP32 amax in `scales` by what its elements are divided by."""
    largest = np.float32(_E2M1_LARGEST * weight_scale_2)
    for i in range(scales.size):
        # The order of `scale_types._e4m3_scales`: 0 becomes 1 before the clamp, which would make 2^-9 of it.
        scale = np.float32(scales[i] / largest)
        scale = _ZERO_AMAX_SCALE if scale == np.float32(0) else scale
        scale = _SMALLEST_BLOCK_SCALE if scale < _SMALLEST_BLOCK_SCALE else scale
        saturated = scale if scale < _E4M3_LARGEST else _E4M3_LARGEST
        code, value = _rounded(saturated, _E4M3_MANTISSA, _E4M3_NORMAL)
        # NaN has become 448 by the comparisons above: code and divisor are NaN again, so that no decoder finds numbers.
        block_scales[i] = np.uint8(code if scale == scale else _E4M3_NAN)
        scales[i] = np.float32((value if scale == scale else scale) * weight_scale_2)


def _e8m0_scales(largest: float) -> Callable[[Array, Any, Array], None]:
    """As `nvfp4_scales`, of powers of two and without a scale of the tensor, for codes up to `largest`."""
    # All amaxes up to this one get exponent 0, less the bias.
    floor = np.float32(largest * 2.0**-E8M0_BIAS).view(np.uint32)

    @njit(**OPTIONS)
    def fill(scales: Array, unused: Any, block_scales: Array) -> None:
        for i in range(scales.size):
            # `scale_types._e8m0_scales` says why the bits of the amax give the exponent.
            bits = np.float32(scales[i]).view(np.uint32)
            steps = np.uint32(max(bits, floor) - floor)
            code = np.uint32(np.uint32(steps + _BELOW_A_BINADE) >> np.uint32(_F32_MANTISSA_BITS))
            # FP32 itself ends at exponent 1: what exponent 0 stands for is its subnormal 2^-127.
            value = np.uint32(code << np.uint32(_F32_MANTISSA_BITS)) if code > np.uint32(0) else _F32_E8M0_SMALLEST
            is_nan = bits > _F32_EXPONENT
            block_scales[i] = np.uint8(_E8M0_NAN if is_nan else code)
            scales[i] = scales[i] if is_nan else np.uint32(value).view(np.float32)

    return fill


def _tile_encoder(width: int, encode: Any, in_a_byte: int) -> Any:
    """Encodes blocks of `width` neighbours under divisors that are there already; arguments as of `_blocks_packer`."""

    @njit(**OPTIONS)
    def encode_blocks(blocks: Array, scales: Array, codes: Array) -> None:
        """One code a byte, from the bits of blocks [n, width] and their divisors [n]."""
        for block in range(scales.size):
            scale = scales[block]
            for i in range(width):
                # Divided, though a product with the reciprocal is faster: it breaks ties of BF16 weights otherwise.
                codes[block, i] = encode(np.float32(fp32(blocks[block, i]) / scale))

    @njit(**OPTIONS)
    def encode_tile(tile: Array, scales: Array, room: Array, packed: Array) -> None:
        """Bits of n * width elements to bytes of codes; `room` is for a code a byte."""
        shape = (scales.size, width)
        blocks = viewed(tile, shape, tile.dtype)
        if in_a_byte == 1:
            encode_blocks(blocks, scales, viewed(packed, shape, packed.dtype))
        else:
            encode_blocks(blocks, scales, viewed(room, shape, room.dtype))
            pairs = viewed(room, (packed.size,), np.uint16)
            for i in range(packed.size):
                # Two bytes 0H 0L, little-endian, become HL.
                packed[i] = np.uint8(pairs[i] | (pairs[i] >> np.uint16(4)))

    return encode_tile


@njit(**OPTIONS)
def _are_usual(divisors: Array) -> bool:
    """Whether all are numbers between `_LEAST_DIVISOR` and `_MOST_DIVISOR`."""
    others = np.uint32(0)
    for i in range(divisors.size):
        others |= np.uint32(0) if (divisors[i] >= _LEAST_DIVISOR) & (divisors[i] <= _MOST_DIVISOR) else np.uint32(1)
    return others == np.uint32(0)


@njit(**OPTIONS)
def _next_bf16(bound: float) -> Any:
    """The bits of the least BF16 magnitude above a bound, which by its last half step of FP32 is none itself."""
    return np.int16((np.int64(np.float64(bound).view(np.int64) + _BF16_STEP) >> _F64_BELOW_BF16) - _F64_TO_BF16_BIAS)


@njit(**OPTIONS)
def e2m1_bounds(divisors: Array, bounds: Array) -> None:
    """The bits of the least BF16 magnitudes whose quotients by usual divisors [n] have the next code, [4, n]."""
    for i in range(divisors.size):
        divisor = np.float64(divisors[i])
        bounds[0, i] = _next_bf16(divisor * _PAST_025)
        bounds[1, i] = _next_bf16(divisor * _FROM_075)
        bounds[2, i] = _next_bf16(divisor * _PAST_125)
        bounds[3, i] = _next_bf16(divisor * _FROM_175)


def _pairs_encoder(width: int, encode_tile: Any) -> Any:
    """Encodes blocks of `width` neighbours as `encode_tile` does, to E2M1.

    BF16 has few values: instead of a division and a rounding for each element, its bits are compared with those of the
    bounds of its block. Sixteen elements are a vector of AVX2 then, and were two.
    """

    @njit(**OPTIONS)
    def encode_blocks(tile: Array, blocks: Array, bounds: Array, codes: Array) -> None:
        for block in range(len(blocks)):
            # The next tile comes while this one is worked on, or its first look would wait for memory.
            prefetch(tile, TILE + block * width)
            past_025, from_075 = bounds[0, block], bounds[1, block]
            # A binade below the bounds at 1.25 and 1.75: how many binades an element is behind is how many of the
            # bounds it has behind it that are these doubled.
            below_125, below_175 = np.int16(bounds[2, block] - _BF16_BINADE), np.int16(bounds[3, block] - _BF16_BINADE)
            for i in range(width):
                bits = np.int16(blocks[block, i])
                magnitude = np.int16(bits & _BF16_MAGNITUDE)
                of_125 = np.int16(np.int16(max(magnitude, below_125) - below_125) >> np.int16(7))
                of_175 = np.int16(np.int16(max(magnitude, below_175) - below_175) >> np.int16(7))
                small = np.int16(np.int16(magnitude >= past_025) + np.int16(magnitude >= from_075))
                code = np.int16(small + min(of_125, np.int16(3)) + min(of_175, np.int16(2)))
                # The negative of -0.0, the least of all integers, is itself, and so has no sign either.
                sign = np.int16(8) if np.int16(-bits) > np.int16(0) else np.int16(0)
                codes[block, i] = np.uint16(code | sign)

    def encode(tile: Array, scales: Array, room: Array, codes: Array, packed: Array) -> None:
        """Bits of n * width elements to half as many bytes; `room` is for 4 * n of them, `codes` as in `pack`."""

    @overload(encode, strict=False)
    def encode_of_type(tile: Any, scales: Any, room: Any, codes: Any, packed: Any) -> Callable[..., None]:
        return encode_bf16 if tile.dtype == types.uint16 else encode_any

    def encode_any(tile: Array, scales: Array, room: Array, codes: Array, packed: Array) -> None:
        encode_tile(tile, scales, codes, packed)

    def encode_bf16(tile: Array, scales: Array, room: Array, codes: Array, packed: Array) -> None:
        if not _are_usual(scales):
            encode_tile(tile, scales, codes, packed)
            return
        bounds, shape = viewed(room, (4, scales.size), np.int16), (scales.size, width)
        e2m1_bounds(scales, bounds)
        encode_blocks(tile, viewed(tile, shape, tile.dtype), bounds, viewed(codes, shape, np.uint16))
        pairs = viewed(codes, (packed.size,), np.uint32)
        for i in range(packed.size):
            # Two words 000H 000L, little-endian, become HL.
            packed[i] = np.uint8(pairs[i] | (pairs[i] >> np.uint32(12)))

    return njit(**OPTIONS)(lambda tile, scales, room, codes, packed: encode(tile, scales, room, codes, packed))


def _blocks_packer(width: int, fill_scales: Any, encode: Any, in_a_byte: int) -> Any:
    """Packs blocks of `width` neighbours: a loop is compiled for each, in which all of these are known.

    Args:
        fill_scales: Of blocks, from their amaxes.
        encode: FP32 to a code.
        in_a_byte: Codes, 1 or 2.
    """
    encode_tile = _tile_encoder(width, encode, in_a_byte)
    encode_pairs = _pairs_encoder(width, encode_tile)

    @njit(**OPTIONS)
    def pack(
        weight: Array,
        weight_scale_2: float,
        longer: Array,
        shorter: Array,
        scales: Array,
        codes: Array,
        packed: Array,
        block_scales: Array,
    ) -> None:
        """Bits of n elements to n / in_a_byte bytes of codes and n / width scales.

        Room to work in is for a tile: `longer` for half its elements and `shorter` for a quarter, both of the
        type of the weight, `scales` for one of each block, and `codes` for two bytes of each element.
        """
        scale_2 = np.float32(weight_scale_2)
        # One step after another over a tile: each is a loop simple enough to become vector instructions.
        for start in range(0, weight.size, TILE):
            tile = weight[start : start + TILE]
            blocks = tile.size // width
            first = start // width
            _block_amax(tile, longer, shorter, scales[:blocks])
            fill_scales(scales[:blocks], scale_2, block_scales[first : first + blocks])
            first_byte = start // in_a_byte
            of_tile = packed[first_byte : first_byte + tile.size // in_a_byte]
            if in_a_byte == 1:
                encode_tile(tile, scales[:blocks], codes, of_tile)
            else:
                encode_pairs(tile, scales[:blocks], longer, codes, of_tile)

    return pack


def _blocks_unpacker(width: int, in_a_byte: int) -> Any:
    """Undoes what `_blocks_packer` makes, in FP32."""

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


encode_nvfp4 = _tile_encoder(NVFP4_BLOCK, _e2m1, in_a_byte=2)
pack_nvfp4 = _blocks_packer(NVFP4_BLOCK, nvfp4_scales, _e2m1, in_a_byte=2)
pack_mxfp4 = _blocks_packer(MX_BLOCK, _e8m0_scales(E2M1_MAX), _e2m1, in_a_byte=2)
pack_mxfp8 = _blocks_packer(MX_BLOCK, _e8m0_scales(E4M3_MAX), _e4m3, in_a_byte=1)
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
def pack_fp8(weight: Array, weight_scale: float, codes: Array) -> None:
    """Bits of n elements to n E4M3 codes."""
    scale = np.float32(weight_scale)
    for i in range(weight.size):
        codes[i] = _e4m3(np.float32(fp32(weight[i]) / scale))


@njit(**OPTIONS)
def unpack_fp8(codes: Array, weight_scale: float, e4m3: Array, out: Array) -> None:
    """Undoes `pack_fp8` in FP32."""
    scale = np.float32(weight_scale)
    for i in range(codes.size):
        out[i] = e4m3[codes[i]] * scale


@njit(**OPTIONS)
def _e4m3_scale(amax: Any) -> Any:
    """The FP32 scale that maps an FP32 amax to 448, as `scale_from_amax` gives it."""
    scale = np.float32(amax / _E4M3_LARGEST)
    # NaN is not below the smallest, and stays NaN.
    scale = _SMALLEST_SCALE if scale < _SMALLEST_SCALE else scale
    return _ZERO_AMAX_SCALE if amax == np.float32(0) else scale


@njit(**OPTIONS)
def pack_fp8_row(rows: Array, row_scales: Array, codes: Array) -> None:
    """Bits of [rows, columns] elements to an FP32 scale for each row and as many E4M3 codes as elements."""
    for row in range(rows.shape[0]):
        largest = magnitude_bits(rows[row, 0])
        for i in range(rows.shape[1]):
            largest = max(largest, magnitude_bits(rows[row, i]))
        scale = _e4m3_scale(fp32(largest))
        row_scales[row] = scale
        # A row is short enough to be in a core's cache still.
        for i in range(rows.shape[1]):
            codes[row, i] = _e4m3(np.float32(fp32(rows[row, i]) / scale))


@njit(**OPTIONS)
def unpack_fp8_row(codes: Array, row_scales: Array, e4m3: Array, out: Array) -> None:
    """Undoes `pack_fp8_row` in FP32."""
    for row in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            out[row, i] = e4m3[codes[row, i]] * row_scales[row]


@njit(**OPTIONS)
def _square_scale(bands: Array, band: int, block: int) -> Any:
    """The FP32 scale of one square of [bands, 128, blocks, 128]."""
    largest = magnitude_bits(bands[band, 0, block, 0])
    for row in range(FP8_BLOCK_SIDE):
        for i in range(FP8_BLOCK_SIDE):
            largest = max(largest, magnitude_bits(bands[band, row, block, i]))
    return _e4m3_scale(fp32(largest))


@njit(**OPTIONS)
def pack_fp8_block(bands: Array, block_scales: Array, codes: Array) -> None:
    """Bits of [bands, 128, blocks, 128] elements to [bands, blocks] FP32 scales and as many E4M3 codes as elements."""
    for band in range(block_scales.shape[0]):
        for block in range(block_scales.shape[1]):
            scale = _square_scale(bands, band, block)
            block_scales[band, block] = scale
            for row in range(FP8_BLOCK_SIDE):
                for i in range(FP8_BLOCK_SIDE):
                    codes[band, row, block, i] = _e4m3(np.float32(fp32(bands[band, row, block, i]) / scale))


@njit(**OPTIONS)
def unpack_fp8_block(codes: Array, block_scales: Array, e4m3: Array, out: Array) -> None:
    """Undoes `pack_fp8_block` in FP32."""
    for band in range(block_scales.shape[0]):
        # Row by row across all squares of a band, which is the order in memory.
        for row in range(FP8_BLOCK_SIDE):
            for block in range(block_scales.shape[1]):
                for i in range(FP8_BLOCK_SIDE):
                    out[band, row, block, i] = e4m3[codes[band, row, block, i]] * block_scales[band, block]


@njit(**OPTIONS)
def _int4(quotient: Any) -> Any:
    """The INT4 code of an FP32 quotient, counted from the lowest, as `codes.INT4` has it: also that of 0 for NaN."""
    inside = _INT4_HIGHEST if quotient > _INT4_HIGHEST else quotient
    inside = _INT4_LOWEST if inside < _INT4_LOWEST else inside
    # In two's complement the highest of four bits is -8 and here it is 8, so that it is the one to be turned.
    code = np.uint32((np.float32(inside + _INTEGERS).view(np.uint32) & np.uint32(15)) ^ np.uint32(8))
    return np.uint8(code if quotient == quotient else np.uint32(8))


@njit(**OPTIONS)
def _bf16_bits(value: Any) -> Any:
    """BF16 bits of an FP32 value, to nearest, ties to even; NaN becomes the one that PyTorch's scalars have."""
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(bits + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))
    return np.uint16(rounded if value == value else np.uint32(0x7FC0))


@njit(**OPTIONS)
def _int4_scales(scales: Array, group_scales: Array) -> None:
    """Writes each group's BF16 scale, and replaces its FP32 amax in `scales` by what its elements are divided by."""
    for i in range(scales.size):
        amax = scales[i]
        scale = np.float32(amax / _INT4_LARGEST)
        scale = _SMALLEST_SCALE if scale < _SMALLEST_SCALE else scale
        scale = _ZERO_AMAX_SCALE if amax == np.float32(0) else scale
        bits = _bf16_bits(scale)
        group_scales[i] = bits
        scales[i] = np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@njit(**OPTIONS)
def _int4_codes(parts: Array, parts_a_group: int, scales: Array, codes: Array) -> None:
    """Fills `codes` [n, 32] with one code a byte, from the bits of as many elements."""
    for part in range(parts.shape[0]):
        scale = scales[part // parts_a_group]
        for i in range(INT4_SMALL_GROUP):
            codes[part, i] = _int4(np.float32(fp32(parts[part, i]) / scale))


@njit(**OPTIONS)
def pack_int4(
    weight: Array,
    group: int,
    longer: Array,
    shorter: Array,
    scales: Array,
    codes: Array,
    packed: Array,
    group_scales: Array,
) -> None:
    """Bits of n elements to n/2 bytes of codes and BF16 bits of n/group scales; `group` is 32 or 128.

    Room to work in is as that of `_blocks_packer`.
    """
    parts_a_group = group // INT4_SMALL_GROUP
    pairs = viewed(codes, (codes.size // 2,), np.uint16)
    for start in range(0, weight.size, TILE):
        tile = weight[start : start + TILE]
        groups, first = tile.size // group, start // group
        _block_amax(tile, longer, shorter, scales[:groups])
        _int4_scales(scales[:groups], group_scales[first : first + groups])
        parts = (tile.size // INT4_SMALL_GROUP, INT4_SMALL_GROUP)
        _int4_codes(viewed(tile, parts, tile.dtype), parts_a_group, scales, viewed(codes, parts, codes.dtype))
        nibbles = packed[start // 2 : start // 2 + tile.size // 2]
        for i in range(nibbles.size):
            nibbles[i] = np.uint8(pairs[i] | (pairs[i] >> np.uint16(4)))


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
            values[group, i, 0] = (np.float32(pair & np.uint8(15)) + _INT4_LOWEST) * scale
            values[group, i, 1] = (np.float32(pair >> np.uint8(4)) + _INT4_LOWEST) * scale
