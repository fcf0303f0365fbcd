"""The trained model of tests/data with few channels far larger than others: the same function, harder to quantize."""

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


def with_outliers_in_values(directory: Path, factor: float) -> Path:
    """A channel of each head of values times a power of two, and the columns that read it divided by it.

    Args:
        directory: Where it is written.
        factor: Above 1.
    """
    shutil.copytree(MODEL, directory)
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for layer in range(4):
        values, output = (tensors[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "vo")
        # Four heads of values of 32 entries, each read by two heads of queries.
        for head, channel in enumerate(torch.randint(32, (4,), generator=generator).tolist()):
            values.view(4, 32, -1)[head, channel] *= factor
            output.view(-1, 4, 2, 32)[:, head, :, channel] /= factor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
