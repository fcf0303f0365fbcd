"""The calibration tokens that every routed expert saw.

Megatron hands a layer's experts `tokens_per_expert`, the rows that each local one gets, whatever module they are
(TEGroupedMLP, SequentialMLP). Which ranks saw the *same* rows is a matter of the layout:

- Expert data parallel ranks hold the same experts and see other tokens: their counts are summed.
- Expert tensor parallel ranks share the work of one expert on the same rows: they count once.
- Tensor parallel ranks of the attention before it see other tokens with sequence parallelism. Without it each has the
  whole sequence and dispatches it, so that every expert sees every token once from each of them: divided out.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from quantplug.calibration.quantizers import leaf_quantizers, needs_amax
from quantplug.megatron.layers import decoder_layers, layers_of
from quantplug.megatron.parallel import current_topology
from quantplug.megatron.parameters import LanguageModel


@dataclass(frozen=True)
class LayerTokens:
    """The calibration tokens of one mixture-of-experts layer, over all ranks.

    Attributes:
        layer: Global layer.
        by_expert: Tokens of every expert, by global id.
    """

    layer: int
    by_expert: tuple[int, ...]

    @property
    def routed(self) -> int:
        """Tokens of all experts together: those of the data times topk, if none was dropped."""
        return sum(self.by_expert)

    def coverage(self, expert: int) -> float:
        """An expert's tokens over its fair share, `routed / experts`: 1 is an even routing, 0 a cold expert.

        0 also where the layer saw no token at all.
        """
        return self.by_expert[expert] * len(self.by_expert) / self.routed if self.routed else 0.0


@dataclass(frozen=True)
class ExpertLayer:
    """A mixture-of-experts layer that this rank holds.

    Attributes:
        layer: Global layer; layers of multi-token prediction are counted on after the decoder's.
        module: The layer itself.
        name: Megatron's name of its experts, with the global layer.
    """

    layer: int
    module: MoELayer
    name: str

    @property
    def is_grouped(self) -> bool:
        """Whether one linear layer, with one input quantizer, holds all local experts."""
        return isinstance(self.module.experts, TEGroupedMLP)

    def local_experts(self) -> dict[int, nn.Module]:
        """Global id to the module of an expert that this rank holds; none where they are grouped."""
        if not isinstance(self.module.experts, SequentialMLP):
            return {}
        return dict(zip(self.module.local_expert_indices, self.module.experts.local_experts, strict=True))

    def activation_quantizers(self) -> Iterator[tuple[str, TensorQuantizer]]:
        """The input quantizers of the experts, by name below them, that calibration must give an amax."""
        for name, module in self.module.experts.named_modules():
            if name.endswith("input_quantizer"):
                yield from ((name, leaf) for leaf in leaf_quantizers(module) if needs_amax(leaf))


def expert_layers(chunks: Sequence[nn.Module]) -> list[ExpertLayer]:
    """The mixture-of-experts layers of all virtual pipeline stages of this rank, those of the decoder first."""
    models = [module for chunk in chunks for module in chunk.modules() if isinstance(module, LanguageModel)]
    return [
        ExpertLayer(record_layer(layer.number, layer.is_mtp, model), experts, f"{layer.name}.mlp.experts")
        for model in models
        for layer in layers_of(model)
        for name, experts in layer.module.named_children()
        if name == "mlp" and isinstance(experts, MoELayer)
    ]


def record_layer(number: int, is_mtp: bool, model: LanguageModel) -> int:
    """The number under which a `CalibrationRecord` has a layer.

    Keys count the layers of multi-token prediction from 0, a record goes on counting after the decoder's.
    """
    return decoder_layers(model) + number if is_mtp else number


class TokenCounter:
    """Counts the rows that this rank's experts get, on this rank alone."""

    def __init__(self, layers: Sequence[ExpertLayer]) -> None:
        self.layers = layers
        self.local = torch.zeros(len(layers), layers[0].module.num_local_experts if layers else 0, dtype=torch.int64)
        """[layers, local experts], on CPU."""

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts every forward of the experts inside."""
        with ExitStack() as hooks:
            # Before the forward of the experts: what arrives is counted, whatever the modules make of it.
            for index, layer in enumerate(self.layers):
                hooks.callback(layer.module.experts.register_forward_pre_hook(self._hook(index)).remove)
            yield

    def _hook(self, index: int) -> Any:
        # Megatron calls experts as (hidden states, tokens per local expert, probabilities), in this order.
        def count(experts: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            _, tokens_per_expert, _ = inputs
            self.local[index] += tokens_per_expert.to(self.local)

        return count

    def reduced(self) -> list[LayerTokens]:
        """What all ranks counted, in the order of the layers. A collective: two calls, whatever the model's size."""
        if not self.layers:
            return []
        counts = _over_all_ranks(self.local)
        # Each TP rank dispatched the whole sequence, so every token has arrived once from each of them.
        if not self.layers[0].module.config.sequence_parallel:
            counts //= current_topology().tp
        return [LayerTokens(layer.layer, tuple(row)) for layer, row in zip(self.layers, counts.tolist(), strict=True)]


def _over_all_ranks(local: torch.Tensor) -> torch.Tensor:
    """[layers, local experts] of this rank to [layers, experts] of all; the ranks of a group hold the same layers."""
    data, expert = parallel_state.get_expert_data_parallel_group(), parallel_state.get_expert_model_parallel_group()
    device = torch.device("cuda") if dist.get_backend(expert) == dist.Backend.NCCL else local.device
    # A copy, since the sum is made in place and what this rank counted must stay.
    counts = local.to(device, copy=True)
    if data.size() > 1:
        dist.all_reduce(counts, group=data)
    if expert.size() > 1:
        parts = [torch.empty_like(counts) for _ in range(expert.size())]
        dist.all_gather(parts, counts, group=expert)
        # Expert parallel rank r holds the r-th run of global experts, so in order of rank the columns are global ids.
        counts = torch.cat(parts, dim=1)
    return counts.cpu()
