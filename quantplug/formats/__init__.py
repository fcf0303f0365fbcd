"""Numerics of the weight formats: pure functions from one weight to named tensors and back. Needs torch alone."""

from quantplug.formats.fp8 import FP8
from quantplug.formats.fp8_block import FP8Block
from quantplug.formats.nonfinite import first_nonfinite
from quantplug.formats.nvfp4 import NVFP4
from quantplug.formats.weight_format import PackedWeight, TensorSpec, WeightFormat

__all__ = ["FP8", "NVFP4", "FP8Block", "PackedWeight", "TensorSpec", "WeightFormat", "first_nonfinite"]
