"""The kernels on GPU tensors: each is one launch of a Triton loop, for one weight or for a group of them.

Nothing waits for the GPU, but a group, whose addresses are copied there.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from quantplug.formats.kernels import reference, triton_loops

_BLOCKS = 128
"""Blocks of NVFP4 that one program works on."""

_TILE = 4096
"""Elements that one program works on where there are no blocks."""

_SQUARE_WARPS = 8
"""Of a program that holds a square of 128 x 128 elements in its registers."""

_ALIGNMENT = 16
_ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

bit_sums = reference.bit_sums


def amax(weight: torch.Tensor) -> torch.Tensor:
    rows = _rows(weight)
    largest = torch.zeros((), dtype=torch.int32, device=weight.device)
    with _on(weight):
        triton_loops.amax[(triton.cdiv(rows.numel(), _TILE),)](
            rows, *rows.stride(), rows.shape[1], rows.numel(), largest, ROWS=rows.shape[0] > 1, TILE=_TILE
        )
    return largest.view(torch.float32)


def pack_nvfp4(
    weight: torch.Tensor, weight_scale_2: torch.Tensor, codes: torch.Tensor, block_scales: torch.Tensor
) -> None:
    pack_nvfp4_group((weight,), weight_scale_2, codes, block_scales)


def pack_nvfp4_group(
    weights: Sequence[torch.Tensor], weight_scale_2: torch.Tensor, codes: torch.Tensor, block_scales: torch.Tensor
) -> None:
    first, blocks = weights[0].detach(), block_scales.numel() // len(weights)
    with _on(first):
        triton_loops.pack_nvfp4[(triton.cdiv(blocks, _BLOCKS), len(weights))](
            _source(weights),
            *first.stride(),
            weight_scale_2,
            codes,
            block_scales.view(torch.uint8),
            block_scales.shape[-1],
            blocks,
            ROWS=not first.is_contiguous(),
            **_kind(weights),
            BLOCKS=_BLOCKS,
        )


def unpack_nvfp4(
    codes: torch.Tensor, block_scales: torch.Tensor, weight_scale_2: torch.Tensor, values: torch.Tensor
) -> None:
    blocks = block_scales.numel()
    with _on(values):
        triton_loops.unpack_nvfp4[(triton.cdiv(blocks, _BLOCKS),)](
            codes, block_scales.view(torch.uint8), weight_scale_2, values, blocks, BLOCKS=_BLOCKS
        )


def pack_fp8(weight: torch.Tensor, weight_scale: torch.Tensor, codes: torch.Tensor) -> None:
    pack_fp8_group((weight,), weight_scale, codes)


def pack_fp8_group(weights: Sequence[torch.Tensor], weight_scale: torch.Tensor, codes: torch.Tensor) -> None:
    rows = [_rows(weight) for weight in weights]
    first, elements = rows[0], rows[0].numel()
    with _on(first):
        triton_loops.pack_fp8[(triton.cdiv(elements, _TILE), len(rows))](
            _source(rows),
            *first.stride(),
            first.shape[1],
            elements,
            weight_scale,
            codes.view(torch.uint8),
            ROWS=first.shape[0] > 1,
            **_kind(rows),
            TILE=_TILE,
        )


def unpack_fp8(codes: torch.Tensor, weight_scale: torch.Tensor, values: torch.Tensor) -> None:
    with _on(values):
        triton_loops.unpack_fp8[(triton.cdiv(values.numel(), _TILE),)](
            codes.view(torch.uint8), weight_scale, values, values.numel(), TILE=_TILE
        )


def pack_fp8_block(weight: torch.Tensor, codes: torch.Tensor, block_scales: torch.Tensor) -> None:
    pack_fp8_block_group((weight,), codes, block_scales)


def pack_fp8_block_group(weights: Sequence[torch.Tensor], codes: torch.Tensor, block_scales: torch.Tensor) -> None:
    first, squares = weights[0].detach(), block_scales.numel() // len(weights)
    with _on(first):
        triton_loops.pack_fp8_block[(squares, len(weights))](
            _source(weights),
            *first.stride(),
            codes.view(torch.uint8),
            block_scales,
            first.shape[1],
            squares,
            **_kind(weights),
            num_warps=_SQUARE_WARPS,
        )


def unpack_fp8_block(codes: torch.Tensor, block_scales: torch.Tensor, values: torch.Tensor) -> None:
    with _on(values):
        triton_loops.unpack_fp8_block[(block_scales.numel(),)](
            codes.view(torch.uint8), block_scales, values, values.shape[1], num_warps=_SQUARE_WARPS
        )


def _on(tensor: torch.Tensor) -> torch.cuda.device:
    """Triton launches on the current device, whichever the tensors are on."""
    return torch.cuda.device(tensor.device if tensor.device.type == "cuda" else -1)


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """The weight as one row if its elements follow each other, else as rows and columns; a copy above two axes."""
    weight = weight.detach()
    return weight if weight.dim() == 2 and not weight.is_contiguous() else weight.contiguous().view(1, -1)


def _source(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weight, or the addresses of several."""
    if len(weights) == 1:
        return weights[0].detach()
    return torch.tensor([weight.data_ptr() for weight in weights], device=weights[0].device)


def _kind(weights: Sequence[torch.Tensor]) -> dict[str, Any]:
    """What a loop must know of a source."""
    if len(weights) == 1:
        return {"ELEMENT": None, "ALIGNED": False}
    is_aligned = all(weight.data_ptr() % _ALIGNMENT == 0 for weight in weights)
    return {"ELEMENT": _ELEMENTS[weights[0].dtype], "ALIGNED": is_aligned}
