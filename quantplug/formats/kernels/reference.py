"""The kernels in plain PyTorch, on any device: what the others must equal in every bit.

The weight is worked on a few rows at a time, so that its FP32 form is never held whole.
"""

from collections.abc import Iterator

import torch

from quantplug.formats import e2m1
from quantplug.formats.chunks import CHUNK_ELEMENTS, fp32_row_chunks
from quantplug.formats.constants import (
    E2M1_MAX,
    E4M3_MAX,
    E4M3_SMALLEST_SUBNORMAL,
    FP8_BLOCK,
    NVFP4_BLOCK,
    ZERO_AMAX_SCALE,
)
from quantplug.formats.kernels.one_by_one import one_by_one
from quantplug.formats.scale_from_amax import scale_from_amax

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def amax(weight: torch.Tensor) -> torch.Tensor:
    largest = torch.zeros((), device=weight.device)
    for chunk in fp32_row_chunks(weight):
        # In place: a list of small results would settle between the chunks, and the heap grow to an FP32 copy.
        torch.maximum(largest, chunk.abs().amax(), out=largest)
    return largest


def bit_sums(weight: torch.Tensor) -> tuple[int, int]:
    rows = weight.detach().view(_INTEGERS[weight.dtype.itemsize]).reshape(weight.shape[0], -1)
    by_row, by_column = (rows.new_zeros(size, dtype=torch.int64) for size in rows.shape)
    # A few rows at a time: a sum of 16-bit integers makes a 64-bit copy of all of them.
    step = max(1, CHUNK_ELEMENTS // rows.shape[1])
    for chunk, of_rows in zip(rows.split(step), by_row.split(step), strict=True):
        wide = chunk.long()
        of_rows.copy_(wide.sum(dim=1))
        by_column += wide.sum(dim=0)
    return _weighted(by_row), _weighted(by_column)


def pack_nvfp4(
    weight: torch.Tensor, weight_scale_2: torch.Tensor, codes: torch.Tensor, block_scales: torch.Tensor
) -> None:
    for rows, values in _numbered(fp32_row_chunks(weight)):
        blocks = _in_blocks(values)
        block_scales[rows] = _nvfp4_block_scales(blocks, weight_scale_2)
        # Divided by the scale as the reader will see it, after its rounding to E4M3.
        scales = block_scales[rows].float() * weight_scale_2
        codes[rows] = e2m1.pack_pairs(e2m1.encode(blocks / scales.unsqueeze(-1)).flatten(-2))


def unpack_nvfp4(
    codes: torch.Tensor, block_scales: torch.Tensor, weight_scale_2: torch.Tensor, values: torch.Tensor
) -> None:
    for rows in _row_slices(values):
        scales = block_scales[rows].float() * weight_scale_2
        blocks = _in_blocks(e2m1.decode(e2m1.unpack_pairs(codes[rows])))
        torch.mul(blocks, scales.unsqueeze(-1), out=_in_blocks(values[rows]))


def pack_fp8(weight: torch.Tensor, weight_scale: torch.Tensor, codes: torch.Tensor) -> None:
    for rows, values in _numbered(fp32_row_chunks(weight)):
        codes[rows] = saturate_to_e4m3(values / weight_scale)


def unpack_fp8(codes: torch.Tensor, weight_scale: torch.Tensor, values: torch.Tensor) -> None:
    for rows in _row_slices(values):
        torch.mul(codes[rows].float(), weight_scale, out=values[rows])


def pack_fp8_block(weight: torch.Tensor, codes: torch.Tensor, block_scales: torch.Tensor) -> None:
    for rows, values in _numbered(fp32_row_chunks(weight, row_multiple=FP8_BLOCK)):
        blocks = _in_squares(values)
        scales = scale_from_amax(blocks.abs().amax((1, 3)), E4M3_MAX)
        block_scales[rows.start // FP8_BLOCK : rows.stop // FP8_BLOCK] = scales
        codes[rows] = saturate_to_e4m3(blocks / scales[:, None, :, None]).view(values.shape)


def unpack_fp8_block(codes: torch.Tensor, block_scales: torch.Tensor, values: torch.Tensor) -> None:
    for rows in _row_slices(values, row_multiple=FP8_BLOCK):
        scales = block_scales[rows.start // FP8_BLOCK : rows.stop // FP8_BLOCK, None, :, None]
        torch.mul(_in_squares(codes[rows].float()), scales, out=_in_squares(values[rows]))


pack_nvfp4_group = one_by_one(pack_nvfp4)
pack_fp8_group = one_by_one(pack_fp8)
pack_fp8_block_group = one_by_one(pack_fp8_block)


def saturate_to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Rounds FP32 to E4M3, ties to even; magnitudes above 448 become 448 where a plain cast makes NaN of them."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _weighted(sums: torch.Tensor) -> int:
    places = torch.arange(1, sums.numel() + 1, device=sums.device) * 2 - 1
    return int((sums * places).sum()) % 2**64


def _nvfp4_block_scales(blocks: torch.Tensor, weight_scale_2: torch.Tensor) -> torch.Tensor:
    """E4M3 scales [n, in/16] that map the amax of each block [n, in/16, 16] to 6."""
    scales = blocks.abs().amax(-1) / (E2M1_MAX * weight_scale_2)
    scales = torch.where(scales == 0, ZERO_AMAX_SCALE, scales)
    # E4M3 would round a tiny scale to 0, by which codes cannot be divided, and one above 448 to NaN.
    return scales.clamp(E4M3_SMALLEST_SUBNORMAL, E4M3_MAX).to(torch.float8_e4m3fn)


def _numbered(chunks: Iterator[torch.Tensor]) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each chunk with the rows that it is."""
    start = 0
    for chunk in chunks:
        yield slice(start, start + chunk.shape[0]), chunk
        start += chunk.shape[0]


def _row_slices(values: torch.Tensor, row_multiple: int = 1) -> Iterator[slice]:
    """The rows in order, a few at a time: as many as `fp32_row_chunks` gives."""
    rows, row_elements = values.shape
    step = max(CHUNK_ELEMENTS // (row_elements * row_multiple), 1) * row_multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _in_blocks(rows: torch.Tensor) -> torch.Tensor:
    """[n, in] as [n, in/16, 16]."""
    return rows.view(rows.shape[0], -1, NVFP4_BLOCK)


def _in_squares(rows: torch.Tensor) -> torch.Tensor:
    """[n, in] as [n/128, 128, in/128, 128]."""
    return rows.view(rows.shape[0] // FP8_BLOCK, FP8_BLOCK, -1, FP8_BLOCK)
