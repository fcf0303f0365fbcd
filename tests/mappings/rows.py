"""A row of a table applied to whole tensors: what exporter and importer do by pieces and slices, in one step."""

from collections.abc import Mapping

import torch

from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.rows import WeightMapping


def to_hf(row: WeightMapping, key: ParamKey, weight: torch.Tensor, dims: ModelDimensions) -> dict[str, torch.Tensor]:
    """Cuts a whole Megatron tensor into its named Hugging Face tensors."""
    parts = row.layout.split(row.to_hf_values(weight), dims)
    return dict(zip(row.hf_names(key, dims), parts, strict=True))


def to_megatron(
    row: WeightMapping, key: ParamKey, tensors: Mapping[str, torch.Tensor], dims: ModelDimensions
) -> torch.Tensor:
    """Merges named Hugging Face tensors into the whole Megatron tensor."""
    parts = tuple(tensors[name] for name in row.hf_names(key, dims))
    return row.from_hf_values(row.layout.merge(parts, dims))
