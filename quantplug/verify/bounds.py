"""How far round to nearest can move a value, from the formats' definitions: what the measured errors are held against.

E4M3 keeps three mantissa bits, so rounding moves a normal value by at most 2^-4 of itself, and a value below the
smallest normal, 2^-6, by at most 2^-10.

NVFP4, one block of 16 with the largest magnitude a. Its scale is S = (a / 6)(1 + d), |d| <= 2^-4, while the E4M3 scale
is normal.

- One value: between 4 and 6 the E2M1 grid is 2 apart, so rounding moves a value by at most
  S <= (17/16)(a / 6) = 17 a / 96. Saturation costs less: a - 6 S <= a / 16. A search for the scale of least squared
  error may take a smaller one, and clip the few largest values for the sake of the others: from three codes below that
  of a / 6 on. These cost most below 11.5/8 of a power of two, where S is 8 of 11.5 parts of a / 6: 7 a / 23. (A larger
  scale costs a value at most a / 5, at which it is halfway between 4 S and 6 S.)
- The block's norm: the worst block holds a, at 6 S / (1 + d), and 15 values at 5 S, halfway between 4 and 6. The
  rounded-up scale (d = 1/16) is the worst: squared error (0.353^2 + 15) S^2 over squared norm (5.647^2 + 375) S^2 is
  0.03718, whose root is 0.1929. (Other halfway points, 0.25, 0.75, 1.25, 1.75, 2.5 and 3.5, give less.)
- With a scale below 2^-6, or zero, the scale itself is coarse: rounding on a grid that holds 0 moves a value by at most
  itself, or saturates it towards 0; the bound is 1. Which blocks these are is told by the scale that the source's
  values ask for, a / (6 weight_scale_2), not by the stored one: a destroyed scale must not excuse itself.

A tensor's bound is the root of the sum over its blocks of (bound * norm)^2, over the norm: exact for these very values.
A zero block, and so a zero tensor, has bound 0.

MXFP4, one block of 32 with the largest magnitude a, under a power of two S. Packers round the exponent up, so that
a <= 6 S, or down, so that a < 8 S and what is above 6 S saturates; in each case a > 3 S. Rounding between 4 and 6 moves
a value by at most S, which is a / 5 where 5 S is a, halfway; saturation by at most 2 S, which is a / 4 where 8 S is a.
So one value, and the norm of a block of equal ones, is off by at most a / 4. A wrong exponent doubles or halves it all.

FP8 (E4M3 times one scale s): at most |x| / 16 + s / 1024 a value; ModelOpt divides in BF16 first (another 2^-9 of the
value, which can move a tie), hence 2^-4 (1 + 2^-4) for the first term.

INT4, one group with the largest magnitude a. Its scale is s = (a / 7.5)(1 + d), |d| <= 2^-8 (BF16), so that rounding
moves a value by at most s / 2. The largest becomes 7 s where it is positive, and is moved by at most
a - 7 (a / 7.5)(1 - 2^-8) = (1 + 14 * 2^-8) a / 15, which is a little more and bounds all of them. 0 is on the grid, so
that no value is moved by more than itself. In place of an E4M3 scale it is the largest value that leaves a group up to
1 / 15 larger or smaller, which the allowance of 2^-4 below is for as well.

Methods that are not round to nearest (GPTQ, a sweep of the block scales, AWQ) may exceed the bound of a single value
and still be right; they do not exceed the bound of a whole tensor, nor twice that of a row, unless something is broken.

Nor do they lose values that the format holds. Rounding makes a block zero when its scale rounds to zero (the scale it
asks for is at most 2^-10), or is clamped to the smallest, 2^-9, and the values lie below its first step: from 2^-9 on
no packer does. An FP8 value becomes zero up to 2^-10 of the scale. Here too 2^-9 is held to be lost, which leaves room
for a packer that flushes ties or divides in BF16.

None of this sees a scale that is a little too large: all weights 15 % too large stay within 0.1929. The gain does,
<decoded, original> / <original, original>. Rounding errors have no common sign, so it is near 1: 0.993 to 1.002 for
NVFP4 by max, scale search and GPTQ, 0.998 to 1.001 for FP8, on trained weights. What is further from 1 than `base` is
suspicious, beyond:

- what is left to chance: the rounding of an E4M3 scale, or value, makes a block of 16 up to 2^-4 larger or smaller. The
  gain of n blocks of equal norm then has a standard deviation of less than 2^-4 / sqrt(n); of other blocks n is (sum of
  squared norms)^2 / (sum of their squares). Two of these are allowed for a weight, which has many blocks, and four for
  a row, of which a weight has so many that one of them is far off.
- the share of the squared norm in blocks that a format holds badly (`squared_bound` beyond what well held blocks have):
  all of it may be lost.

Values that are few, such as those of a source that was quantized before, have common errors; what is suspicious is
therefore rounded anew here, and an error is only a gain that differs from what this gives by more than `decisive`. That
is more than the ways of rounding differ by, and less than the 2 % of a scale that is a little off.
"""

import math
from dataclasses import dataclass

import torch

from quantplug.verify.decode import MXFP4_BLOCK, NVFP4_BLOCK

NVFP4_VALUE_BOUND = 7 / 23
NVFP4_BLOCK_BOUND = 0.1929
MXFP4_BOUND = 1 / 4
MXFP4_SMALLEST = 2.0**-120  # an amax that no power of two is too large for
FP8_RELATIVE_BOUND = 2**-4 * (1 + 2**-4)
FP8_ABSOLUTE_BOUND = 2**-10  # in units of the scale
INT4_VALUE_BOUND = (1 + 14 * 2**-8) / 15
SLACK = 1 + 1e-4  # FP32 rounding of scales and products
E4M3_SMALLEST_NORMAL = 2**-6
E4M3_SMALLEST = 2**-9
E4M3_ROUNDING = 2**-4
ROW_SLACK = 2.0  # what one row may exceed its bound by, for packers that look at more than one value at a time
FP8_SEGMENT = 128  # columns that are looked at together for whether they were lost


@dataclass(frozen=True)
class GainBound:
    """How far the gain of a format may be from 1.

    Attributes:
        base: Systematic part.
        relative: Largest error of a well held block over its norm.
        deviations: How many standard deviations are left to chance.
        decisive: Difference from the gain of the same values rounded anew that is an error.
        centre: What the gain is near; 1 unless a format's ends are uneven.
    """

    base: float
    relative: float
    deviations: float
    decisive: float
    centre: float = 1.0

    def allowed(self, norm: torch.Tensor, bound: torch.Tensor, quartic: torch.Tensor) -> torch.Tensor:
        """FP64, of sums of any shape."""
        chance = self.deviations * E4M3_ROUNDING * quartic.sqrt() / norm
        # What blocks in the subnormal range may lose beyond a well held block: all of it may go one way.
        badly_held = (bound / norm - self.relative**2).clamp(min=0)
        return self.base + chance + badly_held


NVFP4_GAIN = GainBound(0.008, NVFP4_BLOCK_BOUND, deviations=2, decisive=0.012)
NVFP4_ROW_GAIN = GainBound(0.03, NVFP4_BLOCK_BOUND, deviations=4, decisive=0.03)
# Rounded down, exponents saturate the largest values, all in one direction.
MXFP4_GAIN = GainBound(0.04, MXFP4_BOUND, deviations=2, decisive=0.05)
MXFP4_ROW_GAIN = GainBound(0.08, MXFP4_BOUND, deviations=4, decisive=0.08)
FP8_GAIN = GainBound(0.006, FP8_RELATIVE_BOUND, deviations=2, decisive=0.008)
FP8_ROW_GAIN = GainBound(0.01, FP8_RELATIVE_BOUND, deviations=4, decisive=0.01)

# Of the largest value of a group, 7.5, a positive one becomes 7, and a negative one -7 or -8.
INT4_GAIN = GainBound(0.004, NVFP4_BLOCK_BOUND, deviations=2, decisive=0.012, centre=0.995)
INT4_ROW_GAIN = GainBound(0.03, NVFP4_BLOCK_BOUND, deviations=4, decisive=0.03, centre=0.995)


@dataclass(frozen=True)
class RowSums:
    """Sums over each of some rows, FP64 [rows], so that neither 1e-24 nor 1e30 leaves the range when squared.

    Attributes:
        error: Squared differences.
        norm: Squares of the original.
        bound: What `error` may be at most.
        dot: Products of decoded and original.
        quartic: Squares of the blocks' squared norms.
        largest_error: The largest difference.
        amax: The largest magnitude of the original.
        beyond: Values further off than round to nearest can put them.
        lost: Blocks that decode to zeros though the format holds the original's values.
        values: How many values a row has.
    """

    error: torch.Tensor
    norm: torch.Tensor
    bound: torch.Tensor
    dot: torch.Tensor
    quartic: torch.Tensor
    largest_error: torch.Tensor
    amax: torch.Tensor
    beyond: torch.Tensor
    lost: torch.Tensor
    values: int

    def off_gain(self, wanted: GainBound) -> torch.Tensor:
        """BOOL [rows]: whose gain is further from 1 than allowed; none of zeros, nor what the other bounds find."""
        finite = self.dot.isfinite() & (self.norm > 0)
        allowed = wanted.allowed(self.norm, self.bound, self.quartic)
        return finite & ((self.dot / self.norm - wanted.centre).abs() > allowed)


@dataclass
class ErrorSum:
    """Sums over the chunks of one weight.

    Attributes:
        squared_bound: What `squared_error` may be at most.
        dot: Products of decoded and original.
        quartic: Squares of the blocks' squared norms.
        beyond: Values further off than round to nearest can put them.
        values: Values seen.
        lost: Blocks of a row that decode to zeros though the format holds the source's values.
        broken_rows: Rows whose error is beyond `ROW_SLACK` times their own bound.
        off_rows: Rows whose gain is off, though round to nearest gives another.
        off: The same of the whole weight.
    """

    squared_error: float = 0.0
    squared_norm: float = 0.0
    squared_bound: float = 0.0
    dot: float = 0.0
    quartic: float = 0.0
    max_error: float = 0.0
    amax: float = 0.0
    beyond: int = 0
    values: int = 0
    lost: int = 0
    broken_rows: int = 0
    off_rows: int = 0
    off: bool = False

    @property
    def gain(self) -> float:
        return self.dot / self.squared_norm if self.squared_norm else 1.0

    def add(self, rows: RowSums) -> None:
        self.squared_error += float(rows.error.sum())
        self.squared_norm += float(rows.norm.sum())
        self.squared_bound += float(rows.bound.sum())
        self.dot += float(rows.dot.sum())
        self.quartic += float(rows.quartic.sum())
        self.broken_rows += int((rows.error > rows.bound * (ROW_SLACK * SLACK) ** 2).sum())
        if rows.error.numel():
            self.max_error = max(self.max_error, float(rows.largest_error.max()))
            self.amax = max(self.amax, float(rows.amax.max()))
        self.beyond += int(rows.beyond.sum())
        self.values += rows.values * rows.error.numel()
        self.lost += int(rows.lost.sum())

    def off_gain(self, wanted: GainBound) -> bool:
        """Whether the gain of the whole weight is further from 1 than allowed."""
        sums = (torch.tensor([x], dtype=torch.float64) for x in (self.squared_norm, self.squared_bound, self.quartic))
        finite = math.isfinite(self.gain) and self.squared_norm > 0
        return finite and abs(self.gain - wanted.centre) > float(wanted.allowed(*sums))


def _row_sums(
    decoded: torch.Tensor,
    original: torch.Tensor,
    bound: torch.Tensor,
    value_bound: torch.Tensor,
    lost: torch.Tensor,
    columns: int,
) -> RowSums:
    """Of FP32 blocks [rows, blocks, values], the FP64 squared bound of each row, and the bound of each value."""
    difference = (decoded - original).abs()
    norms = _squares(original)
    return RowSums(
        error=_squares(difference).sum(dim=1),
        norm=norms.sum(dim=1),
        bound=bound,
        dot=(decoded.double() * original.double()).flatten(1).sum(dim=1),
        quartic=norms.square().sum(dim=1),
        largest_error=difference.flatten(1).amax(dim=1),
        amax=original.abs().flatten(1).amax(dim=1),
        beyond=(difference > value_bound * SLACK).flatten(1).sum(dim=1),
        lost=lost,
        values=columns,
    )


def _squares(blocks: torch.Tensor) -> torch.Tensor:
    """FP64 squared norms [rows, blocks]."""
    return torch.linalg.vector_norm(blocks, dim=-1, dtype=torch.float64).square()


def nvfp4_sums(decoded: torch.Tensor, original: torch.Tensor, tensor_scale: torch.Tensor) -> RowSums:
    """Of FP32 rows of an NVFP4 weight [rows, columns]; `tensor_scale` is the FP32 multiplier `weight_scale_2`."""
    blocks = original.view(original.shape[0], -1, NVFP4_BLOCK)
    amax = blocks.abs().amax(dim=-1)
    # What the values ask for, not what is stored: a scale that is wrong must not widen its own bound.
    scales = amax / (6 * tensor_scale.abs().reshape(()))
    normal = scales >= E4M3_SMALLEST_NORMAL
    bound = (torch.where(normal, NVFP4_BLOCK_BOUND**2, 1.0) * _squares(blocks)).sum(dim=1)
    value_bound = torch.where(normal, NVFP4_VALUE_BOUND, 1.0) * amax
    decoded_blocks = decoded.view_as(blocks)
    # The format could hold the block, and every code of it decodes to zero: somebody lost it.
    lost = ((scales >= E4M3_SMALLEST) & (decoded_blocks == 0).all(dim=-1)).sum(dim=1)
    return _row_sums(decoded_blocks, blocks, bound, value_bound.unsqueeze(-1), lost, original.shape[1])


def int4_sums(decoded: torch.Tensor, original: torch.Tensor, group: int) -> RowSums:
    """Of FP32 rows of an INT4 weight [rows, columns] with a scale for `group` columns."""
    groups = original.view(original.shape[0], -1, group)
    amax = groups.abs().amax(dim=-1, keepdim=True)
    # By the values' own amax, not by the stored scale, which may be what is wrong.
    value_bound = torch.minimum(groups.abs(), amax * INT4_VALUE_BOUND)
    decoded_groups = decoded.view_as(groups)
    # The largest value of a group is seven steps or more from 0.
    lost = ((amax.squeeze(-1) > 0) & (decoded_groups == 0).all(dim=-1)).sum(dim=1)
    bound = _squares(value_bound).sum(dim=1)
    return _row_sums(decoded_groups, groups, bound, value_bound, lost, original.shape[1])


def mxfp4_sums(decoded: torch.Tensor, original: torch.Tensor) -> RowSums:
    """Of FP32 rows of an MXFP4 weight [rows, columns]."""
    blocks = original.view(original.shape[0], -1, MXFP4_BLOCK)
    amax = blocks.abs().amax(dim=-1)
    decoded_blocks = decoded.view_as(blocks)
    bound = (MXFP4_BOUND**2 * _squares(blocks)).sum(dim=1)
    lost = ((amax >= MXFP4_SMALLEST) & (decoded_blocks == 0).all(dim=-1)).sum(dim=1)
    return _row_sums(decoded_blocks, blocks, bound, (MXFP4_BOUND * amax).unsqueeze(-1), lost, original.shape[1])


def fp8_sums(decoded: torch.Tensor, original: torch.Tensor, scale: torch.Tensor) -> RowSums:
    """Of FP32 rows of an FP8 weight [rows, columns]; `scale` broadcasts to them."""
    # Zero is a code of its own and decodes to zero under every scale: it may not move at all.
    absolute = torch.where(original == 0, 0.0, FP8_ABSOLUTE_BOUND * scale)
    value_bound = original.abs() * FP8_RELATIVE_BOUND + absolute
    held = (original != 0) & (original.abs() >= E4M3_SMALLEST * scale)
    segments = zip(held.split(FP8_SEGMENT, dim=1), decoded.split(FP8_SEGMENT, dim=1), strict=True)
    lost = sum((there.any(dim=1) & (values == 0).all(dim=1)).long() for there, values in segments)
    bound = torch.linalg.vector_norm(value_bound, dim=1, dtype=torch.float64).square()
    values, bounds = _in_blocks(original), _in_blocks(value_bound)
    return _row_sums(_in_blocks(decoded), values, bound, bounds, torch.as_tensor(lost), original.shape[1])


def _in_blocks(rows: torch.Tensor) -> torch.Tensor:
    """[rows, blocks, 16], with zeros at the end of a last block that is cut."""
    missing = -rows.shape[1] % NVFP4_BLOCK
    return torch.nn.functional.pad(rows, (0, missing)).view(rows.shape[0], -1, NVFP4_BLOCK)
