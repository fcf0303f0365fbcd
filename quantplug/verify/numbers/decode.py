"""A second decoder: bytes to FP32 values by tables built from the bit layouts alone.

It shares nothing with the packers, so that an error there cannot hide here.

E2M1 (OCP Microscaling Formats v1.0, 5.3.3): sign, two exponent bits with bias 1, one mantissa bit; no Inf, no NaN.
E4M3 (OCP 8-bit Floating Point v1.0, table 1): sign, four exponent bits with bias 7, three mantissa bits; S.1111.111 is
NaN, no Inf.
E8M0 (OCP Microscaling Formats v1.0, 5.4.1): 2^(byte - 127); 0xFF is NaN.
MXFP8 and MXFP4 (the same, 5.2): E4M3 codes, or two E2M1 codes a byte, and one E8M0 scale for 32 columns.
NVFP4: two E2M1 codes a byte, the low nibble being the even column; value = code * E4M3 block scale * FP32 tensor scale.
"""

import math

import torch

NVFP4_BLOCK = 16  # columns that share one block scale
MXFP4_BLOCK = 32


def _minifloat(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """The value of a small float whose codes are all finite."""
    mantissa = code & ((1 << mantissa_bits) - 1)
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    sign = -1.0 if code >> (mantissa_bits + exponent_bits) else 1.0
    # Subnormal: no implicit leading one, and the exponent of the smallest normal.
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits)


def _e4m3(code: int) -> float:
    return math.nan if code & 0x7F == 0x7F else _minifloat(code, exponent_bits=4, mantissa_bits=3, bias=7)


E2M1_VALUES = torch.tensor([_minifloat(code, exponent_bits=2, mantissa_bits=1, bias=1) for code in range(16)])
E4M3_VALUES = torch.tensor([_e4m3(code) for code in range(256)])
E8M0_VALUES = torch.tensor([*(math.ldexp(1.0, code - 127) for code in range(255)), math.nan])
# Byte to both of its values, so that one lookup decodes two codes: the low nibble is the even column.
_E2M1_PAIRS = torch.stack([E2M1_VALUES[torch.arange(256) & 15], E2M1_VALUES[torch.arange(256) >> 4]], dim=1)

# compressed-tensors counts INT4 from its lowest, -8.
_INT4_PAIRS = torch.stack([torch.arange(256) & 15, torch.arange(256) >> 4], dim=1).float() - 8


def decode_e4m3(codes_U8: torch.Tensor) -> torch.Tensor:
    """FP32 values of E4M3 bytes, any shape."""
    return E4M3_VALUES.index_select(0, codes_U8.flatten().int()).view(codes_U8.shape)


def decode_e8m0(scales_U8: torch.Tensor) -> torch.Tensor:
    """FP32 values of E8M0 bytes, any shape."""
    return E8M0_VALUES.index_select(0, scales_U8.flatten().int()).view(scales_U8.shape)


def decode_e2m1_pairs(packed_U8: torch.Tensor) -> torch.Tensor:
    """FP32 values [rows, 2 * bytes] of packed E2M1 codes [rows, bytes]."""
    rows, columns = packed_U8.shape
    return _E2M1_PAIRS.index_select(0, packed_U8.flatten().int()).view(rows, 2 * columns)


def decode_nvfp4(packed_U8: torch.Tensor, scales_U8: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """FP32 weight [rows, columns] of NVFP4 bytes.

    Args:
        packed_U8: E2M1 code pairs [rows, columns / 2].
        scales_U8: E4M3 block scale bytes [rows, columns / 16], row-major.
        tensor_scale: FP32 scalar of shape [] or [1].
    """
    values = decode_e2m1_pairs(packed_U8)
    rows, columns = values.shape
    scales = decode_e4m3(scales_U8) * tensor_scale.reshape(())
    return (values.view(rows, -1, NVFP4_BLOCK) * scales.unsqueeze(-1)).view(rows, columns)


def decode_int4(packed_U8: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """FP32 weight [rows, columns] of INT4 bytes.

    Args:
        packed_U8: Code pairs [rows, columns / 2], which are the bytes of little-endian integers of eight codes.
        scales: FP32 [rows, groups].
    """
    rows, packed = packed_U8.shape
    values = _INT4_PAIRS.index_select(0, packed_U8.flatten().int()).view(rows, scales.shape[1], -1)
    return (values * scales.unsqueeze(-1)).view(rows, 2 * packed)


def decode_mxfp4(blocks_U8: torch.Tensor, scales_U8: torch.Tensor) -> torch.Tensor:
    """FP32 weight [rows, columns] of MXFP4 bytes.

    Args:
        blocks_U8: E2M1 code pairs [rows, columns / 32, 16].
        scales_U8: E8M0 scale bytes [rows, columns / 32].
    """
    rows, blocks, packed = blocks_U8.shape
    values = decode_e2m1_pairs(blocks_U8.reshape(rows * blocks, packed))
    scales = decode_e8m0(scales_U8).flatten()
    return (values * scales.unsqueeze(1)).view(rows, blocks * 2 * packed)


def spread_blocks(
    scales: torch.Tensor, first_row: int, rows: int, columns: int, block: tuple[int, int]
) -> torch.Tensor:
    """Scales [rows, columns] of a slice of rows, from one scale a block [ceil(out / b0), ceil(in / b1)].

    Args:
        first_row: Row of the whole weight at which the slice begins.
        block: Rows and columns of one block; blocks at the lower and right edge may be cut.
    """
    row_block = torch.arange(first_row, first_row + rows) // block[0]
    column_block = torch.arange(columns) // block[1]
    return scales.index_select(0, row_block).index_select(1, column_block)
