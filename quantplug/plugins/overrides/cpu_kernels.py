"""NVFP4 fake quantization of CPU tensors, where ModelOpt has a CUDA kernel only.

ModelOpt's quantizers call the PyTorch operator `tensorrt::dynamic_block_quantize_op`. Its CPU kernel raises ("amax must
be a CUDA tensor"); this registers one that packs and unpacks by our format. So the forward of a quantized model,
`mtq.fold_weight` and `mtq.temporarily_fold_weights` work without a GPU, for every layer, whoever wrapped it. CUDA
tensors are left to ModelOpt.
"""

import torch

from quantplug.errors import Offender, ShapeError, UnsupportedQuantizationError
from quantplug.formats import NVFP4
from quantplug.formats.constants import NVFP4_BLOCK

OPERATOR = "dynamic_block_quantize_op"
_E2M1_E4M3 = (4, 2, 8, 4)
"""NVFP4 as the operator spells it: bits and exponent bits of a code, then of a block scale."""

_LIBRARY = torch.library.Library("tensorrt", "IMPL")
"""Holds the registration: PyTorch takes it back when this is collected."""


def register_cpu_kernels() -> None:
    """Registers the kernel, in place of ModelOpt's own; again changes nothing."""
    _LIBRARY.impl(OPERATOR, fake_quantize, "CPU", allow_override=True)


def fake_quantize(
    values: torch.Tensor,
    block_size: int,
    amax: torch.Tensor,
    num_bits: int,
    exponent_bits: int,
    scale_num_bits: int,
    scale_exponent_bits: int,
    *of_onnx: str | None,
) -> torch.Tensor:
    """Values [..., K] as a reader of their packed NVFP4 form has them, in their own dtype.

    Args:
        amax: Of the whole tensor; the largest element counts.
        of_onnx: What ModelOpt 0.48 says of an ONNX graph, and no values depend on.

    Raises:
        UnsupportedQuantizationError: Another format than NVFP4 with blocks of 16.
        ShapeError: K does not divide by 16.
    """
    bits = (num_bits, exponent_bits, scale_num_bits, scale_exponent_bits)
    if bits != _E2M1_E4M3 or block_size != NVFP4_BLOCK:
        raise UnsupportedQuantizationError(
            "Only NVFP4 with blocks of 16 is fake-quantized on CPU.",
            [Offender(f"tensorrt::{OPERATOR}", f"(code, scale) bits {bits}, block size {block_size}")],
            "Run the forward on a GPU, or use NVFP4 or FP8.",
        )
    # Blocks lie along the last axis, so all others can be rows. Packed and unpacked by the kernels of the export, a
    # forward computes with the very values that a server reads.
    rows = values.reshape(-1, values.shape[-1])
    problem = NVFP4.problem(tuple(rows.shape))
    if problem is not None:
        raise ShapeError("A tensor does not divide into NVFP4 blocks.", [Offender(f"tensorrt::{OPERATOR}", problem)])
    packed = NVFP4.pack(rows, amax.float().amax())
    return NVFP4.unpack(packed).view(values.shape).to(values.dtype)
