"""BF16 to E4M3 without a division, as numba compiles it: bits of elements against the bounds of their scale.

E4M3 has eight codes a binade, as long as they are not subnormal: how many binades an element lies behind a first bound,
and how many of seven bounds in its own binade, are together its code. Where one lies before that bound it is compared
with those of the subnormal codes too, in as much time again; only NaN is divided.
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
    INFINITE,
    LANES,
    MAGNITUDE,
    WORDS,
    next_bf16,
    numbers_between,
    spread_bytes,
    spread_halves,
)
from quantplug.formats.kernels.cpu.tiles import AHEAD, TILE

# From the code of 2^-5 on all binades are alike, and the middle below that code is where the one before it ends.
_FIRST_CODE, _LAST_CODE, _CODES_A_BINADE = 16, 126, 8
_FIRST_VALUE, _SUBNORMAL = 2.0**-5, 2.0**-9
_HALF_A_STEP = 2.0**-24  # of FP32, between 1 and 2
_SCALES = 256  # of a byte
# Bounds of whole elements, three and those of subnormal codes, and of bytes.
_BOUNDS, _SMALL, _STEPS = 3, _CODES_A_BINADE, _CODES_A_BINADE - 1
_ROWS = _BOUNDS + _SMALL + _STEPS
_AT_ONCE = 2 * LANES  # elements, whose codes are as long as one vector
_FEW = 2  # of a tile, with subnormal codes or zeros: after so many the others are taken to have them too
# Between these divisors no bound is a subnormal of BF16 or Inf.
_LEAST_DIVISOR, _MOST_DIVISOR = np.float32(2.0**-100), np.float32(2.0**100)

room_for_bounds = room_of(_SCALES, _ROWS, WORDS)
"""For those of all scales of a byte, uint32."""

room_for_bounds_of_one = room_of(_ROWS, WORDS)
"""For those of one divisor, uint32."""


@njit(**OPTIONS)
def _reaching(divisor: float, code: int) -> Any:
    """The least BF16 magnitude, bits, whose quotient has the code that is so many behind that of 2^-5."""
    if code == 0:  # Below it the codes are half as far apart. It is even: the middle is to be reached.
        return next_bf16(divisor * (_FIRST_VALUE * (1.0 - 2.0**-5 - _HALF_A_STEP / 2)))
    middle = 1.0 + (2 * code - 1) * 2.0**-4
    return next_bf16(divisor * (_FIRST_VALUE * (middle + (_HALF_A_STEP if code % 2 else -_HALF_A_STEP))))


@njit(**OPTIONS)
def _reaching_small(divisor: float, code: int) -> Any:
    """The same of a subnormal code, or of the one after the last of them."""
    middle, half_a_step = code - 0.5, _HALF_A_STEP / 2
    for binade in range(3):
        if middle >= 2**binade:
            half_a_step = _HALF_A_STEP * 2**binade
    return next_bf16(divisor * (_SUBNORMAL * (middle + (half_a_step if code % 2 else -half_a_step))))


@njit(**OPTIONS)
def _fill_bounds(divisor: Any, bounds: Array) -> None:
    first = _reaching(divisor, 0)
    counted_from = first - BINADE
    binades, codes = divmod(_LAST_CODE - _FIRST_CODE, _CODES_A_BINADE)
    spread_halves(counted_from, bounds[0])
    spread_halves(_reaching(divisor, codes) + binades * BINADE - counted_from, bounds[1])
    spread_halves(INFINITE - counted_from, bounds[2])
    for small in range(_SMALL):
        spread_halves(_reaching_small(divisor, small + 1) - 1, bounds[_BOUNDS + small])
    for step in range(_STEPS):
        spread_bytes(_reaching(divisor, step + 1) - first - 1, bounds[_BOUNDS + _SMALL + step])


@njit(**OPTIONS)
def bounds_of(divisor: Any, bounds: Array) -> bool:
    """What BF16 magnitudes are compared with that become codes, bits, by an FP32 divisor.

    The first is what they are counted from: where codes begin to be those of whole binades, a binade before 2^-5. The
    second, counted so, is the least that has the largest code. The third is Inf, and what is above it lies before the
    first or is NaN. Eight are the largest magnitudes before each subnormal code, and before the one after them. The
    others are bytes: how far into a binade an element is at most, in bits, that is not yet behind the first bound
    between two of its codes, the second, and so on.

    Gives whether the divisor is usual: by others nothing can be compared.
    """
    _fill_bounds(np.float64(divisor), bounds)
    return (divisor >= _LEAST_DIVISOR) & (divisor <= _MOST_DIVISOR)


@njit(**OPTIONS)
def bounds_of_scales(divisors: Array, bounds: Array) -> tuple[int, int]:
    """Those of the FP32 divisors of all scales of a byte, and the first and the last byte whose divisor is usual."""
    for i in range(divisors.size):
        _fill_bounds(np.float64(divisors[i]), bounds[i])
    return numbers_between(divisors, _LEAST_DIVISOR, _MOST_DIVISOR)


def blocks_encoder(width: int, encode_tile: Any) -> Any:
    """Encodes blocks of `width` neighbours as `encode_tile` does, to E4M3; a multiple of those at once."""

    def encode(tile: Array, scales: Array, divisors: Array, bounds: Array, usual: Any, codes: Array) -> None:
        """Bits of n * width elements to as many bytes; arguments as of E2M1's."""

    @overload(encode, strict=False)
    def encode_of_type(
        tile: Any, scales: Any, divisors: Any, bounds: Any, usual: Any, codes: Any
    ) -> Callable[..., None]:
        return encode_bf16 if tile.dtype == types.uint16 else encode_others

    def encode_others(tile: Array, scales: Array, divisors: Array, bounds: Array, usual: Any, codes: Array) -> None:
        encode_tile(tile, scales, divisors, codes)

    def encode_bf16(tile: Array, scales: Array, divisors: Array, bounds: Array, usual: Any, codes: Array) -> None:
        (first, last), with_small = usual, 0
        for block in range(scales.size):
            scale, done = scales[block], False
            if (scale >= first) & (scale <= last):
                done = True
                for start in range(block * width, (block + 1) * width, _AT_ONCE):
                    prefetch_nontemporal(tile, AHEAD + start)
                    if with_small < _FEW and _encode_vectors(tile, bounds[scale], codes, start):
                        continue
                    with_small += 1
                    done &= _encode_small_vectors(tile, bounds[scale], codes, start)
            if not done:
                whole = slice(block * width, (block + 1) * width)
                encode_tile(tile[whole], scales[block : block + 1], divisors, codes[whole])

    return njit(**OPTIONS)(
        lambda tile, scales, divisors, bounds, usual, codes: encode(tile, scales, divisors, bounds, usual, codes)
    )


def codes_encoder(encode_any: Any) -> Any:
    """Encodes elements of one divisor as `encode_any` does, to E4M3."""

    def encode(elements: Array, divisor: Any, bounds: Array, usual: bool, codes: Array) -> None:
        """Bits of n elements to as many codes.

        Args:
            divisor: FP32.
            bounds: Those of the divisor.
            usual: Whether elements can be compared by them.
        """

    @overload(encode, strict=False)
    def encode_of_type(elements: Any, divisor: Any, bounds: Any, usual: Any, codes: Any) -> Callable[..., None]:
        return encode_bf16 if elements.dtype == types.uint16 else encode_others

    def encode_others(elements: Array, divisor: Any, bounds: Array, usual: bool, codes: Array) -> None:
        encode_any(elements, divisor, codes)

    def encode_bf16(elements: Array, divisor: Any, bounds: Array, usual: bool, codes: Array) -> None:
        whole, with_small = elements.size // _AT_ONCE * _AT_ONCE if usual else 0, 0
        for start in range(0, whole, _AT_ONCE):
            prefetch_nontemporal(elements, AHEAD + start)
            if start % TILE == 0:
                with_small = 0
            if with_small < _FEW and _encode_vectors(elements, bounds, codes, start):
                continue
            with_small += 1
            if not _encode_small_vectors(elements, bounds, codes, start):
                encode_any(elements[start : start + _AT_ONCE], divisor, codes[start : start + _AT_ONCE])
        if whole < elements.size:
            encode_any(elements[whole:], divisor, codes[whole:])

    return njit(**OPTIONS)(
        lambda elements, divisor, bounds, usual, codes: encode(elements, divisor, bounds, usual, codes)
    )


def _vectors_encoder(small: bool) -> Any:
    """For compiled code: the codes of the vectors from an element on; False where one needs another way.

    Args:
        small: Whether subnormal codes are found too.
    """

    @intrinsic
    def encode(typing_context: Any, elements: Any, bounds: Any, codes: Any, start: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            *arrays, start = arguments
            kinds = signature.args[: len(arrays)]
            source, of_bounds, target = (
                Memory.of(context, builder, kind, array) for kind, array in zip(kinds, arrays, strict=True)
            )
            zero = context.get_constant(types.intp, 0)
            rows = [of_bounds.lanes(of_bounds.at(zero, row * WORDS), WORDS) for row in range(_ROWS)]
            whole = [row.as_lanes_of(16) for row in rows[: _BOUNDS + _SMALL]]
            steps = [row.as_lanes_of(8) for row in rows[_BOUNDS + _SMALL :]]
            first, most, infinite = whole[:_BOUNDS]
            bits = [source.lanes(source.at(start, vector * LANES), LANES) for vector in range(2)]
            behind: Lanes | int
            one, other = (vector & MAGNITUDE for vector in bits)
            if small:
                is_other = one.max(other).any_more(INFINITE)
                counted = [vector.above(first).min(most) for vector in (one, other)]
                behind = _in_turn(*(_counted(vector, whole[_BOUNDS:]) for vector in (one, other)))
            else:
                is_other = (one - first).max(other - first).any_more(infinite)
                counted = [(vector - first).min(most) for vector in (one, other)]
                behind = _CODES_A_BINADE
            target.write(_codes(bits, counted, behind, steps), target.at(start))
            return builder.not_(is_other)

        return types.boolean(elements, bounds, codes, types.intp), generate

    return encode


_encode_vectors, _encode_small_vectors = _vectors_encoder(small=False), _vectors_encoder(small=True)


def _codes(bits: list[Lanes], counted: list[Lanes], behind: Lanes | int, steps: list[Lanes]) -> Lanes:
    """E4M3 codes of the elements of two vectors, whose bytes take turns meanwhile.

    Args:
        counted: Their magnitudes, from the first bound on.
        behind: How many codes of subnormals, and the one after them, they have behind them.
    """
    one, other = counted
    inside = ((one & 0xFF) | (other << 8)).as_lanes_of(8) & (BINADE - 1)
    binades = (((one >> 4) & 0x78) | ((other << 4) & 0x7800)).as_lanes_of(8)
    signs = (((bits[0] >> 8) & 0x80) | (bits[1] & 0x8000)).as_lanes_of(8)
    codes = (binades + behind + _counted(inside, steps)) | signs
    return codes.taken(codes, [*range(0, _AT_ONCE, 2), *range(1, _AT_ONCE, 2)])


def _counted(lanes: Lanes, passed: list[Lanes]) -> Lanes:
    """How many of some bounds a lane has passed."""
    first, *others = (lanes.where_more_signed(bound, 1) for bound in passed)
    return sum(others, start=first)


def _in_turn(one: Lanes, other: Lanes) -> Lanes:
    """A byte of each of two vectors in turn, from lanes of 16 bits."""
    return (one | (other << 8)).as_lanes_of(8)
