"""Numerics of the weight formats: pure functions from one weight to named tensors and back. Needs torch alone."""

from quantplug.formats.block_format import BlockFormat, EncodedRows
from quantplug.formats.nonfinite import first_nonfinite
from quantplug.formats.table import FP8, FP8_BLOCK, FP8_ROW, INT4, INT4_32, MXFP4, MXFP8, NVFP4
from quantplug.formats.weight_format import PackedWeight, TensorSpec, WeightFormat

__all__ = [
    "FP8",
    "FP8_BLOCK",
    "FP8_ROW",
    "INT4",
    "INT4_32",
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "BlockFormat",
    "EncodedRows",
    "PackedWeight",
    "TensorSpec",
    "WeightFormat",
    "first_nonfinite",
]
