"""Tiny checkpoints in sizes that servers take: heads of 64, and widths that whole blocks of 128 divide."""

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
}
# Not every family has all of these, and to some a size means something else.
OWN_SIZES: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"intermediate_size": 128},
    "llama4_text": {"intermediate_size": 128},
    "gpt_oss": {"intermediate_size": 128},
}


def make_served(name: str, directory: Path) -> Path:
    """Saves the checkpoint of a family, in sizes that servers take."""
    case = CASES[name]
    return save(replace(case, config=_resized(case.config, {**SIZES, **OWN_SIZES.get(name, {})})), directory)


def _resized(config: PreTrainedConfig, sizes: Mapping[str, Any]) -> PreTrainedConfig:
    values = config.to_dict()
    return type(config)(**values | {key: size for key, size in sizes.items() if key in values})
