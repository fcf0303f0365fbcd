"""Whether a decoded weight is too large or too small, as a whole, by rows or by blocks: what a wrong scale does.

The gain is <decoded, original> / <original, original>. Rounding errors have no common sign, so it is near 1: 0.991 to
1.002 for NVFP4 by max, searches for scales and GPTQ, 0.998 to 1.001 for FP8, on trained weights. What is further from
`centre` than `base` is looked at again, as is what of the error lies along its blocks,

    sum over blocks of <decoded - original, original>^2 / <original, original>,

where that is more than a quarter of the squared error: of an error without a direction it is a sixteenth, in a block of
16. Scales of other blocks, or of 8 values for 16, put nine tenths there, which no norm tells from the errors of GPTQ.

Looking again means to round the original anew, in two ways: by scales that a plain packer would give these values, and
by the scales that are stored. The first finds a scale that is off; the second is what any search for scales gives, to
the last bit but for ties. An error is what neither explains, beyond

- `decisive`, which the ways of rounding differ by (GPTQ from max by 0.007), and which is less than 2 % of a scale;
- chance: what lies along the blocks, of relative norm r, becomes a gain by r / sqrt(n) where it has no common sign and
  n blocks are of equal norm; of others n is (sum of squared norms)^2 / (sum of their squares). `deviations` of these
  are allowed. The few blocks of a row do not tell r: there it is half the error's norm;
- `SATURATED` of the squared error that rounding does not have: error feedback puts values beyond the largest code, and
  these all lose.

Under the stored scales ties, and what packers that divide in BF16 take for ties, may go either way: whatever lies
between rounding the original 2^-9 smaller and 2^-9 larger is right. A source that was quantized before has many.
"""

from dataclasses import dataclass

import torch

ALONG = 0.25  # of the squared error that may lie along the blocks before a weight is looked at again
ALONG_DECISIVE = 0.15  # of it that may do so beyond what rounding explains; GPTQ has less than 0.1
ALONG_DEVIATIONS = 2.0
SATURATED = 0.15
TIES = 2.0**-9  # half a unit in BF16's last place
SAME = 1e-3  # what two ways to sum the same values may differ by, over their norm


@dataclass(frozen=True)
class Sums:
    """Sums over each of some rows, or one over a whole weight: FP64, so that 1e-24 and 1e30 can be squared.

    Attributes:
        error: Squared differences.
        norm: Squares of the original.
        dot: Products of decoded and original.
        quartic: Squares of the blocks' squared norms.
        along: The part of `error` that lies along the blocks.
    """

    error: torch.Tensor
    norm: torch.Tensor
    dot: torch.Tensor
    quartic: torch.Tensor
    along: torch.Tensor

    @property
    def spread(self) -> torch.Tensor:
        """1 / sqrt(n), for n blocks of equal norm."""
        return self.quartic.sqrt() / self.norm

    def over_rows(self) -> "Sums":
        """The same sums of all rows together, [1]."""
        return Sums(*(sums.sum(dim=0, keepdim=True) for sums in self._five))

    def plus(self, other: "Sums") -> "Sums":
        """The sums over both."""
        return Sums(*(mine + theirs for mine, theirs in zip(self._five, other._five, strict=True)))

    @property
    def _five(self) -> tuple[torch.Tensor, ...]:
        return self.error, self.norm, self.dot, self.quartic, self.along


@dataclass(frozen=True)
class RoundedAnew:
    """What rounding to nearest makes of the same originals: lower and upper ends of `dot`, upper ones of the others."""

    lower: torch.Tensor
    upper: torch.Tensor
    along: torch.Tensor
    error: torch.Tensor

    @classmethod
    def of(cls, original: torch.Tensor, smaller: torch.Tensor, larger: torch.Tensor) -> "RoundedAnew":
        """Sums over rows.

        Args:
            original: FP32 blocks [rows, blocks, values].
            smaller: What the original becomes where ties are rounded down.
            larger: Where they are rounded up.
        """
        values = original.double()
        norms = values.square().sum(dim=-1)
        dots = [(rounded.double() * values).sum(dim=-1) for rounded in (smaller, larger)]
        along = torch.maximum(*(along_blocks(dot, norms) for dot in dots)).sum(dim=-1)
        error = torch.maximum(*((rounded.double() - values).square() for rounded in (smaller, larger))).sum(
            dim=(-1, -2)
        )
        return cls(dots[0].sum(dim=-1), dots[1].sum(dim=-1), along, error)

    def over_rows(self) -> "RoundedAnew":
        """The same sums of all rows together, [1]."""
        return RoundedAnew(*(sums.sum(dim=0, keepdim=True) for sums in self._all))

    def plus(self, other: "RoundedAnew") -> "RoundedAnew":
        """The sums over both."""
        return RoundedAnew(*(mine + theirs for mine, theirs in zip(self._all, other._all, strict=True)))

    @property
    def _all(self) -> tuple[torch.Tensor, ...]:
        return self.lower, self.upper, self.along, self.error

    def off(self, sums: Sums) -> torch.Tensor:
        """How far a gain lies outside of these."""
        outside = torch.maximum(self.lower - sums.dot, sums.dot - self.upper).clamp(min=0)
        return outside / sums.norm


def along_blocks(dots: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """The part of the squared error that lies along each block, of FP64 <decoded, original> and squared norms."""
    # A block of zeros has no direction. Its error, if it has one, is beyond every bound.
    return torch.where(norms > 0, (dots - norms).square() / norms, 0.0)


@dataclass(frozen=True)
class GainBound:
    """How far the gain of a format may be from 1.

    Attributes:
        centre: What it is near: 1 but for what the ends of a format lose, and what a search does.
        base: Distance from which on it is looked at again.
        decisive: Distance from values rounded anew that is an error.
        deviations: How many standard deviations are left to chance.
        of_row: Whether it is for rows, which have few blocks.
    """

    centre: float
    base: float
    decisive: float
    deviations: float
    of_row: bool = False

    def chance(self, sums: Sums) -> torch.Tensor:
        """What is left to it."""
        most = ALONG * sums.error
        along = most if self.of_row else torch.minimum(sums.along, most)
        return self.deviations * (along / sums.norm).sqrt() * sums.spread

    def suspicious(self, sums: Sums) -> torch.Tensor:
        """BOOL: what is worth rounding anew; nothing that is zero, nor what the other bounds find."""
        # A small weight is looked at again soon enough; rows are too many for that.
        chance = self.chance(sums) if self.of_row else 0.0
        far = (sums.dot / sums.norm - self.centre).abs() > self.base + chance
        return sums.dot.isfinite() & (sums.norm > 0) & far

    def off(self, sums: Sums, plain: RoundedAnew, stored: RoundedAnew) -> torch.Tensor:
        """BOOL: whose gain neither the scales of a plain packer explain, nor those that are stored."""
        return self.suspicious(sums) & (plain.off(sums) > self._allowed(sums, stored)) & (stored.off(sums) > SAME)

    def off_by_stored(self, sums: Sums, stored: RoundedAnew) -> torch.Tensor:
        """BOOL: the same of values that the stored scales hold, whatever search found these.

        Rounding to nearest gives the gain of the stored scales; only error feedback another, and with it an error.
        """
        allowed = torch.minimum(self._allowed(sums, stored), _beyond(sums, stored) / sums.norm)
        return self.suspicious(sums) & (stored.off(sums) > SAME + allowed)

    def _allowed(self, sums: Sums, stored: RoundedAnew) -> torch.Tensor:
        saturated = SATURATED * _beyond(sums, stored) / sums.norm
        return self.decisive + self.chance(sums) + saturated


def misplaced_by_stored(sums: Sums, stored: RoundedAnew) -> torch.Tensor:
    """BOOL: the same of values that the stored scales hold: without feedback none of the error may lie elsewhere."""
    share = (ALONG_DECISIVE + ALONG_DEVIATIONS * sums.spread) * sums.error
    most = stored.along + torch.minimum(share, _beyond(sums, stored)) + SAME**2 * sums.norm
    return (sums.norm > 0) & (sums.along > most)


def _beyond(sums: Sums, stored: RoundedAnew) -> torch.Tensor:
    """The squared error that rounding by the stored scales does not have."""
    return (sums.error - stored.error).clamp(min=0)


def misplaced(sums: Sums, stored: RoundedAnew | None = None) -> torch.Tensor:
    """BOOL: where too much of the error lies along the blocks, and more than rounding by the stored scales explains.

    Without these: what is worth rounding anew.
    """
    share, explained = (ALONG, 0.0) if stored is None else (ALONG_DECISIVE, stored.along)
    most = explained + (share + ALONG_DEVIATIONS * sums.spread) * sums.error + SAME**2 * sums.norm
    return (sums.norm > 0) & (sums.along > most)
