"""A quantization function as RL frameworks bring their own: FP8 in blocks, the last ones partial, in plain torch."""

import torch

E4M3_LARGEST = 448.0


def blockwise_fp8(weight: torch.Tensor, block_size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 codes [out, in] and FP32 scales [ceil(out / rows), ceil(in / columns)], block after block."""
    rows, columns = block_size
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            here = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            block = weight[here].float()
            scale[i, j] = (block.abs().max() / E4M3_LARGEST).clamp(min=1e-12)
            codes[here] = (block / scale[i, j]).to(torch.float8_e4m3fn)
    return codes, scale
