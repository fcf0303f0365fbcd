"""BF16 to E2M1 without a division, as numba compiles it: the bits of elements against the bounds of their block."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from quantplug.compiled.arguments import Array
from quantplug.compiled.compiler import OPTIONS, prefetch, viewed
from quantplug.formats.kernels.cpu.tiles import TILE

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


def pairs_encoder(width: int, encode_tile: Any) -> Any:
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
        """Bits of n * width elements to half as many bytes.

        Args:
            room: For 4 * n elements.
            codes: For two bytes of each.
        """

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
