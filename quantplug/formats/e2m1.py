"""E2M1, the 4-bit float of NVFP4: one sign, two exponent and one mantissa bit, without NaN or Inf.

    code       0    1    2    3    4    5    6    7        8 ... 15
    value      0   0.5   1   1.5   2    3    4    6       -0 ... -6

Codes are held one to a byte (uint8, 0 to 15) or packed two to a byte: the even column in the low nibble.
"""

import torch

from quantplug.formats.constants import E2M1_BOUNDS, E2M1_VALUES

_SIGN_BIT = 3


def encode(values: torch.Tensor) -> torch.Tensor:
    """Rounds FP32 values to the nearest E2M1 code, ties to the even code, magnitudes above 6 to 6.

    A value of -0.0 gets code 0; a negative value that rounds to zero keeps its sign (code 8), as in ModelOpt.

    Returns:
        uint8 codes of the same shape.
    """
    magnitude = values.abs()
    # The code is the number of midpoints that the magnitude has passed. A NaN passes none, and gets code 0.
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for lower_code, bound in enumerate(E2M1_BOUNDS):
        # On the bound itself the even one of codes i and i + 1 wins: the upper one when i is odd.
        codes += magnitude >= bound if lower_code % 2 else magnitude > bound
    # A comparison, not the sign bit: -0.0 is not below 0, and so it gets code 0.
    return codes | (values < 0).byte() << _SIGN_BIT


def decode(codes: torch.Tensor) -> torch.Tensor:
    """FP32 values of uint8 codes, one to a byte; code 8 is -0.0."""
    table = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=codes.device)
    # As integers of 32 bits, because PyTorch takes a uint8 index for a mask.
    return table[codes.int()]


def pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Packs uint8 codes [..., K], K even, two to a byte [..., K/2]: even columns in the low nibble."""
    # vLLM, SGLang, TensorRT-LLM and compressed-tensors all read the low nibble first; nothing on disk says which it is.
    return codes[..., 1::2] << 4 | codes[..., 0::2]


def unpack_pairs(packed: torch.Tensor) -> torch.Tensor:
    """Undoes `pack_pairs`: uint8 [..., K/2] to codes [..., K]."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)
