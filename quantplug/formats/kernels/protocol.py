"""What a set of kernels is: the loops over all elements of a weight, which every format is made of."""

from collections.abc import Sequence
from typing import Protocol

import torch


class Kernels(Protocol):
    """Packing and unpacking of weights [out, in] into tensors that the caller has allocated.

    A weight has any strides and is left as it was. All other tensors are contiguous and on the weight's device. Scales
    are finite and above 0. Every set of kernels gives the same bits, those of `reference`: FP32 arithmetic, true
    divisions, rounding to nearest and ties to even. The formats' modules say which shapes and dtypes belong together.

    A group is weights of one shape, dtype, device and set of strides; what is filled then has one axis more, in front,
    and so have scales of the whole weight.
    """

    def amax(self, weight: torch.Tensor) -> torch.Tensor:
        """max|weight| of a non-empty tensor of any shape, an FP32 scalar on its device; NaN where it holds a NaN."""

    def bit_sums(self, weight: torch.Tensor) -> tuple[int, int]:
        """Of the bits of a non-empty tensor of at least one dimension: two numbers that see any one of them change.

        As signed integers, those of row i are taken 2i + 1 times in the first sum and those of column j 2j + 1 times in
        the second, modulo 2^64; a row is all that has one index in the first dimension.
        """

    def pack_nvfp4(
        self, weight: torch.Tensor, weight_scale_2: torch.Tensor, codes: torch.Tensor, block_scales: torch.Tensor
    ) -> None:
        """Fills `codes` [out, in/2] (U8) and `block_scales` [out, in/16] (F8_E4M3)."""

    def pack_nvfp4_group(
        self,
        weights: Sequence[torch.Tensor],
        weight_scale_2: torch.Tensor,
        codes: torch.Tensor,
        block_scales: torch.Tensor,
    ) -> None:
        """As `pack_nvfp4`, of a group."""

    def unpack_nvfp4(
        self, codes: torch.Tensor, block_scales: torch.Tensor, weight_scale_2: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Fills `values` [out, in] (F32)."""

    def pack_fp8(self, weight: torch.Tensor, weight_scale: torch.Tensor, codes: torch.Tensor) -> None:
        """Fills `codes` [out, in] (F8_E4M3)."""

    def pack_fp8_group(self, weights: Sequence[torch.Tensor], weight_scale: torch.Tensor, codes: torch.Tensor) -> None:
        """As `pack_fp8`, of a group."""

    def unpack_fp8(self, codes: torch.Tensor, weight_scale: torch.Tensor, values: torch.Tensor) -> None:
        """Fills `values` [out, in] (F32)."""

    def pack_fp8_block(self, weight: torch.Tensor, codes: torch.Tensor, block_scales: torch.Tensor) -> None:
        """Fills `codes` [out, in] (F8_E4M3) and `block_scales` [out/128, in/128] (F32)."""

    def pack_fp8_block_group(
        self, weights: Sequence[torch.Tensor], codes: torch.Tensor, block_scales: torch.Tensor
    ) -> None:
        """As `pack_fp8_block`, of a group."""

    def unpack_fp8_block(self, codes: torch.Tensor, block_scales: torch.Tensor, values: torch.Tensor) -> None:
        """Fills `values` [out, in] (F32)."""
