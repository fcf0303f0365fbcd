"""How far round to nearest can move a value, from the formats' definitions: what the measured errors are held against.

E4M3 keeps three mantissa bits, so rounding moves a normal value by at most 2^-4 of itself, and a value below the
smallest normal, 2^-6, by at most 2^-10.

NVFP4, one block of 16 with the largest magnitude a. Its scale is S = (a / 6)(1 + d), |d| <= 2^-4, while the E4M3 scale
is normal.

- One value: between 4 and 6 the E2M1 grid is 2 apart, so rounding moves a value by at most
  S <= (17/16)(a / 6) = 17 a / 96. Saturation costs less: a - 6 S <= a / 16.
- The block's norm: the worst block holds a, at 6 S / (1 + d), and 15 values at 5 S, halfway between 4 and 6. The
  rounded-up scale (d = 1/16) is the worst: squared error (0.353^2 + 15) S^2 over squared norm (5.647^2 + 375) S^2 is
  0.03718, whose root is 0.1929. (Other halfway points, 0.25, 0.75, 1.25, 1.75, 2.5 and 3.5, give less.)
- With a scale below 2^-6, or zero, the scale itself is coarse: rounding on a grid that holds 0 moves a value by at most
  itself, or saturates it towards 0; the bound is 1. Which blocks these are is told by the scale that the source's
  values ask for, a / (6 weight_scale_2), not by the stored one: a destroyed scale must not excuse itself.

A tensor's bound is the root of the sum over its blocks of (bound * norm)^2, over the norm: exact for these very values.
A zero block, and so a zero tensor, has bound 0.

FP8 (E4M3 times one scale s): at most |x| / 16 + s / 1024 a value; ModelOpt divides in BF16 first (another 2^-9 of the
value, which can move a tie), hence 2^-4 (1 + 2^-4) for the first term.

Methods that are not round to nearest (GPTQ, a sweep of the block scales, AWQ) may exceed the bound of a single value
and still be right; they do not exceed the bound of a whole tensor, nor twice that of a row, unless something is broken.

Nor do they lose values that the format holds. Rounding makes a block zero when its scale rounds to zero (the scale it
asks for is at most 2^-10), or is clamped to the smallest, 2^-9, and the values lie below its first step: from 2^-9 on
no packer does. An FP8 value becomes zero up to 2^-10 of the scale. Here too 2^-9 is held to be lost, which leaves room
for a packer that flushes ties or divides in BF16.
"""

import math
from dataclasses import dataclass

import torch

from quantplug.verify.decode import NVFP4_BLOCK

NVFP4_VALUE_BOUND = 17 / 96
NVFP4_BLOCK_BOUND = 0.1929
FP8_RELATIVE_BOUND = 2**-4 * (1 + 2**-4)
FP8_ABSOLUTE_BOUND = 2**-10  # in units of the scale
SLACK = 1 + 1e-4  # FP32 rounding of scales and products
E4M3_SMALLEST_NORMAL = 2**-6
E4M3_SMALLEST = 2**-9
ROW_SLACK = 2.0  # what one row may exceed its bound by, for packers that look at more than one value at a time
FP8_SEGMENT = 128  # columns that are looked at together for whether they were lost


@dataclass
class ErrorSum:
    """Sums over the chunks of one weight.

    Attributes:
        squared_bound: What `squared_error` may be at most.
        beyond: Values further off than round to nearest can put them.
        values: Values seen.
        lost: Blocks of a row that decode to zeros though the format holds the source's values.
        broken_rows: Rows whose error is beyond `ROW_SLACK` times their own bound.
    """

    squared_error: float = 0.0
    squared_norm: float = 0.0
    squared_bound: float = 0.0
    max_error: float = 0.0
    amax: float = 0.0
    beyond: int = 0
    values: int = 0
    lost: int = 0
    broken_rows: int = 0

    def add(
        self, decoded: torch.Tensor, original: torch.Tensor, bound: torch.Tensor, value_bound: torch.Tensor
    ) -> None:
        """Adds rows: FP32 values, original values, what adds up to each row's bound, and the bound of each value."""
        difference = (decoded - original).abs()
        row_errors, row_bounds = _squared_norms(difference), _squared_norms(bound)
        self.squared_error += float(row_errors.sum())
        self.squared_norm += float(_squared_norms(original).sum())
        self.squared_bound += float(row_bounds.sum())
        self.broken_rows += int((row_errors > row_bounds * (ROW_SLACK * SLACK) ** 2).sum())
        self.max_error = max(self.max_error, float(difference.max())) if difference.numel() else self.max_error
        self.amax = max(self.amax, float(original.abs().max())) if original.numel() else self.amax
        self.beyond += int((difference > value_bound * SLACK).sum())
        self.values += decoded.numel()


def _squared_norms(rows: torch.Tensor) -> torch.Tensor:
    """FP64 [rows] of rows of any shape."""
    return torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=torch.float64).square()


def add_nvfp4(total: ErrorSum, decoded: torch.Tensor, original: torch.Tensor, tensor_scale: torch.Tensor) -> None:
    """Adds rows of an NVFP4 weight [rows, columns]; `tensor_scale` is the FP32 multiplier `weight_scale_2`."""
    blocks = original.view(original.shape[0], -1, NVFP4_BLOCK)
    amax = torch.linalg.vector_norm(blocks, math.inf, dim=-1)
    scales = amax / (6 * tensor_scale.abs().reshape(()))
    normal = scales >= E4M3_SMALLEST_NORMAL
    block_bound = torch.where(normal, NVFP4_BLOCK_BOUND, 1.0) * torch.linalg.vector_norm(blocks, dim=-1)
    value_bound = torch.where(normal, NVFP4_VALUE_BOUND, 1.0) * amax
    decoded_blocks = decoded.view_as(blocks)
    total.add(decoded_blocks, blocks, block_bound, value_bound.unsqueeze(-1))
    total.lost += int(((scales >= E4M3_SMALLEST) & (decoded_blocks == 0).all(dim=-1)).sum())


def add_fp8(total: ErrorSum, decoded: torch.Tensor, original: torch.Tensor, scale: torch.Tensor) -> None:
    """Adds rows of an FP8 weight; `scale` broadcasts to them."""
    absolute = torch.where(original == 0, 0.0, FP8_ABSOLUTE_BOUND * scale)
    value_bound = original.abs() * FP8_RELATIVE_BOUND + absolute
    total.add(decoded, original, value_bound, value_bound)
    held = (original != 0) & (original.abs() >= E4M3_SMALLEST * scale)
    for values, there in zip(decoded.split(FP8_SEGMENT, dim=1), held.split(FP8_SEGMENT, dim=1), strict=True):
        total.lost += int((there.any(dim=1) & (values == 0).all(dim=1)).sum())
