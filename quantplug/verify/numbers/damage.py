"""Whether a weight is damaged in part: a block, a few codes, a column, too few of its values to move any sum.

Asked where single values are further off than rounding to nearest can put them, or a block as a whole is larger or
smaller than it makes all but a few (`bounds.py`). A search for scales clips, and error feedback (GPTQ) moves values,
so such values alone are no fault. Two things are, whatever packed it:

- Values that were changed after they were rounded. Where nearly all values are what rounding to nearest by the stored
  scales gives, there was no feedback: these scales then explain every value, clipped ones too, and one that is further
  off by `MARGIN` was changed, or its scale. Damage spoils few rows or few columns, feedback all: the worst `FEW` of
  them are left out, and of the others `CLEAN` of all values may be unexplained. (Feedback of a quarter of a step, which
  `MARGIN` is, changes one code in twenty. Where it is a hundredth, and a row has a block of far larger values, that row
  alone is fed back a quarter, which `CLEAN` must not let pass.) As inputs that are alike in few channels may feed back
  into few columns alone, a column is damaged only where its error is as large as itself, too.
- A column whose gain, <decoded, original> / <original, original> over its rows, is neither 1, nor what rounding by the
  stored scales gives. Errors that are fed back come from other columns and so have no common sign with the column's
  own values, be they more than a step: lost columns are 1 off, and so are columns in each other's places.

Whether there was feedback, and which columns are off, is asked of `SAMPLE` rows: rounding all of a large weight anew
takes thirty times as long as the other sums. Of the others only those are rounded that have such a value or block.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import reduce

import torch

TIES = 2.0**-7  # what packers that divide in BF16, by a scale in BF16, take for a tie
MARGIN = 1 / 24  # of a block's largest magnitude: a quarter of a step between codes of 4 bits
FEW = 0.05  # of the rows, or of the columns, that may hold the damage: one row, or the columns of one byte, at least
CLEAN = 0.0005  # of the other values, that may be unexplained; of those that were rounded to nearest none was
ENOUGH = 1024  # values, to tell feedback from none
OFF_COLUMN = 0.5  # that a column's gain may be off by
DEVIATIONS = 5.0  # of chance
STEP = 4.0  # margins: a step of 4 bits
SAMPLE, STRETCH = 256, 16  # rows that are looked at first, and how many of them lie side by side
_SAME = 1e-6  # in which FP32 products differ


@dataclass(frozen=True)
class Damage:
    """Where a weight is damaged.

    Attributes:
        rows: Rows with values that nothing explains, of a weight that was rounded to nearest.
        values: How many these are.
        columns: Columns that are lost, or others.
    """

    rows: list[int]
    values: int
    columns: list[int]


@dataclass(frozen=True)
class RowCounts:
    """INT64 [rows].

    Attributes:
        numbers: Of the rows in the weight.
        unexplained: Values that rounding does not give.
        far: Those of them that are further off than it puts values, by a margin.
    """

    numbers: torch.Tensor
    unexplained: torch.Tensor
    far: torch.Tensor


@dataclass(frozen=True)
class ColumnSums:
    """FP64 [columns], over some rows.

    Attributes:
        norm: Squares of the original.
        dot: Products of decoded and original.
        error: Squared differences.
        lower: The least that `dot` is where the original is rounded by the stored scales.
        upper: The most.
        unexplained: Values that rounding does not give.
        margin: Squares of the margin.
    """

    norm: torch.Tensor
    dot: torch.Tensor
    error: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor
    unexplained: torch.Tensor
    margin: torch.Tensor

    def plus(self, other: "ColumnSums") -> "ColumnSums":
        """The sums over both."""
        return ColumnSums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def off(self, rows: int) -> torch.Tensor:
        """BOOL [columns]: whose gain neither rounding explains, nor errors of other columns."""
        outside = torch.maximum(
            torch.minimum(self.lower, self.norm) - self.dot, self.dot - torch.maximum(self.upper, self.norm)
        )
        # The error across the column is what others may have fed back; it lies along the column by chance alone.
        across = (self.error - (self.dot - self.norm).square() / self.norm).clamp(min=0)
        chance = DEVIATIONS * (across / self.norm / rows).sqrt()
        return (self.norm > self._step) & (outside / self.norm > OFF_COLUMN + chance)

    @property
    def gone(self) -> torch.Tensor:
        """BOOL [columns]: whose error is larger than they are, and than feedback from few others makes it."""
        return (self.norm > 0) & (self.error > torch.maximum(self.norm, self._step))

    @property
    def _step(self) -> torch.Tensor:
        return STEP**2 * self.margin


@dataclass(frozen=True)
class AgainstRounding:
    """Some rows of a weight beside their original, rounded by the stored scales."""

    by_row: RowCounts
    by_column: ColumnSums

    @classmethod
    def of(
        cls,
        original: torch.Tensor,
        decoded: torch.Tensor,
        smaller: torch.Tensor,
        larger: torch.Tensor,
        margin: torch.Tensor,
        columns: int,
        first: int,
    ) -> "AgainstRounding":
        """Of FP32 blocks [rows, blocks, values].

        Args:
            smaller: The original rounded by the stored scales, where ties are rounded towards zero.
            larger: The same, where they are rounded away from it.
            margin: How much further off than these what was rounded may be, however it was divided. Broadcasts.
            columns: How many the weight has; the last block may go beyond them.
            first: Row of the weight at which these begin.
        """

        def flat(blocks: torch.Tensor) -> torch.Tensor:
            return blocks.flatten(1)[:, :columns]

        margins = flat(margin.expand_as(original))
        original, decoded, smaller, larger = (flat(it) for it in (original, decoded, smaller, larger))
        slack = _SAME * decoded.abs()
        low, high = torch.minimum(smaller, larger) - slack, torch.maximum(smaller, larger) + slack
        # What is not a number is not explained, and not far: it has a finding of its own.
        unexplained = ~((decoded >= low) & (decoded <= high))
        difference = (decoded - original).abs()
        nearest = torch.maximum((smaller - original).abs(), (larger - original).abs())
        far = unexplained & (difference > nearest + margins)
        values = original.double()
        dots = [(it.double() * values).sum(0) for it in (decoded, smaller, larger)]
        by_column = ColumnSums(
            norm=values.square().sum(0),
            dot=dots[0],
            error=difference.double().square().sum(0),
            lower=torch.minimum(*dots[1:]),
            upper=torch.maximum(*dots[1:]),
            unexplained=unexplained.double().sum(0),
            margin=margins.double().square().sum(0),
        )
        numbers = torch.arange(first, first + len(values))
        return cls(RowCounts(numbers, unexplained.sum(1), far.sum(1)), by_column)


def sample_of(rows: int, step: int) -> Iterator[tuple[int, int]]:
    """The rows [first, last) that are looked at first: all of a small weight, at most `step` at a time."""
    if rows <= SAMPLE:
        yield from ((first, min(first + step, rows)) for first in range(0, rows, step))
        return
    count = SAMPLE // STRETCH
    for index in range(count):
        first = index * (rows - STRETCH) // (count - 1)
        yield from ((it, min(it + step, first + STRETCH)) for it in range(first, first + STRETCH, step))


def stretches_of(numbers: list[int], step: int) -> Iterator[tuple[int, int]]:
    """Rows [first, last) that hold these, which are in order: `step` at most, and few others between them."""
    begin = 0
    for end in range(1, len(numbers) + 1):
        ends = end == len(numbers) or numbers[end] - numbers[end - 1] > STRETCH or numbers[end] - numbers[begin] >= step
        if ends:
            yield numbers[begin], numbers[end - 1] + 1
            begin = end


def found(sample: Iterable[AgainstRounding], doubtful: Iterable[AgainstRounding]) -> Damage | None:
    """The damage of a weight; None where there is none.

    Args:
        sample: Of rows evenly apart.
        doubtful: Of all rows with a value beyond or an odd block, in order. Not looked at where there was feedback.
    """
    counts, sums = zip(*((it.by_row, it.by_column) for it in sample), strict=True)
    by_column, unexplained = reduce(ColumnSums.plus, sums), torch.cat([it.unexplained for it in counts])
    rows, columns = len(unexplained), len(by_column.norm)
    hurt: list[int] = []
    values = 0
    for part in (it.by_row for it in doubtful) if _is_clean(unexplained, columns, 1) else ():
        hurt += part.numbers[part.far > 0].tolist()
        values += int(part.far.sum())
    off = by_column.off(rows)
    if _is_clean(by_column.unexplained, rows, 2):
        off |= by_column.gone
    off_columns = off.nonzero().flatten().tolist()
    return Damage(hurt, values, off_columns) if hurt or off_columns else None


def _is_clean(unexplained: torch.Tensor, values: int, least: int) -> bool:
    """Whether rows, or columns, but for few hold what rounding gives: each of them so many values."""
    others = unexplained.sort(descending=True).values[max(least, int(FEW * len(unexplained))) :]
    return len(others) * values >= ENOUGH and int(others.sum()) <= CLEAN * len(others) * values
