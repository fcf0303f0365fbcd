"""Inputs of linears quantized as a server does it, in a model of transformers: by static scales.

By formulas of the formats (docs/formats.md), and by none of quantplug's code. NVFP4: an E4M3 scale for 16 values, of
their largest magnitude over 6 and over the tensor's scale; FP8: one scale of the tensor.
"""

from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

Quantize = Callable[[torch.Tensor], torch.Tensor]
_HALFWAY = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_MAGNITUDES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


class InputFormat(StrEnum):
    """What inputs are quantized to."""

    NVFP4 = "nvfp4"
    FP8 = "fp8"

    @property
    def largest(self) -> float:
        """The value that a scale of 1 reaches."""
        return 2688.0 if self is InputFormat.NVFP4 else 448.0

    def quantizer(self, scale: float) -> Quantize:
        """What rows [n, in] stand for under a scale of the tensor."""
        return (lambda rows: nvfp4(rows, scale)) if self is InputFormat.NVFP4 else (lambda rows: fp8(rows, scale))


def fp8(rows: torch.Tensor, scale: float) -> torch.Tensor:
    """Rows rounded to E4M3 times a scale."""
    return (rows / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def nvfp4(rows: torch.Tensor, scale: float) -> torch.Tensor:
    """Rows rounded to E2M1 times E4M3 scales of 16 values times a scale."""
    blocks = rows.unflatten(-1, (-1, 16))
    largest = blocks.abs().amax(-1, keepdim=True) / 6 / scale
    steps = largest.clamp(2.0**-9, 448).to(torch.float8_e4m3fn).float() * scale
    quotients = (blocks / steps).clamp(-6, 6)
    # Half way between two magnitudes goes to the one whose last bit is 0, which every other one is.
    upper = torch.bucketize(quotients.abs(), _HALFWAY, right=True)
    lower = torch.bucketize(quotients.abs(), _HALFWAY)
    codes = torch.where(upper % 2 == 0, upper, lower)
    return (_MAGNITUDES[codes] * quotients.sign() * steps).flatten(-2)


def linears_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names of linears as checkpoints have them, and their weights; experts that lie in one tensor one by one."""
    for name, weight in model.named_parameters():
        if weight.dim() == 3:
            prefix, _, last = name.rpartition(".")
            # Gate and up are multiplied at once; an export gives both the same scale of their input.
            part = "gate_proj" if last == "gate_up_proj" else last
            yield from ((f"{prefix}.{expert}.{part}", one) for expert, one in enumerate(weight))
        else:
            yield name.removesuffix(".weight"), weight


class QuantizedInputs(TorchFunctionMode):
    """Inside of it, inputs of linears are quantized before they are multiplied.

    Args:
        model: Of transformers, its experts run one after another.
        quantizers: By the name of a linear.
    """

    def __init__(self, model: torch.nn.Module, quantizers: Mapping[str, Quantize]) -> None:
        super().__init__()
        self._of = {weight.data_ptr(): quantizers[name] for name, weight in linears_of(model) if name in quantizers}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Every product with a weight that is known."""
        if function is torch.nn.functional.linear and args[0].numel() and args[1].data_ptr() in self._of:
            args = (self._of[args[1].data_ptr()](args[0]), *args[1:])
        return function(*args, **(kwargs or {}))


class LargestInputs:
    """The largest magnitude that each linear multiplies.

    Attributes:
        found: By the name of a linear.
    """

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def watching(self, model: PreTrainedModel) -> QuantizedInputs:
        """Notes what comes by inside, and changes nothing."""
        model.set_experts_implementation("eager")
        return QuantizedInputs(model, {name: partial(self._note, name) for name, _ in linears_of(model)})

    def _note(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        self.found[name] = max(self.found.get(name, 0.0), float(rows.abs().max()))
        return rows
