"""Scales of blocks that come from elsewhere: from a quantizer whose algorithm has found an amax for each block."""

from collections.abc import Sequence

import torch

from quantplug.formats.constants import E4M3_MAX, E4M3_SMALLEST_SUBNORMAL
from quantplug.formats.encoding import Encoding
from quantplug.formats.scale_types import scale_from_amax


def scales_of_block_amaxes(
    encoding: Encoding, block_amaxes: Sequence[torch.Tensor], amaxes: torch.Tensor
) -> torch.Tensor:
    """The E4M3 scales [count, out, blocks] that amaxes of blocks stand for.

    They are, in FP32, (block amax / 6) * 448 / (amax / 6), with 256 in place of 448 for four-over-six; then clamped and
    rounded. That is the order of ModelOpt's exporter, and gives its bytes (modelopt/torch/quantization/qtensor/
    nvfp4_tensor.py, `get_weights_scaling_factor_from_quantizer`). A block amax that was made of an E4M3 number, and the
    amax, gives that number back: three roundings of 2^-24 do not reach over half a step of 2^-4.

    Args:
        block_amaxes: FP32 [out, blocks] of each weight.
        amaxes: FP32 [count] of the whole weights.
    """
    code_largest = torch.full_like(amaxes, encoding.code.largest)
    # A block without anything gets 1 before the step of the tensor, as in ModelOpt, and so the largest scale.
    of_blocks = torch.stack(list(block_amaxes)) / code_largest[:, None, None]
    of_blocks = torch.where(of_blocks == 0, torch.ones_like(of_blocks), of_blocks)
    largest = encoding.largest / encoding.code.largest
    of_wholes = scale_from_amax(amaxes, encoding.code.largest)
    scales = of_blocks * largest / of_wholes[:, None, None]
    # Of an all-zero weight, where ModelOpt divides 0 by 0: as a weight is packed that has no such amaxes.
    scales = torch.where(amaxes[:, None, None] == 0, torch.ones_like(scales), scales)
    return scales.clamp(E4M3_SMALLEST_SUBNORMAL, E4M3_MAX).to(torch.float8_e4m3fn)


def block_amaxes_of_scales(encoding: Encoding, scales: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """The FP32 amaxes of blocks that stand for E4M3 scales [out, blocks]: `scales_of_block_amaxes` backwards.

    Args:
        amax: FP32 scalar of the whole weight.
    """
    return amax * scales.float() / torch.full_like(amax, encoding.largest / encoding.code.largest)
