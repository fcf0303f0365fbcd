"""ModelOpt's configs by the public names of the formats, made complete for one model."""

import copy
from collections.abc import Mapping
from typing import Any

import modelopt.torch.quantization as mtq

from quantplug.formats.names import SCHEMES, Activations, QuantFormat
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.table import Family
from quantplug.plugins.rules import rules_for_high_precision, with_mtp_quantized

_NO_INPUTS = {"quantizer_name": "*input_quantizer", "enable": False}

_STOCK: Mapping[QuantFormat, Mapping[str, Any]] = {
    QuantFormat.W4A16_NVFP4: mtq.W4A16_NVFP4_CFG,
    QuantFormat.NVFP4: mtq.NVFP4_DEFAULT_CFG,
    QuantFormat.FP8: mtq.FP8_DEFAULT_CFG,
    QuantFormat.W8A16_FP8: mtq.FP8_DEFAULT_CFG,
    QuantFormat.FP8_BLOCKWISE: mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
}


def quant_cfg(
    format: QuantFormat,  # noqa: A002  # as everywhere
    family: Family,
    dims: ModelDimensions,
    *,
    quantize_mtp: bool = False,
) -> dict[str, Any]:
    """The config for `mtq.quantize` of a model of these sizes: ModelOpt's own of the format, and rules of ours.

    The rules turn off what servers load in high precision, in this format or in any.

    Args:
        quantize_mtp: Whether layers of multi-token prediction are quantized too, which ModelOpt's configs keep.
    """
    scheme = SCHEMES[format]
    config = copy.deepcopy(dict(_STOCK[format]))
    if scheme.activations is Activations.PLAIN:
        config["quant_cfg"].append(_NO_INPUTS)
    if quantize_mtp:
        config["quant_cfg"] = with_mtp_quantized(config["quant_cfg"], family, dims)
    config["quant_cfg"] += rules_for_high_precision(family, dims, bits=scheme.weight_bits)
    return config
