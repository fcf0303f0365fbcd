"""FP32 to codes and scales and back, in Triton: what the loops of the GPU kernels do to each element.

Codes and E4M3 scales are made and read with integers, as on a CPU (`cpu.codes`): not every GPU converts FP8. A GPU
rounds `/` of FP32 otherwise than IEEE, and multiplies with the reciprocal where the divisor is a constant: `div_rn`
does neither.
"""

import triton
import triton.language as tl

from quantplug.formats.constants import (
    E2M1_MAX,
    E4M3_MAX,
    E4M3_SMALLEST_SUBNORMAL,
    E8M0_BIAS,
    E8M0_NAN,
    F32_SMALLEST_NORMAL,
    INT4_HIGHEST,
    INT4_LARGEST,
    INT4_LOWEST,
    ZERO_AMAX_SCALE,
)

MAGNITUDE = tl.constexpr(0x7FFFFFFF)
"""All bits of FP32 but its sign."""

E2M1_LARGEST, E4M3_LARGEST = tl.constexpr(E2M1_MAX), tl.constexpr(E4M3_MAX)

_E4M3_SMALLEST = tl.constexpr(E4M3_SMALLEST_SUBNORMAL)
_INT4_LARGEST, _INT4_HIGHEST, _INT4_LOWEST = (
    tl.constexpr(INT4_LARGEST),
    tl.constexpr(INT4_HIGHEST),
    tl.constexpr(INT4_LOWEST),
)
_ZERO_AMAX_SCALE = tl.constexpr(ZERO_AMAX_SCALE)
_E8M0_SMALLEST, _E8M0_NAN = tl.constexpr(2.0**-E8M0_BIAS), tl.constexpr(E8M0_NAN)
_SMALLEST_SCALE = tl.constexpr(F32_SMALLEST_NORMAL)

_EXPONENT = tl.constexpr(0x7F800000)
_MANTISSA_BITS = tl.constexpr(23)
# FP32 holds no fractions beside this number: see `loops._INTEGERS`.
_INTEGERS = tl.constexpr(1.5 * 2.0**23)
_BF16_NAN = tl.constexpr(0x7FC0)
_BELOW_A_BINADE = tl.constexpr((1 << 23) - 1)

# FP32 mantissa bits more than the code's, FP32 bits of its smallest normal magnitude, and where steps are counted.
_E2M1_SHIFT, _E2M1_NORMAL, _E2M1_STEPS = tl.constexpr(22), tl.constexpr(0x3F800000), tl.constexpr(0x07)
_E4M3_SHIFT, _E4M3_NORMAL, _E4M3_STEPS = tl.constexpr(20), tl.constexpr(0x3C800000), tl.constexpr(0x1F)
_E2M1_SIGN, _E4M3_SIGN, _E4M3_NAN = tl.constexpr(0x8), tl.constexpr(0x80), tl.constexpr(0x7F)
_E2M1_SIGN_SHIFT, _E4M3_SIGN_SHIFT = tl.constexpr(28), tl.constexpr(24)

# Scales between which a quotient of 16-bit values needs no care, and nor does its sign: see `rounded_quotient`.
_LEAST_SCALE, _LARGEST_SCALE = tl.constexpr(2.0**-49), tl.constexpr(2.0**14)

# What a code's bits, moved to the end of FP32's exponent, are too small by: 2^(127 - bias of the code).
_E2M1_BIAS, _E4M3_BIAS = tl.constexpr(2.0**126), tl.constexpr(2.0**120)


@triton.jit
def fp32(values: tl.tensor) -> tl.tensor:
    # BF16 is the upper half of FP32. Triton's interpreter converts some of its subnormals to 0, moving bits is exact.
    if values.dtype == tl.bfloat16:
        return (values.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:  # noqa: RET505
        return values.to(tl.float32)


@triton.jit
def e4m3_scale(amax: tl.tensor, scale_2: tl.tensor, largest: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """E4M3 code and value of the scale that maps the amax of a block to `largest`, for blocks [n] of one weight."""
    scale = tl.div_rn(amax, scale_2 * largest)
    is_nan = scale != scale
    # The order of `scale_types._e4m3_scales`. A comparison with NaN is false, so NaN is remembered and put back.
    scale = tl.where(scale == 0, _ZERO_AMAX_SCALE, scale)
    scale = tl.where(scale > _E4M3_SMALLEST, scale, _E4M3_SMALLEST)
    scale = tl.where(scale < E4M3_LARGEST, scale, E4M3_LARGEST)
    code, value = _rounded(scale, _E4M3_SHIFT, _E4M3_NORMAL, _E4M3_STEPS)
    return tl.where(is_nan, _E4M3_NAN, code), tl.where(is_nan, float("nan"), value)


@triton.jit
def e8m0_scale(amax: tl.tensor, LARGEST: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """E8M0 code of the scale under which the amax of a block is at most LARGEST, and 1 / the scale, which is exact.

    `scale_types._e8m0_scales` says why the bits of the amax give the exponent.
    """
    # Floats of at least 0 are in the order of their bits; all amaxes up to this one get exponent 0.
    floor = tl.full(amax.shape, LARGEST * _E8M0_SMALLEST, tl.float32).to(tl.int32, bitcast=True)
    bits = amax.to(tl.int32, bitcast=True)
    code = (tl.maximum(bits, floor) - floor + _BELOW_A_BINADE) >> _MANTISSA_BITS
    # 1 / 2^(code - 127) has exponent 254 - code, above FP32's subnormals for every amax that is finite.
    inverse = ((254 - code) << _MANTISSA_BITS).to(tl.float32, bitcast=True)
    is_nan = bits > _EXPONENT
    return tl.where(is_nan, _E8M0_NAN, code), tl.where(is_nan, float("nan"), inverse)


@triton.jit
def f32_scale(amax: tl.tensor, LARGEST: tl.constexpr) -> tl.tensor:
    """The FP32 scale that maps an amax to LARGEST, as `scale_from_amax` gives it."""
    # A divisor that is a tensor: by a constant the compiler multiplies with its reciprocal.
    scale = tl.div_rn(amax, tl.full((), LARGEST, tl.float32))
    scale = tl.where(scale < _SMALLEST_SCALE, _SMALLEST_SCALE, scale)
    return tl.where(amax == 0, _ZERO_AMAX_SCALE, scale)


@triton.jit
def int4_group_scale(amax: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """BF16 bits and FP32 value of the scale that maps the amax of a group to 7.5, as `scale_types` gives it."""
    scale = f32_scale(amax, _INT4_LARGEST)
    bits = scale.to(tl.int32, bitcast=True)
    # To nearest, ties to even: a half less one, and that one too where the last bit that stays is odd.
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    bits = tl.where(scale == scale, bits, _BF16_NAN)
    return bits, (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def rounded_quotient(
    values: tl.tensor,
    divisor: tl.tensor,
    largest: tl.tensor,
    is_ordinary: tl.tensor,
    SHORT: tl.constexpr,
) -> tl.tensor:
    """`values / divisor`, rounded as IEEE says, and at most `largest`, or just beside it; NaN stays.

    A GPU divides by some ten instructions and a branch. Where values have at most 11 bits, as those of SHORT types do,
    the product with the rounded reciprocal needs a single correction by what it leaves over. That this is the rounded
    quotient tests/formats/kernels/test_quotient.py has tried for all of them; here no step may leave FP32's range.
    """
    if SHORT:
        if is_ordinary:
            reciprocal = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
            most = divisor * largest
            clamped = tl.clamp(values, most * -1, most, propagate_nan=tl.PropagateNan.ALL)
            product = clamped * reciprocal
            # An FMA rounds once, at its end: this is what the product leaves over, and is still to be divided.
            left = tl.fma(product, divisor * -1, clamped)
            quotient = tl.fma(left, reciprocal, product)
        else:
            quotient = saturated(tl.div_rn(values, divisor), largest)
    else:
        quotient = saturated(tl.div_rn(values, divisor), largest)
    return quotient


@triton.jit
def saturated(quotient: tl.tensor, largest: tl.tensor) -> tl.tensor:
    # Without being told to, a GPU's minimum and maximum drop NaN, and a broken weight would become a finite one.
    return tl.clamp(quotient, -largest, largest, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def e2m1_code(quotient: tl.tensor) -> tl.tensor:
    """The E2M1 code of a quotient that is at most 6 or just beside it, as `e2m1.encode` gives it."""
    code, _ = _rounded(tl.abs(quotient), _E2M1_SHIFT, _E2M1_NORMAL, _E2M1_STEPS)
    signed = code | tl.where(quotient < 0, _E2M1_SIGN, 0)
    return tl.where(quotient == quotient, signed, 0)


@triton.jit
def int4_code(values: tl.tensor, scale: tl.tensor, SHORT: tl.constexpr) -> tl.tensor:
    """The INT4 code of `values / scale` [groups, n], scales [groups, 1], counted from the lowest; of NaN that of 0."""
    # One branch for all groups of a program: that of a zero group, 1, is as good as any.
    ordinary = (scale >= _LEAST_SCALE) & (scale <= _LARGEST_SCALE)
    is_ordinary = tl.min(tl.min(ordinary.to(tl.int32), axis=1), axis=0) > 0
    quotient = rounded_quotient(values, scale, -_INT4_LOWEST, is_ordinary, SHORT)
    inside = tl.where(quotient > _INT4_HIGHEST, _INT4_HIGHEST, quotient)
    inside = tl.where(inside < _INT4_LOWEST, _INT4_LOWEST, inside)
    # Two's complement has the highest of four bits for -8, and here it is 8.
    code = ((inside + _INTEGERS).to(tl.int32, bitcast=True) & 0xF) ^ 0x8
    return tl.where(quotient == quotient, code, -_INT4_LOWEST)


@triton.jit
def e4m3_quotient(values: tl.tensor, scale: tl.tensor, SHORT: tl.constexpr) -> tl.tensor:
    """`values / scale`, at most 448 or just beside it."""
    is_ordinary = (scale >= _LEAST_SCALE) & (scale <= _LARGEST_SCALE)
    return rounded_quotient(values, scale, E4M3_LARGEST, is_ordinary, SHORT)


@triton.jit
def e4m3_code(quotient: tl.tensor, values: tl.tensor) -> tl.tensor:
    """The E4M3 code of a quotient of values, as `codes.saturate_to_e4m3` gives it; the sign, of NaN too, is theirs."""
    code, _ = _rounded(tl.abs(quotient), _E4M3_SHIFT, _E4M3_NORMAL, _E4M3_STEPS)
    code = tl.where(quotient == quotient, code, _E4M3_NAN)
    return code | tl.where(values.to(tl.int32, bitcast=True) < 0, _E4M3_SIGN, 0)


@triton.jit
def _rounded(
    magnitude: tl.tensor, SHIFT: tl.constexpr, NORMAL: tl.constexpr, STEPS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Code and value of a magnitude, to nearest, ties to even: `loops._rounded` says how."""
    binade = tl.maximum(magnitude.to(tl.int32, bitcast=True) & _EXPONENT, NORMAL)
    rounder = (binade + (SHIFT << _MANTISSA_BITS)).to(tl.float32, bitcast=True)
    total = magnitude + rounder
    steps = total.to(tl.int32, bitcast=True) & STEPS
    return steps + ((binade - NORMAL) >> SHIFT), total - rounder


@triton.jit
def nearest_e2m1(magnitude: tl.tensor) -> tl.tensor:
    """The E2M1 magnitude that is nearest to an FP32 one: 6 to all above."""
    _, nearest = _rounded(saturated(magnitude, E2M1_LARGEST), _E2M1_SHIFT, _E2M1_NORMAL, _E2M1_STEPS)
    return nearest


@triton.jit
def e2m1_value(code: tl.tensor) -> tl.tensor:
    """FP32 value of the E2M1 code in the lower four bits, as `e2m1.decode` gives it."""
    magnitude = ((code & 0x7) << _E2M1_SHIFT).to(tl.float32, bitcast=True) * _E2M1_BIAS
    return _signed(magnitude, (code & _E2M1_SIGN) << _E2M1_SIGN_SHIFT)


@triton.jit
def int4_value(code: tl.tensor) -> tl.tensor:
    """FP32 value of an INT4 code in the lower four bits."""
    return (code + _INT4_LOWEST).to(tl.float32)


@triton.jit
def e4m3_value(code: tl.tensor) -> tl.tensor:
    """FP32 value of an E4M3 code in the lower eight bits, without an instruction that converts FP8."""
    magnitude = ((code & 0x7F) << _E4M3_SHIFT).to(tl.float32, bitcast=True) * _E4M3_BIAS
    magnitude = tl.where((code & 0x7F) == _E4M3_NAN, float("nan"), magnitude)
    return _signed(magnitude, (code & _E4M3_SIGN) << _E4M3_SIGN_SHIFT)


@triton.jit
def e8m0_value(code: tl.tensor) -> tl.tensor:
    """FP32 value of an E8M0 code: FP32's own exponent, but for 0, which stands for 2^-127 there, and 255 for NaN."""
    value = (code << _MANTISSA_BITS).to(tl.float32, bitcast=True)
    value = tl.where(code == 0, _E8M0_SMALLEST, value)
    return tl.where(code == _E8M0_NAN, float("nan"), value)


@triton.jit
def _signed(magnitude: tl.tensor, sign: tl.tensor) -> tl.tensor:
    """With a sign that is FP32's sign bit: `-` would be a subtraction from 0, and give 0 no sign."""
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
