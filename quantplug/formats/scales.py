"""From amax to the FP32 scale that maps it to a format's largest value."""

import torch

from quantplug.formats.chunks import fp32_row_chunks
from quantplug.formats.constants import F32_SMALLEST_NORMAL, ZERO_AMAX_SCALE


def weight_amax(weight: torch.Tensor) -> torch.Tensor:
    """max|weight| of a non-empty tensor, an FP32 scalar on its device; NaN where the weight holds a NaN."""
    largest = torch.zeros((), device=weight.device)
    for chunk in fp32_row_chunks(weight):
        # In place: a list of small results would settle between the chunks, and the heap grow to an FP32 copy.
        torch.maximum(largest, chunk.abs().amax(), out=largest)
    return largest


def scale_from_amax(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """`amax / largest` in FP32, elementwise, on the device of `amax`.

    The result of a finite amax is finite and above 0: 1.0 for amax 0, and never below the smallest normal FP32.
    """
    amax = amax.detach().float()
    # A tensor as divisor: by a Python number CUDA multiplies with the reciprocal, which is not the rounded quotient.
    quotient = amax / torch.full_like(amax, largest)
    return torch.where(amax == 0, ZERO_AMAX_SCALE, quotient.clamp(min=F32_SMALLEST_NORMAL))


def tensor_scale(weight: torch.Tensor, amax: torch.Tensor | None, largest: float) -> torch.Tensor:
    """FP32 scalar scale of a whole weight, on its device, from the given amax or, when None, from max|weight|."""
    # On the weight's device for the reason above: CUDA treats a divisor on the CPU as a Python number.
    amax = weight_amax(weight) if amax is None else amax.to(weight.device)
    return scale_from_amax(amax.reshape(()), largest)
