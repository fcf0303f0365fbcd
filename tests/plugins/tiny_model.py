"""A small mixture-of-experts GPTModel of real Transformer Engine modules, built without a GPU."""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from quantplug.megatron import cpu
from quantplug.megatron.parallel import current_topology

EXPERTS = 8
HIDDEN = 160
EXPERT_WIDTH = 96
DENSE: dict[str, Any] = {"num_moe_experts": None, "moe_ffn_hidden_size": None, "moe_grouped_gemm": False}


def tiny_config(**overrides: Any) -> TransformerConfig:
    topology = current_topology()
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 48,
        "ffn_hidden_size": 2 * EXPERT_WIDTH,
        "moe_ffn_hidden_size": EXPERT_WIDTH,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 2,
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "allgather",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": topology.tp,
        "expert_model_parallel_size": topology.ep,
        "expert_tensor_parallel_size": topology.etp,
        "pipeline_model_parallel_size": topology.pp,
        "sequence_parallel": topology.tp > 1,
    }
    return TransformerConfig(**(settings | overrides))


def tiny_model(vp_stage: int | None = None, **overrides: Any) -> GPTModel:
    """A model on this rank's shard of the parallel layout that is set up, or one virtual pipeline stage of it."""
    topology = current_topology()
    config = tiny_config(**overrides)
    stages = config.virtual_pipeline_model_parallel_size or 1
    first, last = vp_stage in (None, 0), vp_stage in (None, stages - 1)
    with cpu.construction():
        return GPTModel(
            config,
            get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage),
            vocab_size=384,
            max_sequence_length=64,
            pre_process=first and topology.pp_rank == 0,
            post_process=last and topology.pp_rank == topology.pp - 1,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        ).to(torch.bfloat16)


def grouped_linears(model: GPTModel) -> dict[str, torch.nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if name.endswith(("experts.linear_fc1", "experts.linear_fc2"))
    }
