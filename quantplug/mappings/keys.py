"""Identity of Megatron's parameters, by global ids, and the patterns of names that these are filled into.

Patterns carry `*` for the layer and, for experts, a second `*` for the expert. Layers of multi-token prediction are
counted from 0, as Megatron names them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class ParamKey:
    """Identity of a Megatron parameter across ranks: made once where the model is read, never parsed out of a string.

    Attributes:
        module: Megatron's name with `*` in place of the layer and expert numbers, such as
            `decoder.layers.*.mlp.experts.linear_fc1.weight*`.
        layer: Global layer id (0-based) in the decoder, or in the MTP block; None outside the layers.
        expert: Global expert id, None outside the experts.
    """

    module: str
    layer: int | None = None
    expert: int | None = None

    @property
    def name(self) -> str:
        """The name with global ids filled in."""
        return fill(self.module, self.layer, self.expert)

    @property
    def stack(self) -> str:
        """What holds the layer in Megatron: `decoder` or `mtp`, each of which counts its layers from 0."""
        return self.module.partition(".")[0]

    @property
    def is_mtp(self) -> bool:
        """Whether it belongs to a layer of multi-token prediction that Megatron's model holds."""
        # Tensors that are carried over may begin likewise, and are in no layer of Megatron's.
        return self.layer is not None and self.stack == "mtp"


def fill(pattern: str, layer: int | None, expert: int | None) -> str:
    """Puts the layer into the first `*` of a pattern and the expert into the next.

    A number that is None takes no `*`, so that a pattern of all experts of a layer is filled by the layer alone.
    """
    # In this order in every name there is: experts are inside layers.
    for number in (layer, expert):
        if number is not None:
            pattern = pattern.replace("*", str(number), 1)
    return pattern
