"""Whether error feedback explains an error, by what it does to a weight's outputs.

Of a weight W [out, in], its decoded Q and a sketch S [k, in] of its inputs (`checkpoint/moments_file.py`) the squared
norm of (Q - W) S^T is that of the error in the outputs. Error feedback (GPTQ, arXiv 2210.17323) moves values further
than rounding does, so that this becomes smaller. On the model of docs/accuracy.md with outliers in weights, which the
bounds of weights alone take for wrong, it leaves 0.03 to 0.38 of the squared error in outputs that rounding to the same
scales leaves. Nothing that is wrong makes that smaller. But what was made so, and then got damaged, may still be below
rounding's, and is told by three things that feedback sees to:

- the error has no component along Q: <(Q - W) S^T, Q S^T> / <Q S^T, Q S^T> is -0.009 to 0.015 there, whatever was
  clipped, with a spread of 0.004 at the upper end, and 0.0196 more where a scale is 2 % too large;
- nor along the single blocks of a row. With e the squared error, c the squared outputs of all blocks by themselves, and
  x what of e lies along them, beyond what does of other rows' errors, x / sqrt(e c) is up to 0.08. Scales of other
  blocks make it more. Where the scale of every block is one code up or down, which is less than what feedback makes up
  for there, it is 0.068 in the middle;
- no row has more than 2.4 times the squared error of rounding, its own and that of rows in the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch

from quantplug.verify.numbers.anew import Anew
from quantplug.verify.numbers.bounds import ROW_LIMIT

FED_BACK = 0.9  # of rounding's squared error in outputs, below which there was feedback: rounding has 0.95 and more
MADE_UP_FOR = 0.5  # of it, below which feedback explains what the weights' own bounds do not
DEVIATIONS = 2.0  # of the gain, by its spread over the sums of a sketch, that are left to chance
ALONG_BLOCKS = 0.1  # of sqrt(e c) that may lie along the blocks of a row
ROW = 3.0  # times rounding's squared error, of a row and in the mean, that one may have


@dataclass(frozen=True)
class OutputSums:
    """Of some rows of a weight, or all: FP64.

    Attributes:
        errors: Squared error of each row's outputs.
        norms: Squared outputs of each row.
        plain: Squared error of each row, were it rounded to a plain packer's scales.
        stored: The same by the stored scales.
        along: [k] <error, decoded> for each of the sketch's sums.
        decoded: Squared outputs of the decoded weight.
        in_blocks: Sum over rows and blocks of the squared outputs of a block by itself.
        along_blocks: Sum over them of the part of a row's squared error that lies along a block's outputs, beyond what
            lies there of the errors of all rows.
    """

    errors: torch.Tensor
    norms: torch.Tensor
    plain: torch.Tensor
    stored: torch.Tensor
    along: torch.Tensor
    decoded: float
    in_blocks: float
    along_blocks: float

    @classmethod
    def of(cls, decoded: torch.Tensor, anew: Anew, sketch: torch.Tensor) -> "OutputSums":
        """Of rows.

        Args:
            decoded: FP32 [rows, blocks, values].
            anew: The original of these.
            sketch: FP64 [k, blocks, values].
        """
        of_blocks = torch.einsum("rbv,kbv->rbk", decoded.double(), sketch)
        values, whole, stored = of_blocks.sum(1), sketch.flatten(1).T, anew.by_stored(anew.blocks)
        outputs, by_plain, by_stored = (part.double().flatten(1) @ whole for part in (anew.blocks, anew.plain, stored))
        errors = values - outputs
        sizes = of_blocks.square().sum(-1)
        return cls(
            errors=errors.square().sum(1),
            norms=outputs.square().sum(1),
            plain=(by_plain - outputs).square().sum(1),
            stored=(by_stored - outputs).square().sum(1),
            along=(errors * values).sum(0),
            decoded=float(values.square().sum()),
            in_blocks=float(sizes.sum()),
            along_blocks=_along(of_blocks, sizes, errors),
        )

    @classmethod
    def over(cls, parts: Sequence["OutputSums"]) -> "OutputSums":
        """Of all rows of several."""
        return cls(
            errors=torch.cat([part.errors for part in parts]),
            norms=torch.cat([part.norms for part in parts]),
            plain=torch.cat([part.plain for part in parts]),
            stored=torch.cat([part.stored for part in parts]),
            along=torch.stack([part.along for part in parts]).sum(0),
            decoded=sum(part.decoded for part in parts),
            in_blocks=sum(part.in_blocks for part in parts),
            along_blocks=sum(part.along_blocks for part in parts),
        )

    @property
    def error(self) -> float:
        """Mean squared norm of the error in outputs."""
        return float(self.errors.sum())

    @property
    def norm(self) -> float:
        """Mean squared norm of outputs."""
        return float(self.norms.sum())

    @property
    def share(self) -> float:
        """Of the squared error that rounding by the stored scales makes; inf where this is none."""
        stored = float(self.stored.sum())
        return self.error / stored if stored else inf

    def is_off(self, decisive: float) -> bool:
        """Whether feedback would have made the error less yet: values are not of the scales that are stored.

        Args:
            decisive: Distance of a gain from 1 that is an error (`gains.GainBound`).
        """
        if not self.norm or not self.decoded:
            return True
        gain = float(self.along.sum()) / self.decoded
        spread = float(self.along.std()) * len(self.along) ** 0.5 / self.decoded
        usual = torch.maximum(self.plain, self.stored) + self.plain.sum() / self.norm * self.norms
        # A row that is lost has its own norm for an error; some have outputs that are so small by themselves.
        rows = torch.minimum(ROW * usual, torch.maximum(usual, ROW_LIMIT**2 * self.norms))
        is_right = (
            abs(gain) <= decisive + DEVIATIONS * spread
            and self.along_blocks <= ALONG_BLOCKS * (self.error * self.in_blocks) ** 0.5
            and bool((self.errors <= rows).all())
        )
        # What is not a number is off.
        return not is_right


def _along(of_blocks: torch.Tensor, sizes: torch.Tensor, errors: torch.Tensor) -> float:
    """What of squared errors [rows, k] lies along outputs [rows, blocks, k], of such squared norms, not by chance."""
    of_rows = errors.square().sum(-1)
    if not bool(of_rows.any()):
        return 0.0
    mine = (of_blocks * errors[:, None]).sum(-1).square()
    # In the directions in which all errors lie, of the size of the row's own.
    expected = ((of_blocks @ (errors.T @ errors / of_rows.sum())) * of_blocks).sum(-1) * of_rows[:, None]
    return float(torch.where(sizes > 0, (mine - expected) / sizes, 0.0).sum())
