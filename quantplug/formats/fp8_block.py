"""FP8 in blocks: E4M3 codes with one FP32 scale for each 128x128 block (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).

A value is `weight * weight_scale` of its block.

    weight        F8_E4M3  [out, in]
    weight_scale  F32      [out/128, in/128]   amax of the block / 448; DeepSeek's files call it weight_scale_inv

Both features must be multiples of 128: servers cut merged and sharded weights at block borders. Activations are
quantized at run time, so there is no `input_scale`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantplug.formats.constants import FP8_BLOCK
from quantplug.formats.kernels import kernels_for
from quantplug.formats.shapes import shape_problem
from quantplug.formats.weight_format import PackedWeight, TensorSpec, empty_groups, empty_tensors


@dataclass(frozen=True)
class FP8Block:
    """E4M3 with one scale a 128x128 block; see the module for the tensors."""

    @property
    def name(self) -> str:
        return "fp8_block"

    @property
    def static_activations(self) -> bool:
        return False

    def problem(self, shape: tuple[int, ...]) -> str | None:
        return shape_problem(shape, out_block=FP8_BLOCK, in_block=FP8_BLOCK)

    def outputs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        out_features, in_features = shape
        return (
            TensorSpec("weight", shape, torch.float8_e4m3fn),
            TensorSpec("weight_scale", (out_features // FP8_BLOCK, in_features // FP8_BLOCK), torch.float32),
        )

    def pack(self, weight: torch.Tensor, amax: torch.Tensor | None = None) -> PackedWeight:
        tensors = empty_tensors(self.outputs(tuple(weight.shape)), weight.device)
        kernels_for(weight).pack_fp8_block(weight, tensors["weight"], tensors["weight_scale"])
        return PackedWeight(tensors)

    def pack_group(self, weights: Sequence[torch.Tensor], amaxes: torch.Tensor) -> Sequence[PackedWeight]:
        first = weights[0]
        tensors = empty_groups(self.outputs(tuple(first.shape)), len(weights), first.device)
        kernels_for(first).pack_fp8_block_group(weights, tensors["weight"], tensors["weight_scale"])
        return PackedWeight.of_group(tensors)

    def unpack(self, packed: PackedWeight) -> torch.Tensor:
        values = torch.empty_like(packed.tensors["weight"], dtype=torch.float32)
        kernels_for(values).unpack_fp8_block(packed.tensors["weight"], packed.tensors["weight_scale"], values)
        return values

    def input_scale(self, amax: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("fp8_block has no static activations: check static_activations first")
