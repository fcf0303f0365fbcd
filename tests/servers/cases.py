"""Tiny checkpoints in sizes that servers take: heads of 64, and widths that whole blocks of 128 divide."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from tests.families.cases import CASES, save

SIZES: Mapping[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 384,
    "head_dim": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "intermediate_size_mlp": 512,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 256,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
# Not every family has all of these, and to some a size means something else.
OWN_SIZES: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"intermediate_size": 128},
    "llama4": {"intermediate_size": 128},
    "llama4_text": {"intermediate_size": 128},
    "gpt_oss": {"intermediate_size": 128},
    # The one head size of latent attention that vLLM's CPU build computes.
    "deepseek_v3": {
        "num_key_value_heads": 6,
        "head_dim": 64,
        "q_lora_rank": 128,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "qk_head_dim": 192,
        "v_head_dim": 128,
        # The case's YaRN is of a shorter model than it says, which transformers and vLLM take otherwise.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}


# Settings that published configs have, transformers' do not, and vLLM asks for.
PUBLISHED: Mapping[str, Mapping[str, Any]] = {"deepseek_v3": {"topk_method": "noaux_tc"}}


def make_served(name: str, directory: Path) -> Path:
    """Saves the checkpoint of a family, in sizes that servers take."""
    case = CASES[name]
    save(replace(case, config=_resized(case.config, {**SIZES, **OWN_SIZES.get(name, {})})), directory)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | PUBLISHED.get(name, {})))
    return directory


def _resized(config: PreTrainedConfig, sizes: Mapping[str, Any]) -> PreTrainedConfig:
    values = config.to_dict()
    nested = "text_config" in values
    text = values["text_config"] if nested else values
    text |= {key: size for key, size in sizes.items() if key in text}
    if nested:
        values["vision_config"] |= {"out_hidden_size": sizes["hidden_size"]}
    return type(config)(**values)
