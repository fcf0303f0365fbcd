"""The weight formats that there are. A row is all that a format needs; what it is on disk is told here.

NVFP4 (arXiv 2509.25149, section 2). A value is `code * weight_scale * weight_scale_2`: the E2M1 code, the E4M3 scale of
its block of 16 consecutive input features, and one FP32 scale of the tensor.

    weight          U8       [out, in/2]    two codes a byte, even column in the low nibble
    weight_scale    F8_E4M3  [out, in/16]   linear, row by row; servers swizzle at load
    weight_scale_2  F32      []             amax / (6 * 448), so that the largest block scale is 448

The arithmetic, all in FP32 whatever the weight's dtype, is that of ModelOpt's packer and gives its bytes
(modelopt/torch/quantization/qtensor/nvfp4_tensor.py, `NVFP4QTensor.quantize`), with two exceptions where that divides
by zero or nearly so: an all-zero tensor, and one whose `weight_scale_2` would be subnormal (see `constants`).

FP8 (E4M3 of OCP OFP8), one scale a tensor. A value is `weight * weight_scale`. The weight is divided in FP32 whatever
its dtype: dividing in BF16 rounds twice.

    weight        F8_E4M3  [out, in]
    weight_scale  F32      []          amax / 448

FP8 with a scale a row (compressed-tensors' strategy `channel`, compressed_tensors/quantization/quant_args.py). A value
is `weight * weight_scale` of its row. Activations are quantized at run time, each token by a scale of its own.

    weight        F8_E4M3  [out, in]
    weight_scale  F32      [out, 1]    amax of the row / 448

INT4 in groups of 128 or 32 consecutive input features (compressed-tensors' `pack-quantized`, which llm-compressor
writes by its scheme W4A16). A value is `(code - 8) * weight_scale` of its group.

    weight        U8    [out, in/2]      two codes a byte, even column in the low nibble
    weight_scale  BF16  [out, in/group]  amax of the group / 7.5, rounded to BF16

Codes are made by dividing by the rounded scale, in FP32: the bytes of llm-compressor on a GPU, whose kernel divides in
FP32 too (`_quantize_kernel` of compressed_tensors/quantization/lifecycle/forward_helpers.py).

FP8 in blocks of 128 x 128 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). A value is `weight * weight_scale` of its
block. Activations are quantized at run time, so there is no `input_scale`.

    weight        F8_E4M3  [out, in]
    weight_scale  F32      [ceil(out/128), ceil(in/128)]   amax of the block / 448; in DeepSeek's files weight_scale_inv

The last blocks may be partial, as in DeepSeek-V3's own files (`kv_a_proj_with_mqa` has 576 rows). Where servers merge
linears or cut them they need whole blocks, which is for the plan of an export to know, not for the numerics.

MXFP8 and MXFP4 (OCP Microscaling Formats v1.0), a power of two for each block of 32 consecutive input features. A value
is `code * 2^(weight_scale - 127)`. Activations, where a server quantizes them, are so at run time.

    weight        F8_E4M3  [out, in]     MXFP8
    weight        U8       [out, in/2]   MXFP4: two E2M1 codes a byte, even column in the low nibble
    weight_scale  U8       [out, in/32]  exponent plus 127

The bytes are those of ModelOpt (modelopt/torch/quantization/qtensor/mxfp8_tensor.py, mxfp4_tensor.py), but for two
things of its MXFP4: it rounds ties down where every other format here rounds them to even, and gives 0 a sign.
"""

from quantplug.formats.block_format import BlockFormat
from quantplug.formats.encoding import (
    FP8_BLOCK_ENCODING,
    FP8_ENCODING,
    FP8_ROW_ENCODING,
    INT4_32_ENCODING,
    INT4_ENCODING,
    MXFP4_ENCODING,
    MXFP8_ENCODING,
    NVFP4_ENCODING,
)

NVFP4 = BlockFormat("nvfp4", NVFP4_ENCODING, ("weight_scale", "weight_scale_2"), static_activations=True)
FP8 = BlockFormat("fp8", FP8_ENCODING, ("weight_scale",), static_activations=True)
FP8_ROW = BlockFormat("fp8_row", FP8_ROW_ENCODING, ("weight_scale",), static_activations=False)
FP8_BLOCK = BlockFormat("fp8_block", FP8_BLOCK_ENCODING, ("weight_scale",), static_activations=False)
INT4 = BlockFormat("int4", INT4_ENCODING, ("weight_scale",), static_activations=False)
INT4_32 = BlockFormat("int4_32", INT4_32_ENCODING, ("weight_scale",), static_activations=False)
MXFP8 = BlockFormat("mxfp8", MXFP8_ENCODING, ("weight_scale",), static_activations=False)
MXFP4 = BlockFormat("mxfp4", MXFP4_ENCODING, ("weight_scale",), static_activations=False)
