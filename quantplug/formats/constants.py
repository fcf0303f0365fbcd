"""Every number of the formats, once, with its source.

Sources:
    [MX]   OCP Microscaling Formats (MX) Specification v1.0: sections 5.3.3 (FP4 E2M1), 5.4.1 (E8M0), 6.3 (conversion).
    [OFP8] OCP 8-bit Floating Point Specification (OFP8) v1.0, table of E4M3.
    [NVFP4] Pretraining Large Language Models with NVFP4, arXiv 2509.25149, section 2 and appendix B.
    [DSV3] DeepSeek-V3 Technical Report, arXiv 2412.19437, section 3.3.2.
    [CT]   compressed-tensors 0.20, compressed_tensors/quantization/utils/helpers.py (`calculate_range`,
           `calculate_qparams`).
    [TE]   Transformer Engine, transformer_engine/common/cast/nvfp4/core_nvfp4.cuh.
"""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of each 3-bit E2M1 code; bit 3 of the 4-bit code is the sign [MX]."""

E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Midpoints between neighbouring magnitudes: `E2M1_BOUNDS[i]` parts code i from code i + 1."""

E2M1_MAX = 6.0
"""Largest E2M1 magnitude [MX]."""

E4M3_MAX = 448.0
"""Largest finite E4M3 magnitude, 0b1111110 [OFP8]."""

E4M3_SMALLEST_SUBNORMAL = 2.0**-9
"""Smallest positive E4M3 value, 0b0000001 [OFP8]."""

NVFP4_BLOCK = 16
"""Consecutive input features that share one E4M3 block scale [NVFP4]."""

NVFP4_MAX = E2M1_MAX * E4M3_MAX
"""Largest code times largest block scale, 2688: `weight_scale_2` maps the tensor's amax to it [NVFP4]."""

FP8_BLOCK_SIDE = 128
"""Side of the square weight block that shares one FP32 scale [DSV3]."""

INT4_LOWEST, INT4_HIGHEST = -8, 7
"""The integers of 4 bits in two's complement; a code is the integer less the lowest, 0 to 15 [CT]."""

INT4_LARGEST = (INT4_HIGHEST - INT4_LOWEST) / 2
"""What the amax of a group is mapped to, 7.5: half a step beyond the highest, and short of the lowest [CT]."""

INT4_GROUP, INT4_SMALL_GROUP = 128, 32
"""Consecutive input features that share one scale of INT4: what llm-compressor's W4A16 has, and a finer one."""

F32_SMALLEST_NORMAL = 2.0**-126
"""Smallest normal FP32 (IEEE 754): no scale is below it.

Readers divide by scales and take their reciprocals, and kernels flush subnormals to zero: 1 / 2^-126 is finite, the
reciprocal of a subnormal may not be. Only a weight with amax below 2^-126 times the format's largest value is affected.
"""

ZERO_AMAX_SCALE = 1.0
"""Scale of an all-zero tensor or block, whose own amax would give 0 and then 0 / 0 [TE]."""

MX_BLOCK = 32
"""Consecutive input features that share one E8M0 scale [MX]."""

E8M0_BIAS = 127
"""Bias of the exponent that an E8M0 scale is: its value is 2^(code - 127) [MX]."""

E8M0_NAN = 255
"""The one E8M0 code that is no power of two [MX]."""
