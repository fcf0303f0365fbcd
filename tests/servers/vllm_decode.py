"""What the parameters that vLLM has loaded stand for: FP32 values by the rules that its GPU kernels follow.

Written for these tests alone, from the formats' own descriptions (docs/formats.md) and vLLM 0.32's loading code, and
apart from quantplug, which is not even installed where this runs. Parameters are told by their types and shapes.
"""

import torch

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def dense(
    weight: torch.Tensor,
    scale: torch.Tensor,
    scale_2: torch.Tensor | None,
    widths: list[int] | None = None,
    *,
    inverse_scale_2: bool = False,
) -> torch.Tensor:
    """FP32 [..., out, in] of one linear, or of all experts of a layer in one tensor.

    Args:
        weight: Codes: E4M3; or U8 with two E2M1 codes a byte, the first of two columns in the low nibble; or I32 with
            eight 4-bit integers, 8 standing for 0.
        scale: Scales of blocks, rows, or whole tensors; U8 is an exponent of two (E8M0).
        scale_2: Scales above those of blocks, of which the largest counts where linears are merged (modelopt.py).
        widths: Rows of the linears that are merged in `weight`, where each has a scale of its own.
        inverse_scale_2: Whether `scale_2` divides, as `weight_global_scale` of compressed-tensors does.
    """
    if weight.dtype is torch.int32:
        values = _nibbles(weight.view(torch.uint8)).float() - 8
    elif weight.dtype is torch.uint8:
        values = _e2m1(weight)
    else:
        values = weight.float()
    if scale.dtype is torch.uint8:
        scale = torch.exp2(scale.float() - 127)
    values = values * _spread(scale.float(), values, widths)
    if scale_2 is not None:
        largest = scale_2.float().reshape(*values.shape[:-2], -1)
        factor = 1 / largest.amin(-1) if inverse_scale_2 else largest.amax(-1)
        values = values * factor[..., None, None]
    return values


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def _e2m1(packed: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(packed).int()
    return torch.where(codes >= 8, -1.0, 1.0) * E2M1[codes % 8]


def _spread(scale: torch.Tensor, values: torch.Tensor, widths: list[int] | None) -> torch.Tensor:
    """The scales, one an element or broadcast to that."""
    rows, columns = values.shape[-2:]
    experts = values.shape[:-2]
    if scale.dim() == len(experts) + 2 and scale.shape[-2:] != (1, 1):
        below, beside = scale.shape[-2:]
        tall = 1 if below == rows else 128
        wide = columns if beside == 1 else 128 if tall == 128 else columns // beside
        scale = scale.repeat_interleave(tall, -2)[..., :rows, :]
        return scale.repeat_interleave(wide, -1)[..., :columns]
    flat = scale.reshape(*experts, -1)
    if flat.shape[-1] == rows:
        return flat[..., None]
    if flat.shape[-1] == 1:
        return flat[..., None]
    parts = widths or [rows // flat.shape[-1]] * flat.shape[-1]
    each = [flat[..., index : index + 1].expand(*experts, width) for index, width in enumerate(parts)]
    return torch.cat(each, dim=-1)[..., None]
