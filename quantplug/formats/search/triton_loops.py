"""The search for scales on a GPU, in Triton: `candidates` says what is computed, `reference` shows it.

The kernels must be launched with `enable_fp_fusion=False`: a product and a sum that become one instruction round once
instead of twice, and of two candidates that are nearly as good another one would win.
"""

import triton
import triton.language as tl

from quantplug.formats.constants import NVFP4_BLOCK
from quantplug.formats.kernels.cuda.codes import E2M1_LARGEST, e4m3_scale, e4m3_value, nearest_e2m1
from quantplug.formats.kernels.cuda.loops import block_amax, block_quotient, block_values, store_pairs, weight_of

_WIDTH = tl.constexpr(NVFP4_BLOCK)
_LEAST_CODE, _LARGEST_CODE = tl.constexpr(1), tl.constexpr(126)


@triton.jit
def pack_nvfp4(
    weights: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    tensor_scales: tl.tensor,
    codes: tl.tensor,
    block_scales: tl.tensor,
    blocks_a_row: tl.tensor,
    blocks: tl.tensor,
    multiples: tl.tensor,
    offsets: tl.tensor,
    importance: tl.tensor,
    MULTIPLES: tl.constexpr,
    OFFSETS: tl.constexpr,
    ROWS: tl.constexpr,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """BLOCKS blocks of 16 elements a program, each with the best of the candidates for its scale.

    Errors are weighted by the importance of the columns [weights, 16 * blocks_a_row], where it is not None.
    """
    number = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    weight = weight_of(weights, number, ELEMENT, ALIGNED)
    values = block_values(weight, block, blocks, blocks_a_row, row_stride, column_stride, ROWS, _WIDTH)
    scale_2 = tl.load(tensor_scales + number)
    amax = block_amax(values)
    in_units = tl.abs(values) * tl.div_rn(tl.full((), 1.0, tl.float32), scale_2)
    found, _ = e4m3_scale(amax * tl.load(multiples), scale_2, E2M1_LARGEST)
    least = tl.full((BLOCKS,), float("inf"), tl.float32)
    of_columns = None
    if importance is not None:
        column = (number * blocks_a_row + block % blocks_a_row)[:, None] * _WIDTH + tl.arange(0, _WIDTH)[None, :]
        of_columns = tl.load(importance + column)
    for multiple in range(MULTIPLES):
        nearest, _ = e4m3_scale(amax * tl.load(multiples + multiple), scale_2, E2M1_LARGEST)
        for step in range(OFFSETS):
            offset = tl.load(offsets + step)
            moved = tl.minimum(tl.maximum(nearest + offset, _LEAST_CODE), _LARGEST_CODE)
            code = tl.where(offset == 0, nearest, moved)
            # Of NaN the error is NaN, which is not less, whatever number its code is taken for.
            error = _error(in_units, e4m3_value(code), of_columns)
            is_less = error < least
            found = tl.where(is_less, code, found)
            least = tl.where(is_less, error, least)
    tl.store(block_scales + number * blocks + block, found.to(tl.uint8), mask=block < blocks)
    is_short = weight.dtype.element_ty != tl.float32
    quotient = block_quotient(values, e4m3_value(found), scale_2, E2M1_LARGEST, is_short)
    store_pairs(codes, number * blocks + block, block < blocks, quotient)


@triton.jit
def pack_nvfp4_given(
    weights: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    tensor_scales: tl.tensor,
    codes: tl.tensor,
    block_scales: tl.tensor,
    blocks_a_row: tl.tensor,
    blocks: tl.tensor,
    ROWS: tl.constexpr,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """BLOCKS blocks of 16 elements a program, by the scales that are there already."""
    number = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    weight = weight_of(weights, number, ELEMENT, ALIGNED)
    values = block_values(weight, block, blocks, blocks_a_row, row_stride, column_stride, ROWS, _WIDTH)
    code = tl.load(block_scales + number * blocks + block, mask=block < blocks, other=0).to(tl.int32)
    scale_2 = tl.load(tensor_scales + number)
    is_short = weight.dtype.element_ty != tl.float32
    quotient = block_quotient(values, e4m3_value(code), scale_2, E2M1_LARGEST, is_short)
    store_pairs(codes, number * blocks + block, block < blocks, quotient)


@triton.jit
def _error(in_units: tl.tensor, scale: tl.tensor, importance: tl.tensor) -> tl.tensor:
    """Squared errors [n] of magnitudes [n, 16] under scales [n], weighted by [n, 16] or, being None, by nothing."""
    reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    quotient = in_units * reciprocal[:, None]
    left = quotient - nearest_e2m1(quotient)
    squares = left * left
    if importance is not None:
        squares = squares * importance
    return _sum(squares) * (scale * scale)


@triton.jit
def _sum(squares: tl.tensor) -> tl.tensor:
    """Sums [n] of [n, 16], neighbours first: `tl.sum` has an order of its own."""
    rows: tl.constexpr = squares.shape[0]
    first, second = tl.split(tl.reshape(squares, (rows, 8, 2)))
    first, second = tl.split(tl.reshape(first + second, (rows, 4, 2)))
    first, second = tl.split(tl.reshape(first + second, (rows, 2, 2)))
    first, second = tl.split(first + second)
    return first + second
