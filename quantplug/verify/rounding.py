"""Round to nearest of this checker's own, for weights whose gain is suspicious: what a plain packer would have given.

By the definitions of the formats (see `decode.py`), and nothing else; ties may go either way, which no gain shows.
"""

import torch

from quantplug.verify import decode

_MAGNITUDES = decode.E2M1_VALUES[:8]
_HALFWAY = (_MAGNITUDES[1:] + _MAGNITUDES[:-1]) / 2
_E4M3_LARGEST = 448.0


def nearest_nvfp4(original: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """FP32 values of rows [rows, columns] in NVFP4 with this `weight_scale_2`."""
    blocks = original.view(original.shape[0], -1, decode.NVFP4_BLOCK)
    scale = tensor_scale.reshape(())
    block_scales = _e4m3(blocks.abs().amax(dim=-1, keepdim=True) / (6 * scale)) * scale
    # A block whose scale rounds to zero decodes to zeros; dividing by it would give NaN.
    codes = torch.bucketize(torch.where(block_scales > 0, blocks.abs() / block_scales, 0.0), _HALFWAY)
    return (_MAGNITUDES[codes] * block_scales * blocks.sign()).view_as(original)


def nearest_fp8(original: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """FP32 values of rows in E4M3 with scales that broadcast to them."""
    return _e4m3(original / scale) * scale


def nearest_int4(original: torch.Tensor, group: int) -> torch.Tensor:
    """FP32 values of rows in INT4 with a scale in BF16 for so many columns."""
    groups = original.view(original.shape[0], -1, group)
    scales = (groups.abs().amax(dim=-1, keepdim=True) / 7.5).bfloat16().float()
    steps = torch.where(scales > 0, groups / scales, 0.0).clamp(-8, 7).round()
    return (steps * scales).view_as(original)


def _e4m3(values: torch.Tensor) -> torch.Tensor:
    # torch's cast makes NaN of what is larger than 448; packers saturate.
    return values.clamp(-_E4M3_LARGEST, _E4M3_LARGEST).to(torch.float8_e4m3fn).float()


def nearest_mxfp4(original: torch.Tensor) -> torch.Tensor:
    """FP32 values of rows [rows, columns] in MXFP4, with exponents under which nothing saturates."""
    blocks = original.view(original.shape[0], -1, decode.MXFP4_BLOCK)
    # 6 is 0.75 * 8: of a magnitude m * 2^e, 0.5 <= m < 1, the exponent is e - 3, or one more where m is above 0.75.
    mantissa, exponent = torch.frexp(blocks.abs().amax(dim=-1, keepdim=True))
    scales = torch.ldexp(torch.ones_like(mantissa), (exponent - 3 + (mantissa > 0.75)).clamp(min=-126))
    codes = torch.bucketize(blocks.abs() / scales, _HALFWAY)
    return (_MAGNITUDES[codes] * scales * blocks.sign()).view_as(original)
