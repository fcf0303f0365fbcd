"""The trained model of tests/data with four large channels behind each norm: the same function, harder to quantize."""

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MODEL = Path(__file__).parents[1] / "data" / "kjv_moe"
_NORMS = {"input_layernorm": "self_attn", "post_attention_layernorm": "mlp"}
_READS_A_NORM = re.compile(r"(self_attn\.[qkv]_proj|mlp\.gate|mlp\.experts\.\d+\.(gate|up)_proj)\.weight$")


def with_outliers(directory: Path, factor: float) -> Path:
    """Four of the 128 channels of each norm times a power of two, and the columns that they meet divided by it.

    Args:
        directory: Where it is written.
        factor: Above 1 for outliers among activations, below 1 among weights.
    """
    shutil.copytree(MODEL, directory)
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for layer in range(4):
        for norm, part in _NORMS.items():
            channels = torch.randperm(128, generator=generator)[:4]
            tensors[f"model.layers.{layer}.{norm}.weight"][channels] *= factor
            for name, tensor in tensors.items():
                if f"layers.{layer}.{part}." in name and _READS_A_NORM.search(name):
                    tensor[:, channels] /= factor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
