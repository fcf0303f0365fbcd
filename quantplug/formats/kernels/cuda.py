"""NVFP4 packing on a GPU in one pass, by Triton, which comes with PyTorch's CUDA builds.

`kernels_for` does not choose it yet: it gives the reference's bits in Triton's interpreter, and has to on a GPU first,
which tests/gpu asks.
"""

import torch
import triton
import triton.language as tl

from quantplug.formats.constants import (
    E2M1_MAX,
    E4M3_MAX,
    E4M3_SMALLEST_SUBNORMAL,
    NVFP4_BLOCK,
    ZERO_AMAX_SCALE,
)

_BLOCKS = 128
"""Blocks of 16 elements that one program packs."""

_ELEMENTS = tl.constexpr(NVFP4_BLOCK)
_E2M1_LARGEST = tl.constexpr(E2M1_MAX)
_E4M3_LARGEST = tl.constexpr(E4M3_MAX)
_E4M3_SMALLEST = tl.constexpr(E4M3_SMALLEST_SUBNORMAL)
_ZERO_AMAX_SCALE = tl.constexpr(ZERO_AMAX_SCALE)

_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_EXPONENT = tl.constexpr(0x7F800000)
_MANTISSA_BITS = tl.constexpr(23)

# FP32 mantissa bits more than the code's, FP32 bits of its smallest normal magnitude, and where steps are counted.
_E2M1_SHIFT, _E2M1_NORMAL, _E2M1_STEPS = tl.constexpr(22), tl.constexpr(0x3F800000), tl.constexpr(0x07)
_E4M3_SHIFT, _E4M3_NORMAL, _E4M3_STEPS = tl.constexpr(20), tl.constexpr(0x3C800000), tl.constexpr(0x1F)
_E2M1_SIGN, _E4M3_NAN = tl.constexpr(8), tl.constexpr(0x7F)


def pack_nvfp4(
    weight: torch.Tensor, weight_scale_2: torch.Tensor, codes: torch.Tensor, block_scales: torch.Tensor
) -> None:
    """As `Kernels.pack_nvfp4`, of a bf16, fp16 or fp32 weight."""
    programs = triton.cdiv(block_scales.numel(), _BLOCKS)
    _pack_nvfp4[(programs,)](
        weight.detach(),
        *weight.stride(),
        weight_scale_2,
        codes,
        block_scales.view(torch.uint8),
        block_scales.shape[1],
        block_scales.numel(),
        _BLOCKS,
    )


@triton.jit
def _pack_nvfp4(
    weight: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    weight_scale_2: tl.tensor,
    codes: tl.tensor,
    block_scales: tl.tensor,
    blocks_a_row: tl.tensor,
    blocks: tl.tensor,
    BLOCKS: tl.constexpr,
) -> None:
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    is_there = block < blocks
    column = (block % blocks_a_row)[:, None] * _ELEMENTS + tl.arange(0, _ELEMENTS)[None, :]
    offsets = (block // blocks_a_row)[:, None] * row_stride + column * column_stride
    values = _fp32(tl.load(weight + offsets, mask=is_there[:, None], other=0.0))

    scale_2 = tl.load(weight_scale_2)
    # As integers, magnitudes keep their order, and NaN is the largest.
    largest = tl.max(values.to(tl.int32, bitcast=True) & _MAGNITUDE, axis=1)
    scale_code, scale = _block_scale(largest.to(tl.float32, bitcast=True), scale_2)
    tl.store(block_scales + block, scale_code.to(tl.uint8), mask=is_there)

    # `/` may be off by an ulp on a GPU, and multiplies with the reciprocal where the divisor is a constant.
    quotient = tl.div_rn(values, (scale * scale_2)[:, None])
    low, high = tl.split(tl.reshape(_e2m1(quotient), (BLOCKS, _ELEMENTS // 2, 2)))
    pairs = block[:, None] * (_ELEMENTS // 2) + tl.arange(0, _ELEMENTS // 2)[None, :]
    tl.store(codes + pairs, (low | (high << 4)).to(tl.uint8), mask=is_there[:, None])


@triton.jit
def _fp32(values: tl.tensor) -> tl.tensor:
    # BF16 is the upper half of FP32. Triton's interpreter converts some of its subnormals to 0, moving bits is exact.
    if values.dtype == tl.bfloat16:
        return (values.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:  # noqa: RET505  # Triton compiles one of the branches only if there are two.
        return values.to(tl.float32)


@triton.jit
def _block_scale(amax: tl.tensor, scale_2: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """E4M3 code and value of what maps the amax to 6."""
    scale = tl.div_rn(amax, scale_2 * _E2M1_LARGEST)
    is_nan = scale != scale
    scale = tl.where(scale == 0, _ZERO_AMAX_SCALE, scale)
    scale = tl.where(scale > _E4M3_SMALLEST, scale, _E4M3_SMALLEST)
    scale = tl.where(scale < _E4M3_LARGEST, scale, _E4M3_LARGEST)
    code, value = _rounded(scale, _E4M3_SHIFT, _E4M3_NORMAL, _E4M3_STEPS)
    return tl.where(is_nan, _E4M3_NAN, code), tl.where(is_nan, float("nan"), value)


@triton.jit
def _e2m1(quotient: tl.tensor) -> tl.tensor:
    """As `e2m1.encode`."""
    magnitude = tl.abs(quotient)
    magnitude = tl.where(magnitude < _E2M1_LARGEST, magnitude, _E2M1_LARGEST)
    code, _ = _rounded(magnitude, _E2M1_SHIFT, _E2M1_NORMAL, _E2M1_STEPS)
    signed = code | tl.where(quotient < 0, _E2M1_SIGN, 0)
    return tl.where(quotient == quotient, signed, 0)


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
