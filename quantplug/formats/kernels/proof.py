"""Whether a set of kernels gives the reference's bits on a device, tried out before a weight is packed by it there.

A compiler for GPUs has many targets, and rounding is what its versions and they may differ in.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from quantplug.formats.constants import FP8_BLOCK_SIDE, INT4_GROUP, INT4_LARGEST, INT4_SMALL_GROUP
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
from quantplug.formats.kernels.protocol import Encoded, Kernels
from quantplug.formats.search.candidates import FOUND, TAKEN

_INTEGERS = {2: torch.int16, 4: torch.int32}
_SCALES = (1.0, 7.0, 61.0, 7.0 * 2.0**-60, 1 / 3)
"""Under the first ones, of few bits, many quotients are ties, which no product with a reciprocal of 7 or 61 hits."""

# Scales of 1, of few bits, of many, and one that is raised to the smallest normal FP32 (0 in FP16, which gets 1).
_BLOCK_AMAXES = (448.0, 21.0, 0.29, 2.0**-140)
# INT4 scales of 7, whose reciprocal makes no tie of what is one, of many bits, and a raised one.
_GROUP_AMAXES = (7 * INT4_LARGEST, 0.29, 2.0**-140)
_SIDE = 256

# Among so many patterns, one of every n, 16 neighbours spread over the five binades that E2M1 tells apart.
_STRIDES = {torch.bfloat16: 37, torch.float16: 299, torch.float32: 37}

Work = Callable[[Kernels], Sequence[torch.Tensor]]
"""Lets kernels do something, and gives the tensors that they have filled."""


def gives_the_bits_of_the_reference(kernels: Kernels, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether they do, for every upper 16 bits that a finite element of this type can have."""
    return all(
        # As bytes: of floats, NaN would differ from itself and -0.0 equal 0.0.
        torch.equal(made.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
        for work in _works(_trial_weight(dtype, device))
        for made, expected in zip(work(kernels), work(reference), strict=True)
    )


def _trial_weight(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[512, 256]: every value twice, the second time of FP32 with lower bits that are not 0."""
    # 256^2 is 2^16, and multiples of an odd stride visit every one of the 2^16 patterns once.
    patterns = torch.arange(_SIDE**2) * _STRIDES[dtype] % _SIDE**2
    lower = torch.tensor([1, 0x7FFF, 0x8000, 0xFFFF]).repeat(_SIDE**2 // 4)
    patterns = torch.cat((patterns << 16, patterns << 16 | lower)) if dtype.itemsize == 4 else patterns.repeat(2)
    values = patterns.to(_INTEGERS[dtype.itemsize]).view(dtype)
    return torch.where(values.isfinite(), values, 0).view(-1, _SIDE).to(device)


def _works(weight: torch.Tensor) -> Iterator[Work]:
    yield lambda kernels: (kernels.amax(weight), kernels.amax(weight[:, 1::2]))
    for encoding, scale in product((NVFP4_ENCODING, FP8_ENCODING), _SCALES):
        yield partial(_packed, encoding, weight, weight.new_tensor([scale, scale * 8], dtype=torch.float32))
    # 32 neighbours spread over more binades still, so that values of all sizes stand beside each of the amaxes.
    yield from (partial(_packed, encoding, weight, None) for encoding in (MXFP4_ENCODING, MXFP8_ENCODING))
    for amax in _BLOCK_AMAXES:
        # No element is above the amax, and the first of each row and square is it: all have the scale that is tried.
        clipped = torch.where(weight.abs() <= amax, weight, 0)
        of_rows = clipped.clone()
        of_rows[:, 0] = amax
        yield partial(_packed, FP8_ROW_ENCODING, of_rows, None)
        clipped[::FP8_BLOCK_SIDE, ::FP8_BLOCK_SIDE] = amax
        for part in (clipped, clipped[:-1, :-3]):  # Of whole squares, and of partial ones at both edges.
            yield partial(_packed, FP8_BLOCK_ENCODING, part, None)
    for amax in _GROUP_AMAXES:
        for encoding, group in ((INT4_ENCODING, INT4_GROUP), (INT4_32_ENCODING, INT4_SMALL_GROUP)):
            of_groups = torch.where(weight.abs() <= amax, weight, 0)
            of_groups[:, ::group] = amax
            yield partial(_packed, encoding, of_groups, None)
    # The searches last, which take the longest: kernels that round otherwise are mostly found before.
    for search, scale in product((*FOUND, *TAKEN), _SCALES[2:]):
        scales = weight.new_tensor([scale, scale * 8], dtype=torch.float32)
        yield partial(_packed, NVFP4_ENCODING.searched(search), weight, scales)
    # Of many sizes, and zero for some columns.
    columns = torch.arange(_SIDE, dtype=torch.float32, device=weight.device)
    of_columns = torch.stack((columns % 7 / 3, columns.flip(0) ** 3 + 1 / 3))
    for search in FOUND:
        yield partial(_packed, NVFP4_ENCODING.searched(search), weight, scales, importance=of_columns)


def _packed(
    encoding: Encoding,
    weight: torch.Tensor,
    tensor_scales: torch.Tensor | None,
    kernels: Kernels,
    importance: torch.Tensor | None = None,
) -> Sequence[torch.Tensor]:
    """What kernels fill for a group of two, for one weight with other strides, and for the values of that one.

    These are the three ways in which a loop is compiled: addresses in a table, a tensor with strides, and unpacking.
    """
    group, one = _empty(encoding, weight, 2), _empty(encoding, weight, 1)
    if tensor_scales is not None:
        group, one = replace(group, whole=tensor_scales), replace(one, whole=tensor_scales[:1])
    if importance is not None:
        group, one = replace(group, importance=importance), replace(one, importance=importance[:1])
    values = weight.new_empty((1, *weight.shape), dtype=torch.float32)
    kernels.pack(encoding, (weight, weight.flip(0)), group)
    kernels.pack(encoding, (weight.t().contiguous().t(),), one)
    kernels.unpack(encoding, one, values)
    filled = (group.codes, one.codes, values, group.blocks, one.blocks)
    return [tensor for tensor in filled if tensor is not None]


def _empty(encoding: Encoding, weight: torch.Tensor, count: int) -> Encoded:
    """Tensors to be filled for so many weights like this one; scales of blocks are there where they are given."""
    rows, columns = weight.shape
    codes = weight.new_empty((count, rows, columns // encoding.code.in_a_byte), dtype=encoding.code.dtype)
    if not encoding.has_block_scales:
        return Encoded(codes)
    scales = weight.new_empty((count, *encoding.block.count((rows, columns))), dtype=encoding.scale.dtype)
    if encoding.search.is_given:
        # Every E4M3 number, of which 0 and NaN are no scales.
        numbers = torch.arange(scales.numel(), device=weight.device) % 126 + 1
        scales = numbers.to(torch.uint8).view(scales.dtype).view(scales.shape)
    return Encoded(codes, scales)
