"""The codes that weights are stored in: what each holds, and how FP32 becomes it and comes back. A row a code."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantplug.formats import e2m1
from quantplug.formats.constants import (
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    E4M3_SMALLEST_SUBNORMAL,
    INT4_HIGHEST,
    INT4_LARGEST,
    INT4_LOWEST,
)


@dataclass(frozen=True)
class Code:
    """One kind of code.

    Attributes:
        bits: Of one code; a divisor of 8, so that a byte holds a whole number of them.
        largest: What the amax of a block is mapped to: of a float its largest magnitude.
        smallest: Smallest magnitude above 0; half of it is rounded to 0, ties going to even.
        dtype: Of a tensor of codes, one byte an element.
        encode: FP32 [..., n] to codes [..., n * bits / 8]: to nearest, ties to even, saturating at its ends.
        decode: Codes back to FP32 [..., n], exactly.
    """

    name: str
    bits: int
    largest: float
    smallest: float
    dtype: torch.dtype
    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]

    @property
    def in_a_byte(self) -> int:
        """How many neighbours of a row share a byte."""
        return 8 // self.bits


def saturate_to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Rounds FP32 to E4M3, ties to even; magnitudes above 448 become 448 where a plain cast makes NaN of them."""
    # E4M3 has no Inf to overflow to (OCP OFP8 v1.0), so saturation is the caller's. A NaN passes the clamp as NaN.
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


# PyTorch cannot compute with a 4-bit float, so its codes are made as integers and kept in uint8, two to a byte.
def _e2m1_pairs(values: torch.Tensor) -> torch.Tensor:
    return e2m1.pack_pairs(e2m1.encode(values))


def _of_e2m1_pairs(packed: torch.Tensor) -> torch.Tensor:
    return e2m1.decode(e2m1.unpack_pairs(packed))


def _of_e4m3(codes: torch.Tensor) -> torch.Tensor:
    # Exact: every E4M3 value, subnormals included, is a normal FP32 value.
    return codes.float()


def _int4_pairs(values: torch.Tensor) -> torch.Tensor:
    # Cut off first: 7.5, which the amax may become, is a tie of 7 and of an 8 that there is not. NaN has no integer.
    steps = values.clamp(INT4_LOWEST, INT4_HIGHEST).round().nan_to_num(nan=0.0)
    # Counted from the lowest, so that no code has a sign, as compressed-tensors packs them.
    return e2m1.pack_pairs((steps - INT4_LOWEST).byte())


def _of_int4_pairs(packed: torch.Tensor) -> torch.Tensor:
    return e2m1.unpack_pairs(packed).float() + INT4_LOWEST


E2M1 = Code("E2M1", 4, E2M1_MAX, E2M1_VALUES[1], torch.uint8, _e2m1_pairs, _of_e2m1_pairs)
E4M3 = Code("E4M3", 8, E4M3_MAX, E4M3_SMALLEST_SUBNORMAL, torch.float8_e4m3fn, saturate_to_e4m3, _of_e4m3)
INT4 = Code("INT4", 4, INT4_LARGEST, 1.0, torch.uint8, _int4_pairs, _of_int4_pairs)
