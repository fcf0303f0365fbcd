"""Every value that a weight can hold."""

import torch

from quantplug.formats.constants import E2M1_MAX, E4M3_MAX, NVFP4_MAX

PATTERNS = torch.arange(2**16, dtype=torch.int32)
E4M3_SCALES = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
"""Every positive finite E4M3 value: every scale that a block of NVFP4 can have."""

TENSOR_SCALES = [1.0, 2.0**-126, 2.0**-60, 3e38 / NVFP4_MAX, 1e-5, 2.5e-6, 0.1, 1 / 3, 1.9999998, 1.0000001]
"""Under powers of two every tie is exact; the others have long mantissas, and two are the extremes."""


def all_values(dtype: torch.dtype) -> torch.Tensor:
    """Every value of a 16-bit dtype. Of FP32 every upper half, and lower halves on, beside and between ties.

    A tie of E2M1 or E4M3 has at most 5 significant bits. So of the lower 16 bits of a quotient it counts alone whether
    they are 0; those tried also carry into the upper half, or just fail to.
    """
    if dtype.itemsize == 2:
        return PATTERNS.to(torch.int16).view(dtype)
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    return ((PATTERNS << 16)[:, None] + lower).view(dtype).flatten()


def every_block(dtype: torch.dtype, scale: torch.Tensor, weight_scale_2: float) -> torch.Tensor:
    """NVFP4 blocks [n, 16] of all finite values that can be in a block of this E4M3 scale; the first is its amax."""
    values = all_values(dtype)
    values = values[values.isfinite()]
    amax = (scale * E2M1_MAX * weight_scale_2).to(dtype)
    # The largest scale is that of all larger amaxes too.
    inside = values if scale == E4M3_MAX else values[values.abs() <= amax]
    blocks = torch.nn.functional.pad(inside, (0, -inside.numel() % 15)).view(-1, 15)
    return torch.cat((amax.expand(len(blocks), 1), blocks), 1)
