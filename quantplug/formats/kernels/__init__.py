"""The loops over a weight's elements, in one set of functions for each kind of device, all of the same bits.

    reference  plain PyTorch, on any device
    cpu        fused and multi-threaded, compiled on the user's machine by numba
    cuda       fused, compiled for the user's GPU by Triton, and taken where they prove themselves (`proof`)

`kernels_for` is the only place that chooses.
"""

import logging
import subprocess
from functools import cache

import torch

from quantplug.formats.kernels import reference
from quantplug.formats.kernels.proof import gives_the_bits_of_the_reference
from quantplug.formats.kernels.protocol import Encoded, Kernels

__all__ = ["Encoded", "Kernels", "kernels_for"]

# What checkpoints and models hold. Anything else, such as FP64, is rare enough for the reference.
_FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_log = logging.getLogger(__name__)


def kernels_for(weight: torch.Tensor) -> Kernels:
    """The fastest kernels for a weight of this device and dtype."""
    if weight.dtype in _FUSED_DTYPES:
        match weight.device.type:
            case "cpu":
                return _cpu_kernels()
            case "cuda":
                return _cuda_kernels(weight.dtype, weight.device)
    return reference


@cache
def _cpu_kernels() -> Kernels:
    """The kernels compiled by numba where that is installed, else the reference.

    numba is imported with the first weight that is packed and not with quantplug: readers of checkpoints need no numba,
    and should not wait for its import.
    """
    try:
        from quantplug.formats.kernels.cpu import kernels
    except ImportError:  # Not here, not for this version of Python or NumPy, or told not to compile.
        return reference
    return kernels


# Proved for each dtype and device: Triton compiles other code for each, and a host may hold GPUs of two kinds.
@cache
def _cuda_kernels(dtype: torch.dtype, device: torch.device) -> Kernels:
    """Triton's kernels where they run and give the reference's bits, else the reference.

    The first weight of each dtype on each device finds that out; later ones are told from the cache.
    """
    try:
        from triton.errors import TritonError

        from quantplug.formats.kernels.cuda import kernels
    except ImportError:  # As in builds of PyTorch for CPUs and for some GPUs.
        return reference
    try:
        if gives_the_bits_of_the_reference(kernels, dtype, device):
            return kernels
        reason = "Triton's kernels round otherwise than they should"
    # No C compiler, which Triton needs, or a GPU that it does not compile for.
    except (TritonError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        reason = f"{type(error).__name__}: {error}"
    _log.warning("Weights on %s are packed by plain PyTorch, to the same bytes but slower: %s", device, reason)
    return reference
