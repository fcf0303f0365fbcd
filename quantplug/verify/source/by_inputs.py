"""A weight's error as its inputs see it, and whether that is one of rounding, however far single columns are off.

With the second moments m of the inputs, the expected squared error of a weight's outputs is, of channels that are not
correlated, the sum over columns of m * (q - w)^2. A search that knows m clips large weights that meet small inputs, for
the sake of the fifteen beside them: of such a weight the plain error is as large as that of a wrong one. So what the
plain bounds take for wrong is looked at again with every column times the root of its m, by the same rules:

- the error of the weight, and of each row, is within three times what a plain packer would leave, or, where this is
  little, below the limits that hold for any rounding (`bounds.py`);
- of the values that the stored scales hold, those that are not clipped, the gain of the weight, and of each row, is
  what rounding them anew by these scales gives, and no more of the error lies along the blocks than that explains
  (`gains.py`). Error feedback is told from a wrong scale by the error that it leaves beyond rounding's. What clipping
  takes is left to the first rule: a gain of all values would fall with it, and hide a scale that is a little off.

A scale that is off, scales or rows in other places, and values of another weight are wrong in every column, and so in
those that matter too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch

from quantplug.verify.inventory.layouts import Layout
from quantplug.verify.numbers import gains
from quantplug.verify.numbers.bounds import ROW_LIMIT, WEIGHT_LIMIT, limit_of
from quantplug.verify.numbers.gains import RoundedAnew, Sums
from quantplug.verify.source.matrices import Matrix
from quantplug.verify.source.measure import AnyRows, feedback_of, gains_of, read_rows
from quantplug.verify.source.originals import Original


@dataclass(frozen=True)
class SeenByInputs:
    """A quantized weight [rows, columns] and its original, with every column as large as its inputs make it.

    Attributes:
        moments: FP64 [columns], above zero.
    """

    original: Original
    weight: Matrix
    layout: Layout
    rows: int
    columns: int
    moments: torch.Tensor

    def squares(self) -> tuple[float, float]:
        """Mean squared norms of the error that the weight makes in outputs, and of the outputs themselves."""
        error = norm = 0.0
        for packed, values in self._chunks():
            error += float((packed.decoded().double() - values.double()).square().sum(0) @ self.moments)
            norm += float(values.double().square().sum(0) @ self.moments)
        return error, norm

    def is_of_rounding(self) -> bool:
        """Whether rounding explains the error."""
        # Of ordinary size, so that nothing under- or overflows.
        sizes = (self.moments / self.moments.mean()).sqrt().float()[None]
        gain, row_gain = gains_of(self.layout)
        feedback, all_rows = feedback_of(self.layout), []
        for packed, values in self._chunks():
            whole, limits = _sums(packed, values, sizes), packed.rounded(values, sizes).plain
            held = sizes * packed.holds(values)
            inside, stored = _sums(packed, values, held), packed.rounded(values, held).stored
            limit = limit_of(limits.error, whole.norm, feedback, ROW_LIMIT)
            # What is not a number is within no limit.
            if not bool((whole.error <= limit).all()) or bool(row_gain.off_by_stored(inside, stored).any()):
                return False
            all_rows.append((whole.over_rows(), limits.over_rows(), inside.over_rows(), stored.over_rows()))
        wholes, limits_of, insides, by_stored = zip(*all_rows, strict=True)
        whole, inside = reduce(Sums.plus, wholes), reduce(Sums.plus, insides)
        limits, stored = reduce(RoundedAnew.plus, limits_of), reduce(RoundedAnew.plus, by_stored)
        within = whole.error <= limit_of(limits.error, whole.norm, feedback, WEIGHT_LIMIT)
        return bool(within & ~gain.off_by_stored(inside, stored) & ~gains.misplaced_by_stored(inside, stored))

    def _chunks(self) -> Iterator[tuple[AnyRows, torch.Tensor]]:
        step = self.original.step(self.columns)
        for first in range(0, self.rows, step):
            last = min(first + step, self.rows)
            values = self.original.rows(self.weight.expert, first, last).float()
            yield read_rows(self.weight, self.layout, first, last), values


def _sums(packed: AnyRows, original: torch.Tensor, sizes: torch.Tensor) -> Sums:
    decoded, values = packed.in_blocks(packed.decoded() * sizes).double(), packed.in_blocks(original * sizes).double()
    norms, dots = values.square().sum(-1), (decoded * values).sum(-1)
    return Sums(
        error=(decoded - values).square().sum((-1, -2)),
        norm=norms.sum(-1),
        dot=dots.sum(-1),
        quartic=norms.square().sum(-1),
        along=gains.along_blocks(dots, norms).sum(-1),
    )
