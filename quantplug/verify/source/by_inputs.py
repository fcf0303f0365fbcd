"""Whether a quantized weight's error is one of rounding as its inputs see it, however far single columns are off.

With the second moments m of the inputs, the expected squared error of a weight's outputs is, of channels that are not
correlated, the sum over columns of m * (q - w)^2. A search that knows m clips large weights that meet small inputs, for
the sake of the fifteen beside them: of such a weight the plain error is as large as that of a wrong one. So what the
plain bounds take for wrong is looked at again with every column times the root of its m, by the same rules:

- the error of the weight, and of each row, is within three times what a plain packer would leave, or, where this is
  little, below the limits that hold for any rounding (`bounds.py`);
- of the values that the stored scales hold, those that are not clipped, the gain of the weight, and of each row, is
  what rounding them anew by these scales gives, and no more of the error lies along the blocks than that explains
  (`gains.py`). What clipping takes is left to the first rule: a gain of all values would fall with it, and hide a scale
  that is a little off. So this is asked of weights too that are within the plain bounds.

What error feedback makes up for between columns neither sees. There the error in outputs is far less than rounding to
the same scales leaves, by a sketch of the inputs, and `outputs.py` has the rules.

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
from quantplug.verify.numbers.outputs import FED_BACK, MADE_UP_FOR, OutputSums
from quantplug.verify.source.input_moments import Inputs
from quantplug.verify.source.matrices import Matrix
from quantplug.verify.source.measure import feedback_of, gains_of
from quantplug.verify.source.originals import Original
from quantplug.verify.source.packed_rows import PackedRows, read_rows


@dataclass(frozen=True)
class ByInputs:
    """What its inputs say of a weight's error.

    Attributes:
        error: Mean squared norm of the error that it makes in its outputs.
        norm: Mean squared norm of these.
        is_within: The error is no larger than rounding to nearest, or a search for scales, makes it.
        is_made_up_for: It is so much less that it is one of error feedback.
        has_wrong_scales: Values are not those that rounding by the stored scales, or feedback, gives.
    """

    error: float
    norm: float
    is_within: bool
    is_made_up_for: bool
    has_wrong_scales: bool


def by_inputs(original: Original, weight: Matrix, layout: Layout, rows: int, columns: int, inputs: Inputs) -> ByInputs:
    """Looks at a quantized weight [rows, columns] and its original, some rows at a time."""
    # Of ordinary size, so that nothing under- or overflows.
    sizes = (inputs.moments / inputs.moments.mean()).sqrt().float()[None]
    gain, row_gain = gains_of(layout)
    feedback, is_within, is_off = feedback_of(layout), True, False
    found: list[tuple[Sums, RoundedAnew, Sums, RoundedAnew]] = []
    outputs: list[OutputSums] = []
    for packed, values in _chunks(original, weight, layout, rows, columns):
        anew, decoded = packed.anew(values), packed.decoded()
        held = sizes * packed.holds(values)
        whole, limits = _sums(packed, decoded, values, sizes), anew.sums(packed.in_blocks(sizes)).plain
        inside, stored = _sums(packed, decoded, values, held), anew.sums(packed.in_blocks(held)).stored
        # What is not a number is within no limit.
        is_within &= bool((whole.error <= limit_of(limits.error, whole.norm, feedback, ROW_LIMIT)).all())
        is_off |= bool(row_gain.off_by_stored(inside, stored).any())
        found.append((whole.over_rows(), limits.over_rows(), inside.over_rows(), stored.over_rows()))
        outputs.append(OutputSums.of(packed.in_blocks(decoded), anew, packed.in_blocks(inputs.sketch)))
    wholes, limits_of, insides, by_stored = zip(*found, strict=True)
    whole, inside = reduce(Sums.plus, wholes), reduce(Sums.plus, insides)
    limits, stored = reduce(RoundedAnew.plus, limits_of), reduce(RoundedAnew.plus, by_stored)
    is_within &= bool(whole.error <= limit_of(limits.error, whole.norm, feedback, WEIGHT_LIMIT))
    is_off |= bool(gain.off_by_stored(inside, stored) | gains.misplaced_by_stored(inside, stored))
    of_outputs = OutputSums.over(outputs)
    return ByInputs(
        of_outputs.error,
        of_outputs.norm,
        is_within,
        is_made_up_for=of_outputs.share < MADE_UP_FOR,
        has_wrong_scales=of_outputs.is_off(gain.decisive) if of_outputs.share < FED_BACK else is_off,
    )


def _chunks(
    original: Original, weight: Matrix, layout: Layout, rows: int, columns: int
) -> Iterator[tuple[PackedRows, torch.Tensor]]:
    step = original.step(columns)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield read_rows(weight, layout, first, last), original.rows(weight.expert, first, last).float()


def _sums(packed: PackedRows, decoded: torch.Tensor, original: torch.Tensor, sizes: torch.Tensor) -> Sums:
    mine, values = packed.in_blocks(decoded * sizes).double(), packed.in_blocks(original * sizes).double()
    norms, dots = values.square().sum(-1), (mine * values).sum(-1)
    return Sums(
        error=(mine - values).square().sum((-1, -2)),
        norm=norms.sum(-1),
        dot=dots.sum(-1),
        quartic=norms.square().sum(-1),
        along=gains.along_blocks(dots, norms).sum(-1),
    )
