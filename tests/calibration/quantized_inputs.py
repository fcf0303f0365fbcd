"""A server's arithmetic in transformers: weights that an export stands for, inputs quantized by the scales in it.

The decoders are those of others (`tests.servers.reference`), and so is the quantization of inputs: torchao's for NVFP4,
PyTorch's cast for FP8.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

from tests.logits import TOKENS, transformers_model
from tests.servers.reference import dequantized

Inputs = Callable[[torch.Tensor], torch.Tensor]


def logits_of_a_server(export: Path, source: Path, scratch: Path) -> torch.Tensor:
    """What a server computes of an export, in FP32 but for the quantized inputs; each expert's own input scale."""
    model = transformers_model(dequantized(export, source, scratch))
    model.set_experts_implementation("eager")
    stored: dict[str, torch.Tensor] = {}
    for file in export.glob("*.safetensors"):
        stored |= load_file(file)
    quantizes: dict[int, Inputs] = {}
    for name, weight in model.named_parameters():
        for linear, part in _linears(name, weight):
            if f"{linear}.input_scale" in stored:
                codes, scale = stored[f"{linear}.weight"], stored[f"{linear}.input_scale"]
                quantizes[part.data_ptr()] = _nvfp4(scale) if codes.dtype is torch.uint8 else _fp8(scale)
    assert quantizes
    with torch.no_grad(), _Quantizing(quantizes):
        return model(TOKENS, use_cache=False).logits


def _linears(name: str, weight: torch.nn.Parameter) -> list[tuple[str, torch.Tensor]]:
    """The names that the linears of a parameter have on disk; one for each expert."""
    if weight.dim() == 3:
        prefix, last = name.rsplit(".", 1)
        of_disk = re.sub("^gate_up_proj$", "gate_proj", last)
        return [(f"{prefix}.{expert}.{of_disk}", part) for expert, part in enumerate(weight)]
    return [(name.removesuffix(".weight"), weight)]


def _fp8(scale: torch.Tensor) -> Inputs:
    return lambda rows: (rows / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def _nvfp4(scale: torch.Tensor) -> Inputs:
    def quantized(rows: torch.Tensor) -> torch.Tensor:
        flat = rows.reshape(-1, rows.shape[-1])
        return NVFP4Tensor.to_nvfp4(flat, per_tensor_scale=scale).dequantize(torch.float32).view(rows.shape)

    return quantized


class _Quantizing(TorchFunctionMode):
    """Quantizes the input of every product with a weight that has a place in `quantizes`."""

    def __init__(self, quantizes: dict[int, Inputs]) -> None:
        super().__init__()
        self.quantizes = quantizes

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.nn.functional.linear and args[0].numel() and args[1].data_ptr() in self.quantizes:
            args = (self.quantizes[args[1].data_ptr()](args[0]), *args[1:])
        return function(*args, **(kwargs or {}))
