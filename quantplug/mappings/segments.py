"""Tensors that are several end to end, each of which tensor parallelism cuts by itself.

Megatron's recurrent mixers project a layer's input by one such weight: a slice holds its share of every segment, one
behind the other, so that slices put end to end are not the whole.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantplug.mappings.layouts import ModelDimensions, OnePart


@dataclass(frozen=True)
class Segmented:
    """[s1 + s2 + ..., ...] rows in Megatron; a layout's `split` and `merge` say what they are in Hugging Face.

    Attributes:
        sizes: The rows of each segment of the whole tensor.
    """

    sizes: Callable[[ModelDimensions], tuple[int, ...]]
    shard_axis: int | None = 0

    def problem(self, shape: tuple[int, ...], dims: ModelDimensions) -> str | None:
        rows = sum(self.sizes(dims))
        return None if shape[0] == rows else f"has {shape[0]} rows, the config says {rows}"

    def cuts_cleanly(self, slices: int, dims: ModelDimensions) -> bool:
        return slices == 1  # A slice holds rows of all segments, which lie apart.

    def widths(self) -> int:
        return 1

    def join(self, slices: tuple[torch.Tensor, ...], dims: ModelDimensions) -> torch.Tensor:
        # Megatron asks every segment to divide by the ranks, so each slice has the same share of it.
        shares = [size // len(slices) for size in self.sizes(dims)]
        by_segment = zip(*(part.split(shares) for part in slices), strict=True)
        return torch.cat([share for segment in by_segment for share in segment])

    def cut(self, weight: torch.Tensor, index: int, slices: int, dims: ModelDimensions) -> torch.Tensor:
        return torch.cat([segment.chunk(slices)[index] for segment in self.segments(weight, dims)])

    def segments(self, weight: torch.Tensor, dims: ModelDimensions) -> tuple[torch.Tensor, ...]:
        """The segments of a whole tensor."""
        return weight.split(self.sizes(dims))


@dataclass(frozen=True)
class SegmentedAlike(OnePart, Segmented):
    """The same tensor under another name: only its slices are another matter."""
