"""Inputs that a model's linears are given by hand, the same at every layout and in grouped and single experts."""

from typing import Any
from zlib import crc32

import torch
from torch import nn
from transformer_engine.pytorch import GroupedLinear

from quantplug.calibration.inputs.linears import Linear, LinearWeight, linears_of
from quantplug.calibration.shared_amax import Axis
from quantplug.mappings.keys import ParamKey

TOKENS = (300, 0, 3, 120)
"""How many rows an expert gets, by its number modulo four; every other linear gets the first."""


def identity(key: ParamKey) -> str:
    """A weight's name, however its experts are held."""
    if key.expert is None:
        return key.name
    linear = next(part for part in key.module.split(".") if part.startswith("linear_fc"))
    return f"layer {key.layer} expert {key.expert} {linear}"


def feed(model: nn.Module) -> None:
    """Hands every linear its rows, as far as this rank sees them and has their channels; multiplies nothing."""
    for linear in linears_of(model):
        parts = [_seen_here(linear, _rows(weight, _columns(linear))) for weight in linear.weights]
        if isinstance(linear.modules[0], GroupedLinear):
            linear.modules[0](torch.cat(parts), [len(part) for part in parts])
        else:
            for module, part in zip(linear.modules, parts, strict=True):
                module.input_quantizer(part)


def multiply_in_torch(self: GroupedLinear, inp: torch.Tensor, m_splits: list[int], *_: Any, **__: Any) -> torch.Tensor:
    """TE's grouped forward on a CPU: its weights are asked for and multiplied, as its own does on a GPU."""
    weights = self._get_weight_tensors()
    return torch.cat([rows @ weight.T for rows, weight in zip(inp.split(m_splits), weights, strict=True)])


def _rows(weight: LinearWeight, columns: int) -> torch.Tensor:
    """FP32 [n, columns], of channels that are correlated and of unequal size."""
    count = TOKENS[0] if weight.key.expert is None else TOKENS[weight.key.expert % len(TOKENS)]
    generator = torch.Generator().manual_seed(crc32(identity(weight.key).encode()))
    mixed = torch.randn(count, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return mixed * torch.linspace(0.1, 3, columns)[torch.randperm(columns, generator=generator)]


def _columns(linear: Linear) -> int:
    """Of all ranks."""
    group = linear.tensor_group if linear.is_row_parallel else None
    return linear.columns * (1 if group is None else group.world_size())


def _seen_here(linear: Linear, rows: torch.Tensor) -> torch.Tensor:
    """Every row once from each rank that sends it, shared out over the ranks that hold the same weights."""
    over_data = linear.axes.get(Axis.DATA) or linear.axes[Axis.EXPERT_DATA]
    seen = rows.repeat(linear.repeats, 1)[over_data.rank() :: over_data.world_size()]
    group = linear.tensor_group if linear.is_row_parallel else None
    first = 0 if group is None else group.rank() * linear.columns
    return seen[:, first : first + linear.columns]
