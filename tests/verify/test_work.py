"""Work grows with the number of modules, not with its square: lines that run are counted, at two sizes."""

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import quantplug.verify
from quantplug.verify import verify_checkpoint

PACKAGE = str(Path(quantplug.verify.__file__).parent)
WIDTH = 16


def lines_run(work: Callable[[], object]) -> int:
    """How many lines of the package run, and how often a function or a generator's next turn is entered."""
    lines = 0

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        lines += event in ("line", "call")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


def mixture(layers: int, experts: int) -> dict[str, torch.Tensor]:
    """W4A16_NVFP4, the router and the norms plain."""
    plain = torch.ones(WIDTH, WIDTH, dtype=torch.bfloat16)
    tensors = {
        "model.embed_tokens.weight": plain,
        "lm_head.weight": plain.clone(),
        "model.norm.weight": plain[0].clone(),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.{name}.weight": plain[0].clone() for name in ("input_layernorm", "self_attn.q_norm")}
        tensors[f"{prefix}.mlp.gate.weight"] = torch.ones(experts, WIDTH, dtype=torch.bfloat16)
        linears = [f"self_attn.{name}_proj" for name in "qkvo"]
        linears += [f"mlp.experts.{index}.{name}_proj" for index in range(experts) for name in ("gate", "up", "down")]
        for linear in linears:
            tensors[f"{prefix}.{linear}.weight"] = torch.zeros(WIDTH, WIDTH // 2, dtype=torch.uint8)
            tensors[f"{prefix}.{linear}.weight_scale"] = torch.ones(WIDTH, 1).to(torch.float8_e4m3fn)
            tensors[f"{prefix}.{linear}.weight_scale_2"] = torch.tensor(1.0)
    return tensors


def modelopt(patterns: list[str]) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "ignore": patterns}


def no_list(layers: int, experts: int) -> dict[str, Any]:
    return modelopt(["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(layers))])


def a_name_for_each(layers: int, experts: int) -> dict[str, Any]:
    names = [f"model.layers.{layer}.mlp.experts.{index}.up_proj" for layer in range(layers) for index in range(experts)]
    return modelopt(names)


def a_wildcard_for_each(layers: int, experts: int) -> dict[str, Any]:
    return modelopt([
        f"model.layers.{layer}.mlp.experts.{index}.*" for layer in range(layers) for index in range(experts)
    ])  # fmt: skip


def a_part_for_each(layers: int, experts: int) -> dict[str, Any]:
    parts = [f"layers.{layer}.mlp.experts.{index}" for layer in range(layers) for index in range(experts)]
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": parts}


def a_target_for_each(layers: int, experts: int) -> dict[str, Any]:
    targets = [f"model.layers.{layer}.mlp.experts.{index}" for layer in range(layers) for index in range(experts)]
    weights = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}
    group = {"targets": targets, "weights": weights, "format": "nvfp4-pack-quantized"}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": targets}


@pytest.mark.parametrize(
    "quantization", [no_list, a_name_for_each, a_wildcard_for_each, a_part_for_each, a_target_for_each]
)
@pytest.mark.parametrize("lost", [False, True])
def test_four_times_the_modules_are_four_times_the_work(
    tmp_path: Path, quantization: Callable[[int, int], dict[str, Any]], lost: bool
) -> None:
    """Twice the layers of twice the experts; also where every other layer has a router and no expert."""
    small, large = (
        lines_run(partial(verify_checkpoint, write(tmp_path, quantization, lost, layers, experts)))
        for layers, experts in ((2, 8), (4, 16))
    )
    assert large < 4.2 * small


def write(
    root: Path, quantization: Callable[[int, int], dict[str, Any]], lost: bool, layers: int, experts: int
) -> Path:
    directory = root / f"{layers}-{experts}"
    directory.mkdir()
    tensors = mixture(layers, experts)
    if lost:
        tensors = {name: tensor for name, tensor in tensors.items() if not re.search(r"[02468].mlp.experts", name)}
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": layers, "num_experts": experts,
        "hidden_size": WIDTH, "intermediate_size": WIDTH, "moe_intermediate_size": WIDTH, "vocab_size": WIDTH,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": WIDTH, "tie_word_embeddings": False,
        "quantization_config": quantization(layers, experts),
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory
