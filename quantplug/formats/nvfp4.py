"""NVFP4: 4-bit codes with two levels of scales (arXiv 2509.25149, section 2).

A value is `code * weight_scale * weight_scale_2`: the E2M1 code, the E4M3 scale of its block of 16 consecutive input
features, and one FP32 scale of the tensor.

    weight          U8       [out, in/2]    two codes a byte, even column in the low nibble
    weight_scale    F8_E4M3  [out, in/16]   linear, row by row; servers swizzle at load
    weight_scale_2  F32      []             amax / (6 * 448), so that the largest block scale is 448

The arithmetic, all in FP32 whatever the weight's dtype, is that of ModelOpt's packer and gives its bytes
(modelopt/torch/quantization/qtensor/nvfp4_tensor.py, `NVFP4QTensor.quantize`), with two exceptions where that divides
by zero or nearly so: an all-zero tensor, and one whose `weight_scale_2` would be subnormal (see `constants`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantplug.formats.constants import NVFP4_BLOCK, NVFP4_MAX
from quantplug.formats.kernels import kernels_for
from quantplug.formats.scale_from_amax import scale_from_amax
from quantplug.formats.scales import tensor_scale
from quantplug.formats.shapes import shape_problem
from quantplug.formats.weight_format import PackedWeight, TensorSpec, empty_groups, empty_tensors


@dataclass(frozen=True)
class NVFP4:
    """NVFP4 with blocks of 16 input features; see the module for the tensors."""

    @property
    def name(self) -> str:
        return "nvfp4"

    @property
    def static_activations(self) -> bool:
        return True

    def problem(self, shape: tuple[int, ...]) -> str | None:
        return shape_problem(shape, in_block=NVFP4_BLOCK)

    def outputs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        out_features, in_features = shape
        return (
            TensorSpec("weight", (out_features, in_features // 2), torch.uint8),
            TensorSpec("weight_scale", (out_features, in_features // NVFP4_BLOCK), torch.float8_e4m3fn),
            TensorSpec("weight_scale_2", (), torch.float32),
        )

    def pack(self, weight: torch.Tensor, amax: torch.Tensor | None = None) -> PackedWeight:
        tensors = empty_tensors(self.outputs(tuple(weight.shape)), weight.device)
        tensors["weight_scale_2"] = scale_2 = tensor_scale(weight, amax, NVFP4_MAX)
        kernels_for(weight).pack_nvfp4(weight, scale_2, tensors["weight"], tensors["weight_scale"])
        return PackedWeight(tensors)

    def pack_group(self, weights: Sequence[torch.Tensor], amaxes: torch.Tensor) -> Sequence[PackedWeight]:
        first = weights[0]
        tensors = empty_groups(self.outputs(tuple(first.shape)), len(weights), first.device)
        tensors["weight_scale_2"] = scales_2 = scale_from_amax(amaxes.to(first.device), NVFP4_MAX)
        kernels_for(first).pack_nvfp4_group(weights, scales_2, tensors["weight"], tensors["weight_scale"])
        return PackedWeight.of_group(tensors)

    def unpack(self, packed: PackedWeight) -> torch.Tensor:
        codes, scales = packed.tensors["weight"], packed.tensors["weight_scale"]
        values = torch.empty(codes.shape[0], 2 * codes.shape[1], device=codes.device)
        kernels_for(values).unpack_nvfp4(codes, scales, packed.tensors["weight_scale_2"], values)
        return values

    def input_scale(self, amax: torch.Tensor) -> torch.Tensor:
        return scale_from_amax(amax.reshape(()), NVFP4_MAX)
