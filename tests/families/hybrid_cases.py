"""Configs of hybrid decoders, and what their published checkpoints hold beside what transformers saves."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import NemotronHConfig, PreTrainedConfig, PreTrainedModel

from tests.logits import VOCABULARY

NEMOTRON_H: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 160,
    "intermediate_size": 224,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "max_position_embeddings": 128,
    "mamba_num_heads": 6,
    "mamba_head_dim": 40,
    "n_groups": 2,
    "ssm_state_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 288,
    "use_mamba_kernels": False,
    # transformers' own path cuts time steps off below it; Megatron and the kernels of both do not.
    "time_step_min": 1e-20,
}
_EXPERT_BIAS = "mixer.gate.e_score_correction_bias"


def nemotron_h(layers: list[str], **settings: Any) -> NemotronHConfig:
    return NemotronHConfig(**NEMOTRON_H, layers_block_type=layers, **settings)


def as_published(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The embedding under the name that all published checkpoints have, as transformers 5.24 saves it, but not 5.14."""
    saved = tensors.pop("backbone.embedding.weight", None)
    return tensors if saved is None else {**tensors, "backbone.embeddings.weight": saved}


def correction_biases(model: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """transformers' own are 0, and not F32 once the model is rounded."""
    layers = [i for i, kind in enumerate(config.layers_block_type) if kind == "moe"]
    return {f"backbone.layers.{layer}.{_EXPERT_BIAS}": torch.empty(config.n_routed_experts) for layer in layers}


def with_mtp(model: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """A step of multi-token prediction of two layers, attention and experts, under its published names."""
    hidden, head = config.hidden_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width, shared = config.moe_intermediate_size, config.moe_shared_expert_intermediate_size
    attention, experts = "mtp.layers.0", "mtp.layers.1"
    shapes: dict[str, tuple[int, ...]] = {
        f"{attention}.eh_proj.weight": (hidden, 2 * hidden),
        **{f"{attention}.{norm}.weight": (hidden,) for norm in ("enorm", "hnorm", "norm")},
        f"{attention}.mixer.q_proj.weight": (heads * head, hidden),
        **{f"{attention}.mixer.{name}_proj.weight": (groups * head, hidden) for name in "kv"},
        f"{attention}.mixer.o_proj.weight": (hidden, heads * head),
        **{f"{experts}.{norm}.weight": (hidden,) for norm in ("norm", "final_layernorm")},
        f"{experts}.mixer.gate.weight": (config.n_routed_experts, hidden),
        f"{experts}.{_EXPERT_BIAS}": (config.n_routed_experts,),
        f"{experts}.mixer.shared_experts.up_proj.weight": (shared, hidden),
        f"{experts}.mixer.shared_experts.down_proj.weight": (hidden, shared),
    }
    for expert in range(config.n_routed_experts):
        shapes[f"{experts}.mixer.experts.{expert}.up_proj.weight"] = (width, hidden)
        shapes[f"{experts}.mixer.experts.{expert}.down_proj.weight"] = (hidden, width)
    return {**correction_biases(model, config), **{name: torch.empty(shape) for name, shape in shapes.items()}}
