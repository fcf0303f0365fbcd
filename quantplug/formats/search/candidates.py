"""How the scales of blocks are found, as data: of a block's amax alone, or the best of several by squared error.

The search changes no format: whatever scale a block has, servers read it alike. It is defined for scales that are
stored in few bits, as NVFP4's E4M3: there neighbouring codes are 6 to 12 percent apart, and the code that the amax is
rounded to is the best one for few blocks.

A candidate is an E4M3 code: that of the block's amax times one of `multiples`, plus one of `offsets`. Its error is,
in units of the tensor's scale and in FP32, each step rounded to nearest:

    y_i = |w_i| * (1 / scale_2)          for the 16 elements of a block
    x_i = y_i * (1 / s)                  s is the value of the candidate
    d_i = x_i - nearest E2M1 magnitude of x_i
    e   = sum of d_i * d_i, neighbours first, then neighbours of these sums: ((0+1)+(2+3))+((4+5)+(6+7)) ...
    error = e * (s * s)

Where columns are of unequal importance h_i, FP32, as those of a linear whose inputs are not of one size are, the sum is
of (d_i * d_i) * h_i.

The order of the sum is part of the definition, so that every device finds the same. In units of the scale nothing
under- or overflows, however small a weight is. The first candidate wins unless a later one has a smaller error.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from quantplug.choices import Scales as Scales


@dataclass(frozen=True)
class ScaleSearch:
    """Which scales are tried for a block.

    Attributes:
        name: For messages.
        multiples: Of the block's amax, which is what the largest code stands for: 1.5 lets the code 4 stand for it.
        offsets: Codes of the scale's type, from the one that such an amax is rounded to.
        largest: What the scale of the tensor maps the scale of its largest block to; None for the largest of the type.
        is_given: Whether nothing is tried, and scales of blocks come from elsewhere.
    """

    name: str
    multiples: tuple[float, ...] = (1.0,)
    offsets: tuple[int, ...] = (0,)
    largest: float | None = None
    is_given: bool = False


FOUR_OVER_SIX_LARGEST = 256.0
"""Largest block scale of four-over-six: 1.5 times it, 384, is an E4M3 number too (Four Over Six, arXiv 2512.02010)."""

# From near to far. A smaller scale clips the amax, a larger one wastes the code 6; scales twice as large waste a bit
# of every code, so that no more than eight codes, a binade, can gain anything.
_NEAR = (0, -1, 1, -2, 2, -3, 3, 4, 5, 6, 7)

# Where columns count unequally, a large value in one that hardly counts is better clipped, be it to a thirtieth, than
# its fifteen neighbours rounded to nothing. Eight codes are a binade; so far away every third is near enough.
_FAR = (*_NEAR, *range(-5, -41, -3))

BY_MAX = ScaleSearch("max")
FOUR_OVER_SIX = ScaleSearch("four_over_six", multiples=(1.0, 1.5), largest=FOUR_OVER_SIX_LARGEST)
BY_ERROR = ScaleSearch("mse", offsets=_NEAR)
BY_WEIGHTED_ERROR = ScaleSearch("weighted_mse", offsets=_FAR)
GIVEN = ScaleSearch("given", is_given=True)
GIVEN_FOUR_OVER_SIX = ScaleSearch("given, four_over_six", largest=FOUR_OVER_SIX_LARGEST, is_given=True)

FOUND, TAKEN = (FOUR_OVER_SIX, BY_ERROR, BY_WEIGHTED_ERROR), (GIVEN, GIVEN_FOUR_OVER_SIX)
"""Searches that compare, and those that take what they are given: beside that of the amax, all that there are."""


SEARCHES: Mapping[Scales, ScaleSearch] = {
    Scales.MAX: BY_MAX,
    Scales.FOUR_OVER_SIX: FOUR_OVER_SIX,
    Scales.MSE: BY_ERROR,
}
"""The searches by name."""
