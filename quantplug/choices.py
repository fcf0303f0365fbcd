"""What callers choose from, by name: in Python, on the command line, in examples and documents alike.

Nothing but names and what they mean, so that the command line can list and complete them without waiting for torch.
What each does is said where it is done: `formats/names.py`, `formats/search/candidates.py`, `selection/policy.py`,
`export/plan/dialects/table.py` and `export/pipeline/amaxes.py` have a table of each.
"""

from enum import StrEnum


class QuantFormat(StrEnum):
    """The formats by name: `wXaY` counts the bits of weights and activations, where the bare name quantizes both."""

    W4A16_NVFP4 = "w4a16_nvfp4"
    NVFP4 = "nvfp4"
    FP8 = "fp8"
    W8A16_FP8 = "w8a16_fp8"
    FP8_BLOCKWISE = "fp8_blockwise"
    FP8_DYNAMIC = "fp8_dynamic"
    INT4 = "int4"
    MXFP8 = "mxfp8"
    MXFP4 = "mxfp4"

    @property
    def needs_data(self) -> bool:
        """Whether activations are quantized by scales that only calibration with data can give."""
        return self in _WEIGHT_ONLY

    @property
    def weight_only(self) -> "QuantFormat":
        """The format of the same weights that needs no data: itself where it needs none."""
        return _WEIGHT_ONLY.get(self, self)


_WEIGHT_ONLY = {QuantFormat.NVFP4: QuantFormat.W4A16_NVFP4, QuantFormat.FP8: QuantFormat.W8A16_FP8}

PLAIN = "plain"
"""The name of no format: weights are written as they are, also those of a quantized model."""

EXPORT_FORMATS = (*(name for name in QuantFormat if not name.needs_data), PLAIN)
"""What a training checkpoint can be written in, whatever its quantizers say."""


class KVCacheFormat(StrEnum):
    """The formats of a server's KV cache that a checkpoint can ask for.

    `fp8_cast` is E4M3 with a scale of 1.0: keys and values are cast, so that it takes no data and no tensors, but two
    lines of config. It is what most published NVFP4 checkpoints have (ModelOpt's recipes call it `kv_fp8_cast`). `fp8`
    is E4M3 with scales that were calibrated with data, two for each attention layer. `nvfp4_cast` and `nvfp4` are the
    same of NVFP4, whose blocks have scales that the server makes.
    """

    FP8_CAST = "fp8_cast"
    FP8 = "fp8"
    NVFP4_CAST = "nvfp4_cast"
    NVFP4 = "nvfp4"

    @property
    def needs_data(self) -> bool:
        """Whether it has scales that only calibration with data can give."""
        return self.cast is not self

    @property
    def cast(self) -> "KVCacheFormat":
        """The same type with a scale of 1.0, which needs no data: itself where it is that."""
        return _CASTS.get(self, self)


_CASTS = {KVCacheFormat.FP8: KVCacheFormat.FP8_CAST, KVCacheFormat.NVFP4: KVCacheFormat.NVFP4_CAST}


class Scales(StrEnum):
    """How the scales of blocks are found, by name. None needs data."""

    MAX = "max"
    """The block's amax gets the largest code, 6."""
    FOUR_OVER_SIX = "four_over_six"
    """Whichever of the codes 6 and 4 for the amax has the smaller squared error (arXiv 2512.02010)."""
    MSE = "mse"
    """The scale with the least squared error, among those from 3 codes below that of the amax to 7 above."""


class Preset(StrEnum):
    """Which linears of a model are quantized at all, by the names of ModelOpt's recipes."""

    DEFAULT = "default"
    """All but those that a family's table keeps from few bits, as vendors do (`WeightMapping.default_min_bits`)."""
    ALL = "all"
    """Those too."""
    EXPERTS_ONLY = "experts_only"
    MLP_ONLY = "mlp_only"
    OMLP_ONLY = "omlp_only"


class DialectName(StrEnum):
    """The spellings of formats on disk, by name."""

    MODELOPT = "modelopt"
    DEEPSEEK = "deepseek"
    COMPRESSED_TENSORS = "compressed-tensors"
    MXFP4 = "mxfp4"


class WeightAmax(StrEnum):
    """What becomes of a weight that has grown beyond the amax of its quantizer."""

    CALIBRATED = "calibrated"
    """It is an error: its largest values would be clipped."""
    REFRESH = "refresh"
    """The amaxes of all weights are taken anew, from the weights as they are. Those of inputs stay."""
    CLIP = "clip"
    """It is clipped, as a fake-quantized forward has done in training, or as the algorithm meant that set the amax."""
