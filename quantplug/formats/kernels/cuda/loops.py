"""The loops of the GPU kernels, in Triton, which comes with PyTorch's CUDA builds.

Each works on one weight, or on one of a group that `program_id(1)` tells: then `weights` holds addresses of weights of
type ELEMENT, all of one shape and of one set of strides, and the other tensors hold those of all, one after another.
Without ROWS the elements of a weight follow each other, and no index has to be divided.
"""

import triton
import triton.language as tl

from quantplug.formats.constants import FP8_BLOCK_SIDE
from quantplug.formats.kernels.cuda.codes import (
    E2M1_LARGEST,
    E4M3_LARGEST,
    MAGNITUDE,
    e2m1_code,
    e2m1_value,
    e4m3_code,
    e4m3_quotient,
    e4m3_scale,
    e4m3_value,
    e8m0_scale,
    e8m0_value,
    f32_scale,
    fp32,
    int4_code,
    int4_group_scale,
    int4_value,
    rounded_quotient,
    saturated,
)

_SIDE = tl.constexpr(FP8_BLOCK_SIDE)

# So many times an E4M3 block scale, from 2^-9 to 448, is between those with which a quotient needs no care.
_LEAST_SCALE_2, _LARGEST_SCALE_2 = tl.constexpr(2.0**-40), tl.constexpr(2.0**5)


@triton.jit
def amax(
    weight: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    columns: tl.tensor,
    elements: tl.tensor,
    largest: tl.tensor,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Raises `largest`, FP32 bits, to those of the largest magnitude: as integers, NaN is above all numbers."""
    # int64 in every loop here: a weight, and a group of them all the more, may have more than 2^31 elements.
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    values = _values(weight, index, elements, row_stride, column_stride, columns, ROWS)
    tl.atomic_max(largest, tl.max(values.to(tl.int32, bitcast=True) & MAGNITUDE, axis=0))


@triton.jit
def pack_blocks(
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
    WIDTH: tl.constexpr,
    POWERS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """BLOCKS blocks of WIDTH neighbours a program.

    With POWERS their scales are E8M0 and `tensor_scales` is None, else E4M3 under a scale of the tensor. With PAIRS the
    codes are E2M1, two to a byte, else E4M3.
    """
    number = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    is_there = block < blocks
    weight = weight_of(weights, number, ELEMENT, ALIGNED)
    values = block_values(weight, block, blocks, blocks_a_row, row_stride, column_stride, ROWS, WIDTH)
    amax = block_amax(values)
    largest: tl.constexpr = E2M1_LARGEST if PAIRS else E4M3_LARGEST
    if POWERS:
        scale_code, inverse = e8m0_scale(amax, largest)
        quotient = saturated(values * inverse[:, None], largest)
    else:
        scale_2 = tl.load(tensor_scales + number)
        scale_code, scale = e4m3_scale(amax, scale_2, largest)
        quotient = block_quotient(values, scale, scale_2, largest, weight.dtype.element_ty != tl.float32)
    tl.store(block_scales + number * blocks + block, scale_code.to(tl.uint8), mask=is_there)
    place = number * blocks + block
    if PAIRS:
        store_pairs(codes, place, is_there, quotient)
    else:
        places = place[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(codes + places, e4m3_code(quotient, values).to(tl.uint8), mask=is_there[:, None])


@triton.jit
def block_values(
    weight: tl.tensor,
    block: tl.tensor,
    blocks: tl.tensor,
    blocks_a_row: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """FP32 values [n, WIDTH] of the blocks with these numbers [n]; 0 behind the last."""
    # A block never reaches over the end of a row, so one mask of blocks is enough for its elements.
    element = tl.arange(0, WIDTH)[None, :]
    if ROWS:
        column = (block % blocks_a_row)[:, None] * WIDTH + element
        offsets = (block // blocks_a_row)[:, None] * row_stride + column * column_stride
    else:
        offsets = block[:, None] * WIDTH + element
    return fp32(tl.load(weight + offsets, mask=(block < blocks)[:, None], other=0.0))


@triton.jit
def block_amax(values: tl.tensor) -> tl.tensor:
    """FP32 amaxes [n] of blocks [n, width]; as integers, NaN is above all numbers."""
    return tl.max(values.to(tl.int32, bitcast=True) & MAGNITUDE, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def block_quotient(
    values: tl.tensor, scale: tl.tensor, scale_2: tl.tensor, largest: tl.tensor, SHORT: tl.constexpr
) -> tl.tensor:
    """Values [n, width] divided by the E4M3 scales [n] of their blocks under the scale of the tensor."""
    is_ordinary = (scale_2 >= _LEAST_SCALE_2) & (scale_2 <= _LARGEST_SCALE_2)
    return rounded_quotient(values, (scale * scale_2)[:, None], largest, is_ordinary, SHORT)


@triton.jit
def store_pairs(codes: tl.tensor, place: tl.tensor, is_there: tl.tensor, quotient: tl.tensor) -> None:
    """Stores the E2M1 codes of blocks [n, width], two a byte, for blocks that lie at these places [n]."""
    rows: tl.constexpr = quotient.shape[0]
    bytes_of_one: tl.constexpr = quotient.shape[1] // 2
    # Neighbours [.., width / 2, 2] become the nibbles of one byte: `low` holds the even columns.
    low, high = tl.split(tl.reshape(e2m1_code(quotient), (rows, bytes_of_one, 2)))
    pairs = place[:, None] * bytes_of_one + tl.arange(0, bytes_of_one)[None, :]
    tl.store(codes + pairs, (low | (high << 4)).to(tl.uint8), mask=is_there[:, None])


@triton.jit
def unpack_blocks(
    codes: tl.tensor,
    block_scales: tl.tensor,
    tensor_scale: tl.tensor,
    values: tl.tensor,
    blocks: tl.tensor,
    WIDTH: tl.constexpr,
    POWERS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    is_there = block < blocks
    scale_code = tl.load(block_scales + block, mask=is_there, other=0).to(tl.int32)
    # Both scales first, then the code, as in the reference: FP32 products in another order differ in their last bits.
    scale = e8m0_value(scale_code) if POWERS else e4m3_value(scale_code) * tl.load(tensor_scale)
    places = block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    if PAIRS:
        pairs = block[:, None] * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]
        pair = tl.load(codes + pairs, mask=is_there[:, None], other=0).to(tl.int32)
        value = e2m1_value(tl.reshape(tl.join(pair & 0xF, pair >> 4), (BLOCKS, WIDTH)))
    else:
        value = e4m3_value(tl.load(codes + places, mask=is_there[:, None], other=0).to(tl.int32))
    tl.store(values + places, value * scale[:, None], mask=is_there[:, None])


@triton.jit
def pack_fp8(
    weights: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    columns: tl.tensor,
    elements: tl.tensor,
    weight_scale: tl.tensor,
    codes: tl.tensor,
    ROWS: tl.constexpr,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    number = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    weight = weight_of(weights, number, ELEMENT, ALIGNED)
    values = _values(weight, index, elements, row_stride, column_stride, columns, ROWS)
    quotient = e4m3_quotient(values, tl.load(weight_scale + number), weight.dtype.element_ty != tl.float32)
    code = e4m3_code(quotient, values)
    tl.store(codes + number * elements + index, code.to(tl.uint8), mask=index < elements)


@triton.jit
def unpack_fp8(
    codes: tl.tensor, weight_scale: tl.tensor, values: tl.tensor, elements: tl.tensor, TILE: tl.constexpr
) -> None:
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    code = tl.load(codes + index, mask=index < elements, other=0).to(tl.int32)
    tl.store(values + index, e4m3_value(code) * tl.load(weight_scale), mask=index < elements)


@triton.jit
def pack_fp8_row(
    weights: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    codes: tl.tensor,
    row_scales: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One row a program, in TILES of TILE columns: once for its amax, and again, out of the cache, for its codes.

    A model has few widths, so that to compile for each number of tiles costs little.
    """
    number, row = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    weight = weight_of(weights, number, ELEMENT, ALIGNED)
    places, codes = weight + row * row_stride, codes + (number * rows + row) * columns
    magnitudes = tl.zeros((TILE,), tl.int32)
    for tile in range(TILES):
        column = tile * TILE + tl.arange(0, TILE).to(tl.int64)
        values = fp32(tl.load(places + column * column_stride, mask=column < columns, other=0.0))
        # As integers, NaN is above all numbers, and no maximum drops it.
        magnitudes = tl.maximum(magnitudes, values.to(tl.int32, bitcast=True) & MAGNITUDE)
    scale = f32_scale(tl.max(magnitudes, axis=0).to(tl.float32, bitcast=True), E4M3_LARGEST)
    tl.store(row_scales + number * rows + row, scale)
    for tile in range(TILES):
        column = tile * TILE + tl.arange(0, TILE).to(tl.int64)
        values = fp32(tl.load(places + column * column_stride, mask=column < columns, other=0.0))
        code = e4m3_code(e4m3_quotient(values, scale, weight.dtype.element_ty != tl.float32), values)
        tl.store(codes + column, code.to(tl.uint8), mask=column < columns)


@triton.jit
def unpack_fp8_row(
    codes: tl.tensor, row_scales: tl.tensor, values: tl.tensor, columns: tl.tensor, TILE: tl.constexpr
) -> None:
    """TILE columns of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    places = row * columns + column
    code = tl.load(codes + places, mask=column < columns, other=0).to(tl.int32)
    tl.store(values + places, e4m3_value(code) * tl.load(row_scales + row), mask=column < columns)


@triton.jit
def pack_fp8_block(
    weights: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    codes: tl.tensor,
    block_scales: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    squares_a_row: tl.tensor,
    squares: tl.tensor,
    PARTIAL: tl.constexpr,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """One square of 128 x 128 elements a program; with PARTIAL the last ones may reach beyond the weight."""
    number, square = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    row, column = _in_square(square, squares_a_row)
    weight = weight_of(weights, number, ELEMENT, ALIGNED)
    places, codes = row * columns + column, codes + number * rows * columns
    # A mask asks for an address of its own for each element: whole squares are read and written without.
    if PARTIAL:
        is_there = (row < rows) & (column < columns)
        read = tl.load(weight + row * row_stride + column * column_stride, mask=is_there, other=0.0)
    else:
        read = tl.load(weight + row * row_stride + column * column_stride)
    values = fp32(read)
    magnitudes = values.to(tl.int32, bitcast=True) & MAGNITUDE
    scale = f32_scale(tl.max(tl.max(magnitudes, axis=1), axis=0).to(tl.float32, bitcast=True), E4M3_LARGEST)
    tl.store(block_scales + number * squares + square, scale)
    code = e4m3_code(e4m3_quotient(values, scale, weight.dtype.element_ty != tl.float32), values)
    if PARTIAL:
        tl.store(codes + places, code.to(tl.uint8), mask=is_there)
    else:
        tl.store(codes + places, code.to(tl.uint8))


@triton.jit
def unpack_fp8_block(
    codes: tl.tensor,
    block_scales: tl.tensor,
    values: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    squares_a_row: tl.tensor,
    PARTIAL: tl.constexpr,
) -> None:
    """One square of 128 x 128 elements a program; with PARTIAL the last ones may reach beyond the weight."""
    square = tl.program_id(0).to(tl.int64)
    row, column = _in_square(square, squares_a_row)
    places = row * columns + column
    scale = tl.load(block_scales + square)
    if PARTIAL:
        is_there = (row < rows) & (column < columns)
        code = tl.load(codes + places, mask=is_there, other=0).to(tl.int32)
        tl.store(values + places, e4m3_value(code) * scale, mask=is_there)
    else:
        code = tl.load(codes + places).to(tl.int32)
        tl.store(values + places, e4m3_value(code) * scale)


@triton.jit
def pack_int4(
    weights: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    codes: tl.tensor,
    group_scales: tl.tensor,
    groups_a_row: tl.tensor,
    groups: tl.tensor,
    ROWS: tl.constexpr,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """BLOCKS groups of GROUP elements a program; their BF16 scales are stored as the integers of their bits."""
    number = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    is_there = group < groups
    element = tl.arange(0, GROUP)[None, :]
    if ROWS:
        column = (group % groups_a_row)[:, None] * GROUP + element
        offsets = (group // groups_a_row)[:, None] * row_stride + column * column_stride
    else:
        offsets = group[:, None] * GROUP + element
    weight = weight_of(weights, number, ELEMENT, ALIGNED)
    values = fp32(tl.load(weight + offsets, mask=is_there[:, None], other=0.0))

    largest = tl.max(values.to(tl.int32, bitcast=True) & MAGNITUDE, axis=1)
    scale_bits, scale = int4_group_scale(largest.to(tl.float32, bitcast=True))
    tl.store(group_scales + number * groups + group, scale_bits.to(tl.int16), mask=is_there)

    code = int4_code(values, scale[:, None], weight.dtype.element_ty != tl.float32)
    low, high = tl.split(tl.reshape(code, (BLOCKS, GROUP // 2, 2)))
    pairs = (number * groups + group)[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
    tl.store(codes + pairs, (low | (high << 4)).to(tl.uint8), mask=is_there[:, None])


@triton.jit
def unpack_int4(
    codes: tl.tensor,
    group_scales: tl.tensor,
    values: tl.tensor,
    groups: tl.tensor,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    group = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    is_there = group < groups
    pairs = group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
    pair = tl.load(codes + pairs, mask=is_there[:, None], other=0).to(tl.int32)
    scale_bits = tl.load(group_scales + group, mask=is_there, other=0).to(tl.int32)
    scale = (scale_bits << 16).to(tl.float32, bitcast=True)
    code = tl.reshape(tl.join(pair & 0xF, pair >> 4), (BLOCKS, GROUP))
    places = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(values + places, int4_value(code) * scale[:, None], mask=is_there[:, None])


@triton.jit
def weight_of(weights: tl.tensor, number: tl.tensor, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """Where the weight begins: `weights` itself if ELEMENT is None."""
    if ELEMENT is None:
        return weights
    else:  # noqa: RET505  # Triton compiles one of the branches only if there are two.
        weight = tl.load(weights + number).to(tl.pointer_type(ELEMENT))
        # Of an address out of a table nothing is known that would let 16 bytes be read at once.
        if ALIGNED:
            weight = tl.multiple_of(weight, 16)
        return weight


@triton.jit
def _values(
    weight: tl.tensor,
    index: tl.tensor,
    elements: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    columns: tl.tensor,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """Elements by their numbers in row-major order, in FP32; 0 behind the last."""
    offsets = index
    if ROWS:
        offsets = (index // columns) * row_stride + (index % columns) * column_stride
    return fp32(tl.load(weight + offsets, mask=index < elements, other=0.0))


@triton.jit
def _in_square(square: tl.tensor, squares_a_row: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Row numbers [128, 1] and column numbers [1, 128] of a square of a weight."""
    row = (square // squares_a_row) * _SIDE + tl.arange(0, _SIDE)
    column = (square % squares_a_row) * _SIDE + tl.arange(0, _SIDE)
    return row[:, None], column[None, :]
