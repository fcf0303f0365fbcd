"""What a weight format is: pure functions from one weight to named tensors and back.

A format knows numerics only. It never sees a parameter's name, a model or a rank: errors here are reasons (strings), and
the caller that knows the name raises them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an output, known before any data is.

    Attributes:
        name: Full name on disk; inside a format, the suffix (`weight`, `weight_scale`, `weight_scale_2`).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class PackedWeight:
    """One packed weight: suffix to tensor, any number of them."""

    tensors: Mapping[str, torch.Tensor]


class WeightFormat(Protocol):
    """How one weight of shape [out_features, in_features] becomes bytes."""

    @property
    def name(self) -> str:
        """Short name for tables and messages."""

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be packed, naming the divisor; None when it can."""

    def outputs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """The tensors `pack` makes of a weight of this shape, in writing order."""

    def pack(self, weight: torch.Tensor, amax: torch.Tensor | None = None) -> PackedWeight:
        """Packs a finite weight [out, in] of any float dtype.

        Args:
            amax: FP32 scalar that the per-tensor scale is made from: the calibrated amax of the whole scale group (gate
                and up; q, k and v). None takes max|weight|. Formats without a per-tensor scale ignore it.
        """

    def unpack(self, packed: PackedWeight) -> torch.Tensor:
        """The FP32 values [out, in] that a reader of the packed bytes computes."""

    def input_scale(self, amax: torch.Tensor) -> torch.Tensor:
        """FP32 scalar `input_scale` of static activation quantization from the calibrated input amax."""
