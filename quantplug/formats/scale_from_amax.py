"""From an amax to the FP32 scale that maps it to a format's largest value."""

import torch

from quantplug.formats.constants import F32_SMALLEST_NORMAL, ZERO_AMAX_SCALE


def scale_from_amax(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """`amax / largest` in FP32, elementwise, on the device of `amax`.

    The result of a finite amax is finite and above 0: 1.0 for amax 0, and never below the smallest normal FP32.
    """
    amax = amax.detach().float()
    # A tensor as divisor: by a Python number CUDA multiplies with the reciprocal, which is not the rounded quotient.
    quotient = amax / torch.full_like(amax, largest)
    return torch.where(amax == 0, ZERO_AMAX_SCALE, quotient.clamp(min=F32_SMALLEST_NORMAL))
