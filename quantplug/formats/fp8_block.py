"""FP8 in blocks: E4M3 codes with one FP32 scale for each 128x128 block (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).

A value is `weight * weight_scale` of its block.

    weight        F8_E4M3  [out, in]
    weight_scale  F32      [out/128, in/128]   amax of the block / 448; DeepSeek's files call it weight_scale_inv

Both features must be multiples of 128: servers cut merged and sharded weights at block borders. Activations are
quantized at run time, so there is no `input_scale`.
"""

from dataclasses import dataclass

import torch

from quantplug.formats.base import PackedWeight, TensorSpec
from quantplug.formats.chunks import fp32_row_chunks
from quantplug.formats.constants import E4M3_MAX, FP8_BLOCK
from quantplug.formats.fp8 import saturate_to_e4m3
from quantplug.formats.scales import scale_from_amax
from quantplug.formats.shapes import shape_problem


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
        chunks = [_pack_rows(rows) for rows in fp32_row_chunks(weight, row_multiple=FP8_BLOCK)]
        codes, scales = zip(*chunks, strict=True)
        return PackedWeight({"weight": torch.cat(codes), "weight_scale": torch.cat(scales)})

    def unpack(self, packed: PackedWeight) -> torch.Tensor:
        blocks = _in_blocks(packed.tensors["weight"].float())
        return _in_rows(blocks * packed.tensors["weight_scale"][:, None, :, None])

    def input_scale(self, amax: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("fp8_block has no static activations: check static_activations first")


def _in_blocks(rows: torch.Tensor) -> torch.Tensor:
    """[n, in] as [n/128, 128, in/128, 128]."""
    return rows.view(rows.shape[0] // FP8_BLOCK, FP8_BLOCK, -1, FP8_BLOCK)


def _in_rows(blocks: torch.Tensor) -> torch.Tensor:
    """Undoes `_in_blocks`."""
    return blocks.flatten(2).flatten(0, 1)


def _pack_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [n, in] and scales [n/128, in/128] of FP32 rows [n, in]."""
    blocks = _in_blocks(rows)
    scales = scale_from_amax(blocks.abs().amax((1, 3)), E4M3_MAX)
    return _in_rows(saturate_to_e4m3(blocks / scales[:, None, :, None])), scales
