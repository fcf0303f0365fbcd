"""The loops of the GPU kernels, in Triton, which comes with PyTorch's CUDA builds.

Each works on one weight, or on one of a group that `program_id(1)` tells: then `weights` holds addresses of weights of
type ELEMENT, all of one shape and of one set of strides, and the other tensors hold those of all, one after another.
Without ROWS the elements of a weight follow each other, and no index has to be divided.

Codes and E4M3 scales are made and read with integers, as in `loops`: not every GPU converts FP8. A GPU rounds `/` of
FP32 otherwise than IEEE, and multiplies with the reciprocal where the divisor is a constant: `div_rn` does neither.
"""

import triton
import triton.language as tl

from quantplug.formats.constants import (
    E2M1_MAX,
    E4M3_MAX,
    E4M3_SMALLEST_SUBNORMAL,
    F32_SMALLEST_NORMAL,
    FP8_BLOCK_SIDE,
    NVFP4_BLOCK,
    ZERO_AMAX_SCALE,
)

_ELEMENTS = tl.constexpr(NVFP4_BLOCK)
_SIDE = tl.constexpr(FP8_BLOCK_SIDE)
_E2M1_LARGEST = tl.constexpr(E2M1_MAX)
_E4M3_LARGEST = tl.constexpr(E4M3_MAX)
_E4M3_SMALLEST = tl.constexpr(E4M3_SMALLEST_SUBNORMAL)
_ZERO_AMAX_SCALE = tl.constexpr(ZERO_AMAX_SCALE)
_SMALLEST_SCALE = tl.constexpr(F32_SMALLEST_NORMAL)

_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_EXPONENT = tl.constexpr(0x7F800000)
_MANTISSA_BITS = tl.constexpr(23)

# FP32 mantissa bits more than the code's, FP32 bits of its smallest normal magnitude, and where steps are counted.
_E2M1_SHIFT, _E2M1_NORMAL, _E2M1_STEPS = tl.constexpr(22), tl.constexpr(0x3F800000), tl.constexpr(0x07)
_E4M3_SHIFT, _E4M3_NORMAL, _E4M3_STEPS = tl.constexpr(20), tl.constexpr(0x3C800000), tl.constexpr(0x1F)
_E2M1_SIGN, _E4M3_SIGN, _E4M3_NAN = tl.constexpr(0x8), tl.constexpr(0x80), tl.constexpr(0x7F)
_E2M1_SIGN_SHIFT, _E4M3_SIGN_SHIFT = tl.constexpr(28), tl.constexpr(24)

# Scales between which a quotient of 16-bit values needs no care, and nor does its sign: see `_quotient`.
_LEAST_SCALE, _LARGEST_SCALE = tl.constexpr(2.0**-49), tl.constexpr(2.0**14)
# So many times an E4M3 block scale, from 2^-9 to 448, is between them.
_LEAST_SCALE_2, _LARGEST_SCALE_2 = tl.constexpr(2.0**-40), tl.constexpr(2.0**5)

# What a code's bits, moved to the end of FP32's exponent, are too small by: 2^(127 - bias of the code).
_E2M1_BIAS, _E4M3_BIAS = tl.constexpr(2.0**126), tl.constexpr(2.0**120)


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
    tl.atomic_max(largest, tl.max(values.to(tl.int32, bitcast=True) & _MAGNITUDE, axis=0))


@triton.jit
def pack_nvfp4(
    weights: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    weight_scale_2: tl.tensor,
    codes: tl.tensor,
    block_scales: tl.tensor,
    blocks_a_row: tl.tensor,
    blocks: tl.tensor,
    ROWS: tl.constexpr,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """BLOCKS blocks of 16 elements a program."""
    number = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    is_there = block < blocks
    # A block never reaches over the end of a row, so one mask of blocks is enough for its 16 elements.
    element = tl.arange(0, _ELEMENTS)[None, :]
    if ROWS:
        column = (block % blocks_a_row)[:, None] * _ELEMENTS + element
        offsets = (block // blocks_a_row)[:, None] * row_stride + column * column_stride
    else:
        offsets = block[:, None] * _ELEMENTS + element
    weight = _weight(weights, number, ELEMENT, ALIGNED)
    values = _fp32(tl.load(weight + offsets, mask=is_there[:, None], other=0.0))

    scale_2 = tl.load(weight_scale_2 + number)
    largest = tl.max(values.to(tl.int32, bitcast=True) & _MAGNITUDE, axis=1)
    scale_code, scale = _block_scale(largest.to(tl.float32, bitcast=True), scale_2)
    tl.store(block_scales + number * blocks + block, scale_code.to(tl.uint8), mask=is_there)

    divisor = (scale * scale_2)[:, None]
    is_ordinary = (scale_2 >= _LEAST_SCALE_2) & (scale_2 <= _LARGEST_SCALE_2)
    quotient = _quotient(values, divisor, _E2M1_LARGEST, is_ordinary, weight.dtype.element_ty != tl.float32)
    # Neighbours [.., 8, 2] become the nibbles of one byte: `low` holds the even columns.
    low, high = tl.split(tl.reshape(_e2m1(quotient), (BLOCKS, _ELEMENTS // 2, 2)))
    pairs = (number * blocks + block)[:, None] * (_ELEMENTS // 2) + tl.arange(0, _ELEMENTS // 2)[None, :]
    tl.store(codes + pairs, (low | (high << 4)).to(tl.uint8), mask=is_there[:, None])


@triton.jit
def unpack_nvfp4(
    codes: tl.tensor,
    block_scales: tl.tensor,
    weight_scale_2: tl.tensor,
    values: tl.tensor,
    blocks: tl.tensor,
    BLOCKS: tl.constexpr,
) -> None:
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    is_there = block < blocks
    pairs = block[:, None] * (_ELEMENTS // 2) + tl.arange(0, _ELEMENTS // 2)[None, :]
    pair = tl.load(codes + pairs, mask=is_there[:, None], other=0).to(tl.int32)
    # Both scales first, then the code, as in the reference: FP32 products in another order differ in their last bits.
    scale = _e4m3_value(tl.load(block_scales + block, mask=is_there, other=0).to(tl.int32)) * tl.load(weight_scale_2)
    code = tl.reshape(tl.join(pair & 0xF, pair >> 4), (BLOCKS, _ELEMENTS))
    places = block[:, None] * _ELEMENTS + tl.arange(0, _ELEMENTS)[None, :]
    tl.store(values + places, _e2m1_value(code) * scale[:, None], mask=is_there[:, None])


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
    weight = _weight(weights, number, ELEMENT, ALIGNED)
    values = _values(weight, index, elements, row_stride, column_stride, columns, ROWS)
    code = _e4m3(values, tl.load(weight_scale + number), weight.dtype.element_ty != tl.float32)
    tl.store(codes + number * elements + index, code.to(tl.uint8), mask=index < elements)


@triton.jit
def unpack_fp8(
    codes: tl.tensor, weight_scale: tl.tensor, values: tl.tensor, elements: tl.tensor, TILE: tl.constexpr
) -> None:
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    code = tl.load(codes + index, mask=index < elements, other=0).to(tl.int32)
    tl.store(values + index, _e4m3_value(code) * tl.load(weight_scale), mask=index < elements)


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
    weight = _weight(weights, number, ELEMENT, ALIGNED)
    places, codes = weight + row * row_stride, codes + (number * rows + row) * columns
    magnitudes = tl.zeros((TILE,), tl.int32)
    for tile in range(TILES):
        column = tile * TILE + tl.arange(0, TILE).to(tl.int64)
        values = _fp32(tl.load(places + column * column_stride, mask=column < columns, other=0.0))
        # As integers, NaN is above all numbers, and no maximum drops it.
        magnitudes = tl.maximum(magnitudes, values.to(tl.int32, bitcast=True) & _MAGNITUDE)
    scale = _e4m3_scale(tl.max(magnitudes, axis=0).to(tl.float32, bitcast=True))
    tl.store(row_scales + number * rows + row, scale)
    for tile in range(TILES):
        column = tile * TILE + tl.arange(0, TILE).to(tl.int64)
        values = _fp32(tl.load(places + column * column_stride, mask=column < columns, other=0.0))
        code = _e4m3(values, scale, weight.dtype.element_ty != tl.float32)
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
    tl.store(values + places, _e4m3_value(code) * tl.load(row_scales + row), mask=column < columns)


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
    weight = _weight(weights, number, ELEMENT, ALIGNED)
    places, codes = row * columns + column, codes + number * rows * columns
    # A mask asks for an address of its own for each element: whole squares are read and written without.
    if PARTIAL:
        is_there = (row < rows) & (column < columns)
        read = tl.load(weight + row * row_stride + column * column_stride, mask=is_there, other=0.0)
    else:
        read = tl.load(weight + row * row_stride + column * column_stride)
    values = _fp32(read)
    magnitudes = values.to(tl.int32, bitcast=True) & _MAGNITUDE
    scale = _e4m3_scale(tl.max(tl.max(magnitudes, axis=1), axis=0).to(tl.float32, bitcast=True))
    tl.store(block_scales + number * squares + square, scale)
    code = _e4m3(values, scale, weight.dtype.element_ty != tl.float32)
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
        tl.store(values + places, _e4m3_value(code) * scale, mask=is_there)
    else:
        code = tl.load(codes + places).to(tl.int32)
        tl.store(values + places, _e4m3_value(code) * scale)


@triton.jit
def _weight(weights: tl.tensor, number: tl.tensor, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
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
    return _fp32(tl.load(weight + offsets, mask=index < elements, other=0.0))


@triton.jit
def _in_square(square: tl.tensor, squares_a_row: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Row numbers [128, 1] and column numbers [1, 128] of a square of a weight."""
    row = (square // squares_a_row) * _SIDE + tl.arange(0, _SIDE)
    column = (square % squares_a_row) * _SIDE + tl.arange(0, _SIDE)
    return row[:, None], column[None, :]


@triton.jit
def _fp32(values: tl.tensor) -> tl.tensor:
    # BF16 is the upper half of FP32. Triton's interpreter converts some of its subnormals to 0, moving bits is exact.
    if values.dtype == tl.bfloat16:
        return (values.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:  # noqa: RET505
        return values.to(tl.float32)


@triton.jit
def _block_scale(amax: tl.tensor, scale_2: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """E4M3 code and value of the scale that maps the amax of a block to 6, for blocks [n] of one weight."""
    scale = tl.div_rn(amax, scale_2 * _E2M1_LARGEST)
    is_nan = scale != scale
    # The order of `scale_types._e4m3_scales`. A comparison with NaN is false, so NaN is remembered and put back.
    scale = tl.where(scale == 0, _ZERO_AMAX_SCALE, scale)
    scale = tl.where(scale > _E4M3_SMALLEST, scale, _E4M3_SMALLEST)
    scale = tl.where(scale < _E4M3_LARGEST, scale, _E4M3_LARGEST)
    code, value = _rounded(scale, _E4M3_SHIFT, _E4M3_NORMAL, _E4M3_STEPS)
    return tl.where(is_nan, _E4M3_NAN, code), tl.where(is_nan, float("nan"), value)


@triton.jit
def _e4m3_scale(amax: tl.tensor) -> tl.tensor:
    """The FP32 scale that maps an amax to 448, as `scale_from_amax` gives it."""
    # A divisor that is a tensor: by a constant the compiler multiplies with its reciprocal.
    scale = tl.div_rn(amax, tl.full((), _E4M3_LARGEST, tl.float32))
    scale = tl.where(scale < _SMALLEST_SCALE, _SMALLEST_SCALE, scale)
    return tl.where(amax == 0, _ZERO_AMAX_SCALE, scale)


@triton.jit
def _quotient(
    values: tl.tensor,
    divisor: tl.tensor,
    largest: tl.tensor,
    is_ordinary: tl.tensor,
    SHORT: tl.constexpr,
) -> tl.tensor:
    """`values / divisor`, rounded as IEEE says, and at most `largest`, or just beside it; NaN stays.

    A GPU divides by some ten instructions and a branch. Where values have at most 11 bits, as those of SHORT types do,
    the product with the rounded reciprocal needs a single correction by what it leaves over. That this is the rounded
    quotient tests/formats/kernels/test_quotient.py has tried for all of them; here no step may leave FP32's range.
    """
    if SHORT:
        if is_ordinary:
            reciprocal = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
            most = divisor * largest
            clamped = tl.clamp(values, most * -1, most, propagate_nan=tl.PropagateNan.ALL)
            product = clamped * reciprocal
            # An FMA rounds once, at its end: this is what the product leaves over, and is still to be divided.
            left = tl.fma(product, divisor * -1, clamped)
            quotient = tl.fma(left, reciprocal, product)
        else:
            quotient = _saturated(tl.div_rn(values, divisor), largest)
    else:
        quotient = _saturated(tl.div_rn(values, divisor), largest)
    return quotient


@triton.jit
def _saturated(quotient: tl.tensor, largest: tl.tensor) -> tl.tensor:
    # Without being told to, a GPU's minimum and maximum drop NaN, and a broken weight would become a finite one.
    return tl.clamp(quotient, -largest, largest, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _e2m1(quotient: tl.tensor) -> tl.tensor:
    """The E2M1 code of a quotient that is at most 6 or just beside it, as `e2m1.encode` gives it."""
    code, _ = _rounded(tl.abs(quotient), _E2M1_SHIFT, _E2M1_NORMAL, _E2M1_STEPS)
    signed = code | tl.where(quotient < 0, _E2M1_SIGN, 0)
    return tl.where(quotient == quotient, signed, 0)


@triton.jit
def _e4m3(values: tl.tensor, scale: tl.tensor, SHORT: tl.constexpr) -> tl.tensor:
    """The E4M3 code of `values / scale`, as `codes.saturate_to_e4m3` gives it; the sign, of NaN too, is the value's."""
    is_ordinary = (scale >= _LEAST_SCALE) & (scale <= _LARGEST_SCALE)
    quotient = _quotient(values, scale, _E4M3_LARGEST, is_ordinary, SHORT)
    code, _ = _rounded(tl.abs(quotient), _E4M3_SHIFT, _E4M3_NORMAL, _E4M3_STEPS)
    code = tl.where(quotient == quotient, code, _E4M3_NAN)
    return code | tl.where(values.to(tl.int32, bitcast=True) < 0, _E4M3_SIGN, 0)


@triton.jit
def _rounded(
    magnitude: tl.tensor, SHIFT: tl.constexpr, NORMAL: tl.constexpr, STEPS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Code and value of a magnitude, to nearest, ties to even: `loops._rounded` says how."""
    binade = tl.maximum(magnitude.to(tl.int32, bitcast=True) & _EXPONENT, NORMAL)
    rounder = (binade + (SHIFT << _MANTISSA_BITS)).to(tl.float32, bitcast=True)
    total = magnitude + rounder
    steps = total.to(tl.int32, bitcast=True) & STEPS
    return steps + ((binade - NORMAL) >> SHIFT), total - rounder


@triton.jit
def _e2m1_value(code: tl.tensor) -> tl.tensor:
    """FP32 value of the E2M1 code in the lower four bits, as `e2m1.decode` gives it."""
    magnitude = ((code & 0x7) << _E2M1_SHIFT).to(tl.float32, bitcast=True) * _E2M1_BIAS
    return _signed(magnitude, (code & _E2M1_SIGN) << _E2M1_SIGN_SHIFT)


@triton.jit
def _e4m3_value(code: tl.tensor) -> tl.tensor:
    """FP32 value of an E4M3 code in the lower eight bits, without an instruction that converts FP8."""
    magnitude = ((code & 0x7F) << _E4M3_SHIFT).to(tl.float32, bitcast=True) * _E4M3_BIAS
    magnitude = tl.where((code & 0x7F) == _E4M3_NAN, float("nan"), magnitude)
    return _signed(magnitude, (code & _E4M3_SIGN) << _E4M3_SIGN_SHIFT)


@triton.jit
def _signed(magnitude: tl.tensor, sign: tl.tensor) -> tl.tensor:
    """With a sign that is FP32's sign bit: `-` would be a subtraction from 0, and give 0 no sign."""
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
