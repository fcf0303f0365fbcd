"""The kernels on GPU tensors: each is one launch of a Triton loop, for one weight or for a group of them.

Nothing waits for the GPU, but a group, whose addresses are copied there.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from quantplug.formats.codes import E2M1
from quantplug.formats.constants import FP8_BLOCK_SIDE
from quantplug.formats.encoding import (
    FP8_BLOCK_ENCODING,
    FP8_ENCODING,
    FP8_ROW_ENCODING,
    INT4_32_ENCODING,
    INT4_ENCODING,
    MXFP4_ENCODING,
    MXFP8_ENCODING,
    NVFP4_ENCODING,
    Encoding,
)
from quantplug.formats.kernels import reference
from quantplug.formats.kernels.cuda import loops
from quantplug.formats.kernels.protocol import Encoded, Loops
from quantplug.formats.scale_types import E8M0_SCALE
from quantplug.formats.search import triton_loops as search_loops
from quantplug.formats.search.candidates import FOUND, TAKEN, ScaleSearch

_BLOCKS = 128
"""Blocks of neighbours that one program works on."""

_IN_GROUPS = 2048
"""Elements of INT4 that one program works on, in groups of 32 or of 128: those of `_BLOCKS` blocks of NVFP4."""

_TILE = 4096
"""Elements that one program works on where there are no blocks."""

_ROW_TILE = 1024
"""Columns that the program of a row works on at a time: experts' rows are one to a few times as long."""

_SQUARE_WARPS = 8
"""Warps of a program that holds a square of 128 x 128 elements in its registers: 64 elements a thread."""

_ALIGNMENT = 16
_ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

# Sums of integers are the same in any order, so the reference gives its own bits on a GPU too.
bit_sums = reference.bit_sums


def amax(weight: torch.Tensor) -> torch.Tensor:
    rows = _rows(weight)
    # FP32 bits as an integer, 0 being those of 0.0: programs add to their maximum in any order, with one result.
    largest = torch.zeros((), dtype=torch.int32, device=weight.device)
    with _on(weight):
        loops.amax[(triton.cdiv(rows.numel(), _TILE),)](
            rows, *rows.stride(), rows.shape[1], rows.numel(), largest, ROWS=rows.shape[0] > 1, TILE=_TILE
        )
    return largest.view(torch.float32)


def pack(encoding: Encoding, weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    _loops(encoding).pack(weights, encoded)


def unpack(encoding: Encoding, encoded: Encoded, values: torch.Tensor) -> None:
    _loops(encoding).unpack(encoded, values)


def _pack_blocks(encoding: Encoding, weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    _launch_blocks(loops.pack_blocks, weights, encoded, **_blocks_of(encoding))


def _pack_given(weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    _launch_blocks(search_loops.pack_nvfp4_given, weights, encoded, BLOCKS=_BLOCKS)


def _pack_searched(search: ScaleSearch, weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    device = weights[0].device
    multiples = torch.tensor(search.multiples, dtype=torch.float32, device=device)
    offsets = torch.tensor(search.offsets, dtype=torch.int32, device=device)
    counts = {"MULTIPLES": len(multiples), "OFFSETS": len(offsets), "BLOCKS": _BLOCKS}
    # Products and sums that become one instruction would round otherwise: see `search_loops`.
    beside = (multiples, offsets, encoded.importance)
    _launch_blocks(search_loops.pack_nvfp4, weights, encoded, *beside, **counts, enable_fp_fusion=False)


def _launch_blocks(
    kernel: Any, weights: Sequence[torch.Tensor], encoded: Encoded, *beside: torch.Tensor | None, **options: Any
) -> None:
    first, block_scales = weights[0].detach(), encoded.block_scales
    blocks = block_scales.numel() // len(weights)
    with _on(first):
        kernel[(triton.cdiv(blocks, _BLOCKS), len(weights))](
            _source(weights),
            *first.stride(),
            encoded.whole,
            encoded.codes.view(torch.uint8),
            block_scales.view(torch.uint8),
            block_scales.shape[-1],
            blocks,
            *beside,
            ROWS=not first.is_contiguous(),
            **_kind(weights),
            **options,
        )


# Unpacking has no group form: readers take one weight at a time, and values in FP32 are eight times their codes.
def _unpack_blocks(encoding: Encoding, encoded: Encoded, values: torch.Tensor) -> None:
    for of_weight, of_values in zip(encoded.of_each(), values, strict=True):
        block_scales = of_weight.block_scales
        blocks = block_scales.numel()
        with _on(values):
            loops.unpack_blocks[(triton.cdiv(blocks, _BLOCKS),)](
                of_weight.codes.view(torch.uint8),
                block_scales.view(torch.uint8),
                of_weight.whole,
                of_values,
                blocks,
                **_blocks_of(encoding),
            )


def _blocks_of(encoding: Encoding) -> dict[str, Any]:
    """What a loop over blocks of neighbours must be told of an encoding, when it is compiled."""
    return {
        "WIDTH": encoding.block.columns,
        "POWERS": encoding.scale == E8M0_SCALE,
        "PAIRS": encoding.code == E2M1,
        "BLOCKS": _BLOCKS,
    }


def _pack_fp8(weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    # This list also keeps the copies that `_rows` may make alive: `_source` holds addresses, not tensors.
    rows = [_rows(weight) for weight in weights]
    first, elements = rows[0], rows[0].numel()
    with _on(first):
        loops.pack_fp8[(triton.cdiv(elements, _TILE), len(rows))](
            _source(rows),
            *first.stride(),
            first.shape[1],
            elements,
            encoded.tensor_scales,
            encoded.codes.view(torch.uint8),
            ROWS=first.shape[0] > 1,
            **_kind(rows),
            TILE=_TILE,
        )


def _unpack_fp8(encoded: Encoded, values: torch.Tensor) -> None:
    for of_weight, of_values in zip(encoded.of_each(), values, strict=True):
        elements = of_values.numel()
        with _on(values):
            loops.unpack_fp8[(triton.cdiv(elements, _TILE),)](
                of_weight.codes.view(torch.uint8), of_weight.tensor_scales, of_values, elements, TILE=_TILE
            )


def _pack_fp8_row(weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    first = weights[0].detach()
    rows, columns = first.shape
    with _on(first):
        loops.pack_fp8_row[(rows, len(weights))](
            _source(weights),
            *first.stride(),
            encoded.codes.view(torch.uint8),
            encoded.block_scales,
            rows,
            columns,
            **_kind(weights),
            TILES=triton.cdiv(columns, _ROW_TILE),
            TILE=_ROW_TILE,
        )


def _unpack_fp8_row(encoded: Encoded, values: torch.Tensor) -> None:
    for of_weight, of_values in zip(encoded.of_each(), values, strict=True):
        rows, columns = of_values.shape
        with _on(values):
            loops.unpack_fp8_row[(rows, triton.cdiv(columns, _ROW_TILE))](
                of_weight.codes.view(torch.uint8), of_weight.block_scales, of_values, columns, TILE=_ROW_TILE
            )


def _pack_fp8_block(weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    first, block_scales = weights[0].detach(), encoded.block_scales
    rows, columns = first.shape
    squares = block_scales[0].numel()
    # One program a square: its amax is then a reduction within the program, and no element is read a second time.
    with _on(first):
        loops.pack_fp8_block[(squares, len(weights))](
            _source(weights),
            *first.stride(),
            encoded.codes.view(torch.uint8),
            block_scales,
            rows,
            columns,
            block_scales.shape[-1],
            squares,
            PARTIAL=_has_partial_squares(rows, columns),
            **_kind(weights),
            num_warps=_SQUARE_WARPS,
        )


def _unpack_fp8_block(encoded: Encoded, values: torch.Tensor) -> None:
    for of_weight, of_values in zip(encoded.of_each(), values, strict=True):
        rows, columns = of_values.shape
        with _on(values):
            loops.unpack_fp8_block[(of_weight.block_scales.numel(),)](
                of_weight.codes.view(torch.uint8),
                of_weight.block_scales,
                of_values,
                rows,
                columns,
                of_weight.block_scales.shape[-1],
                PARTIAL=_has_partial_squares(rows, columns),
                num_warps=_SQUARE_WARPS,
            )


def _pack_int4(weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
    first, group_scales = weights[0].detach(), encoded.block_scales
    groups = group_scales.numel() // len(weights)
    sizes = _group_sizes(encoded)
    with _on(first):
        loops.pack_int4[(triton.cdiv(groups, sizes["BLOCKS"]), len(weights))](
            _source(weights),
            *first.stride(),
            encoded.codes,
            group_scales.view(torch.int16),
            group_scales.shape[-1],
            groups,
            ROWS=not first.is_contiguous(),
            **_kind(weights),
            **sizes,
        )


def _unpack_int4(encoded: Encoded, values: torch.Tensor) -> None:
    sizes = _group_sizes(encoded)
    for of_weight, of_values in zip(encoded.of_each(), values, strict=True):
        groups = of_weight.block_scales.numel()
        with _on(values):
            loops.unpack_int4[(triton.cdiv(groups, sizes["BLOCKS"]),)](
                of_weight.codes, of_weight.block_scales.view(torch.int16), of_values, groups, **sizes
            )


def _group_sizes(encoded: Encoded) -> dict[str, int]:
    """How many columns share a scale of INT4, and how many such groups one program works on."""
    group = encoded.codes.shape[-1] * 2 // encoded.block_scales.shape[-1]
    return {"BLOCKS": _IN_GROUPS // group, "GROUP": group}


def _has_partial_squares(rows: int, columns: int) -> bool:
    return rows % FP8_BLOCK_SIDE != 0 or columns % FP8_BLOCK_SIDE != 0


_LOOPS: Mapping[Encoding, Loops] = {
    **{
        encoding: Loops(partial(_pack_blocks, encoding), partial(_unpack_blocks, encoding))
        for encoding in (NVFP4_ENCODING, MXFP4_ENCODING, MXFP8_ENCODING)
    },
    **{
        NVFP4_ENCODING.searched(search): Loops(
            _pack_given if search.is_given else partial(_pack_searched, search), partial(_unpack_blocks, NVFP4_ENCODING)
        )
        for search in (*FOUND, *TAKEN)
    },
    FP8_ENCODING: Loops(_pack_fp8, _unpack_fp8),
    FP8_ROW_ENCODING: Loops(_pack_fp8_row, _unpack_fp8_row),
    FP8_BLOCK_ENCODING: Loops(_pack_fp8_block, _unpack_fp8_block),
    INT4_ENCODING: Loops(_pack_int4, _unpack_int4),
    INT4_32_ENCODING: Loops(_pack_int4, _unpack_int4),
}
"""The encodings that have Triton loops. One that is not here is worked on by the reference: right, but slower."""


def _loops(encoding: Encoding) -> Loops:
    return _LOOPS.get(encoding) or reference.loops_for(encoding)


def _on(tensor: torch.Tensor) -> torch.cuda.device:
    """Makes the tensor's GPU the current one: Triton launches there, whichever GPU the tensors are on.

    -1 changes nothing, which is for tensors on the CPU under Triton's interpreter.
    """
    return torch.cuda.device(tensor.device if tensor.device.type == "cuda" else -1)


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """The weight as one row if its elements follow each other, else as rows and columns; a copy above two axes."""
    weight = weight.detach()
    # The loops know two strides. Weights that are packed have two axes; only the amax of others comes here with more.
    return weight if weight.dim() == 2 and not weight.is_contiguous() else weight.contiguous().view(1, -1)


def _source(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weight itself, or an int64 tensor of the addresses of several."""
    if len(weights) == 1:
        return weights[0].detach()
    # Experts are parameters of their own, at addresses of their own. Copying them together would double their memory.
    return torch.tensor([weight.data_ptr() for weight in weights], device=weights[0].device)


def _kind(weights: Sequence[torch.Tensor]) -> dict[str, Any]:
    """What a loop must be told, when it is compiled, to read what `_source` gives."""
    # Of a tensor Triton finds dtype and alignment out itself; of addresses in a table it knows neither.
    if len(weights) == 1:
        return {"ELEMENT": None, "ALIGNED": False}
    is_aligned = all(weight.data_ptr() % _ALIGNMENT == 0 for weight in weights)
    return {"ELEMENT": _ELEMENTS[weights[0].dtype], "ALIGNED": is_aligned}
