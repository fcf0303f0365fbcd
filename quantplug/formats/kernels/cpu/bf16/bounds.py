"""What bits of BF16 are compared with instead of dividing them: the bits from which on a quotient has another code.

A quotient is rounded to FP32 before it is rounded to a code, so that it reaches a middle between two codes half a step
of FP32 before it, and passes it half a step behind. Ties go to the even code: a middle above an odd one is to be
reached, and one above an even one is to be passed.
"""

from typing import Any

import numpy as np
from numba import njit

from quantplug.compiled.arguments import Array
from quantplug.compiled.compiler import OPTIONS

MANTISSA_BITS, MAGNITUDE, SIGN, INFINITE = 7, 0x7FFF, 0x8000, 0x7F80
BINADE = 1 << MANTISSA_BITS

LANES = 16
"""Elements of BF16 in a vector of 256 bits."""

WORDS = LANES // 2
"""Of 32 bits, in such a vector."""

# FP64 holds the product of a bound, of 27 bits, and of a divisor, of 24; and BF16 the upper 16 bits of FP32.
_F64_BELOW_BF16 = np.int64(52 - 7)
_BF16_STEP = np.int64(1 << (52 - 7))
_F64_TO_BF16_BIAS = np.int64((1023 - 127) << 7)


@njit(**OPTIONS)
def next_bf16(bound: float) -> Any:
    """The bits of the least BF16 magnitude above a bound, which by its last half step of FP32 is none itself."""
    return np.int64((np.int64(np.float64(bound).view(np.int64) + _BF16_STEP) >> _F64_BELOW_BF16) - _F64_TO_BF16_BIAS)


@njit(**OPTIONS)
def numbers_between(divisors: Array, least: Any, most: Any) -> tuple[int, int]:
    """The first and the last number of a divisor between two: of scales of a byte, of which larger ones stand for more.

    Where there is none, the first is behind the last.
    """
    first, last = divisors.size, -1
    for i in range(divisors.size):
        if (divisors[i] >= least) & (divisors[i] <= most):
            first, last = min(first, i), i
    return first, last


@njit(**OPTIONS)
def spread_halves(number: int, words: Array) -> None:
    """A number of 16 bits over a vector, so that an instruction compares with it where it lies, and none reads it."""
    twice = np.uint32(np.uint32(number << 16) | np.uint32(number))
    for i in range(WORDS):
        words[i] = twice


@njit(**OPTIONS)
def spread_bytes(number: int, words: Array) -> None:
    """The same of 8 bits."""
    spread_halves((number << 8) | number, words)
