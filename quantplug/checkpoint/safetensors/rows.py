"""Slices of a safetensors file's tensors, each copied by its place in the file.

A mapped file needs no copy, but pages behind its end, where it has been cut since, end the process when they are
touched. A read that comes to the end too early is an error that can be told.
"""

import ctypes
import json
import math
import os
from collections.abc import Iterator

import torch

Index = tuple[int | slice, ...]

# What safetensors itself takes for the longest header (safetensors/src/tensor.rs, `MAX_HEADER_SIZE`).
_MOST_HEADER_BYTES = 100_000_000
_BLOCK_BYTES = 4 * 2**20


def data_starts(descriptor: int) -> dict[str, int]:
    """Where the data of each tensor begins in a file.

    Raises:
        ValueError: The file has no header of safetensors.
        EOFError: It ends before its header does.
    """
    length = int.from_bytes(_read(descriptor, 8, 0), "little")
    if length > _MOST_HEADER_BYTES:
        raise ValueError("its header is too long")
    header = json.loads(_read(descriptor, length, 8))
    try:
        entries = {name: entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
        return {name: 8 + length + int(start) for name, start in entries.items()}
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError("its header is not one of safetensors") from error


def read_slice(descriptor: int, start: int, shape: tuple[int, ...], dtype: torch.dtype, index: Index) -> torch.Tensor:
    """A part of a tensor, in memory of its own.

    Args:
        start: Where its data begins in the file.
        shape: Of the whole tensor.
        index: Numbers and slices without a step along its first axes; numbers come first.

    Raises:
        EOFError: The file ends before the data does.
    """
    while index and isinstance(index[0], int):
        start += range(shape[0])[index[0]] * math.prod(shape[1:]) * dtype.itemsize
        shape, index = shape[1:], index[1:]
    # From here on there are slices alone, and a scalar is one row.
    slices = [part for part in index if isinstance(part, slice)]
    rows = range(shape[0])[slices[0]] if slices else range(shape[0] if shape else 1)
    row_shape, inner = shape[1:], tuple(slices[1:])
    row_bytes = math.prod(row_shape) * dtype.itemsize
    sizes = tuple(len(range(size)[part]) for size, part in zip(row_shape, inner, strict=False))
    found = torch.empty((len(rows), *sizes, *row_shape[len(sizes) :]) if shape else (), dtype=dtype)
    if found.shape[1:] == row_shape[: max(len(shape) - 1, 0)]:
        # The rows lie in one stretch.
        _read_into(descriptor, found, start + rows.start * row_bytes)
        return found
    for first, last in _blocks(len(rows), max(_BLOCK_BYTES // max(row_bytes, 1), 1)):
        block = torch.empty((last - first, *row_shape), dtype=dtype)
        _read_into(descriptor, block, start + (rows.start + first) * row_bytes)
        found[first:last] = block[(slice(None), *inner)]
    return found


def _blocks(rows: int, step: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def _read(descriptor: int, nbytes: int, offset: int) -> bytes:
    found = os.pread(descriptor, nbytes, offset)
    if len(found) < nbytes:
        raise EOFError
    return found


def _read_into(descriptor: int, tensor: torch.Tensor, offset: int) -> None:
    """Fills a contiguous tensor with the bytes from `offset` on."""
    if not tensor.nbytes:
        return
    # By its address: a tensor gives its memory to nothing but NumPy, which is not needed here.
    left = memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
    while left:
        # A call reads at most 2 GiB on Linux, and may read less than that (read(2)).
        count = os.preadv(descriptor, [left], offset)
        if not count:
            raise EOFError
        left, offset = left[count:], offset + count
