"""FP8: E4M3 codes (OCP OFP8) with one FP32 scale a tensor. A value is `weight * weight_scale`.

    weight        F8_E4M3  [out, in]
    weight_scale  F32      []          amax / 448

The weight is divided in FP32 whatever its dtype: dividing in BF16 rounds twice.
"""

from dataclasses import dataclass

import torch

from quantplug.formats.base import PackedWeight, TensorSpec
from quantplug.formats.chunks import fp32_row_chunks
from quantplug.formats.constants import E4M3_MAX
from quantplug.formats.scales import scale_from_amax, tensor_scale
from quantplug.formats.shapes import shape_problem


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
        weight_scale = tensor_scale(weight, amax, E4M3_MAX)
        codes = [saturate_to_e4m3(rows / weight_scale) for rows in fp32_row_chunks(weight)]
        return PackedWeight({"weight": torch.cat(codes), "weight_scale": weight_scale})

    def unpack(self, packed: PackedWeight) -> torch.Tensor:
        return packed.tensors["weight"].float() * packed.tensors["weight_scale"]

    def input_scale(self, amax: torch.Tensor) -> torch.Tensor:
        return scale_from_amax(amax.reshape(()), E4M3_MAX)


def saturate_to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Rounds FP32 to E4M3, ties to even; magnitudes above 448 become 448 where a plain cast makes NaN of them."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
