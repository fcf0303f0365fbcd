"""Layouts of gated delta nets and of attention with an output gate, as Qwen3-Next and Qwen3.5 have them.

Shape legend: K rows of all queries (and of all keys), V rows of all values, h heads of values, H hidden, D head_dim,
A attention heads, G query groups.
"""

from dataclasses import dataclass

import torch

from quantplug.mappings.layouts import Concatenated, DeltaSizes, ModelDimensions
from quantplug.mappings.segments import Segmented, SegmentedAlike


def _delta(dims: ModelDimensions) -> DeltaSizes:
    # Rows with these layouts stand in the scope DELTA_LAYER, which models without such sizes have no layers of.
    assert dims.delta is not None, "only models with gated delta nets have such rows"
    return dims.delta


def _projected(dims: ModelDimensions) -> tuple[int, ...]:
    """Rows of queries, keys, values, gates z, betas b and alphas a."""
    sizes = _delta(dims)
    return (sizes.key_rows, sizes.key_rows, sizes.value_rows, sizes.value_rows, sizes.value_heads, sizes.value_heads)


def _convolved(dims: ModelDimensions) -> tuple[int, ...]:
    """Rows of queries, keys and values."""
    return _projected(dims)[:3]


@dataclass(frozen=True)
class DeltaParts(Segmented):
    """[q, k, v, z, b, a] in Megatron; the same rows in four parts on disk: [q, k, v], z, b and a (Qwen3.5)."""

    def split(self, weight: torch.Tensor, dims: ModelDimensions) -> tuple[torch.Tensor, ...]:
        # The convolution runs over q, k and v together, which is why the first three are one tensor on disk.
        rows = _projected(dims)
        return weight.split((sum(rows[:3]), *rows[3:]))

    def merge(self, parts: tuple[torch.Tensor, ...], dims: ModelDimensions) -> torch.Tensor:
        return torch.cat(parts)


@dataclass(frozen=True)
class DeltaByKeyHead(Segmented):
    """[q, k, v, z, b, a] in Megatron; two parts on disk, one head of keys after another (Qwen3-Next).

    The first has of every head of keys its query and its key, then the values and the gates of the h / key heads that
    go with it; the second their betas, then their alphas. As `fix_query_key_value_ordering` of transformers' takes
    them apart.
    """

    def split(self, weight: torch.Tensor, dims: ModelDimensions) -> tuple[torch.Tensor, ...]:
        query, key, value, gate, beta, alpha = self._by_key_head(self.segments(weight, dims), dims)
        return torch.cat((query, key, value, gate), 1).flatten(0, 1), torch.cat((beta, alpha), 1).flatten(0, 1)

    def merge(self, parts: tuple[torch.Tensor, ...], dims: ModelDimensions) -> torch.Tensor:
        heads = _delta(dims).key_heads
        # Rows that go with one head of keys; of betas and alphas that is the number of value heads it serves.
        query, key, value, gate, beta, alpha = (rows // heads for rows in _projected(dims))
        projection, factors = self._by_key_head(parts, dims)
        segments = (*projection.split((query, key, value, gate), 1), *factors.split((beta, alpha), 1))
        return torch.cat([segment.flatten(0, 1) for segment in segments])

    def _by_key_head(self, tensors: tuple[torch.Tensor, ...], dims: ModelDimensions) -> list[torch.Tensor]:
        """Each [rows, ...] as [key heads, rows of one, ...]."""
        heads = _delta(dims).key_heads
        return [tensor.unflatten(0, (heads, -1)) for tensor in tensors]


@dataclass(frozen=True)
class GatedQKV(Concatenated):
    """[(2A + 2G) * D, H] in Megatron, one query group after another: its queries, their gates, its key, its value.

    On disk the gate of a head follows its query, both in the first of the three parts.
    """

    shard_axis: int | None = 0

    def problem(self, shape: tuple[int, ...], dims: ModelDimensions) -> str | None:
        rows = 2 * (dims.num_attention_heads + dims.num_query_groups) * dims.head_dim
        if shape[0] == rows:
            return None
        heads = f"{dims.num_attention_heads} heads with gates and {dims.num_query_groups} query groups"
        return f"has {shape[0]} rows, not the {rows} of {heads} of {dims.head_dim}"

    def cuts_cleanly(self, slices: int, dims: ModelDimensions) -> bool:
        # With fewer query groups than ranks Megatron cuts through a group.
        return dims.num_query_groups % slices == 0

    def split(self, weight: torch.Tensor, dims: ModelDimensions) -> tuple[torch.Tensor, ...]:
        heads = dims.num_attention_heads // dims.num_query_groups
        # [groups, blocks of D rows in one, D, ...]: A/G queries, as many gates, one key, one value.
        grouped = weight.unflatten(0, (-1, 2 * heads + 2, dims.head_dim))
        query, gate, key, value = grouped.split([heads, heads, 1, 1], dim=1)
        # [groups, heads of one, query or gate, D, ...]
        return torch.stack((query, gate), dim=2).flatten(0, 3), key.flatten(0, 2), value.flatten(0, 2)

    def merge(self, parts: tuple[torch.Tensor, ...], dims: ModelDimensions) -> torch.Tensor:
        gated, key, value = parts
        heads = dims.num_attention_heads // dims.num_query_groups
        query, gate = gated.unflatten(0, (-1, heads, 2, dims.head_dim)).unbind(2)
        keys, values = (part.unflatten(0, (-1, 1, dims.head_dim)) for part in (key, value))
        return torch.cat((query, gate, keys, values), dim=1).flatten(0, 2)


DELTA_PARTS = DeltaParts(_projected)
DELTA_BY_KEY_HEAD = DeltaByKeyHead(_projected)
DELTA_CONVOLUTION = SegmentedAlike(_convolved)
GATED_QKV = GatedQKV()
