"""A weight as FP32, a few rows at a time, so that packing never holds a whole FP32 copy of it."""

from collections.abc import Iterator

import torch

CHUNK_ELEMENTS = 1 << 18
"""1 MiB of FP32: the temporaries of one chunk stay in a CPU core's cache."""


def fp32_row_chunks(weight: torch.Tensor, row_multiple: int = 1) -> Iterator[torch.Tensor]:
    """Yields the rows of a non-empty weight in order, as contiguous FP32 tensors that are for reading only.

    Args:
        row_multiple: Every chunk but the last has a multiple of this many rows, so that no block is cut.
    """
    row_elements = weight.numel() // weight.shape[0]
    # Whole steps of `row_multiple` rows, and one such step at least, however long the rows are.
    rows = CHUNK_ELEMENTS // (row_elements * row_multiple) * row_multiple
    for chunk in torch.split(weight.detach(), max(rows, row_multiple)):
        # Of contiguous FP32 this copies nothing, and the caller gets the weight's own memory: hence for reading only.
        yield chunk.float().contiguous()
