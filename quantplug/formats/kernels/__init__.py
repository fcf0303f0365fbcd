"""The loops over a weight's elements, in one set of functions for each kind of device, all of the same bits.

    reference  plain PyTorch, on any device
    cpu        fused and multi-threaded, compiled on the user's machine by numba

`kernels_for` is the only place that chooses.
"""

from functools import cache

import torch

from quantplug.formats.kernels import reference
from quantplug.formats.kernels.base import Kernels

__all__ = ["Kernels", "kernels_for"]

_FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def kernels_for(weight: torch.Tensor) -> Kernels:
    """The fastest kernels for a weight of this device and dtype."""
    if weight.device.type == "cpu" and weight.dtype in _FUSED_DTYPES:
        return _cpu_kernels()
    return reference


@cache
def _cpu_kernels() -> Kernels:
    """Those of numba, which is imported with the first weight that is packed and not with quantplug."""
    try:
        from quantplug.formats.kernels import cpu
    except ImportError:  # Not here, not for this version of Python or NumPy, or told not to compile.
        return reference
    return cpu
