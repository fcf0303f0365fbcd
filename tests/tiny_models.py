"""The checkpoints that most tests begin with, written by transformers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.families.cases import DECODER, make

MOE_SIZES = {
    **DECODER,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
}


def _fill(model: PreTrainedModel, seed: int) -> None:
    """Random weights that keep activations near 1, and norm weights that are not 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)


def _save(
    directory: Path,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    seed: int = 20,
    **how: object,
) -> None:
    model = model_class(config)
    _fill(model, seed)
    model.to(torch.bfloat16).save_pretrained(directory, **how)


def _moe(directory: Path, layers: int = 2, seed: int = 20, max_shard_size: str = "50GB", **sizes: object) -> None:
    config = Qwen3MoeConfig(**{**MOE_SIZES, "num_hidden_layers": layers, **sizes})
    _save(directory, Qwen3MoeForCausalLM, config, seed, max_shard_size=max_shard_size)


def _dense(directory: Path, *, tied: bool) -> None:
    _save(directory, Qwen3ForCausalLM, Qwen3Config(**DECODER, tie_word_embeddings=tied))


_DIVISIBLE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "head_dim": 64,
    "num_experts": 4,
}
_MADE: dict[str, Callable[[Path], None]] = {
    # Qwen3-MoE in bf16: 2 layers, 8 experts, 2 of them for a token.
    "qwen3_moe": _moe,
    # Of one layer and 4 experts, for models that are built again and again.
    "one_layer": partial(_moe, layers=1, num_experts=4),
    # With 4 layers, the second of them dense, in shards of at most 400 kB.
    "qwen3_mixed": partial(_moe, layers=4, seed=21, max_shard_size="400KB", mlp_only_layers=[1]),
    # Every weight of it, but not every half of one, divides by 128.
    "divisible": partial(_moe, **_DIVISIBLE),
    # Dense Qwen3 in bf16 with an output layer of its own.
    "qwen3": partial(_dense, tied=False),
    # Dense Qwen3 in bf16 whose output layer is its embedding.
    "qwen3_tied": partial(_dense, tied=True),
}


def make_tiny(name: str, directory: Path) -> None:
    """Writes the checkpoint of a name: one of these, or `family_` and a family's."""
    if name in _MADE:
        _MADE[name](directory)
    else:
        make(name.removeprefix("family_"), directory)
