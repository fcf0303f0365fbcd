"""A model of two formats: NVFP4, and FP8 where attention is, as most published mixtures of experts have them."""

import copy
from collections.abc import Mapping
from typing import Any

import modelopt.torch.quantization as mtq

FP8 = {"num_bits": (4, 3), "axis": None}
KV_CACHE = {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": (4, 3), "use_constant_amax": True}}


def fp8_of(linear: str) -> list[dict[str, Any]]:
    """The rules that give a linear, by a part of its name, FP8 weights and inputs."""
    return [{"quantizer_name": f"*{linear}.{kind}_quantizer*", "cfg": dict(FP8)} for kind in ("weight", "input")]


def mixed_cfg(*more: Mapping[str, Any], base: Mapping[str, Any] = mtq.NVFP4_DEFAULT_CFG) -> dict[str, Any]:
    """NVFP4 with FP8 attention, and rules that come after these."""
    config = copy.deepcopy(dict(base))
    return {**config, "quant_cfg": [*config["quant_cfg"], *fp8_of("self_attention.linear_*"), *more]}
