"""Names: how one Megatron parameter stands for one or more Hugging Face tensors.

A family's table is read in both directions. Patterns carry `*` for the layer and, for experts, a second `*` for the
expert; both are always *global* ids.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from quantplug.mappings.layouts import IDENTITY, Layout, ModelDimensions


@dataclass(frozen=True, order=True)
class ParamKey:
    """Identity of a Megatron parameter across ranks: made once where the model is read, never parsed out of a string.

    Attributes:
        module: Megatron's name with `*` in place of the layer and expert numbers, such as
            `decoder.layers.*.mlp.experts.linear_fc1.weight*`.
        layer: Global layer id (0-based), None outside the layers.
        expert: Global expert id, None outside the experts.
    """

    module: str
    layer: int | None = None
    expert: int | None = None

    @property
    def name(self) -> str:
        """The name with global ids filled in."""
        return fill(self.module, self.layer, self.expert)


def fill(pattern: str, layer: int | None, expert: int | None) -> str:
    """Puts the layer into the first `*` of a pattern and the expert into the next."""
    for number in (layer, expert):
        if number is not None:
            pattern = pattern.replace("*", str(number), 1)
    return pattern


class Scope(Enum):
    """Where in a model a row of the table stands: once, once a layer (of some kind), or once an expert."""

    MODEL = "model"
    LAYER = "layer"
    DENSE_LAYER = "dense layer"
    MOE_LAYER = "MoE layer"
    EXPERT = "expert"


class Role(Enum):
    """What a tensor is to quantization."""

    LINEAR = "linear weight, which a format may pack"
    ROUTER = "router, kept in high precision: servers load it so"
    VOCABULARY = "embedding or output layer, kept in high precision: servers load it so"
    OTHER = "no matrix product"


@dataclass(frozen=True)
class WeightMapping:
    """One row of a family's table.

    Attributes:
        megatron: The spellings of the parameter in Megatron (TE and local layer specs name some norms apart).
        hf: Names of the Hugging Face tensors it stands for, in the order of the layout's parts.
        scope: Where in the model the row stands.
        layout: How the Megatron tensor is cut into those parts, and merged again.
        role: What the tensor is to quantization.
    """

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    scope: Scope
    layout: Layout = IDENTITY
    role: Role = Role.OTHER

    def keys(self, dims: ModelDimensions) -> Iterator[ParamKey]:
        """Every parameter that a whole model of these sizes has by this row, under its first Megatron spelling."""
        module = self.megatron[0]
        moe_layers = dims.moe_layers
        layers = {
            Scope.MODEL: (None,),
            Scope.LAYER: range(dims.num_layers),
            Scope.DENSE_LAYER: [layer for layer in range(dims.num_layers) if layer not in moe_layers],
            Scope.MOE_LAYER: moe_layers,
            Scope.EXPERT: moe_layers,
        }[self.scope]
        experts = range(dims.num_experts) if self.scope is Scope.EXPERT else (None,)
        return (ParamKey(module, layer, expert) for layer in layers for expert in experts)

    def hf_names(self, key: ParamKey) -> tuple[str, ...]:
        return tuple(fill(pattern, key.layer, key.expert) for pattern in self.hf)

    def to_hf(self, key: ParamKey, weight: torch.Tensor, dims: ModelDimensions) -> dict[str, torch.Tensor]:
        """Cuts a whole Megatron tensor into its named Hugging Face tensors (views where the layout allows)."""
        return dict(zip(self.hf_names(key), self.layout.split(weight, dims), strict=True))

    def to_megatron(self, key: ParamKey, tensors: Mapping[str, torch.Tensor], dims: ModelDimensions) -> torch.Tensor:
        """Merges named Hugging Face tensors into the whole Megatron tensor."""
        return self.layout.merge(tuple(tensors[name] for name in self.hf_names(key)), dims)


@dataclass(frozen=True)
class MegatronConfig:
    """A Hugging Face config in Megatron's words.

    Attributes:
        transformer: Keyword arguments of `TransformerConfig`.
        model: Keyword arguments of `GPTModel`, `vocab_size` being the unpadded number of rows.
    """

    transformer: Mapping[str, Any]
    model: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One architecture: data only, read in both directions.

    Attributes:
        name: Short name for tables and messages.
        architectures: Values of `architectures` in config.json that it serves.
        mappings: The table.
        dimensions: Reads `ModelDimensions` from the config as a dict.
        megatron_config: Converts the config; raises UnsupportedModelError for a setting we do not convert.
        tied: Hugging Face name to the name whose data it shares when `tie_word_embeddings` is set.
    """

    name: str
    architectures: tuple[str, ...]
    mappings: tuple[WeightMapping, ...]
    dimensions: Callable[[Mapping[str, Any]], ModelDimensions]
    megatron_config: Callable[[Mapping[str, Any]], MegatronConfig]
    tied: Mapping[str, str] = field(default_factory=dict)

    def expected(self, dims: ModelDimensions) -> Iterator[tuple[tuple[str, ...], ParamKey]]:
        """Every parameter of a whole model of these sizes, with its Hugging Face names, row by row."""
        return ((row.hf_names(key), key) for row in self.mappings for key in row.keys(dims))

    def by_megatron(self) -> dict[str, WeightMapping]:
        """Every Megatron spelling with its row."""
        return {name: mapping for mapping in self.mappings for name in mapping.megatron}
