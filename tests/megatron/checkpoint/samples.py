"""Tiny checkpoints of each Megatron-Core that we know ends of, kept beside the tests: others must read them.

    python -m tests.megatron.checkpoint.samples

writes those of the installed release: `samples/megatron_core-0.16.1.tar.xz` has a folder for every name of `SAMPLES`.
Values are made of names, so that a test knows what must be there.
"""

import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import modelopt.torch.quantization as mtq
import torch
from torch import nn
from transformers import NemotronHConfig

import quantplug.plugins  # noqa: F401
from quantplug.mappings.families import find_family
from quantplug.megatron.checkpoint.save_load import save_checkpoint
from quantplug.megatron.models.build import build_model
from quantplug.megatron.parameters import LanguageModel
from quantplug.megatron.releases.installed import VERSION
from tests.export.checkpoints import one_rank
from tests.families.hybrid_cases import NEMOTRON_H
from tests.megatron.checkpoint.trained import save_trained
from tests.plugins.configs import WEIGHT_ONLY_FP8
from tests.plugins.tiny_model import tiny_model

FOLDER = Path(__file__).parent / "samples"

DECODER: Mapping[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
# Latent attention, a layer of multi-token prediction, and a bias of the router.
LATENT: Mapping[str, Any] = {
    **DECODER,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_nextn_predict_layers": 1,
    "rope_theta": 10000.0,
}


def mixture() -> LanguageModel:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "kv_channels": 16, "num_moe_experts": 3}
    return tiny_model(**sizes, ffn_hidden_size=32, moe_ffn_hidden_size=32)


def latent() -> LanguageModel:
    return build_model(find_family("DeepseekV3ForCausalLM").megatron_config(LATENT))


def hybrid() -> LanguageModel:
    sizes = {"hidden_size": 32, "head_dim": 16, "num_attention_heads": 2, "mamba_head_dim": 16, "mamba_num_heads": 2}
    experts = {"n_routed_experts": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32}
    settings = {**NEMOTRON_H, "vocab_size": 100, "ssm_state_size": 16, **sizes, **experts, "num_experts_per_tok": 2}
    config = NemotronHConfig(**settings, layers_block_type=["mamba", "attention", "moe"])
    return build_model(find_family("NemotronHForCausalLM").megatron_config(config.to_dict()))


Make = Callable[[], LanguageModel]
SAMPLES: Mapping[str, tuple[Make, dict[str, Any] | None]] = {
    "nvfp4": (mixture, mtq.W4A16_NVFP4_CFG),
    "latent": (latent, WEIGHT_ONLY_FP8),
    "hybrid": (hybrid, mtq.W4A16_NVFP4_CFG),
    "trained": (mixture, None),
}
"""Name to the model, and the config that it is quantized with; what is not is as trainers save it."""


def expected(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The values of a parameter or amax by its name in a model; exact in every type."""
    # Later releases have other names for what their checkpoints call as before.
    stable = name.replace("mtp_model_layer", "transformer_layer").replace("conv1d_", "conv1d.")
    start = crc32(stable.encode()) % 97
    values = (torch.arange(tensor.numel()) + start) % 15 + 1
    return (values / 8).to(tensor.dtype).view_as(tensor)


def held(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint must give back: every parameter, amax and bias of a router."""
    yield from model.named_parameters()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(("._amax", "expert_bias")))
    yield from buffers


def fill(model: nn.Module) -> None:
    with torch.no_grad():
        for name, tensor in held(model):
            tensor.copy_(expected(name, tensor))


def write_samples(folder: Path) -> None:
    for name, (make, config) in SAMPLES.items():
        model = make()
        fill(model)
        if config is None:
            save_trained([model], folder / name)
            continue
        mtq.quantize(model, config)
        fill(model)
        save_checkpoint(model, folder / name, extra={"sample": name})


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with TemporaryDirectory() as made, one_rank():
        write_samples(Path(made))
        with tarfile.open(FOLDER / f"megatron_core-{VERSION}.tar.xz", "w:xz", preset=9) as archive:
            archive.add(made, ".")


if __name__ == "__main__":
    main()
