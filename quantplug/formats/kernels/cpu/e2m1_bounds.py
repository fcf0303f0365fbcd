"""BF16 to E2M1 without a division, as numba compiles it: bits of elements against the bounds of their scale.

A scale of one byte has 256 values, so that the bounds of all are found once for a piece of a weight. BF16 has few
values too: instead of a division and a rounding for each element, its bits are compared with the bounds.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic, overload

from quantplug.compiled.arguments import Array
from quantplug.compiled.compiler import OPTIONS, prefetch, room_of
from quantplug.compiled.vectors import Lanes, Memory
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
_BF16_MANTISSA_BITS, _BF16_MAGNITUDE, _BF16_SIGN = 7, 0x7FFF, 0x8000
_BF16_BINADE = 1 << _BF16_MANTISSA_BITS
_E2M1_SIGN = 8
_SCALES, _BOUNDS = 256, 5  # of a byte, and of each
# Between these divisors no bound is a subnormal of BF16, and no quotient is 0 but that of 0.
_LEAST_DIVISOR, _MOST_DIVISOR = np.float32(2.0**-100), np.float32(2.0**16)


room_for_bounds = room_of(_SCALES, _BOUNDS)
"""For those of all scales of a byte, uint32."""


@njit(**OPTIONS)
def _are_between(scale_bytes: Array, first: int, last: int) -> bool:
    """Whether all are."""
    lowest, highest = scale_bytes[0], scale_bytes[0]
    for i in range(scale_bytes.size):
        lowest, highest = min(lowest, scale_bytes[i]), max(highest, scale_bytes[i])
    return (lowest >= first) & (highest <= last)


@njit(**OPTIONS)
def _next_bf16(bound: float) -> Any:
    """The bits of the least BF16 magnitude above a bound, which by its last half step of FP32 is none itself."""
    return np.int64((np.int64(np.float64(bound).view(np.int64) + _BF16_STEP) >> _F64_BELOW_BF16) - _F64_TO_BF16_BIAS)


@njit(**OPTIONS)
def _twice(bits: int) -> Any:
    """In both halves of a word: a word can be spread over a vector as it is read, and half a word cannot."""
    return np.uint32(np.uint32(bits << 16) | np.uint32(bits))


@njit(**OPTIONS)
def bounds_of_scales(values: Array, scale_2: Any, bounds: Array) -> tuple[int, int]:
    """What BF16 magnitudes are compared with whose quotients by scales [n] become codes, bits [n, 5].

    A scale's FP32 value, times the scale above it, is what is divided by; of one that is not usual the bounds are none.
    The first two are the largest magnitudes before the codes of 0.5 and 1, which are to be passed. The next two are the
    least that have those of 1.5 and 2, a binade below: how many binades an element is behind is how many of the bounds
    at 1.25, 2.5 and 5, or at 1.75 and 3.5, it has behind it. The last is the least that has the code of 6, the largest.

    Gives the first and the last scale that is usual, and so are those between them: of bytes that stand for numbers
    above 0 a larger one stands for a larger number. Where there is none, the first is behind the last.
    """
    first, last = values.size, -1
    for i in range(values.size):
        scale = np.float32(values[i] * scale_2)
        if (scale >= _LEAST_DIVISOR) & (scale <= _MOST_DIVISOR):
            first, last = min(first, i), i
        divisor = np.float64(scale)
        from_15 = _next_bf16(divisor * _PAST_125)
        bounds[i, 0] = _twice(_next_bf16(divisor * _PAST_025) - 1)
        bounds[i, 1] = _twice(_next_bf16(divisor * _FROM_075) - 1)
        bounds[i, 2] = _twice(from_15 - _BF16_BINADE)
        bounds[i, 3] = _twice(_next_bf16(divisor * _FROM_175) - _BF16_BINADE)
        bounds[i, 4] = _twice(from_15 + 2 * _BF16_BINADE)
    return first, last


def pairs_encoder(width: int, encode_tile: Any) -> Any:
    """Encodes blocks of `width` neighbours as `encode_tile` does, to E2M1."""
    encode_block = _block_encoder(width)

    def encode(tile: Array, scales: Array, scale_bytes: Array, bounds: Array, usual: Any, packed: Array) -> None:
        """Bits of n * width elements to half as many bytes.

        Args:
            scales: FP32 divisors [n].
            scale_bytes: What stands for them.
            bounds: Of all scales.
            usual: The first and the last byte that have bounds.
        """

    @overload(encode, strict=False)
    def encode_of_type(
        tile: Any, scales: Any, scale_bytes: Any, bounds: Any, usual: Any, packed: Any
    ) -> Callable[..., None]:
        return encode_bf16 if tile.dtype == types.uint16 else encode_any

    def encode_any(tile: Array, scales: Array, scale_bytes: Array, bounds: Array, usual: Any, packed: Array) -> None:
        encode_tile(tile, scales, packed)

    def encode_bf16(tile: Array, scales: Array, scale_bytes: Array, bounds: Array, usual: Any, packed: Array) -> None:
        first, last = usual
        if not _are_between(scale_bytes, first, last):
            encode_tile(tile, scales, packed)
            return
        for block in range(scales.size):
            # The next tile comes while this one is worked on, or its first look would wait for memory.
            prefetch(tile, TILE + block * width)
            encode_block(tile, scale_bytes, bounds, packed, block)

    return njit(**OPTIONS)(
        lambda tile, scales, scale_bytes, bounds, usual, packed: encode(
            tile, scales, scale_bytes, bounds, usual, packed
        )
    )


def _block_encoder(width: int) -> Any:
    """For compiled code: the codes of the block that has a number, in width / 2 bytes."""

    @intrinsic
    def encode(
        typing_context: Any, tile: Any, scale_bytes: Any, bounds: Any, packed: Any, block: Any
    ) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            *arrays, block = arguments
            kinds = signature.args[: len(arrays)]
            elements, scales, bounds, packed = (
                Memory.of(context, builder, kind, array) for kind, array in zip(kinds, arrays, strict=True)
            )
            scale = builder.zext(builder.load(scales.at(block)), block.type)
            of_scale = builder.mul(scale, block.type(_BOUNDS))
            words = (bounds.spread(bounds.at(of_scale, bound), width // 2) for bound in range(_BOUNDS))
            compared = (word.as_lanes_of(16) for word in words)
            bits = elements.lanes(elements.at(builder.mul(block, block.type(width))), width)
            codes = _e2m1_codes(bits, *compared)
            packed.write(_pairs(codes), packed.at(builder.mul(block, block.type(width // 2))))
            return context.get_dummy_value()

        return types.void(tile, scale_bytes, bounds, packed, types.intp), generate

    return encode


def _e2m1_codes(
    bits: Lanes, before_05: Lanes, before_1: Lanes, below_15: Lanes, below_2: Lanes, least_of_6: Lanes
) -> Lanes:
    """The codes of BF16 elements, in as many bits, by the bounds of their scale."""
    # Behind the largest code binades would go on being counted.
    magnitudes = (bits & _BF16_MAGNITUDE).min(least_of_6)
    large = (magnitudes.above(below_15) >> _BF16_MANTISSA_BITS) + (magnitudes.above(below_2) >> _BF16_MANTISSA_BITS)
    codes = large + magnitudes.where_more_signed(before_05, 1) + magnitudes.where_more_signed(before_1, 1)
    # All bits but the sign are 0 in -0.0, which has no sign as a code.
    return codes + bits.where_more(_BF16_SIGN, _E2M1_SIGN)


def _pairs(codes: Lanes) -> Lanes:
    """Two codes a byte, from lanes of 16 bits each."""
    # Two words 000H 000L, little-endian, become HL.
    pairs = codes.as_lanes_of(32)
    return (pairs | (pairs >> 12)).narrowed(8)
