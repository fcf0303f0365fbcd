"""A mixture of experts of Megatron's local modules: its forward runs on CPU, with the experts one after another."""

import json
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from torch import nn

from quantplug.calibration.tokens import expert_layers
from quantplug.mappings.families import find_family
from quantplug.megatron import cpu
from quantplug.megatron.models.build import LayerSpec, build_model


def build(checkpoint: Path, layer_spec: LayerSpec = LayerSpec.LOCAL) -> GPTModel:
    """Weights that are the same in every run on one rank."""
    config = json.loads((checkpoint / "config.json").read_text())
    family = find_family(config["architectures"][0])
    model = build_model(family.megatron_config(config), layer_spec=layer_spec, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    return model.eval()


def run(model: nn.Module, length: int = 24) -> None:
    """One forward over two sequences that are the same everywhere."""
    tokens = torch.arange(2 * length).view(2, length) * 7 % 500
    hidden_from_later = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), diagonal=1)
    with torch.no_grad(), cpu.local_forward():
        model(tokens, torch.arange(length).expand(2, -1), hidden_from_later)


def send_everything_to(expert: int, model: nn.Module) -> None:
    """Makes the router of every layer choose `expert` and the one after it for every token."""

    def choose(
        _: nn.Module, __: object, output: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        probs, routing_map = (torch.zeros_like(part) for part in output)
        probs[:, expert : expert + 2] = 0.5
        routing_map[:, expert : expert + 2] = True
        return probs, routing_map

    for layer in expert_layers([model]):
        layer.module.router.register_forward_hook(choose)
