"""A short mark of a weight's data, so that a resumed export notices that the model is no longer the same."""

import hashlib

import torch

from quantplug.export.plan.source import Rows, ScaledRows
from quantplug.formats.kernels import kernels_for


def fingerprint(rows: Rows) -> str:
    """A mark of the bits of rows of at least one dimension, or of their codes and scales, computed where they live.

    Any one changed element changes it, and so do exchanged rows or columns. It is no cryptographic hash.
    """
    if isinstance(rows, torch.Tensor):
        return _mark(rows)
    # Amaxes that a quantizer has for blocks make bytes as values do.
    tensors = tuple(rows) if isinstance(rows, ScaledRows) else rows.packed.tensors.values()
    return hashlib.sha256(" ".join(map(_mark, tensors)).encode()).hexdigest()[:16]


def _mark(weight: torch.Tensor) -> str:
    # Two codes at a time, as kernels have loops for 16 bits and none for 8.
    if weight.dtype.itemsize == 1 and weight.shape[-1] % 2 == 0 and weight.is_contiguous():
        weight = weight.view(torch.bfloat16)
    sums = kernels_for(weight).bit_sums(weight) if weight.numel() else ()
    # 64 bits of it are enough to tell copies apart, and marks of every slice travel to all ranks.
    return hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype} {sums}".encode()).hexdigest()[:16]
