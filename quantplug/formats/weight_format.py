"""What a weight format is: pure functions from one weight to named tensors and back.

A format knows numerics only. It never sees a parameter's name, a model or a rank: errors here are reasons (strings),
and the caller that knows the name raises them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an output, known before any data is.

    Attributes:
        name: Full name on disk; inside a format, the suffix (`weight`, `weight_scale`, `weight_scale_2`).
        shape: Sizes of the axes; `()` for a scalar.
        dtype: As stored; packed 4-bit codes are `torch.uint8`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the data on disk and in memory."""
        # An element of packed codes is a byte: two 4-bit codes are counted in the shape already.
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


def empty_groups(specs: Iterable[TensorSpec], count: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Uninitialised contiguous tensors, by name, for the packed form of `count` weights of one shape.

    The tensors of one name are one tensor [count, ...], whose first axis counts the weights.
    """
    return {spec.name: torch.empty((count, *spec.shape), dtype=spec.dtype, device=device) for spec in specs}


@dataclass(frozen=True)
class PackedWeight:
    """One packed weight.

    Attributes:
        tensors: Suffix to contiguous tensor, in writing order; shapes and dtypes are those of `WeightFormat.outputs`.
    """

    # Ordered, as every dict is: files are written in this order, so that one export is the same bytes as the next.
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of_group(cls, tensors: Mapping[str, torch.Tensor]) -> "list[PackedWeight]":
        """The weights of a group, from its tensors [count, ...].

        Each is a view: the memory of the whole group lives as long as any one of them.
        """
        of_each = zip(*(tensor.unbind() for tensor in tensors.values()), strict=True)
        return [cls(dict(zip(tensors, of_one, strict=True))) for of_one in of_each]


class WeightFormat(Protocol):
    """How one weight of shape [out_features, in_features] becomes bytes."""

    @property
    def name(self) -> str:
        """Short name for tables and messages."""

    @property
    def static_activations(self) -> bool:
        """Whether `input_scale` exists; False where servers quantize activations from what they see at run time."""

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be packed, naming the divisor; None when it can."""

    @property
    def cut_steps(self) -> tuple[int | None, int | None]:
        """Rows and columns in multiples of which a weight can be cut, and its parts packed apart to the same bytes.

        None for an axis that cannot be cut. A scale of the whole tensor does not hinder: all parts are given its amax.
        """

    def outputs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """The tensors `pack` makes of a weight of this shape, which has no `problem`, in writing order."""

    def pack(self, weight: torch.Tensor, amax: torch.Tensor | None = None) -> PackedWeight:
        """Packs a weight [out, in] of any float dtype, strides and device, and leaves it as it was.

        The caller has made sure that the weight is finite (`first_nonfinite`) and its shape has no `problem`; neither
        is checked again. All scales are finite and above 0, also those of an all-zero weight, whose codes are 0.

        Args:
            amax: One float that the per-tensor scale is made from: the calibrated amax of the whole scale group (gate
                and up; q, k and v), 0 only if the group is all zero. None takes max|weight|. Weights above it
                saturate. Formats without a per-tensor scale ignore it.

        Returns:
            Tensors on the weight's device.
        """

    def pack_group(
        self, weights: Sequence[torch.Tensor], amaxes: torch.Tensor, block_amaxes: Sequence[torch.Tensor] = ()
    ) -> Sequence[PackedWeight]:
        """Packs several weights as `pack` would each: at once on a GPU, which one small weight does not fill.

        Args:
            weights: Of one shape, dtype, device and set of strides.
            amaxes: One float for each, [len(weights)].
            block_amaxes: FP32 [out, blocks] for each, where a format is given the scales of its blocks; others are
                given none.
        """

    def unpack(self, packed: PackedWeight) -> torch.Tensor:
        """The FP32 values [out, in] that a reader of the packed bytes computes."""

    def input_scale(self, amax: torch.Tensor) -> torch.Tensor:
        """FP32 scalar `input_scale` of static activation quantization from the calibrated input amax (one float).

        Raises:
            NotImplementedError: The format has no `static_activations`.
        """
