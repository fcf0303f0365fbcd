"""Round to nearest of this checker's own, for weights that are suspicious: what other packers would have given.

By the definitions of the formats (see `decode.py`), and nothing else. Each function takes values and scales, FP32, that
broadcast to each other: those of a plain packer, or those that are stored.
"""

import torch

from quantplug.verify.numbers import decode

_MAGNITUDES = decode.E2M1_VALUES[:8]
_HALFWAY = (_MAGNITUDES[1:] + _MAGNITUDES[:-1]) / 2
E4M3_LARGEST, E2M1_LARGEST, INT4_LARGEST = 448.0, 6.0, 7.0


def e2m1(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Of E2M1 codes."""
    codes = torch.bucketize(_over(values, scales).abs(), _HALFWAY)
    return _MAGNITUDES[codes] * scales * values.sign()


def e4m3(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Of E4M3 codes."""
    return _e4m3(_over(values, scales)) * scales


def int4(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Of INT4 codes, -8 to 7."""
    return _over(values, scales).clamp(-8, 7).round() * scales


def plain_nvfp4_scales(amaxes: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """Scales of NVFP4's blocks with these largest magnitudes, under a `weight_scale_2`, which is in them."""
    return _e4m3(_over(amaxes, 6 * tensor_scale)) * tensor_scale


def plain_int4_scales(amaxes: torch.Tensor) -> torch.Tensor:
    """Scales of INT4's groups, as BF16 holds them."""
    return (amaxes / 7.5).bfloat16().float()


def plain_mxfp4_scales(amaxes: torch.Tensor) -> torch.Tensor:
    """Powers of two under which nothing saturates."""
    # 6 is 0.75 * 8: of a magnitude m * 2^e, 0.5 <= m < 1, the exponent is e - 3, or one more where m is above 0.75.
    mantissa, exponent = torch.frexp(amaxes)
    return torch.ldexp(torch.ones_like(mantissa), (exponent - 3 + (mantissa > 0.75)).clamp(min=-126))


def _over(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    # What has a scale of zero decodes to zeros; dividing by it would give NaN.
    return torch.where(scales == 0, 0.0, values / scales)


def _e4m3(values: torch.Tensor) -> torch.Tensor:
    # torch's cast makes NaN of what is larger than 448; packers saturate.
    return values.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).float()
