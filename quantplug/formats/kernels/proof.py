"""Whether a set of kernels gives the reference's bits on a device, tried out before a weight is packed by it there.

A compiler for GPUs has many targets, and rounding is what its versions and they may differ in.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from quantplug.formats.constants import FP8_BLOCK, NVFP4_BLOCK
from quantplug.formats.kernels import reference
from quantplug.formats.kernels.protocol import Kernels

_INTEGERS = {2: torch.int16, 4: torch.int32}
_SCALES = (1.0, 7.0, 61.0, 7.0 * 2.0**-60, 1 / 3)
"""Under the first ones, of few bits, many quotients are ties, which no product with a reciprocal of 7 or 61 hits."""

_SQUARE_AMAXES = (448.0, 21.0, 0.29, 2.0**-140)
_SIDE = 256

# Among so many patterns, one of every n, 16 neighbours spread over the five binades that E2M1 tells apart.
_STRIDES = {torch.bfloat16: 37, torch.float16: 299, torch.float32: 37}

Work = Callable[[Kernels], Sequence[torch.Tensor]]
"""Lets kernels do something, and gives the tensors that they have filled."""


def gives_the_bits_of_the_reference(kernels: Kernels, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether they do, for every upper 16 bits that a finite element of this type can have."""
    return all(
        torch.equal(made.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
        for work in _works(_trial_weight(dtype, device))
        for made, expected in zip(work(kernels), work(reference), strict=True)
    )


def _trial_weight(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[512, 256]: every value twice, the second time of FP32 with lower bits that are not 0."""
    patterns = torch.arange(_SIDE**2) * _STRIDES[dtype] % _SIDE**2
    lower = torch.tensor([1, 0x7FFF, 0x8000, 0xFFFF]).repeat(_SIDE**2 // 4)
    patterns = torch.cat((patterns << 16, patterns << 16 | lower)) if dtype.itemsize == 4 else patterns.repeat(2)
    values = patterns.to(_INTEGERS[dtype.itemsize]).view(dtype)
    return torch.where(values.isfinite(), values, 0).view(-1, _SIDE).to(device)


def _works(weight: torch.Tensor) -> Iterator[Work]:
    yield lambda kernels: (kernels.amax(weight), kernels.amax(weight[:, 1::2]))
    for scale in _SCALES:
        yield partial(_nvfp4, weight, scale)
        yield partial(_fp8, weight, scale)
    for amax in _SQUARE_AMAXES:
        clipped = torch.where(weight.abs() <= amax, weight, 0)
        clipped[::FP8_BLOCK, ::FP8_BLOCK] = amax
        yield partial(_fp8_block, clipped)


def _nvfp4(weight: torch.Tensor, scale: float, kernels: Kernels) -> Sequence[torch.Tensor]:
    rows, columns = weight.shape
    scales = weight.new_tensor([scale, scale * 8], dtype=torch.float32)
    codes = weight.new_empty((2, rows, columns // 2), dtype=torch.uint8)
    block_scales = weight.new_empty((2, rows, columns // NVFP4_BLOCK), dtype=torch.float8_e4m3fn)
    values = weight.new_empty(weight.shape, dtype=torch.float32)
    kernels.pack_nvfp4_group((weight, weight.flip(0)), scales, codes, block_scales)
    kernels.pack_nvfp4(weight.t().contiguous().t(), scales[0], codes[0], block_scales[0])
    kernels.unpack_nvfp4(codes[0], block_scales[0], scales[0], values)
    return codes, block_scales, values


def _fp8(weight: torch.Tensor, scale: float, kernels: Kernels) -> Sequence[torch.Tensor]:
    scales = weight.new_tensor([scale, scale * 8], dtype=torch.float32)
    codes = weight.new_empty((2, *weight.shape), dtype=torch.float8_e4m3fn)
    values = weight.new_empty(weight.shape, dtype=torch.float32)
    kernels.pack_fp8_group((weight, weight.flip(0)), scales, codes)
    kernels.pack_fp8(weight.t().contiguous().t(), scales[0], codes[0])
    kernels.unpack_fp8(codes[0], scales[0], values)
    return codes, values


def _fp8_block(weight: torch.Tensor, kernels: Kernels) -> Sequence[torch.Tensor]:
    rows, columns = weight.shape
    codes = weight.new_empty((2, *weight.shape), dtype=torch.float8_e4m3fn)
    block_scales = weight.new_empty((2, rows // FP8_BLOCK, columns // FP8_BLOCK), dtype=torch.float32)
    values = weight.new_empty(weight.shape, dtype=torch.float32)
    kernels.pack_fp8_block_group((weight, weight.flip(0)), codes, block_scales)
    kernels.pack_fp8_block(weight.t().contiguous().t(), codes[0], block_scales[0])
    kernels.unpack_fp8_block(codes[0], block_scales[0], values)
    return codes, block_scales, values
