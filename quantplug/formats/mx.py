"""MXFP4, read only: E2M1 codes with one power of two for each 32 of them [MX].

    value = E2M1(code) * 2 ** (scale - 127)

GPT-OSS's own checkpoints hold their experts so: `_blocks` uint8 [..., K / 32, 16], two codes to a byte with the even
column in the low nibble, and `_scales` uint8 [..., K / 32].
"""

import torch

from quantplug.formats.constants import E8M0_BIAS, E8M0_NAN
from quantplug.formats.e2m1 import decode, unpack_pairs


def unpack_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The BF16 values [..., K] of blocks and scales.

    Exact: a code has one bit of mantissa, and its exponent is one of BF16's; only 4 and 6 times the largest scale
    overflow, to Inf. A scale of 255 is NaN.
    """
    # The scale is uint8, and 0 to 254 less the bias needs a sign.
    exponents = scales.int() - E8M0_BIAS
    values = torch.ldexp(decode(unpack_pairs(blocks)), exponents[..., None])
    # [..., K / 32, 32] until here: each scale stands beside its 32 values.
    values = values.masked_fill_((scales == E8M0_NAN)[..., None], torch.nan)
    return values.flatten(-2).to(torch.bfloat16)
