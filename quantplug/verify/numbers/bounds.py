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

Methods that are not round to nearest (GPTQ, a sweep of the block scales, AWQ) may exceed these bounds and still be
right, which the end of this page is about.

Nor do they lose values that the format holds. Rounding makes a block zero when its scale rounds to zero (the scale it
asks for is at most 2^-10), or is clamped to the smallest, 2^-9, and the values lie below its first step: from 2^-9 on
no packer does. An FP8 value becomes zero up to 2^-10 of the scale. Here too 2^-9 is held to be lost, which leaves room
for a packer that flushes ties or divides in BF16.

Error feedback (GPTQ) goes further, the more so the more inputs differ in size: with four channels of 128 that are 32
times the others, to 0.33 of a weight and 0.5 of a row. So a weight, and a row, may be off by three times their bound,
though never by as much as others in their place would be (1.4), or nothing (1): `WEIGHT_LIMIT` and `ROW_LIMIT`. What is
wrong within that has a wrong gain (`gains.py`): by half the error where values are others, or missing.
"""

from dataclasses import dataclass

import torch

from quantplug.verify.numbers.damage import Damage
from quantplug.verify.numbers.decode import MXFP4_BLOCK, NVFP4_BLOCK
from quantplug.verify.numbers.gains import GainBound, Sums, along_blocks

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
FEEDBACK = 3.0  # times its bound that a weight, or a row, may be off by, for packers that look at more than one value
MXFP4_FEEDBACK = 2.0  # The bound of a power of two is wide; an exponent that is one off doubles a block.
WEIGHT_LIMIT = 0.6  # of its norm that a weight may be off by, however wide its bound is
ROW_LIMIT = 0.9
ODD_BLOCK = 0.15  # of a block's squared norm that its product with what is decoded is off by: hardly any is that
FP8_SEGMENT = 128  # columns that are looked at together for whether they were lost


# Of a weight, and of one of its rows.
NVFP4_GAINS = (
    GainBound(0.9955, 0.006, decisive=0.011, deviations=2),
    GainBound(0.9955, 0.03, decisive=0.03, deviations=4, of_row=True),
)
# Exponents that are rounded down saturate the largest values, all in one direction.
MXFP4_GAINS = (
    GainBound(0.99, 0.02, decisive=0.02, deviations=2),
    GainBound(0.99, 0.06, decisive=0.06, deviations=4, of_row=True),
)
FP8_GAINS = (
    GainBound(0.999, 0.004, decisive=0.008, deviations=2),
    GainBound(0.999, 0.006, decisive=0.01, deviations=4, of_row=True),
)
# Of the largest value of a group, 7.5, a positive one becomes 7, and a negative one -7 or -8.
INT4_GAINS = (
    GainBound(0.995, 0.006, decisive=0.011, deviations=2),
    GainBound(0.995, 0.03, decisive=0.03, deviations=4, of_row=True),
)


@dataclass(frozen=True)
class RowSums(Sums):
    """Sums over each of some rows, [rows].

    Attributes:
        bound: What `error` may be at most where values are rounded to nearest.
        largest_error: The largest difference.
        amax: The largest magnitude of the original.
        beyond: Values further off than round to nearest can put them.
        lost: Blocks that decode to zeros though the format holds the original's values.
        odd: Blocks that are larger or smaller as a whole than rounding makes all but a few.
        values: How many values a row has.
    """

    bound: torch.Tensor
    largest_error: torch.Tensor
    amax: torch.Tensor
    beyond: torch.Tensor
    lost: torch.Tensor
    odd: torch.Tensor
    values: int


@dataclass
class ErrorSum:
    """Sums over the chunks of one weight, of which `gains.Sums` says what the first are.

    Attributes:
        feedback: Times its bound that a weight or a row may be off by.
        beyond: Values further off than round to nearest can put them.
        values: Values seen.
        lost: Blocks of a row that decode to zeros though the format holds the source's values.
        broken_rows: Rows whose error is beyond all that rounding may give.
        off_rows: Rows whose gain is off, though round to nearest gives another.
        off: The same of the whole weight.
        misplaced: The error lies along the blocks, as if their scales were of other blocks.
        damage: Of some rows or columns, looked for where values are beyond or blocks odd; None where there is none.
    """

    squared_error: float = 0.0
    squared_norm: float = 0.0
    squared_bound: float = 0.0
    dot: float = 0.0
    quartic: float = 0.0
    along: float = 0.0
    max_error: float = 0.0
    amax: float = 0.0
    beyond: int = 0
    values: int = 0
    lost: int = 0
    broken_rows: int = 0
    off_rows: int = 0
    off: bool = False
    misplaced: bool = False
    damage: Damage | None = None
    feedback: float = FEEDBACK

    @property
    def gain(self) -> float:
        return self.dot / self.squared_norm if self.squared_norm else 1.0

    @property
    def sums(self) -> Sums:
        """Of the whole weight, [1]."""
        whole = (self.squared_error, self.squared_norm, self.dot, self.quartic, self.along)
        return Sums(*(torch.tensor([part], dtype=torch.float64) for part in whole))

    @property
    def squared_limit(self) -> float:
        """What `squared_error` may be at most, however values were rounded."""
        bound, norm = torch.tensor([self.squared_bound, self.squared_norm], dtype=torch.float64)
        return float(limit_of(bound, norm, self.feedback, WEIGHT_LIMIT))

    def add(self, rows: RowSums) -> None:
        self.squared_error += float(rows.error.sum())
        self.squared_norm += float(rows.norm.sum())
        self.squared_bound += float(rows.bound.sum())
        self.dot += float(rows.dot.sum())
        self.quartic += float(rows.quartic.sum())
        self.along += float(rows.along.sum())
        self.broken_rows += int((rows.error > limit_of(rows.bound, rows.norm, self.feedback, ROW_LIMIT)).sum())
        if rows.error.numel():
            self.max_error = max(self.max_error, float(rows.largest_error.max()))
            self.amax = max(self.amax, float(rows.amax.max()))
        self.beyond += int(rows.beyond.sum())
        self.values += rows.values * rows.error.numel()
        self.lost += int(rows.lost.sum())


def limit_of(bound: torch.Tensor, norm: torch.Tensor, feedback: float, limit: float) -> torch.Tensor:
    """Squared error that no way of rounding exceeds: `feedback` times the bound, but no more than `limit` of the norm.

    Where the bound itself is more than that, all may be lost to rounding, and it is the bound.
    """
    wider = torch.minimum(feedback**2 * bound, limit**2 * norm)
    return torch.maximum(bound, wider) * SLACK**2


def _row_sums(
    decoded: torch.Tensor,
    original: torch.Tensor,
    bound: torch.Tensor,
    value_bound: torch.Tensor,
    lost: torch.Tensor,
    columns: int,
    normal: torch.Tensor | None = None,
) -> RowSums:
    """Of FP32 blocks [rows, blocks, values], the FP64 squared bound of each row, and the bound of each value.

    Args:
        normal: BOOL [rows, blocks]: which blocks the format does not round more coarsely than others; None for all.
    """
    difference = (decoded - original).abs()
    norms, dots = _squares(original), (decoded.double() * original.double()).sum(dim=-1)
    odd = (dots - norms).abs() > ODD_BLOCK * norms
    return RowSums(
        error=_squares(difference).sum(dim=1),
        norm=norms.sum(dim=1),
        bound=bound,
        dot=dots.sum(dim=1),
        quartic=norms.square().sum(dim=1),
        along=along_blocks(dots, norms).sum(dim=1),
        largest_error=difference.flatten(1).amax(dim=1),
        amax=original.abs().flatten(1).amax(dim=1),
        beyond=(difference > value_bound * SLACK).flatten(1).sum(dim=1),
        lost=lost,
        odd=(odd if normal is None else odd & normal).sum(dim=1),
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
    return _row_sums(decoded_blocks, blocks, bound, value_bound.unsqueeze(-1), lost, original.shape[1], normal)


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
    value_bound = fp8_value_bound(original, scale)
    held = (original != 0) & (original.abs() >= E4M3_SMALLEST * scale)
    segments = zip(held.split(FP8_SEGMENT, dim=1), decoded.split(FP8_SEGMENT, dim=1), strict=True)
    lost = sum((there.any(dim=1) & (values == 0).all(dim=1)).long() for there, values in segments)
    bound = torch.linalg.vector_norm(value_bound, dim=1, dtype=torch.float64).square()
    values, bounds = in_blocks(original), in_blocks(value_bound)
    normal = (values.abs() >= E4M3_SMALLEST_NORMAL * in_blocks(scale.expand_as(original))).any(dim=-1)
    normal &= (values != 0).any(dim=-1)
    return _row_sums(in_blocks(decoded), values, bound, bounds, torch.as_tensor(lost), original.shape[1], normal)


def fp8_value_bound(original: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """How far each FP32 value may be moved; `scale` broadcasts to them."""
    # Zero is a code of its own and decodes to zero under every scale: it may not move at all.
    absolute = torch.where(original == 0, 0.0, FP8_ABSOLUTE_BOUND * scale)
    return original.abs() * FP8_RELATIVE_BOUND + absolute


def in_blocks(rows: torch.Tensor, width: int = NVFP4_BLOCK) -> torch.Tensor:
    """[rows, blocks, width], with zeros at the end of a last block that is cut."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % width)).view(rows.shape[0], -1, width)
