"""What a set of kernels is: the loops over all elements of a weight, which every format is made of."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple, Protocol

import torch

from quantplug.formats.encoding import Encoding


@dataclass(frozen=True)
class Encoded:
    """A group of encoded weights: contiguous tensors on one device, whose first axis counts the weights.

    Attributes:
        codes: [count, out, in / codes in a byte], in the code's dtype.
        blocks: Scales of blocks [count, blocks below each other, blocks side by side], in the scale's dtype; None for
            an encoding without blocks.
        whole: FP32 scales of whole tensors [count], given before packing, finite and above 0; None for an encoding that
            has scales of blocks alone.
        importance: FP32 weights [count, in] of the squared errors of columns, given before packing, at least 0 and
            finite, for an encoding whose search compares errors; None where all columns count alike.
    """

    codes: torch.Tensor
    blocks: torch.Tensor | None = None
    whole: torch.Tensor | None = None
    importance: torch.Tensor | None = None

    def of_each(self) -> Iterator["Encoded"]:
        """Each weight by itself: views without the first axis."""
        # `repeat` has no end, so the zip ends with the codes; `unbind` is what a loop over a tensor calls after checks.
        parts = self.codes, self.blocks, self.whole, self.importance
        each = (repeat(None) if part is None else part.unbind() for part in parts)
        return (Encoded(*of_one) for of_one in zip(*each, strict=False))

    @property
    def block_scales(self) -> torch.Tensor:
        """`blocks`, of an encoding that has them."""
        # For type checkers: the encoding that chose the loop says that there are such scales.
        assert self.blocks is not None
        return self.blocks

    @property
    def tensor_scales(self) -> torch.Tensor:
        """`whole`, of an encoding that has them."""
        assert self.whole is not None
        return self.whole


class Kernels(Protocol):
    """Packing and unpacking of weights [out, in] into tensors that the caller has allocated.

    A weight has any strides and is left as it was; all other tensors are contiguous and on the weight's device. Every
    set of kernels gives the same bits, those of `reference`: FP32 arithmetic, true divisions, rounding to nearest and
    ties to even. Weights come in groups of one shape, dtype, device and set of strides; one weight is a group of one.
    """

    def amax(self, weight: torch.Tensor) -> torch.Tensor:
        """max|weight| of a non-empty tensor of any shape, an FP32 scalar on its device; NaN where it holds a NaN."""

    def bit_sums(self, weight: torch.Tensor) -> tuple[int, int]:
        """Two numbers from the bits of a non-empty tensor of at least one dimension; any one element changes both.

        As signed integers, those of row i are taken 2i + 1 times in the first sum and those of column j 2j + 1 times in
        the second, modulo 2^64; a row is all that has one index in the first dimension. An odd number has an inverse
        modulo 2^64, so what a single element changes by, times 2i + 1, is never 0.
        """

    def pack(self, encoding: Encoding, weights: Sequence[torch.Tensor], encoded: Encoded) -> None:
        """Fills the codes and the block scales of `encoded`.

        Where the encoding has a scale of the whole tensor, `encoded.whole` holds it already and is only read; so are
        scales of blocks where the encoding's search says that they are given, and the importance of columns.
        """

    def unpack(self, encoding: Encoding, encoded: Encoded, values: torch.Tensor) -> None:
        """Fills `values` [count, out, in], FP32, with what a reader of `encoded` computes."""


class Loops(NamedTuple):
    """How a set of kernels works on one encoding."""

    pack: Callable[[Sequence[torch.Tensor], Encoded], None]
    unpack: Callable[[Encoded, torch.Tensor], None]
