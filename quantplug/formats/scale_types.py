"""What a scale is stored as, and how it comes of an amax: one row a type."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantplug.formats.constants import (
    E4M3_MAX,
    E4M3_SMALLEST_SUBNORMAL,
    E8M0_BIAS,
    E8M0_NAN,
    F32_SMALLEST_NORMAL,
    ZERO_AMAX_SCALE,
)

# Of FP32.
_MANTISSA_BITS = 23
_BINADE = 1 << _MANTISSA_BITS


@dataclass(frozen=True)
class ScaleType:
    """How the scale of a block is stored.

    Attributes:
        largest: What a scale of the whole tensor maps the scale of its largest block to; None where the type reaches
            as far as FP32, so that it needs no second level.
        from_amax: From the amaxes of blocks, FP32 of any shape, and the FP32 scalar that they are to be mapped to, to
            scales of `dtype`: finite and above 0 whatever finite amax they are of.
        decode: Scales of `dtype` to the FP32 values that codes are multiplied by, exactly.
        smallest: What a smaller scale is raised to; None where no amax of a model comes near it.
    """

    name: str
    dtype: torch.dtype
    largest: float | None
    from_amax: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    smallest: float | None = None


def scale_from_amax(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """`amax / largest` in FP32, elementwise, on the device of `amax`.

    The result of a finite amax is finite and above 0: 1.0 for amax 0, and never below the smallest normal FP32.
    """
    amax = amax.detach().float()
    # A tensor as divisor: by a Python number CUDA multiplies with the reciprocal, which is not the rounded quotient.
    return _f32_scales(amax, torch.full_like(amax, largest))


def _f32_scales(amaxes: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    return torch.where(amaxes == 0, ZERO_AMAX_SCALE, (amaxes / largest).clamp(min=F32_SMALLEST_NORMAL))


def _e4m3_scales(amaxes: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    scales = amaxes / largest
    # Asked of the quotient and not of the amax, as ModelOpt does: one that underflows gives 1, and codes of 0.
    scales = torch.where(scales == 0, ZERO_AMAX_SCALE, scales)
    # E4M3 would round a tiny scale to 0, by which codes cannot be divided, and one above 448 to NaN.
    return scales.clamp(E4M3_SMALLEST_SUBNORMAL, E4M3_MAX).to(torch.float8_e4m3fn)


def _bf16_scales(amaxes: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    scales = _f32_scales(amaxes, largest)
    # Of NaN PyTorch's own rounding makes one pattern or another, as it is in a vector or behind the last one.
    return scales.to(torch.bfloat16).masked_fill_(scales.isnan(), torch.nan)


def _e8m0_scales(amaxes: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """The exponent of the smallest power of two under which no amax is above the largest code, plus the bias.

    [MX] 6.3 rounds down instead: the scale is the power of two in the amax, less that in the largest code. Amaxes of up
    to 2 times that power then stand against codes of up to 1.5 times it (6) or 1.75 (448), and saturate: of amaxes
    spread evenly over a binade two in five with E2M1, one in five with E4M3. Rounded up none does, which is what
    ModelOpt (modelopt/torch/quantization/qtensor/mxfp8_tensor.py, mxfp4_tensor.py: ceil of log2(amax / largest)),
    NVIDIA's recipe of MXFP8 (arXiv 2506.08027, section 3.1) and torchao's RCEIL do. Zeros get the smallest scale.
    """
    # The bits of magnitudes count steps of FP32, 2^23 a binade: their difference, in binades and rounded up, is the
    # exponent. A logarithm would be rounded, and leave outside what is just above a border.
    steps = amaxes.float().view(torch.int32) - largest.view(torch.int32)
    exponents = (steps + (_BINADE - 1) >> _MANTISSA_BITS) + E8M0_BIAS
    return torch.where(amaxes.isnan(), E8M0_NAN, exponents.clamp(min=0)).to(torch.uint8)


def _of_e8m0(scales: torch.Tensor) -> torch.Tensor:
    # Exact, the smallest one too: 2^-127 is a subnormal of FP32.
    return scales.view(torch.float8_e8m0fnu).float()


F32_SCALE = ScaleType("F32", torch.float32, None, _f32_scales, torch.Tensor.float)
E4M3_SCALE = ScaleType("E4M3", torch.float8_e4m3fn, E4M3_MAX, _e4m3_scales, torch.Tensor.float, E4M3_SMALLEST_SUBNORMAL)
# As integers: what reads or writes these files knows an exponent as U8, and few tools the type F8_E8M0.
E8M0_SCALE = ScaleType("E8M0", torch.uint8, None, _e8m0_scales, _of_e8m0)
BF16_SCALE = ScaleType("BF16", torch.bfloat16, None, _bf16_scales, torch.Tensor.float)
