"""Grouped experts: one Megatron module that holds many weights, one Hugging Face entry for each.

Megatron names the weights of its local experts either `experts.linear_fc1.weight{i}` (`TEGroupedMLP`, one module) or
`experts.local_experts.{i}.linear_fc1.weight` (`SequentialMLP`). Both stand for the same per-expert Hugging Face
tensors, and both are renumbered from local to global experts: `grouped_mlp` makes one row of a table for both. Where
Hugging Face too holds all experts of a layer in one tensor, the rows are `FusedExpertMapping` and
`FusedGatedExpertMapping`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import GATED, GATED_JOINED, ROW, Layout, ModelDimensions
from quantplug.mappings.rows import Placement, Role, Scope, WeightMapping


@dataclass(frozen=True)
class FusedExpertMapping(WeightMapping):
    """One expert's tensor as a slice of the Hugging Face tensor that holds all experts of its layer.

    `hf` carries `*` for the layer alone. All experts share their scales, of which there is one for a whole tensor.

    Attributes:
        transposed: Whether a matrix is stored as [experts, in, out]. Declared, never guessed from shapes.
        packed: How the same weight is written where experts are quantized, if servers then load them one by one.
        fused_where_read: Whether they do so only in formats of which they read no such tensor.
    """

    transposed: bool = False
    packed: WeightMapping | None = None
    fused_where_read: bool = False

    def when_packed(self, *, fused_is_read: bool) -> WeightMapping:
        # Most servers build quantized experts from names of each expert, and read them fused in some formats only.
        stays = self.packed is None or (self.fused_where_read and fused_is_read)
        return self if stays or self.packed is None else self.packed

    def unturned(self) -> "FusedExpertMapping":
        return replace(self, transposed=False)

    def renamed(self, rename: Callable[[str], str]) -> Self:
        # A vision-language model writes its packed experts under its own names too.
        packed = None if self.packed is None else self.packed.renamed(rename)
        return replace(super().renamed(rename), packed=packed)

    def placement(self, key: ParamKey, dims: ModelDimensions) -> Placement:
        # Keys of such rows always have an expert: `WeightMapping.keys` numbers them in the scope EXPERT.
        assert key.expert is not None
        return Placement(key.expert, dims.num_experts, self.transposed)

    def experts_module(self, key: ParamKey, dims: ModelDimensions) -> str:
        return self.hf_names(key, dims)[0].rpartition(".")[0]

    def group(self, key: ParamKey, dims: ModelDimensions) -> str | None:
        # Beside one tensor of all experts there is room for one scale, so they must be packed with one amax.
        return self.hf_names(key, dims)[0] if self.role is Role.LINEAR else None


@dataclass(frozen=True)
class FusedGatedExpertMapping(FusedExpertMapping):
    """gate_proj and up_proj of one expert as one slice: [gate; up] joined, or their rows in turn, by the layout."""

    layout: Layout = GATED_JOINED


def grouped_mlp(linear: str, hf: tuple[str, ...], layout: Layout) -> WeightMapping:
    """The row of an experts' linear under both of Megatron's spellings.

    Args:
        linear: `linear_fc1` or `linear_fc2`.
        hf: Per-expert Hugging Face patterns, layer then expert as `*`.
    """
    return WeightMapping(
        megatron=spellings(linear, "weight"),
        hf=hf,
        scope=Scope.EXPERT,
        layout=layout,
        role=Role.LINEAR,
    )


def joined_experts(
    experts: str, *, transposed: bool, fused_where_read: bool = False
) -> tuple[FusedExpertMapping, FusedExpertMapping]:
    """The rows of gated experts that a plain checkpoint holds in one tensor for each linear of a layer.

    Rows of gate_proj lie before those of up_proj. Where experts are quantized they are written one by one.

    Args:
        experts: Pattern of the Hugging Face module of all experts.
        transposed: Whether matrices are stored as [experts, in, out].
        fused_where_read: Whether they are written one by one only in formats of which servers read no such tensor.
    """
    # Rows of the same Megatron parameters in both forms; `when_packed` says which of them is written.
    gate_and_up = (f"{experts}.*.gate_proj.weight", f"{experts}.*.up_proj.weight")
    return (
        FusedGatedExpertMapping(
            spellings("linear_fc1", "weight"),
            (f"{experts}.gate_up_proj",),
            Scope.EXPERT,
            GATED_JOINED,
            Role.LINEAR,
            transposed=transposed,
            packed=grouped_mlp("linear_fc1", gate_and_up, GATED),
            fused_where_read=fused_where_read,
        ),
        FusedExpertMapping(
            spellings("linear_fc2", "weight"),
            (f"{experts}.down_proj",),
            Scope.EXPERT,
            ROW,
            Role.LINEAR,
            transposed=transposed,
            packed=grouped_mlp("linear_fc2", (f"{experts}.*.down_proj.weight",), ROW),
            fused_where_read=fused_where_read,
        ),
    )


def spellings(linear: str, tensor: str) -> tuple[str, str]:
    """Megatron's two names of an experts' tensor: grouped, and one module an expert.

    Args:
        linear: `linear_fc1` or `linear_fc2`.
        tensor: `weight` or `bias`.
    """
    experts = "decoder.layers.*.mlp.experts"
    # The grouped one first: it is what a parameter is known by, whichever of the two a model has.
    return f"{experts}.{linear}.{tensor}*", f"{experts}.local_experts.*.{linear}.{tensor}"
