"""A short mark of a weight's data, so that a resumed export notices that the model is no longer the same."""

import hashlib

import torch

from quantplug.formats.kernels import kernels_for


def fingerprint(weight: torch.Tensor) -> str:
    """A mark of the bits of a tensor of at least one dimension, computed where it lives.

    Any one changed element changes it, and so do exchanged rows or columns. It is no cryptographic hash.
    """
    sums = kernels_for(weight).bit_sums(weight) if weight.numel() else ()
    # 64 bits of it are enough to tell copies apart, and marks of every slice travel to all ranks.
    return hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype} {sums}".encode()).hexdigest()[:16]
