"""FP8: E4M3 codes (OCP OFP8) with one FP32 scale a tensor. A value is `weight * weight_scale`.

    weight        F8_E4M3  [out, in]
    weight_scale  F32      []          amax / 448

The weight is divided in FP32 whatever its dtype: dividing in BF16 rounds twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantplug.formats.constants import E4M3_MAX
from quantplug.formats.kernels import kernels_for
from quantplug.formats.scale_from_amax import scale_from_amax
from quantplug.formats.scales import tensor_scale
from quantplug.formats.shapes import shape_problem
from quantplug.formats.weight_format import PackedWeight, TensorSpec, empty_groups, empty_tensors


@dataclass(frozen=True)
class FP8:
    """E4M3 with one scale a tensor; see the module for the tensors."""

    @property
    def name(self) -> str:
        return "fp8"

    @property
    def static_activations(self) -> bool:
        return True

    def problem(self, shape: tuple[int, ...]) -> str | None:
        return shape_problem(shape)

    def outputs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("weight", shape, torch.float8_e4m3fn),
            TensorSpec("weight_scale", (), torch.float32),
        )

    def pack(self, weight: torch.Tensor, amax: torch.Tensor | None = None) -> PackedWeight:
        tensors = empty_tensors(self.outputs(tuple(weight.shape)), weight.device)
        tensors["weight_scale"] = tensor_scale(weight, amax, E4M3_MAX)
        kernels_for(weight).pack_fp8(weight, tensors["weight_scale"], tensors["weight"])
        return PackedWeight(tensors)

    def pack_group(self, weights: Sequence[torch.Tensor], amaxes: torch.Tensor) -> Sequence[PackedWeight]:
        first = weights[0]
        tensors = empty_groups(self.outputs(tuple(first.shape)), len(weights), first.device)
        tensors["weight_scale"] = scale_from_amax(amaxes.to(first.device), E4M3_MAX)
        kernels_for(first).pack_fp8_group(weights, tensors["weight_scale"], tensors["weight"])
        return PackedWeight.of_group(tensors)

    def unpack(self, packed: PackedWeight) -> torch.Tensor:
        values = torch.empty_like(packed.tensors["weight"], dtype=torch.float32)
        kernels_for(values).unpack_fp8(packed.tensors["weight"], packed.tensors["weight_scale"], values)
        return values

    def input_scale(self, amax: torch.Tensor) -> torch.Tensor:
        return scale_from_amax(amax.reshape(()), E4M3_MAX)
