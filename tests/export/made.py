"""How the sources and exports are made that the fixtures of tests/conftest.py give."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from examples.make_tiny_model import Architecture, Dtype, make_tiny_model
from quantplug import export_mcore_gpt_to_hf
from quantplug.megatron.models.build import LayerSpec
from tests.export.checkpoints import load, one_rank, quantize

# Every linear divides into 128x128 blocks.
BLOCK_SIZES = {
    "vocab_size": 523,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}

# Latent attention as DeepSeek-V3's, whose 576 rows of `kv_a_proj_with_mqa` end in half a block: here it has 192. With a
# hidden size of 320, the last blocks of most linears are partial along one axis.
LATENT_BLOCKS = {
    **BLOCK_SIZES,
    "hidden_size": 320,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 48,
    "num_nextn_predict_layers": 0,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}


def _random(model: PreTrainedModel, directory: Path) -> Path:
    """Weights that grow along both axes, by different factors: every 128x128 block has an amax of its own."""
    torch.manual_seed(30)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                rows, columns = (1.4 ** (torch.arange(size) / 128) for size in parameter.shape[-2:])
                parameter.copy_(0.03 * torch.randn(parameter.shape) * rows[:, None] * columns**0.3)
    model.to(torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # FP32 in published checkpoints.
            buffer.data = torch.rand(buffer.shape)
    model.save_pretrained(directory)
    return directory


def _tiny(directory: Path, architecture: Architecture, tied: bool, dtype: Dtype) -> Path:
    make_tiny_model(directory, architecture, tied, seed=3, layers=2, experts=4, dtype=dtype)
    return directory


MAKERS: dict[str, Callable[[Path], Path]] = {
    "moe": lambda path: _tiny(path, Architecture.QWEN3_MOE, False, Dtype.BFLOAT16),
    "moe_fp32": lambda path: _tiny(path, Architecture.QWEN3_MOE, False, Dtype.FLOAT32),
    "dense": lambda path: _tiny(path, Architecture.QWEN3, False, Dtype.BFLOAT16),
    "tied": lambda path: _tiny(path, Architecture.QWEN3, True, Dtype.BFLOAT16),
    "moe_blocks": lambda path: _random(
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**BLOCK_SIZES, **MOE, head_dim=64, moe_intermediate_size=128)), path
    ),
    "wide_moe_blocks": lambda path: _random(
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**BLOCK_SIZES, **MOE, head_dim=128, moe_intermediate_size=256)), path
    ),
    "latent_blocks": lambda path: _random(DeepseekV3ForCausalLM(DeepseekV3Config(**LATENT_BLOCKS)), path),
    "dense_blocks": lambda path: _random(Qwen3ForCausalLM(Qwen3Config(**BLOCK_SIZES, head_dim=128)), path),
}


def make_source(name: str, directory: Path) -> Path:
    """A Hugging Face checkpoint by name."""
    return MAKERS[name](directory)


def make_export(source: Path, scheme: str, layer_spec: LayerSpec, directory: Path) -> Path:
    """A quantized export of a checkpoint, by way of Megatron-Core on one rank."""
    with one_rank():
        export_mcore_gpt_to_hf(quantize(load(source, layer_spec), scheme), source, export_dir=directory)
    return directory
