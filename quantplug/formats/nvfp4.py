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

from dataclasses import dataclass

import torch

from quantplug.formats import e2m1
from quantplug.formats.base import PackedWeight, TensorSpec
from quantplug.formats.chunks import fp32_row_chunks
from quantplug.formats.constants import (
    E2M1_MAX,
    E4M3_MAX,
    E4M3_SMALLEST_SUBNORMAL,
    NVFP4_BLOCK,
    NVFP4_MAX,
    ZERO_AMAX_SCALE,
)
from quantplug.formats.scales import scale_from_amax, tensor_scale
from quantplug.formats.shapes import shape_problem


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
        weight_scale_2 = tensor_scale(weight, amax, NVFP4_MAX)
        chunks = [_pack_rows(rows, weight_scale_2) for rows in fp32_row_chunks(weight)]
        packed, block_scales = zip(*chunks, strict=True)
        return PackedWeight(
            {
                "weight": torch.cat(packed),
                "weight_scale": torch.cat(block_scales),
                "weight_scale_2": weight_scale_2,
            }
        )

    def unpack(self, packed: PackedWeight) -> torch.Tensor:
        values = e2m1.decode(e2m1.unpack_pairs(packed.tensors["weight"]))
        scales = packed.tensors["weight_scale"].float() * packed.tensors["weight_scale_2"]
        return (_in_blocks(values) * scales.unsqueeze(-1)).flatten(-2)

    def input_scale(self, amax: torch.Tensor) -> torch.Tensor:
        return scale_from_amax(amax.reshape(()), NVFP4_MAX)


def _in_blocks(rows: torch.Tensor) -> torch.Tensor:
    """[n, in] as [n, in/16, 16]."""
    return rows.view(rows.shape[0], -1, NVFP4_BLOCK)


def _pack_rows(rows: torch.Tensor, weight_scale_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes [n, in/2] and block scales [n, in/16] of FP32 rows [n, in]."""
    blocks = _in_blocks(rows)
    block_scales = _block_scales(blocks, weight_scale_2)
    # Divided by the scale as the reader will see it, after its rounding to E4M3.
    codes = e2m1.encode(blocks / (block_scales.float() * weight_scale_2).unsqueeze(-1))
    return e2m1.pack_pairs(codes.flatten(-2)), block_scales


def _block_scales(blocks: torch.Tensor, weight_scale_2: torch.Tensor) -> torch.Tensor:
    """E4M3 scales [n, in/16] that map the amax of each block [n, in/16, 16] to 6."""
    scales = blocks.abs().amax(-1) / (E2M1_MAX * weight_scale_2)
    scales = torch.where(scales == 0, ZERO_AMAX_SCALE, scales)
    # E4M3 would round a tiny scale to 0, by which codes cannot be divided, and one above 448 to NaN.
    return scales.clamp(E4M3_SMALLEST_SUBNORMAL, E4M3_MAX).to(torch.float8_e4m3fn)
