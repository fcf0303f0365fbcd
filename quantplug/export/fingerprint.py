"""A short mark of a weight's data, so that a resumed export notices that the model is no longer the same."""

import hashlib

import torch

from quantplug.formats.chunks import CHUNK_ELEMENTS

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(weight: torch.Tensor) -> str:
    """A mark of the bits of a tensor of at least one dimension, computed where it lives.

    Sums of the rows and of the columns, each weighted by its place, modulo 2^64: any one changed element changes it,
    and so do exchanged rows or columns. It is no cryptographic hash.
    """
    if weight.numel() == 0:
        return hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype}".encode()).hexdigest()[:16]
    bits = weight.detach().view(_BITS[weight.dtype.itemsize])
    rows = bits.reshape(bits.shape[0], -1)
    by_row, by_column = (rows.new_zeros(size, dtype=torch.int64) for size in rows.shape)
    # A few rows at a time: a sum of 16-bit integers makes a 64-bit copy of all of them.
    step = max(1, CHUNK_ELEMENTS // rows.shape[1])
    for chunk, of_rows in zip(rows.split(step), by_row.split(step), strict=True):
        wide = chunk.long()
        of_rows.copy_(wide.sum(dim=1))
        by_column += wide.sum(dim=0)
    sums = [_weighted(by_column), _weighted(by_row)]
    return hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype} {sums}".encode()).hexdigest()[:16]


def _weighted(sums: torch.Tensor) -> int:
    places = torch.arange(1, sums.numel() + 1, device=sums.device) * 2 - 1
    return int((sums * places).sum())
