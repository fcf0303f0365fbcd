"""What a scale is stored as, and how it comes of an amax: one row a type."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantplug.formats.constants import E4M3_MAX, E4M3_SMALLEST_SUBNORMAL, F32_SMALLEST_NORMAL, ZERO_AMAX_SCALE


@dataclass(frozen=True)
class ScaleType:
    """How the scale of a block is stored.

    Attributes:
        largest: What a scale of the whole tensor maps the scale of its largest block to; None where the type reaches
            as far as FP32, so that it needs no second level.
        from_amax: From the amaxes of blocks, FP32 of any shape, and the FP32 scalar that they are to be mapped to, to
            scales of `dtype`: finite and above 0 whatever finite amax they are of.
        smallest: What a smaller scale is raised to; None where no amax of a model comes near it.
    """

    name: str
    dtype: torch.dtype
    largest: float | None
    from_amax: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
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


F32_SCALE = ScaleType("F32", torch.float32, None, _f32_scales)
E4M3_SCALE = ScaleType("E4M3", torch.float8_e4m3fn, E4M3_MAX, _e4m3_scales, E4M3_SMALLEST_SUBNORMAL)
BF16_SCALE = ScaleType("BF16", torch.bfloat16, None, _bf16_scales)
