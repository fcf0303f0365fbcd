"""Originals rounded anew, by scales that a plain packer would give them and by those that are stored."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantplug.verify.numbers import gains
from quantplug.verify.numbers.gains import RoundedAnew


def rounded_both_ways(
    blocks: torch.Tensor, by_stored: Callable[[torch.Tensor], torch.Tensor], ties: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks rounded where what is a tie, or off one by `ties` of it, goes towards zero, and where it goes away."""
    return by_stored(blocks * (1 - ties)), by_stored(blocks * (1 + ties))


@dataclass(frozen=True)
class Anew:
    """Rows of an original, rounded anew.

    Attributes:
        blocks: FP32 [rows, blocks, values].
        plain: The same, rounded by a plain packer's scales.
        by_stored: Rounds such blocks by the scales that are stored.
    """

    blocks: torch.Tensor
    plain: torch.Tensor
    by_stored: Callable[[torch.Tensor], torch.Tensor]

    def sums(self, sizes: torch.Tensor | None = None) -> "AnewSums":
        """Over each row, of what rounding in both ways gives.

        Args:
            sizes: FP32 [., blocks, values], by which values are multiplied once they are rounded; None for 1.
        """
        # Only the stored scales have to explain all: with a plain packer's, ties are rounded to even as it does.
        by = 1.0 if sizes is None else sizes
        as_they_are = self.plain * by
        ends = rounded_both_ways(self.blocks, self.by_stored, gains.TIES)
        values = self.blocks * by
        by_stored = RoundedAnew.of(values, *(end * by for end in ends))
        return AnewSums(RoundedAnew.of(values, as_they_are, as_they_are), by_stored)


@dataclass(frozen=True)
class AnewSums:
    """Sums over rows that were rounded anew: by a plain packer's scales, and by those that are stored."""

    plain: RoundedAnew
    stored: RoundedAnew

    def plus(self, other: "AnewSums") -> "AnewSums":
        """The sums over both."""
        return AnewSums(self.plain.plus(other.plain), self.stored.plus(other.stored))

    def over_rows(self) -> "AnewSums":
        """The same sums of all rows together."""
        return AnewSums(self.plain.over_rows(), self.stored.over_rows())
