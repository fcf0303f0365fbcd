"""How one Megatron tensor is cut into Hugging Face tensors: pairs of pure functions, and the axis that shards.

Every layout works on whole tensors and on shards of them alike: each of its parts is cut along `shard_axis`, and
merging the cut parts gives the shard that Megatron holds.

Shape legend: H hidden, D head_dim, A attention heads, G query groups (KV heads), V vocabulary, F feed-forward width.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch


class Option(Enum):
    """What a config may switch on, and with it rows of its family's table.

    A row names the option that it needs, so that one table serves all configs of a family.
    """

    QUERY_LATENT = "queries of multi-latent attention by way of a latent"
    QUERY_DIRECT = "queries of multi-latent attention without one"
    QK_NORM = "norms on queries and keys"
    QKV_BIAS = "biases of queries, keys and values"
    OUTPUT_BIAS = "bias of what attention gives"
    QUERY_GATE = "gates of what attention gives, in the projection of the queries"
    EXPERT_LATENT = "projections into a latent before the routed experts, and out of it behind them"


@dataclass(frozen=True)
class LatentSizes:
    """The sizes of multi-latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1).

    Attributes:
        query_rank: Width of the latent of queries; None where they have none.
        key_value_rank: Width of the latent of keys and values.
        rotary_dim: Entries of a head of queries and keys that carry the position.
        value_dim: Entries of a head of values.
    """

    query_rank: int | None
    key_value_rank: int
    rotary_dim: int
    value_dim: int


@dataclass(frozen=True)
class DeltaSizes:
    """The sizes of gated delta nets (https://arxiv.org/abs/2412.06464).

    Attributes:
        key_heads: Heads of queries, and of keys.
        value_heads: Heads of values, a multiple of `key_heads`.
        key_dim: Entries of a head of queries and keys.
        value_dim: Entries of a head of values.
        kernel: Taps of the convolution.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def key_rows(self) -> int:
        """Rows of all queries, and of all keys."""
        return self.key_heads * self.key_dim

    @property
    def value_rows(self) -> int:
        """Rows of all values."""
        return self.value_heads * self.value_dim


@dataclass(frozen=True)
class HybridLayers:
    """Which layers of a decoder have what, where not all of them have attention and a feed-forward network.

    Attributes:
        attention: Global ids of the layers with attention.
        delta: Global ids of the layers with a gated delta net (https://arxiv.org/abs/2412.06464).
        mamba: Global ids of the layers with a Mamba-2 mixer (https://arxiv.org/abs/2405.21060).
        dense: Global ids of the layers with a feed-forward network without experts.
    """

    attention: tuple[int, ...]
    dense: tuple[int, ...]
    delta: tuple[int, ...] = ()
    mamba: tuple[int, ...] = ()


@dataclass(frozen=True)
class MambaSizes:
    """The sizes of a Mamba-2 mixer (https://arxiv.org/abs/2405.21060, section 7).

    Attributes:
        num_heads: Heads of the mixer.
        head_dim: Entries of a head.
        num_groups: Groups of heads, which share their input and output matrices B and C.
        state_dim: Entries of a head's state for each of its entries: rows of a group in B and in C.
        kernel: Tokens that the convolution sees.
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_dim: int
    kernel: int

    @property
    def inner(self) -> int:
        """Entries of all heads: rows of z and of x."""
        return self.num_heads * self.head_dim

    @property
    def states(self) -> int:
        """Rows of B, and of C."""
        return self.num_groups * self.state_dim


@dataclass(frozen=True)
class ModelDimensions:
    """The sizes that names and layouts need.

    Attributes:
        num_layers: Layers of the decoder, without those of multi-token prediction.
        hidden_size: Width H of what layers hand on.
        num_attention_heads: Heads A of queries.
        num_query_groups: Heads G of keys, and of values, each of which A / G heads of queries share.
        head_dim: Entries D of a head.
        vocab_size: Rows of the Hugging Face embedding, without Megatron's padding.
        num_experts: Routed experts of a layer, 0 in a dense model.
        moe_layers: Global ids of the layers that have experts.
        mlp_width: Feed-forward width F of a dense layer; None where it is not known.
        expert_width: Feed-forward width F of an expert; None where it is not known.
        shared_width: Feed-forward width F of all shared experts together; None where there are none.
        expert_latent: Width of the latent that routed experts read and write; None where that is the hidden size.
        mtp_layers: Layers of multi-token prediction.
        latent: Sizes of multi-latent attention, `head_dim` then being that of queries and keys; None without it.
        hybrid: Which layers have what; None where all have attention and a feed-forward network.
        delta: Sizes of gated delta nets; None without them.
        mamba: Sizes of the Mamba mixers; None where no layer has one.
        options: What the config switches on.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    num_experts: int = 0
    moe_layers: tuple[int, ...] = ()
    mlp_width: int | None = None
    expert_width: int | None = None
    shared_width: int | None = None
    expert_latent: int | None = None
    mtp_layers: int = 0
    latent: LatentSizes | None = None
    hybrid: HybridLayers | None = None
    delta: DeltaSizes | None = None
    mamba: MambaSizes | None = None
    options: frozenset[Option] = frozenset()

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Global ids of the layers with attention."""
        return tuple(range(self.num_layers)) if self.hybrid is None else self.hybrid.attention

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Global ids of the layers with a feed-forward network without experts."""
        if self.hybrid is not None:
            return self.hybrid.dense
        # Without a hybrid decoder every layer has a network: of experts, or a dense one.
        with_experts = frozenset(self.moe_layers)
        return tuple(layer for layer in range(self.num_layers) if layer not in with_experts)


class Layout(Protocol):
    """A pair of pure functions between a Megatron tensor and its Hugging Face parts."""

    @property
    def shard_axis(self) -> int | None:
        """Axis of every *part* that tensor parallelism cuts; None for a tensor every rank holds whole."""

    def problem(self, shape: tuple[int, ...], dims: ModelDimensions) -> str | None:
        """Why a whole Megatron tensor of this shape is not one of a model of these sizes; None when it may be."""

    def cuts_cleanly(self, slices: int, dims: ModelDimensions) -> bool:
        """Whether each of that many slices of the Megatron tensor splits into slices of the parts."""

    def widths(self) -> int:
        """How many times the feed-forward width F the sharded axis of a part is."""

    def join(self, slices: tuple[torch.Tensor, ...], dims: ModelDimensions) -> torch.Tensor:
        """The whole Megatron tensor from its tensor parallel slices, in order."""

    def cut(self, weight: torch.Tensor, index: int, slices: int, dims: ModelDimensions) -> torch.Tensor:
        """One of that many slices of a whole Megatron tensor: the inverse of `join`."""

    def split(self, weight: torch.Tensor, dims: ModelDimensions) -> tuple[torch.Tensor, ...]:
        """The Hugging Face parts of a Megatron tensor, whole or a slice of one that `cuts_cleanly`."""

    def merge(self, parts: tuple[torch.Tensor, ...], dims: ModelDimensions) -> torch.Tensor:
        """Hugging Face to Megatron: the inverse of `split`, up to Megatron's padding rows."""


class Concatenated:
    """Slices that are put together end to end, as Megatron's own tensor parallelism cuts most tensors."""

    # None for tensors that every rank holds whole: any slice is then the whole, and the first one is taken.
    shard_axis: int | None

    def cuts_cleanly(self, slices: int, dims: ModelDimensions) -> bool:
        return True

    def widths(self) -> int:
        return 1

    def join(self, slices: tuple[torch.Tensor, ...], dims: ModelDimensions) -> torch.Tensor:
        return slices[0] if self.shard_axis is None else torch.cat(slices, dim=self.shard_axis)

    def cut(self, weight: torch.Tensor, index: int, slices: int, dims: ModelDimensions) -> torch.Tensor:
        return weight if self.shard_axis is None else weight.chunk(slices, dim=self.shard_axis)[index]


class OnePart:
    """The Megatron tensor as it is, for the one Hugging Face part."""

    def split(self, weight: torch.Tensor, dims: ModelDimensions) -> tuple[torch.Tensor, ...]:
        return (weight,)

    def merge(self, parts: tuple[torch.Tensor, ...], dims: ModelDimensions) -> torch.Tensor:
        (weight,) = parts
        return weight


@dataclass(frozen=True)
class Identity(OnePart, Concatenated):
    """A tensor that is the same in both, under another name; `shard_axis` says how tensor parallelism cuts it."""

    shard_axis: int | None = None

    def problem(self, shape: tuple[int, ...], dims: ModelDimensions) -> str | None:
        return None


@dataclass(frozen=True)
class VocabularyRows(OnePart, Concatenated):
    """[V_padded, H] in Megatron, [V, H] in Hugging Face: padding rows exist only in Megatron."""

    shard_axis: int | None = 0

    # Megatron pads the rows to a multiple that tensor parallel ranks divide, so their number depends on the run.
    def problem(self, shape: tuple[int, ...], dims: ModelDimensions) -> str | None:
        if shape[0] >= dims.vocab_size and shape[1:] == (dims.hidden_size,):
            return None
        return f"has shape {list(shape)}, not [at least {dims.vocab_size}, {dims.hidden_size}]"

    def split(self, weight: torch.Tensor, dims: ModelDimensions) -> tuple[torch.Tensor, ...]:
        return (weight[: dims.vocab_size],)


@dataclass(frozen=True)
class GatedConcat(Concatenated):
    """[2F, H] in Megatron: all rows of gate_proj [F, H], then all rows of up_proj [F, H]."""

    shard_axis: int | None = 0

    def problem(self, shape: tuple[int, ...], dims: ModelDimensions) -> str | None:
        # Not held against the config's width: this layout serves dense layers, experts and shared experts alike.
        return None if shape[0] % 2 == 0 else f"has {shape[0]} rows, which do not halve into gate_proj and up_proj"

    def join(self, slices: tuple[torch.Tensor, ...], dims: ModelDimensions) -> torch.Tensor:
        # Every slice holds its rows of gate_proj, then its rows of up_proj: so a rank can multiply the two by itself.
        # Slices put end to end would be gate, up, gate, up.
        gates, ups = zip(*(part.chunk(2, dim=0) for part in slices), strict=True)
        return torch.cat((*gates, *ups), dim=0)

    def cut(self, weight: torch.Tensor, index: int, slices: int, dims: ModelDimensions) -> torch.Tensor:
        return torch.cat([half.chunk(slices, dim=0)[index] for half in weight.chunk(2, dim=0)], dim=0)

    def split(self, weight: torch.Tensor, dims: ModelDimensions) -> tuple[torch.Tensor, ...]:
        gate, up = weight.chunk(2, dim=0)
        return gate, up

    def merge(self, parts: tuple[torch.Tensor, ...], dims: ModelDimensions) -> torch.Tensor:
        return torch.cat(parts, dim=0)


@dataclass(frozen=True)
class GatedJoined(OnePart, GatedConcat):
    """The same Megatron tensor as one Hugging Face part [2F, ...]: all rows of gate_proj, then all rows of up_proj."""

    # `split` and `merge` are those of OnePart, which stands first: whole tensors are the same in both, slices are not.
    def widths(self) -> int:
        return 2

    def cuts_cleanly(self, slices: int, dims: ModelDimensions) -> bool:
        return slices == 1  # A slice holds rows of both halves, which lie apart in the part.


@dataclass(frozen=True)
class GatedInterleave(GatedConcat):
    """The same Megatron tensor as one Hugging Face part [2F, ...]: rows of gate_proj and up_proj in turn (GPT-OSS)."""

    def widths(self) -> int:
        return 2

    # [2, F, ...] stacked as [F, 2, ...]: row i of gate_proj, then row i of up_proj. A slice of Megatron's tensor has
    # rows with the same numbers of both, so it is a slice of this part too.
    def split(self, weight: torch.Tensor, dims: ModelDimensions) -> tuple[torch.Tensor, ...]:
        return (torch.stack(weight.chunk(2, dim=0), dim=1).flatten(0, 1),)

    def merge(self, parts: tuple[torch.Tensor, ...], dims: ModelDimensions) -> torch.Tensor:
        (weight,) = parts
        return torch.cat((weight[0::2], weight[1::2]), dim=0)


@dataclass(frozen=True)
class QKVInterleave(Concatenated):
    """[(A + 2G) * D, ...] in Megatron, one query group after another: its A/G query heads, its key, its value.

    Works for the weight [.., H] and the bias [..]. Only the ratio A/G is used, so a shard that holds a part of the
    groups is cut the same way.
    """

    shard_axis: int | None = 0

    def problem(self, shape: tuple[int, ...], dims: ModelDimensions) -> str | None:
        # A wrong head_dim or number of groups can still reshape, to parts with each other's rows: refused here.
        rows = (dims.num_attention_heads + 2 * dims.num_query_groups) * dims.head_dim
        if shape[0] == rows:
            return None
        # The sizes that were expected, so that a wrong config can be told from a wrong weight.
        heads = f"{dims.num_attention_heads} heads and {dims.num_query_groups} query groups of {dims.head_dim}"
        return f"has {shape[0]} rows, not the {rows} of {heads}"

    def cuts_cleanly(self, slices: int, dims: ModelDimensions) -> bool:
        # With fewer query groups than ranks Megatron cuts through a group.
        return dims.num_query_groups % slices == 0

    def split(self, weight: torch.Tensor, dims: ModelDimensions) -> tuple[torch.Tensor, ...]:
        heads_per_group = dims.num_attention_heads // dims.num_query_groups
        tail = weight.shape[1:]
        # [g, heads of a group, D, ...]
        grouped = weight.reshape(-1, heads_per_group + 2, dims.head_dim, *tail)
        query, key, value = grouped.split([heads_per_group, 1, 1], dim=1)
        return query.reshape(-1, *tail), key.reshape(-1, *tail), value.reshape(-1, *tail)

    def merge(self, parts: tuple[torch.Tensor, ...], dims: ModelDimensions) -> torch.Tensor:
        query, key, value = parts
        heads_per_group = dims.num_attention_heads // dims.num_query_groups
        tail = query.shape[1:]
        # Each as [g, heads of a group, D, ...], so that a group's queries, key and value come to lie together.
        grouped = torch.cat(
            (
                query.reshape(-1, heads_per_group, dims.head_dim, *tail),
                key.reshape(-1, 1, dims.head_dim, *tail),
                value.reshape(-1, 1, dims.head_dim, *tail),
            ),
            dim=1,
        )
        return grouped.reshape(-1, *tail)


# Column parallel linears cut the rows of the weight, [out, in], and row parallel ones its columns.
IDENTITY = Identity()
COLUMN = Identity(shard_axis=0)
ROW = Identity(shard_axis=1)
VOCABULARY = VocabularyRows()
GATED = GatedConcat()
GATED_JOINED = GatedJoined()
GATED_INTERLEAVED = GatedInterleave()
QKV = QKVInterleave()


def layout_shapes(shape: tuple[int, ...], layout: Layout, dims: ModelDimensions) -> tuple[tuple[int, ...], ...]:
    """Shapes of the parts that a layout makes of a Megatron tensor of a shape that it has no `problem` with."""
    # Run on a tensor without data: what the layout does is the only description of what it does.
    parts = layout.split(torch.empty(shape, device="meta"), dims)
    return tuple(tuple(part.shape) for part in parts)
