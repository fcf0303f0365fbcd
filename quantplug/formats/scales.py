"""The amax of a whole weight, and the scale made of it."""

import torch

from quantplug.formats.kernels import kernels_for
from quantplug.formats.scale_from_amax import scale_from_amax


def weight_amax(weight: torch.Tensor) -> torch.Tensor:
    """max|weight| of a non-empty tensor, an FP32 scalar on its device; NaN where the weight holds a NaN."""
    return kernels_for(weight).amax(weight)


def tensor_scale(weight: torch.Tensor, amax: torch.Tensor | None, largest: float) -> torch.Tensor:
    """FP32 scalar scale of a whole weight, on its device, from the given amax or, when None, from max|weight|."""
    # On the weight's device: CUDA treats a divisor on the CPU as a Python number, and multiplies with its reciprocal.
    amax = weight_amax(weight) if amax is None else amax.to(weight.device)
    return scale_from_amax(amax.reshape(()), largest)
