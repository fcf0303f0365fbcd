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
from quantplug.compiled.compiler import OPTIONS, prefetch_nontemporal, room_of
from quantplug.compiled.vectors import Lanes, Memory
from quantplug.formats.kernels.cpu.bf16.bounds import (
    BINADE,
    LANES,
    MAGNITUDE,
    MANTISSA_BITS,
    SIGN,
    WORDS,
    next_bf16,
    numbers_between,
    spread_halves,
)
from quantplug.formats.kernels.cpu.tiles import AHEAD, LINE

# E2M1 changes its code in the middle between two of its values: at 0.25, 0.75, 1.25, 1.75, and at 2.5, 5 and 3.5, which
# are the last two of these doubled. Those at 0.75 and 1.75 are to be reached, the others to be passed.
_PAST_025, _FROM_075 = 0.25 + 2.0**-26, 0.75 - 2.0**-25
_PAST_125, _FROM_175 = 1.25 + 2.0**-24, 1.75 - 2.0**-24
_E2M1_SIGN = 8
_SCALES, _BOUNDS = 256, 5  # of a byte, and of each
_AT_ONCE = 4  # vectors whose codes are as long as one of them
# Between these divisors no bound is a subnormal of BF16, and no quotient is 0 but that of 0.
_LEAST_DIVISOR, _MOST_DIVISOR = np.float32(2.0**-100), np.float32(2.0**16)


room_for_bounds = room_of(_SCALES, _BOUNDS, WORDS)
"""For those of all scales of a byte, uint32."""


@njit(**OPTIONS)
def _are_between(scales: Array, first: int, last: int) -> bool:
    """Whether all are."""
    lowest, highest = scales[0], scales[0]
    for i in range(scales.size):
        lowest, highest = min(lowest, scales[i]), max(highest, scales[i])
    return (lowest >= first) & (highest <= last)


@njit(**OPTIONS)
def bounds_of_scales(divisors: Array, bounds: Array) -> tuple[int, int]:
    """What BF16 magnitudes are compared with that become codes, bits, by the FP32 divisors of the scales of a byte.

    The first two are the largest magnitudes before the codes of 0.5 and 1, which are to be passed. The next two are the
    least that have those of 1.5 and 2, a binade below: how many binades an element is behind is how many of the bounds
    at 1.25, 2.5 and 5, or at 1.75 and 3.5, it has behind it. The last is the least that has the code of 6, the largest.

    Gives the first and the last byte whose divisor is usual: by others nothing can be compared.
    """
    for i in range(divisors.size):
        divisor = np.float64(divisors[i])
        from_15 = next_bf16(divisor * _PAST_125)
        spread_halves(next_bf16(divisor * _PAST_025) - 1, bounds[i, 0])
        spread_halves(next_bf16(divisor * _FROM_075) - 1, bounds[i, 1])
        spread_halves(from_15 - BINADE, bounds[i, 2])
        spread_halves(next_bf16(divisor * _FROM_175) - BINADE, bounds[i, 3])
        spread_halves(from_15 + 2 * BINADE, bounds[i, 4])
    return numbers_between(divisors, _LEAST_DIVISOR, _MOST_DIVISOR)


def blocks_encoder(width: int, encode_tile: Any) -> Any:
    """Encodes blocks of `width` neighbours as `encode_tile` does, to E2M1."""
    encode_vectors, at_once = _vectors_encoder(width), _AT_ONCE * LANES

    def encode(tile: Array, scales: Array, divisors: Array, bounds: Array, usual: Any, packed: Array) -> None:
        """Bits of n * width elements to half as many bytes.

        Args:
            scales: The bytes of scales [n].
            divisors: What elements are divided by, FP32, of all bytes.
            bounds: Of all bytes.
            usual: The first and the last byte by which elements can be compared.
        """

    @overload(encode, strict=False)
    def encode_of_type(
        tile: Any, scales: Any, divisors: Any, bounds: Any, usual: Any, packed: Any
    ) -> Callable[..., None]:
        return encode_bf16 if tile.dtype == types.uint16 else encode_any

    def encode_any(tile: Array, scales: Array, divisors: Array, bounds: Array, usual: Any, packed: Array) -> None:
        encode_tile(tile, scales, divisors, packed)

    def encode_bf16(tile: Array, scales: Array, divisors: Array, bounds: Array, usual: Any, packed: Array) -> None:
        first, last = usual
        whole = tile.size // at_once * at_once if _are_between(scales, first, last) else 0
        for start in range(0, whole, at_once):
            for line in range(start, start + at_once, LINE):
                prefetch_nontemporal(tile, AHEAD + line)
            encode_vectors(tile, scales, bounds, packed, start)
        if whole < tile.size:
            encode_tile(tile[whole:], scales[whole // width :], divisors, packed[whole // 2 :])

    return njit(**OPTIONS)(
        lambda tile, scales, divisors, bounds, usual, packed: encode(tile, scales, divisors, bounds, usual, packed)
    )


def _vectors_encoder(width: int) -> Any:
    """For compiled code: the codes of the vectors from an element on, of blocks of `width`."""

    @intrinsic
    def encode(typing_context: Any, tile: Any, scales: Any, bounds: Any, packed: Any, start: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            *arrays, start = arguments
            kinds = signature.args[: len(arrays)]
            elements, scales, bounds, packed = (
                Memory.of(context, builder, kind, array) for kind, array in zip(kinds, arrays, strict=True)
            )
            first_block = builder.udiv(start, start.type(width))

            def codes_of(vector: int) -> Lanes:
                scale = builder.zext(builder.load(scales.at(first_block, vector * LANES // width)), start.type)
                bounds_of_it = builder.mul(scale, start.type(_BOUNDS * WORDS))
                words = (bounds.lanes(bounds.at(bounds_of_it, bound * WORDS), WORDS) for bound in range(_BOUNDS))
                compared = (word.as_lanes_of(16) for word in words)
                return _e2m1_codes(elements.lanes(elements.at(start, vector * LANES), LANES), *compared)

            codes = [codes_of(vector) for vector in range(_AT_ONCE)]
            packed.write(_pairs(*codes), packed.at(builder.udiv(start, start.type(2))))
            return context.get_dummy_value()

        return types.void(tile, scales, bounds, packed, types.intp), generate

    return encode


def _e2m1_codes(
    bits: Lanes, before_05: Lanes, before_1: Lanes, below_15: Lanes, below_2: Lanes, least_of_6: Lanes
) -> Lanes:
    """The codes of BF16 elements, in as many bits, by the bounds of their scale."""
    # Behind the largest code binades would go on being counted.
    magnitudes = (bits & MAGNITUDE).min(least_of_6)
    large = (magnitudes.above(below_15) >> MANTISSA_BITS) + (magnitudes.above(below_2) >> MANTISSA_BITS)
    codes = large + magnitudes.where_more_signed(before_05, 1) + magnitudes.where_more_signed(before_1, 1)
    # All bits but the sign are 0 in -0.0, which has no sign as a code.
    return codes + bits.where_more(SIGN, _E2M1_SIGN)


def _pairs(*codes: Lanes) -> Lanes:
    """Two codes a byte, from four vectors with a code in each 16 bits."""
    # Words 0b0a 0B0A, little-endian, of neighbours in the first and in the second vector; and those of the other two.
    first, second = ((one | (other << 8)).as_lanes_of(32) for one, other in (codes[:2], codes[2:]))
    lower = (first & 0xFFFF) | (second << 16)
    upper = (first >> 16) | (second & 0xFFFF0000)
    # A byte of each vector in turn, which are to come one vector after another.
    in_turn = (lower | (upper << 4)).as_lanes_of(8)
    return in_turn.taken(in_turn, [byte for vector in range(_AT_ONCE) for byte in range(vector, 32, _AT_ONCE)])
