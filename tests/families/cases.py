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
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
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

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
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
    "qwen2": Case(Qwen2ForCausalLM, Qwen2Config(**DECODER)),
    "qwen2_tied": Case(Qwen2ForCausalLM, Qwen2Config(**DECODER, tie_word_embeddings=True)),
    "qwen2_moe": Case(
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(
            **{**DECODER, "num_hidden_layers": 3},
            moe_intermediate_size=96,
            shared_expert_intermediate_size=288,
            num_experts=6,
            num_experts_per_tok=3,
            norm_topk_prob=False,
            mlp_only_layers=[1],
        ),
    ),
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
    "llama2": Case(LlamaForCausalLM, LlamaConfig(**{**DECODER, "num_key_value_heads": 4, "head_dim": 40})),
    "llama3": Case(
        LlamaForCausalLM, LlamaConfig(**{**DECODER, "max_position_embeddings": 16384}, rope_parameters=LLAMA3_ROPE)
    ),
    "mixtral": Case(
        MixtralForCausalLM,
        MixtralConfig(
            **{**DECODER, "intermediate_size": 96},
            num_local_experts=6,
            num_experts_per_tok=2,
            sliding_window=None,
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
