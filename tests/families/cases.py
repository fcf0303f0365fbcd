"""One tiny random checkpoint of every family, built and saved by transformers itself.

Awkward on purpose: hidden 160, head size 48, expert width 96, an odd vocabulary, query groups fewer than heads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.logits import VOCABULARY

DECODER: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 160,
    "intermediate_size": 224,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "max_position_embeddings": 128,
}

Tensors = dict[str, torch.Tensor]


def no_tensors(config: PreTrainedConfig) -> Tensors:
    return {}


@dataclass(frozen=True)
class Case:
    """How the tiny checkpoint of a family is made.

    Attributes:
        model: transformers' class.
        config: Its config.
        beside: Tensors that checkpoints of the family hold and transformers' class does not, such as MTP layers.
    """

    model: type[PreTrainedModel]
    config: PreTrainedConfig
    beside: Callable[[PreTrainedConfig], Tensors] = no_tensors


CASES: dict[str, Case] = {
    "qwen3": Case(Qwen3ForCausalLM, Qwen3Config(**DECODER)),
    "qwen3_moe": Case(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **{**DECODER, "num_hidden_layers": 3},
            moe_intermediate_size=96,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            mlp_only_layers=[1],
        ),
    ),
    # The first and third layer see 3 tokens, fewer than the tests' sequences have.
    "gpt_oss": Case(
        GptOssForCausalLM,
        GptOssConfig(
            **{**DECODER, "num_hidden_layers": 3, "intermediate_size": 96},
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=3,
        ),
    ),
}


def make(name: str, directory: Path) -> Path:
    """Saves the checkpoint of a family: BF16, norm weights that are not 1, activations near 1."""
    case = CASES[name]
    torch.manual_seed(50)
    model = case.model(case.config)
    draw(dict(model.named_parameters()))
    model.to(torch.bfloat16).save_pretrained(directory)
    beside = case.beside(case.config)
    if beside:
        draw(beside)
        saved = load_file(directory / "model.safetensors")
        added = {key: tensor if tensor.dtype == torch.float32 else tensor.bfloat16() for key, tensor in beside.items()}
        save_file(saved | added, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@torch.no_grad()
def draw(tensors: Mapping[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        if tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5)
        else:
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5)
