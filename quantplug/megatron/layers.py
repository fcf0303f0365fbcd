"""The layers of a live model, by what keys call them: the same whether a `GPTModel` or a `HybridModel` has them."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from quantplug.mappings.hybrid_pattern import HybridPattern
from quantplug.megatron.releases.hybrid import HybridModel, HybridStack, layer_pattern

_DECODER, _MTP = "decoder.layers.*", "mtp.layers.*"
_IN_MTP = f"{_MTP}.transformer_layer"


@dataclass(frozen=True)
class Layer:
    """A module that is a layer of a model, or half of one, as the layers of a `HybridModel` mostly are.

    Attributes:
        module: The module.
        pattern: What keys call it, with `*` for the number.
        number: Its number among all pipeline stages, counted from 0; of layers of multi-token prediction, among these.
    """

    module: nn.Module
    pattern: str
    number: int

    @property
    def is_mtp(self) -> bool:
        """Whether it is, or is in, a layer of multi-token prediction."""
        return self.pattern.startswith(_MTP)

    @property
    def name(self) -> str:
        """What keys call it, with the number."""
        return self.pattern.replace("*", str(self.number), 1)


def layers_of(chunk: GPTModel | HybridModel) -> Iterator[Layer]:
    """Every layer of a model that this rank holds. Inside of one of multi-token prediction there are further ones."""
    pattern = pattern_of_model(chunk)
    for layer in chunk.decoder.layers:
        # Megatron counts its layers from 1, and over all pipeline stages.
        number = layer.layer_number - 1
        yield Layer(layer, _DECODER, number if pattern is None else pattern.layer(number))
    for module in chunk.modules():
        if isinstance(module, MultiTokenPredictionLayer):
            number = module.layer_number - 1
            yield Layer(module, _MTP, number)
            yield from (Layer(inner, _IN_MTP, number) for inner in _inside(module))


def decoder_layers(chunk: GPTModel | HybridModel) -> int:
    """How many layers the decoder has on all pipeline stages, as keys count them."""
    pattern = pattern_of_model(chunk)
    count: int = chunk.config.num_layers if pattern is None else pattern.num_layers
    return count


def pattern_of_model(chunk: GPTModel | HybridModel) -> HybridPattern | None:
    """Which layers the whole model has; None of a `GPTModel`, whose config says it.

    Raises:
        UnsupportedModelError: It has layers that are not converted.
    """
    return layer_pattern(chunk) if isinstance(chunk, HybridModel) else None


def _inside(layer: MultiTokenPredictionLayer) -> Iterator[nn.Module]:
    """The layer of the decoder's kind in one of multi-token prediction: one module, or one for each half."""
    for child in layer.children():
        if isinstance(child, HybridStack):
            yield from child.layers
        elif isinstance(child, TransformerLayer):
            yield child
