"""The quantizer configs that must give every weight its amax without a forward loop."""

import copy
from typing import Any

import modelopt.torch.quantization as mtq

WEIGHT_ONLY_FP8: dict[str, Any] = {
    **copy.deepcopy(mtq.FP8_DEFAULT_CFG),
    "quant_cfg": [
        *copy.deepcopy(mtq.FP8_DEFAULT_CFG["quant_cfg"]),
        {"quantizer_name": "*input_quantizer", "enable": False},
    ],
}

PER_TENSOR: dict[str, dict[str, Any]] = {
    "w4a16_nvfp4": mtq.W4A16_NVFP4_CFG,
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "w8a16_fp8": WEIGHT_ONLY_FP8,
}

BLOCKWISE: dict[str, Any] = mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG

PER_ROW: dict[str, Any] = mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG
