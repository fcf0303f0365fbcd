"""A short mark of a weight's data, so that a resumed export notices that the model is no longer the same."""

import hashlib

import torch

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(weight: torch.Tensor) -> str:
    """A mark of the bits of a float tensor of at least one dimension, computed where it lives.

    Sums of the rows and of the columns, each weighted by its place, modulo 2^64: any one changed element changes it,
    and so do exchanged rows or columns. It is no cryptographic hash.
    """
    bits = weight.detach().contiguous().view(_BITS[weight.dtype.itemsize])
    rows = bits.reshape(bits.shape[0], -1)
    sums = [_weighted(rows.sum(dim=axis, dtype=torch.int64)) for axis in (0, 1)]
    return hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype} {sums}".encode()).hexdigest()[:16]


def _weighted(sums: torch.Tensor) -> int:
    places = torch.arange(1, sums.numel() + 1, device=sums.device) * 2 - 1
    return int((sums * places).sum())
