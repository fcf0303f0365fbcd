"""Rows: how one Megatron parameter stands for one or more Hugging Face tensors, and what these are to quantization."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Self

import torch

from quantplug.mappings.keys import ParamKey, fill
from quantplug.mappings.layouts import IDENTITY, Layout, ModelDimensions, Option


class Scope(Enum):
    """Where in a model a row of the table stands: once, once a layer (of some kind), or once an expert."""

    MODEL = "model"
    LAYER = "layer"
    ATTENTION_LAYER = "layer with attention"
    DELTA_LAYER = "layer with a gated delta net"
    MAMBA_LAYER = "layer with a Mamba mixer"
    DENSE_LAYER = "dense layer"
    MOE_LAYER = "MoE layer"
    EXPERT = "expert"
    MTP = "all layers of multi-token prediction together"


class LayerStack(Enum):
    """Which stack of layers a row belongs to."""

    DECODER = "decoder"
    MTP = "multi-token prediction, whose layers Hugging Face counts on after the decoder's"
    MTP_APART = "multi-token prediction, whose layers Hugging Face counts from 0"

    @property
    def is_mtp(self) -> bool:
        """Whether its layers are of multi-token prediction."""
        return self is not LayerStack.DECODER


class Role(Enum):
    """What a tensor is to quantization."""

    LINEAR = "linear weight, which a format may pack"
    ROUTER = "router, kept in high precision: servers load it so"
    ROUTER_BIAS = "bias of the router, in the type of the router"
    EMBEDDING = "embedding, kept in high precision: servers load it so"
    OUTPUT_LAYER = "output layer, kept in high precision unless quantize_lm_head asks for it"
    HIGH_PRECISION = "linear weight kept in high precision: servers load it so"
    PASSTHROUGH_WEIGHT = "weight of what Megatron does not hold, carried over from the source as it is"
    PASSTHROUGH = "other tensor of what Megatron does not hold, carried over from the source as it is"
    OTHER = "no matrix product"

    @property
    def multiplies(self) -> bool:
        """Whether the tensor is the weight of a matrix product, and so is quantized or named in an exclude list."""
        return self not in (Role.ROUTER_BIAS, Role.OTHER, Role.PASSTHROUGH)

    @property
    def may_be_packed(self) -> bool:
        """Whether a format may pack the weight."""
        return self in (Role.LINEAR, Role.OUTPUT_LAYER)

    @property
    def is_of_vocabulary(self) -> bool:
        """Whether it has a row for every token."""
        return self in (Role.EMBEDDING, Role.OUTPUT_LAYER)

    @property
    def is_of_router(self) -> bool:
        """Whether the tensor is one of the router's, whose type on disk is the router's own."""
        return self in (Role.ROUTER, Role.ROUTER_BIAS)

    @property
    def is_passthrough(self) -> bool:
        """Whether the tensor belongs to no parameter of Megatron's, and comes from the source alone."""
        return self in (Role.PASSTHROUGH_WEIGHT, Role.PASSTHROUGH)


@dataclass(frozen=True)
class Placement:
    """Where one expert's tensor lies in a Hugging Face tensor of all experts of its layer.

    Attributes:
        expert: Its place along the first axis.
        experts: Length of that axis.
        transposed: Whether a matrix is stored as [in, out].
    """

    expert: int
    experts: int
    transposed: bool

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor of all experts, from that of one expert's."""
        # Biases have one axis and are never turned; scale tables keep their further axes where they are.
        turned = (shape[1], shape[0], *shape[2:]) if self.transposed and len(shape) > 1 else shape
        return (self.experts, *turned)

    def is_shared(self, stored: tuple[int, ...]) -> bool:
        """Whether a tensor of that shape is one scale of all experts, which has no place for each of them."""
        return stored in ((), (1,))

    def stored_axis(self, axis: int, rank: int) -> int:
        """Which axis of the tensor of all experts an axis of one expert's tensor of that rank is."""
        # The experts' axis comes first. Behind it a transposed [out, in] is [in, out]: axes 0 and 1 become 2 and 1.
        return rank - axis if self.transposed else axis + 1

    def turned(self, tensor: torch.Tensor) -> torch.Tensor:
        """One expert's tensor as it is stored; and as it is stored, back. A view.

        Tables of scales are turned as the matrix is: [out, in, ...] to [in, out, ...].
        """
        return tensor.transpose(0, 1) if self.transposed and tensor.ndim > 1 else tensor


@dataclass(frozen=True)
class Merged:
    """A module that servers make of several linears on disk, and look up in exclude lists by its own name.

    Attributes:
        name: Pattern of its name.
        parts: Patterns of the tensors that it is made of.
    """

    name: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class WeightMapping:
    """One row of a family's table.

    Attributes:
        megatron: The spellings of the parameter in Megatron (TE and local layer specs name some norms apart).
        hf: Names of the Hugging Face tensors it stands for, in the order of the layout's parts.
        scope: Where in the model the row stands.
        layout: How the Megatron tensor is cut into those parts, and merged again.
        role: What the tensor is to quantization.
        block: Which stack of layers it belongs to.
        scale_group: Pattern that names what this weight shares its scales with, besides its own parts: servers fuse
            weights of one group into one linear, which has one `weight_scale_2`. None if it is alone.
        duplicates: Patterns of Hugging Face names that hold the same tensor once more for every MTP layer.
        dtype: Type on disk where it is not that of the model's other plain tensors.
        keep_source_dtype: Whether it is written in the source's type, as far as that is known, where that holds more
            than the type of others: models compute with it in FP32, and not all sources hold it so.
        option: Only models with this option have the row; None for all.
        min_bits: Bits in which every server reads a linear that is quantized.
        default_min_bits: Fewest bits in which it is quantized where the user does not ask for all (`Preset.ALL`): a
            linear by which a model loses far more than by others, and which vendors keep for it. Servers read it all
            the same, and quantizers that are enabled for it are written.
        unserved: Why no server loads the linear quantized, in any format that is written but the MXFP4 of GPT-OSS; None
            where some do.
        served_in_mxfp4: Whether servers load it in that.
        high_precision: Those of `hf` that stay in high precision also where the weight is quantized: servers load them
            so.
        merged: What servers make of several of `hf`, where an exclude list must name it beside these.
        served: Names by which servers look for these tensors, in the order of `hf`, which some tool writes and they do
            not know: an export has the served ones. Empty where servers know `hf`.
        offset: What Hugging Face's values are more than Megatron's: 1 where Megatron's norm is zero-centred, and
            multiplies with 1 + weight, and Hugging Face's is not. Of a model whose norms are as the family says
            (`Family.zero_centred`).
    """

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    scope: Scope
    layout: Layout = IDENTITY
    role: Role = Role.OTHER
    block: LayerStack = LayerStack.DECODER
    scale_group: str | None = None
    duplicates: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    keep_source_dtype: bool = False
    option: Option | None = None
    min_bits: int = 4
    default_min_bits: int = 4
    unserved: str | None = None
    served_in_mxfp4: bool = False
    high_precision: tuple[str, ...] = ()
    merged: tuple[Merged, ...] = ()
    served: tuple[str, ...] = ()
    offset: float = 0.0

    def keys(self, dims: ModelDimensions) -> Iterator[ParamKey]:
        """Every parameter that a whole model of these sizes has by this row, under its first Megatron spelling."""
        # The first spelling is its identity: TE and local specs of one model must agree on what a parameter is.
        module = self.megatron[0]
        # A row whose option is off has no parameters, so that nothing is missing in a model without them.
        if self.option is not None and self.option not in dims.options:
            return iter(())
        layers: Iterable[int | None] = (None,) if self.scope is Scope.MODEL else self._layers(dims)
        experts = range(dims.num_experts) if self.scope is Scope.EXPERT else (None,)
        return (ParamKey(module, layer, expert) for layer in layers for expert in experts)

    def _layers(self, dims: ModelDimensions) -> Sequence[int]:
        """The layers of its block that have it, counted from 0 in the block."""
        # Hugging Face has one set of these for all MTP layers, so it stands for the first of Megatron's.
        if self.scope is Scope.MTP:
            return range(min(dims.mtp_layers, 1))
        in_decoder = self._decoder_layers(dims)
        if self.block is LayerStack.DECODER:
            return in_decoder
        # Megatron makes MTP layers like the last one of the decoder (get_gpt_mtp_block_spec).
        return range(dims.mtp_layers if dims.num_layers - 1 in in_decoder else 0)

    def _decoder_layers(self, dims: ModelDimensions) -> Sequence[int]:
        """Global ids of the decoder's layers that are of the row's scope."""
        match self.scope:
            case Scope.DENSE_LAYER:
                return dims.dense_layers
            case Scope.MOE_LAYER | Scope.EXPERT:
                return dims.moe_layers
            case Scope.ATTENTION_LAYER:
                return dims.attention_layers
            case Scope.DELTA_LAYER:
                return dims.hybrid.delta if dims.hybrid else ()
            case Scope.MAMBA_LAYER:
                return dims.hybrid.mamba if dims.hybrid else ()
        return range(dims.num_layers)

    def hf_names(self, key: ParamKey, dims: ModelDimensions) -> tuple[str, ...]:
        """Names of the Hugging Face tensors of one parameter, in the order of the layout's parts."""
        return tuple(fill(pattern, self._hf_layer(key, dims), key.expert) for pattern in self.hf)

    def when_packed(self, *, fused_is_read: bool) -> "WeightMapping":
        """The row that says how the same weight is written where experts are quantized: mostly this one.

        Args:
            fused_is_read: Whether servers read all experts in one tensor, of any architecture, in the format.
        """
        return self

    def unturned(self) -> "WeightMapping":
        """The row of the same weight in a form that holds no matrix as [in, out]: mostly this one."""
        return self

    def as_served(self) -> Self:
        """The row of the same weight by the names that servers look for: mostly this one."""
        return replace(self, hf=self.served, served=()) if self.served else self

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """The same row with other names in Hugging Face."""
        # Every field that holds names: one that keeps its old name would match nothing, without an error.
        return replace(
            self,
            hf=tuple(map(rename, self.hf)),
            scale_group=None if self.scale_group is None else rename(self.scale_group),
            duplicates=tuple(map(rename, self.duplicates)),
            high_precision=tuple(map(rename, self.high_precision)),
            merged=tuple(Merged(rename(it.name), tuple(map(rename, it.parts))) for it in self.merged),
            served=tuple(map(rename, self.served)),
        )

    def of_norm(self, zero_centred: bool | None, *, usual: bool) -> Self:
        """The same row for a model whose norms are zero-centred where the family's usually are not, or the reverse.

        Args:
            zero_centred: Whether the model's norm is; None for a weight that is no norm's.
            usual: What `Family.zero_centred` says.
        """
        if zero_centred is None or zero_centred is usual:
            return self
        return replace(self, offset=self.offset + zero_centred - usual)

    def placement(self, key: ParamKey, dims: ModelDimensions) -> Placement | None:
        """Where the parts lie in tensors that hold all experts of a layer; None where they are tensors themselves."""
        return None

    def merged_names(self, key: ParamKey, dims: ModelDimensions) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Every module that servers make of several parts, with the names of these."""
        layer = self._hf_layer(key, dims)
        for module in self.merged:
            yield fill(module.name, layer, key.expert), tuple(fill(part, layer, key.expert) for part in module.parts)

    def group(self, key: ParamKey, dims: ModelDimensions) -> str | None:
        """Name of the group of weights with which a parameter shares its scales; None if it is alone.

        Servers fuse them into one linear with one scale of the tensor, and take one of several for all.
        """
        return None if self.scale_group is None else fill(self.scale_group, self._hf_layer(key, dims), key.expert)

    def experts_module(self, key: ParamKey, dims: ModelDimensions) -> str | None:
        """Hugging Face's module of all experts of the layer; None for what belongs to no expert."""
        # Exclude lists name this module: servers quantize all experts of a layer or none.
        if key.expert is None:
            return None
        # What stands before the expert's `*`: `model.layers.*.mlp.experts`.
        return fill(self.hf[0].rpartition(".*")[0], self._hf_layer(key, dims), None)

    def mtp_layer_module(self, key: ParamKey, dims: ModelDimensions) -> str | None:
        """Hugging Face's module of the MTP layer, where it is counted on after the decoder's; None for other rows."""
        if self.block is not LayerStack.MTP:
            return None
        return fill(self.hf[0].partition("*")[0] + "*", self._hf_layer(key, dims), None)

    def duplicate_names(self, dims: ModelDimensions) -> tuple[str, ...]:
        """Names under which Hugging Face holds the same tensor once more, for every MTP layer."""
        # Numbered as Hugging Face numbers these layers, on after the decoder's.
        return tuple(
            fill(name, dims.num_layers + mtp, None) for mtp in range(dims.mtp_layers) for name in self.duplicates
        )

    def _hf_layer(self, key: ParamKey, dims: ModelDimensions) -> int | None:
        # DeepSeek-V3's MTP layer is `model.layers.61` after 61 decoder layers, where Megatron has `mtp.layers.0`.
        return dims.num_layers + key.layer if self.block is LayerStack.MTP and key.layer is not None else key.layer

    def to_hf_values(self, values: torch.Tensor) -> torch.Tensor:
        """Hugging Face's values of some of Megatron's: the same, or in FP32 where they differ."""
        # Not in BF16, whose steps near 1 are 2^-7: the type on disk is to say what is rounded away of a small weight.
        return values.float() + self.offset if self.offset else values

    def from_hf_values(self, values: torch.Tensor) -> torch.Tensor:
        """Megatron's values of some of Hugging Face's: the inverse of `to_hf_values`, in FP32 where they differ."""
        return values.float() - self.offset if self.offset else values
