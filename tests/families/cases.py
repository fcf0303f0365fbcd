"""One tiny random checkpoint of every family, built and saved by transformers itself.

Awkward on purpose: hidden 160, head size 48, expert width 96, an odd vocabulary, query groups fewer than heads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from tests.families import hybrid_cases as hybrid
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
MIXTURE: Mapping[str, Any] = {
    **DECODER,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 96,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
}
LATENT: Mapping[str, Any] = {
    **{name: value for name, value in MIXTURE.items() if name != "head_dim"},
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
}
YARN: Mapping[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
GLM: Mapping[str, Any] = {**MIXTURE, "num_experts_per_tok": 2}

# Rotary embeddings of three axes, whose sections are half of what a head turns.
SECTIONS: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 8, 8]}
VISION: Mapping[str, Any] = {
    "depth": 2,
    "hidden_size": 40,
    "num_heads": 4,
    "intermediate_size": 72,
    "out_hidden_size": DECODER["hidden_size"],
}
# Heads of values twice those of keys, and of another size; the third layer of four has attention, and the last.
DELTA: Mapping[str, Any] = {
    **{name: value for name, value in DECODER.items() if name != "num_hidden_layers"},
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
}
GATED_EXPERTS: Mapping[str, Any] = {
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 288,
    "num_experts": 6,
    "num_experts_per_tok": 3,
}

Tensors = dict[str, torch.Tensor]
F32 = ".e_score_correction_bias"


def no_tensors(model: type[PreTrainedModel], config: PreTrainedConfig) -> Tensors:
    return {}


def no_duplicates(config: PreTrainedConfig) -> Mapping[str, str]:
    return {}


def correction_biases(model: type[PreTrainedModel], config: PreTrainedConfig) -> Tensors:
    """transformers' own are 0, and not F32 once the model is rounded."""
    layers = range(config.first_k_dense_replace, config.num_hidden_layers + config.num_nextn_predict_layers)
    return {f"model.layers.{layer}.mlp.gate{F32}": torch.empty(config.n_routed_experts) for layer in layers}


def correction_biases_beside_vision(model: type[PreTrainedModel], config: PreTrainedConfig) -> Tensors:
    text = config.text_config
    layers = range(text.first_k_dense_replace, text.num_hidden_layers)
    name = "model.language_model.layers.{}.mlp.gate" + F32
    return {name.format(layer): torch.empty(text.n_routed_experts) for layer in layers}


def mtp_beside(model: type[PreTrainedModel], config: PreTrainedConfig) -> Tensors:
    """Some tensors of multi-token prediction that the config does not count: they are carried."""
    hidden = config.text_config.hidden_size
    return {"mtp.fc.weight": torch.empty(hidden, 2 * hidden), "mtp.norm.weight": torch.empty(hidden)}


def experts_together(tensors: Tensors) -> Tensors:
    """All experts of a layer in one tensor [experts, out, in], as Qwen3.5 is published; transformers saves each."""
    together = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for prefix in sorted({name.partition(".experts.")[0] for name in tensors if ".experts." in name}):
        count = len([name for name in tensors if name.startswith(f"{prefix}.experts.") and ".up_proj." in name])

        def stacked(linear: str, prefix: str = prefix, count: int = count) -> torch.Tensor:
            return torch.stack([tensors[f"{prefix}.experts.{expert}.{linear}.weight"] for expert in range(count)])

        together[f"{prefix}.experts.gate_up_proj"] = torch.cat((stacked("gate_proj"), stacked("up_proj")), dim=1)
        together[f"{prefix}.experts.down_proj"] = stacked("down_proj")
    return together


def as_saved(tensors: Tensors) -> Tensors:
    return tensors


def experts_transposed(tensors: Tensors) -> Tensors:
    """All experts of a layer in one tensor [experts, in, out], as Qwen publishes them."""
    return {
        name: tensor.mT.contiguous() if name.endswith((".experts.gate_up_proj", ".experts.down_proj")) else tensor
        for name, tensor in tensors.items()
    }


def mtp_layer(model: type[PreTrainedModel], config: PreTrainedConfig) -> Tensors:
    """What transformers does not save: the layer of multi-token prediction. And correction biases that are not 0.

    Its decoder layer is the last one of a model that is one layer deeper.
    """
    last, hidden = config.num_hidden_layers, config.hidden_size
    deeper = type(config)(**{**config.to_dict(), "num_hidden_layers": last + 1})
    with TemporaryDirectory() as directory:
        model(deeper).save_pretrained(directory)
        saved = load_file(Path(directory) / "model.safetensors")
    layer = {name: tensor for name, tensor in saved.items() if name.startswith(f"model.layers.{last}.")}
    norms = {
        f"model.layers.{last}.{norm}.weight": torch.empty(hidden) for norm in ("enorm", "hnorm", "shared_head.norm")
    }
    biases = correction_biases(model, config)
    return {**layer, **norms, **biases, f"model.layers.{last}.eh_proj.weight": torch.empty(hidden, 2 * hidden)}


def mtp_duplicates(config: PreTrainedConfig) -> dict[str, str]:
    """The embedding and the head, which checkpoints hold once more in the MTP layer."""
    layer = f"model.layers.{config.num_hidden_layers}"
    return {
        f"{layer}.embed_tokens.weight": "model.embed_tokens.weight",
        f"{layer}.shared_head.head.weight": "lm_head.weight",
    }


def own_mtp_layer(model: type[PreTrainedModel], config: PreTrainedConfig) -> Tensors:
    """The same of families whose layer of multi-token prediction has a name of its own."""
    hidden = config.hidden_size
    deeper = type(config)(
        **{
            **config.to_dict(),
            "num_hidden_layers": config.num_hidden_layers + 1,
            "layer_types": [*config.layer_types, "full_attention"],
        }
    )
    with TemporaryDirectory() as directory:
        model(deeper).save_pretrained(directory)
        saved = load_file(Path(directory) / "model.safetensors")
    last = f"model.layers.{config.num_hidden_layers}."
    layer = {f"mtp.layers.0.{name.removeprefix(last)}": saved[name] for name in saved if name.startswith(last)}
    norms = {
        f"mtp.{name}.weight": torch.empty(hidden) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    }
    return {**layer, **norms, "mtp.fc.weight": torch.empty(hidden, 2 * hidden)}


@dataclass(frozen=True)
class Case:
    """How the tiny checkpoint of a family is made.

    Attributes:
        model: transformers' class.
        config: Its config.
        beside: Tensors that checkpoints of the family hold and transformers' class does not, such as MTP layers.
        duplicates: Names of further tensors that hold the same as others, and the names of those.
        published: How its publisher holds the tensors that transformers saves.
    """

    model: type[PreTrainedModel]
    config: PreTrainedConfig
    beside: Callable[[type[PreTrainedModel], PreTrainedConfig], Tensors] = no_tensors
    duplicates: Callable[[PreTrainedConfig], Mapping[str, str]] = no_duplicates
    published: Callable[[Tensors], Tensors] = as_saved


QWEN3_VL_MOE = Qwen3VLMoeConfig(
    text_config={
        **DECODER,
        "num_hidden_layers": 3,
        "moe_intermediate_size": 96,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
        # As published, and asked for by servers; transformers computes nothing else and does not save it.
        "norm_topk_prob": True,
        "rope_parameters": dict(SECTIONS),
    },
    vision_config={**VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
)

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
    "qwen3_next": Case(
        Qwen3NextForCausalLM,
        Qwen3NextConfig(**DELTA, **GATED_EXPERTS, mlp_only_layers=[1], num_nextn_predict_layers=1),
        own_mtp_layer,
    ),
    "qwen3_5": Case(
        Qwen3_5ForCausalLM,
        Qwen3_5TextConfig(**DELTA, tie_word_embeddings=True, mtp_num_hidden_layers=1),
        own_mtp_layer,
    ),
    "qwen3_5_moe": Case(
        Qwen3_5MoeForCausalLM,
        Qwen3_5MoeTextConfig(
            **{name: value for name, value in DELTA.items() if name != "intermediate_size"},
            **GATED_EXPERTS,
            mtp_num_hidden_layers=1,
        ),
        own_mtp_layer,
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
    "deepseek_v2": Case(
        DeepseekV2ForCausalLM, DeepseekV2Config(**LATENT, q_lora_rank=96, n_shared_experts=2, num_experts_per_tok=3)
    ),
    "deepseek_v2_lite": Case(
        DeepseekV2ForCausalLM,
        DeepseekV2Config(
            **LATENT,
            q_lora_rank=None,
            n_shared_experts=2,
            num_experts_per_tok=2,
            routed_scaling_factor=16.0,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            rope_parameters={**YARN, "rope_theta": 1e4},
        ),
    ),
    "deepseek_v3": Case(
        DeepseekV3ForCausalLM,
        DeepseekV3Config(
            **LATENT,
            q_lora_rank=96,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            # transformers computes no other router and does not save them; servers ask for them, as published.
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            rope_parameters={**YARN, "rope_theta": 1e4, "mscale": 0.9, "mscale_all_dim": 0.7},
        ),
        mtp_layer,
        mtp_duplicates,
    ),
    "glm4_moe": Case(
        Glm4MoeForCausalLM,
        Glm4MoeConfig(**GLM, attention_bias=True, use_qk_norm=True, routed_scaling_factor=2.5),
        mtp_layer,
        mtp_duplicates,
    ),
    "glm4_moe_air": Case(Glm4MoeForCausalLM, Glm4MoeConfig(**GLM, num_nextn_predict_layers=0), correction_biases),
    "qwen3_vl_tied": Case(
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig(
            text_config={**DECODER, "rope_parameters": dict(SECTIONS)},
            vision_config={**VISION, "deepstack_visual_indexes": [1], "num_position_embeddings": 16},
            tie_word_embeddings=True,
        ),
    ),
    "qwen3_vl_moe": Case(Qwen3VLMoeForConditionalGeneration, QWEN3_VL_MOE, published=experts_transposed),
    "qwen3_vl_moe_resaved": Case(Qwen3VLMoeForConditionalGeneration, QWEN3_VL_MOE),
    "glm4v_moe": Case(
        Glm4vMoeForConditionalGeneration,
        Glm4vMoeConfig(
            text_config={
                **GLM,
                "routed_scaling_factor": 2.5,
                # As published, and asked for by servers; transformers has no such setting for this model.
                "use_qk_norm": False,
                "rope_parameters": {**SECTIONS, "mrope_section": [4, 4, 4], "partial_rotary_factor": 0.5},
            },
            vision_config={**VISION, "image_size": 28, "patch_size": 14},
        ),
        correction_biases_beside_vision,
    ),
}

_SAME_DECODER = {"deepseek_v2", "glm4_moe_air", "llama2", "qwen3_5", "qwen3_5_moe", "qwen3_vl_moe_resaved"}
DECODERS = [name for name in CASES if name not in _SAME_DECODER]
"""One of each that is the same in Megatron: of deepseek_v3, glm4v_moe, llama3, and with vision rather than without."""


LLAMA4: Mapping[str, Any] = {
    **DECODER,
    "intermediate_size": 96,
    "intermediate_size_mlp": 224,
    "num_hidden_layers": 4,
    "num_local_experts": 6,
}

CASES |= {
    "llama4": Case(
        Llama4ForConditionalGeneration,
        Llama4Config(
            text_config={
                **LLAMA4,
                "interleave_moe_layer_step": 2,
                "use_qk_norm": True,
                "rope_parameters": {**LLAMA3_ROPE, "factor": 16.0, "high_freq_factor": 1.0},
            },
            vision_config={
                "hidden_size": 40,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "intermediate_size": 160,
                "vision_output_dim": 40,
                "projector_input_dim": 40,
                "projector_output_dim": 40,
                "image_size": 28,
                "patch_size": 14,
            },
        ),
    ),
    "llama4_text": Case(
        Llama4ForCausalLM,
        Llama4TextConfig(**LLAMA4, interleave_moe_layer_step=1, no_rope_layers=[1, 0, 1, 1], use_qk_norm=False),
    ),
}

CASES |= {
    "nemotron_h": Case(
        NemotronHForCausalLM,
        hybrid.nemotron_h(["linear_attention", "mlp", "full_attention", "linear_attention"]),
        published=hybrid.as_published,
    ),
    "nemotron_h_moe": Case(
        NemotronHForCausalLM,
        hybrid.nemotron_h(
            ["linear_attention", "moe", "full_attention", "moe"],
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            num_nextn_predict_layers=1,
        ),
        hybrid.with_mtp,
        published=hybrid.as_published,
    ),
    "nemotron_h_latent": Case(
        NemotronHForCausalLM,
        hybrid.nemotron_h(["moe", "linear_attention"], moe_latent_size=64),
        hybrid.correction_biases,
        published=hybrid.as_published,
    ),
}


DELTA_ROPE: Mapping[str, Any] = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.25,
    "mrope_section": [2, 2, 2],
}
CASES |= {
    "qwen3_5_vl": Case(
        Qwen3_5ForConditionalGeneration,
        Qwen3_5Config(
            text_config={**DELTA, "rope_parameters": dict(DELTA_ROPE)},
            vision_config={**VISION, "num_position_embeddings": 16},
            tie_word_embeddings=True,
        ),
        mtp_beside,
    ),
    "qwen3_5_vl_moe": Case(
        Qwen3_5MoeForConditionalGeneration,
        Qwen3_5MoeConfig(
            text_config={**DELTA, **GATED_EXPERTS, "rope_parameters": dict(DELTA_ROPE)},
            vision_config={**VISION, "num_position_embeddings": 16},
        ),
        published=experts_together,
    ),
}


def make(name: str, directory: Path) -> Path:
    """Saves the checkpoint of a family."""
    return save(CASES[name], directory)


def save(case: Case, directory: Path) -> Path:
    """Saves a checkpoint: BF16, norm weights that are not 1, activations near 1."""
    torch.manual_seed(50)
    model = case.model(case.config)
    draw(dict(model.named_parameters()))
    model.to(torch.bfloat16).save_pretrained(directory)
    beside = case.beside(case.model, case.config)
    draw(beside)
    added = {name: tensor if name.endswith(F32) else tensor.bfloat16() for name, tensor in beside.items()}
    tensors = case.published(load_file(directory / "model.safetensors")) | added
    tensors |= {name: tensors[original].clone() for name, original in case.duplicates(case.config).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@torch.no_grad()
def draw(tensors: Mapping[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        if tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5)
        else:
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5)
