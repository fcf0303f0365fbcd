"""A model's linears in the order in which data passes them, one layer a step: the same steps on all ranks."""

from collections.abc import Iterator, Sequence

from torch import nn

from quantplug.calibration.inputs.linears import Linear
from quantplug.megatron.agreement import gather_objects
from quantplug.megatron.layers import layers_of
from quantplug.megatron.parameters import LanguageModel

Place = tuple[bool, int]
"""Whether a layer is one of multi-token prediction, and its number among all pipeline stages."""

_BEHIND: Place = (True, 1 << 30)
"""What is in no layer: an output layer."""


def in_steps(model: nn.Module, linears: Sequence[Linear]) -> Iterator[list[Linear]]:
    """This rank's linears of each layer that any rank has, in order; none where another stage holds it. A collective.

    A module that is no language model, such as one layer, is one step.
    """
    places = _places(model)
    of_linears = [places.get(linear.modules[0], _BEHIND) for linear in linears]
    for step in sorted({place for of_rank in gather_objects(of_linears) for place in of_rank}):
        yield [linear for linear, place in zip(linears, of_linears, strict=True) if place == step]


def _places(model: nn.Module) -> dict[nn.Module, Place]:
    found: dict[nn.Module, Place] = {}
    for chunk in model.modules():
        for layer in layers_of(chunk) if isinstance(chunk, LanguageModel) else ():
            # A layer of multi-token prediction holds another one, which is no step of its own.
            for module in layer.module.modules():
                found.setdefault(module, (layer.is_mtp, layer.number))
    return found
