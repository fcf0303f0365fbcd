"""Checkpoints as other tools write them: by compressed-tensors' own compressors, module by module."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
PLAIN = ("lm_head", "model.embed_tokens")


def scheme_of(preset: str) -> QuantizationScheme:
    """A preset of compressed-tensors, with the format that weights of it are stored in."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.format = "nvfp4-pack-quantized" if "NVFP4" in preset else "float-quantized"
    return QuantizationScheme.model_validate(scheme.model_dump())


def linears(tensors: Tensors) -> Iterator[str]:
    """Names of the modules that a quantizer would take."""
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if tensor.dim() == 2 and module not in PLAIN and not module.endswith("mlp.gate"):
            yield module


def write(directory: Path, source: Path, tensors: Tensors, quantization: dict[str, Any]) -> Path:
    directory.mkdir()
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    if (source / "generation_config.json").exists():
        shutil.copy(source / "generation_config.json", directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def group_amax(weights: Tensors, module: str) -> torch.Tensor:
    """The amax of all modules that are merged with this one."""
    parent, _, name = module.rpartition(".")
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        if name in group:
            return torch.stack([weights[f"{parent}.{member}.weight"].abs().max() for member in group]).max()
    return weights[f"{module}.weight"].abs().max()


def compress_nvfp4(weights: Tensors, module: str, scheme: QuantizationScheme) -> Tensors:
    weight = weights[f"{module}.weight"].float()
    amax = group_amax(weights, module).float().reshape(1)
    state = {"weight": weight, "weight_global_scale": generate_gparam(-amax, amax)}
    blocks = weight.view(weight.shape[0], -1, 16)
    low, high = blocks.amin(dim=-1), blocks.amax(dim=-1)
    scale, _ = calculate_qparams(low, high, scheme.weights, global_scale=state["weight_global_scale"])
    state["weight_scale"] = scale
    if scheme.input_activations is not None:
        state["input_global_scale"] = torch.tensor([25.0])
    return compress(state, scheme)


def compress_fp8(weights: Tensors, module: str, scheme: QuantizationScheme) -> Tensors:
    weight = weights[f"{module}.weight"].float()
    strategy = str(scheme.weights.strategy)
    if strategy == "channel":
        low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    elif strategy == "block":
        tiles = weight.view(weight.shape[0] // 128, 128, -1, 128)
        low, high = tiles.amin(dim=(1, 3)), tiles.amax(dim=(1, 3))
    else:
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    scale, _ = calculate_qparams(low, high, scheme.weights)
    state = {"weight": weight, "weight_scale": scale}
    if scheme.input_activations is not None and scheme.input_activations.dynamic is False:
        state["input_scale"] = torch.tensor([0.5])
    return compress(state, scheme)


def compress(state: Tensors, scheme: QuantizationScheme) -> Tensors:
    compressor = BaseCompressor.get_value_from_registry(str(scheme.format))
    return {name: tensor.contiguous() for name, tensor in compressor.compress(state, scheme).items()}


def compress_checkpoint(
    source: Path, directory: Path, preset: str, spoil: Callable[[Tensors], object], **config: Any
) -> Path:
    """A checkpoint of Qwen3-MoE in one of compressed-tensors' presets, at a directory that is not there yet."""
    scheme = scheme_of(preset)
    pack = compress_nvfp4 if "NVFP4" in preset else compress_fp8
    weights = load_file(source / "model.safetensors")
    modules = [
        name for name in linears(weights) if preset != "FP8_BLOCK" or (".k_proj" not in name and ".v_proj" not in name)
    ]
    left = [name for name in linears(weights) if name not in modules]
    tensors = {name: tensor for name, tensor in weights.items() if name.removesuffix(".weight") not in modules}
    for module in modules:
        packed = pack(weights, module, scheme)
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in packed.items()}
    spoil(tensors)
    quantization = {
        "quant_method": "compressed-tensors", "format": str(scheme.format),
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme.model_dump(mode="json")}, "ignore": ["lm_head", "re:.*mlp.gate$", *left],
    } | config  # fmt: skip
    return write(directory, source, tensors, quantization)
