"""The elements of weights and their codes, as numba compiles them: bits to FP32, and FP32 to the codes of a format.

A weight arrives as the integers of its bits, and their type says which float they are: uint16 is BF16, int16 is FP16,
uint32 is FP32 (NumPy has no BF16, numba's CPU code no FP16).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from quantplug.compiled.compiler import OPTIONS
from quantplug.formats.constants import E2M1_MAX, E4M3_MAX, INT4_HIGHEST, INT4_LOWEST

_F32_SIGN = np.uint32(0x80000000)
F32_EXPONENT = np.uint32(0x7F800000)
F32_MANTISSA_BITS = 23

# 1.0 is E2M1's smallest normal magnitude (exponent bias 1), 2^-6 is E4M3's (bias 7).
# Codes as (mantissa bits, FP32 bits of the smallest normal magnitude, largest magnitude).
_E2M1_MANTISSA, _E2M1_NORMAL, E2M1_LARGEST = 1, np.uint32(0x3F800000), np.float32(E2M1_MAX)
E4M3_MANTISSA, E4M3_NORMAL, E4M3_LARGEST = 3, np.uint32(0x3C800000), np.float32(E4M3_MAX)
_E2M1_SIGN, _E4M3_SIGN_SHIFT, E4M3_NAN = np.uint32(8), np.uint32(24), np.uint32(0x7F)

_INT4_HIGHEST, INT4_LOWEST_VALUE = np.float32(INT4_HIGHEST), np.float32(INT4_LOWEST)
# FP32 holds no fractions beside this number, so that a small one is rounded when it is added; the low bits are then
# those of its two's complement.
_INTEGERS = np.float32(1.5 * 2**F32_MANTISSA_BITS)


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
    special = np.uint32(shifted | F32_EXPONENT).view(np.float32)
    magnitude = special if exponent == np.uint32(0x0F800000) else finite
    sign = np.uint32(np.uint32(half & np.uint32(0x8000)) << np.uint32(16))
    return np.uint32(np.float32(magnitude).view(np.uint32) | sign).view(np.float32)


@njit(**OPTIONS)
def rounded(magnitude: Any, mantissa_bits: Any, smallest_normal: Any) -> Any:
    """Code, without sign, and value of a magnitude that is at most the format's largest: to nearest, ties to even.

    Adding 2^e, with e so large that FP32 can only hold multiples of the format's step, rounds to such a multiple; the
    low bits of the sum then count the steps. Below the smallest normal magnitude the step stays the same.
    """
    shift = np.uint32(F32_MANTISSA_BITS - mantissa_bits)
    bits = np.float32(magnitude).view(np.uint32)
    binade = np.uint32(max(np.uint32(bits & F32_EXPONENT), smallest_normal))
    rounder = np.uint32(binade + np.uint32(shift << np.uint32(F32_MANTISSA_BITS))).view(np.float32)
    # FP32 addition rounds to nearest, ties to even, and the format's own even codes are those of an even step count.
    total = np.float32(np.float32(magnitude) + rounder)
    # 2^(m + 1) of them are the first code of the next binade: rounding up carries into the exponent by itself.
    steps = np.uint32(total.view(np.uint32) & np.uint32((4 << mantissa_bits) - 1))
    return np.uint32(steps + np.uint32(np.uint32(binade - smallest_normal) >> shift)), np.float32(total - rounder)


@njit(**OPTIONS)
def e2m1_code(quotient: Any) -> Any:
    """The E2M1 code of an FP32 quotient, as `e2m1.encode` gives it: also code 0 for -0.0 and NaN."""
    magnitude = np.float32(abs(quotient))
    # A comparison with NaN is false, so NaN becomes the largest magnitude here and is told apart by the last line.
    magnitude = magnitude if magnitude < E2M1_LARGEST else E2M1_LARGEST
    code, _ = rounded(magnitude, _E2M1_MANTISSA, _E2M1_NORMAL)
    signed = np.uint32(code | (_E2M1_SIGN if quotient < np.float32(0) else np.uint32(0)))
    return np.uint8(signed if quotient == quotient else np.uint32(0))


@njit(**OPTIONS)
def e4m3_code(quotient: Any) -> Any:
    """The E4M3 code of an FP32 quotient, as `codes.saturate_to_e4m3` gives it: the sign bit is kept, of -0.0 too."""
    bits = np.float32(quotient).view(np.uint32)
    magnitude = np.float32(abs(quotient))
    magnitude = magnitude if magnitude < E4M3_LARGEST else E4M3_LARGEST
    code, _ = rounded(magnitude, E4M3_MANTISSA, E4M3_NORMAL)
    code = code if quotient == quotient else E4M3_NAN
    return np.uint8(np.uint32(code | np.uint32(np.uint32(bits & _F32_SIGN) >> _E4M3_SIGN_SHIFT)))


@njit(**OPTIONS)
def int4_code(quotient: Any) -> Any:
    """The INT4 code of an FP32 quotient, counted from the lowest, as `codes.INT4` has it: also that of 0 for NaN."""
    inside = _INT4_HIGHEST if quotient > _INT4_HIGHEST else quotient
    inside = INT4_LOWEST_VALUE if inside < INT4_LOWEST_VALUE else inside
    # In two's complement the highest of four bits is -8 and here it is 8, so that it is the one to be turned.
    code = np.uint32((np.float32(inside + _INTEGERS).view(np.uint32) & np.uint32(15)) ^ np.uint32(8))
    return np.uint8(code if quotient == quotient else np.uint32(8))


@njit(**OPTIONS)
def bf16_bits(value: Any) -> Any:
    """BF16 bits of an FP32 value, to nearest, ties to even; NaN becomes the one that PyTorch's scalars have."""
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(bits + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))
    return np.uint16(rounded if value == value else np.uint32(0x7FC0))
