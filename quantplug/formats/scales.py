"""The amax of a whole weight, which the scale of a tensor is made of."""

import torch

from quantplug.formats.kernels import kernels_for


def weight_amax(weight: torch.Tensor) -> torch.Tensor:
    """max|weight| of a non-empty tensor, an FP32 scalar on its device; NaN where the weight holds a NaN."""
    return kernels_for(weight).amax(weight)
