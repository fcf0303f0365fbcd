"""The scales of blocks, squares and rows, as numba compiles them: of an amax what is stored, and what is divided by."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from quantplug.compiled.arguments import Array
from quantplug.compiled.compiler import OPTIONS, room_of
from quantplug.formats.constants import (
    E4M3_SMALLEST_SUBNORMAL,
    E8M0_BIAS,
    E8M0_NAN,
    F32_SMALLEST_NORMAL,
    INT4_LARGEST,
    ZERO_AMAX_SCALE,
)
from quantplug.formats.kernels.cpu.codes import (
    E2M1_LARGEST,
    E4M3_LARGEST,
    E4M3_MANTISSA,
    E4M3_NAN,
    E4M3_NORMAL,
    F32_EXPONENT,
    F32_MANTISSA_BITS,
    bf16_bits,
    rounded,
)

_BELOW_A_BINADE = np.uint32((1 << F32_MANTISSA_BITS) - 1)
_E8M0_NAN = np.uint32(E8M0_NAN)
_INT4_LARGEST = np.float32(INT4_LARGEST)
_SMALLEST_BLOCK_SCALE = np.float32(E4M3_SMALLEST_SUBNORMAL)
_SMALLEST_SCALE = np.float32(F32_SMALLEST_NORMAL)
_ZERO_AMAX_SCALE = np.float32(ZERO_AMAX_SCALE)


a_byte_s = room_of(256)
"""For something of each scale of a byte."""


@njit(**OPTIONS)
def fill_divisors(values: Array, weight_scale_2: Any, divisors: Array) -> None:
    """What the elements of a block are divided by, of each scale of a byte, from what it stands for; all FP32."""
    for i in range(divisors.size):
        divisors[i] = np.float32(values[i] * weight_scale_2)


@njit(**OPTIONS)
def nvfp4_scales(amaxes: Array, weight_scale_2: Any, block_scales: Array) -> None:
    """The E4M3 scales of blocks from their FP32 amaxes."""
    largest = np.float32(E2M1_LARGEST * weight_scale_2)
    for i in range(amaxes.size):
        # The order of `scale_types._e4m3_scales`: 0 becomes 1 before the clamp, which would make 2^-9 of it.
        scale = np.float32(amaxes[i] / largest)
        scale = _ZERO_AMAX_SCALE if scale == np.float32(0) else scale
        scale = _SMALLEST_BLOCK_SCALE if scale < _SMALLEST_BLOCK_SCALE else scale
        saturated = scale if scale < E4M3_LARGEST else E4M3_LARGEST
        code, _ = rounded(saturated, E4M3_MANTISSA, E4M3_NORMAL)
        # NaN has become 448 by the comparisons above: the code is NaN's again, so that no decoder finds numbers.
        block_scales[i] = np.uint8(code if scale == scale else E4M3_NAN)


def e8m0_scales(largest: float) -> Callable[[Array, Any, Array], None]:
    """As `nvfp4_scales`, of powers of two and without a scale of the tensor, for codes up to `largest`."""
    # All amaxes up to this one get exponent 0, less the bias.
    floor = np.float32(largest * 2.0**-E8M0_BIAS).view(np.uint32)

    @njit(**OPTIONS)
    def fill(amaxes: Array, unused: Any, block_scales: Array) -> None:
        for i in range(amaxes.size):
            # `scale_types._e8m0_scales` says why the bits of the amax give the exponent.
            bits = np.float32(amaxes[i]).view(np.uint32)
            steps = np.uint32(max(bits, floor) - floor)
            code = np.uint32(np.uint32(steps + _BELOW_A_BINADE) >> np.uint32(F32_MANTISSA_BITS))
            block_scales[i] = np.uint8(_E8M0_NAN if bits > F32_EXPONENT else code)

    return fill


@njit(**OPTIONS)
def e4m3_scale(amax: Any) -> Any:
    """The FP32 scale that maps an FP32 amax to 448, as `scale_from_amax` gives it."""
    scale = np.float32(amax / E4M3_LARGEST)
    # NaN is not below the smallest, and stays NaN.
    scale = _SMALLEST_SCALE if scale < _SMALLEST_SCALE else scale
    return _ZERO_AMAX_SCALE if amax == np.float32(0) else scale


@njit(**OPTIONS)
def int4_scales(scales: Array, group_scales: Array) -> None:
    """Writes each group's BF16 scale, and replaces its FP32 amax in `scales` by what its elements are divided by."""
    for i in range(scales.size):
        amax = scales[i]
        scale = np.float32(amax / _INT4_LARGEST)
        scale = _SMALLEST_SCALE if scale < _SMALLEST_SCALE else scale
        scale = _ZERO_AMAX_SCALE if amax == np.float32(0) else scale
        bits = bf16_bits(scale)
        group_scales[i] = bits
        scales[i] = np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)
