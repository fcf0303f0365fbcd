"""Tiny checkpoints in sizes that servers take: heads of 64, and widths that whole blocks of 128 divide."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedConfig

from tests.families.cases import CASES, save
from tests.families.hybrid_cases import as_published

Sizes = Mapping[str, Any]

SIZES: Sizes = {
    "vocab_size": 512,
    "hidden_size": 384,
    "head_dim": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "intermediate_size_mlp": 512,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 256,
}
# Latents and heads of the published models, for which vLLM's attention on CPUs is made.
LATENT: Sizes = {
    "num_key_value_heads": 6,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "qk_head_dim": 192,
    "v_head_dim": 128,
}
# As in published configs of DeepSeek-V2. Where ours has null vLLM's router for CPUs stops, and without scaling its
# rotary embedding there is another.
AS_V2: Sizes = {
    "n_group": 1,
    "topk_group": 1,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
DELTA: Sizes = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
# Of Mamba's one projection every part but the last ends on a block.
MAMBA: Sizes = {"mamba_num_heads": 4, "mamba_head_dim": 64, "n_groups": 2, "ssm_state_size": 64}
# Halves of what a head turns, by axes.
AXES: Mapping[str, list[int]] = {
    "qwen3_vl_tied": [12, 10, 10],
    "qwen3_vl_moe": [12, 10, 10],
    "glm4v_moe": [6, 5, 5],
    "qwen3_5_vl": [4, 2, 2],
    "qwen3_5_vl_moe": [4, 2, 2],
}
# Not every family has all of these, and to some a size means something else.
OWN_SIZES: Mapping[str, Sizes] = {
    "mixtral": {"intermediate_size": 128},
    "llama4": {"intermediate_size": 128},
    "llama4_text": {"intermediate_size": 128},
    "gpt_oss": {"intermediate_size": 128},
    "deepseek_v2": {**LATENT, **AS_V2},
    "deepseek_v2_lite": {**LATENT, "q_lora_rank": None},
    "deepseek_v3": LATENT,
    "qwen3_next": DELTA,
    "qwen3_5": DELTA,
    "qwen3_5_moe": DELTA,
    "qwen3_5_vl": DELTA,
    "qwen3_5_vl_moe": DELTA,
    "nemotron_h": MAMBA,
    "nemotron_h_moe": MAMBA,
    "nemotron_h_latent": MAMBA,
}


# Every second layer has full attention, as a published config says by one number; and every layer has experts, as
# in all published ones: SGLang does not look at `mlp_only_layers`.
_EVERY_SECOND: Sizes = {"layer_types": ["linear_attention", "full_attention"] * 2, "mlp_only_layers": []}
_REGULAR: Mapping[str, Sizes] = {
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {"mlp_only_layers": []},
    "qwen3_next": _EVERY_SECOND,
    "qwen3_5": _EVERY_SECOND,
    "qwen3_5_moe": _EVERY_SECOND,
    "qwen3_5_vl": _EVERY_SECOND,
    "qwen3_5_vl_moe": _EVERY_SECOND,
    "qwen3_vl_moe": {"mlp_only_layers": []},
}
_LETTERS = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}


def make_served(name: str, directory: Path, more: Sizes = MappingProxyType({})) -> Path:
    """Saves the checkpoint of a family, in sizes that servers take."""
    case = CASES[name]
    config = _resized(case.config, {**SIZES, **OWN_SIZES.get(name, {}), **more})
    if name in AXES:
        config.text_config.rope_parameters["mrope_section"] = AXES[name]
    published = as_published if name.startswith("nemotron_h") else case.published
    return save(replace(case, config=config, published=published), directory)


def make_published(name: str, directory: Path) -> Path:
    """The same with a config as publishers write it, which is what SGLang's own classes of configs read.

    transformers 5 leaves out `full_attention_interval` and `moe_layer_freq`, and names Nemotron-H's layers anew.
    """
    make_served(name, directory, _REGULAR.get(name, {}))
    file = directory / "config.json"
    config = json.loads(file.read_text())
    text = config.get("text_config", config)
    if "layers_block_type" in text:
        text["hybrid_override_pattern"] = "".join(_LETTERS[kind] for kind in text.pop("layers_block_type"))
        text.pop("mtp_layers_block_type", None)
        text["num_hidden_layers"] = len(text["hybrid_override_pattern"])
    elif "linear_num_key_heads" in text:
        text["full_attention_interval"] = 2
    elif "kv_lora_rank" in text:
        text |= {"moe_layer_freq": 1, "scoring_func": text.get("scoring_func") or "softmax"}
    file.write_text(json.dumps(config))
    return directory


def _resized(config: PreTrainedConfig, sizes: Sizes) -> PreTrainedConfig:
    values = config.to_dict()
    if "text_config" in values:
        text = values["text_config"]
        vision = values["vision_config"]
        out = {"out_hidden_size": sizes["hidden_size"]} if "out_hidden_size" in vision else {}
        return type(config)(**values | {"text_config": _sized(text, sizes), "vision_config": vision | out})
    return type(config)(**_sized(values, sizes))


def _sized(values: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    return values | {key: size for key, size in sizes.items() if key in values}
