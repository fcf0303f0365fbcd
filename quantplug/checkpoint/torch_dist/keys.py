"""Where the parameters of a model are in a checkpoint: keys of tensors, in all the ways that Megatron-Core names them.

A parameter `decoder.layers.3.self_attention.linear_proj.weight` is
    one by one   a tensor of that name (`singleton_local_shards`, layers that are not alike, quantized models), or
    stacked      layer 3 of `decoder.layers.self_attention.linear_proj.weight` [layers, ...],
an expert's `decoder.layers.3.mlp.experts.linear_fc1.weight69`
    one by one   `decoder.layers.3.mlp.experts.experts.69.linear_fc1.weight`, or
    stacked      expert 69 of `decoder.layers.3.mlp.experts.experts.linear_fc1.weight` [experts, ...], where layers are
                 stacked too layer 3, expert 69 of `decoder.layers.mlp.experts.experts.linear_fc1.weight`.
A `HybridModel` of pairs, of attention and networks in turn, has names of its own (`quantplug.mappings.hybrid_pattern`),
and no stacked layers: `decoder.layers.6.self_attention.linear_proj.weight` and `decoder.layers.7.mlp.…` of layer 3.
Some are cut into parts, each a tensor of its own, whose rows follow one another as in a model without tensor
parallelism. Read off what Megatron-Core 0.16.1 writes of every family (`sharded_state_dict` of its modules).
"""

import re
from collections.abc import Collection, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from quantplug.checkpoint.torch_dist.aside import kind_of
from quantplug.checkpoint.torch_dist.reader import Segment
from quantplug.mappings.hybrid_pattern import in_hybrid_model
from quantplug.mappings.keys import ParamKey
from quantplug.mappings.layouts import ModelDimensions
from quantplug.mappings.rows import Scope
from quantplug.mappings.table import Family

_EXPERT = re.compile(r"(?P<above>.*\.experts)\.(?:local_experts\.\*\.)?(?P<linear>linear_fc[12]\.\w+)\*?")
# Suffixes of the parts in their order, longer lists before those that they contain: gate and up of an expert or MLP
# (`apply_swiglu_sharded_factory`), projections and convolutions of gated delta nets and of Mamba mixers
# (`_split_tensor_factory`).
_PARTS = (
    ("",),
    ("_w", "_v"),
    (".query", ".key", ".value", ".z", ".beta", ".alpha"),
    (".query", ".key", ".value"),
    (".z", ".x", ".B", ".C", ".dt"),
    (".x", ".B", ".C"),
)

LAYERS_STACKED = re.compile(r"decoder\.layers\.[^\d.]")
"""Beginning of the key of a tensor of all layers."""

NORM_SPELLINGS = (
    (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
    (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
    (".self_attention.q_layernorm.", ".self_attention.linear_q_up_proj.layer_norm_"),
    (".self_attention.q_layernorm.", ".self_attention.linear_q_proj.layer_norm_"),
    (".self_attention.kv_layernorm.", ".self_attention.linear_kv_up_proj.layer_norm_"),
    (".norm.", ".mixer.in_proj.layer_norm_"),
)
"""Names of a norm that is a module, and of the same norm fused into the linear behind it.

Which of the two it is, is said by the layer spec, and for MLA by Megatron-Core's version.
"""


@dataclass(frozen=True)
class FoundParameter:
    """A parameter of the model in a checkpoint.

    Attributes:
        key: By the spelling under which it was found.
        segments: What it is made of, one below another.
    """

    key: ParamKey
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Naming:
    """How the model that was saved names its parameters.

    Attributes:
        dims: Its sizes.
        in_pairs: Whether it is a `HybridModel`, two of whose layers are one of the table's.
    """

    dims: ModelDimensions
    in_pairs: bool = False

    def places(self, spelling: str, key: ParamKey) -> Iterator[Segment]:
        """Where a parameter may be: under names with its numbers, or in tensors of all layers, all experts, or both.

        Args:
            spelling: As `of_checkpoint` gives it.
        """
        layer, axes = key.layer, []
        if self.in_pairs:
            spelling, layer = in_hybrid_model(spelling, layer)
        if layer is not None:
            count = self.dims.mtp_layers if key.stack == "mtp" else self.dims.num_layers
            axes.append(("layers.*", layer, count, (False,) if self.in_pairs else (False, True)))
        if key.expert is not None:
            axes.append(("experts.*", key.expert, self.dims.num_experts, (False, True)))
        for stacked in product(*(ways for *_, ways in axes)):
            name, place, of = spelling, [], []
            for (numbered, number, count, _), is_stacked in zip(axes, stacked, strict=True):
                name = name.replace(numbered, numbered[:-2] if is_stacked else numbered[:-1] + str(number), 1)
                place += [number] if is_stacked else []
                of += [count] if is_stacked else []
            yield Segment(name, tuple(place), tuple(of))


def naming_of(family: Family, dims: ModelDimensions, tensors: Container[str]) -> Naming:
    """How a checkpoint names the parameters of a model of these sizes: by the norm behind all layers.

    Args:
        tensors: Keys of the checkpoint.
    """
    outside = (name for row in family.mappings if row.scope is Scope.MODEL for name in row.megatron)
    in_pairs = [(name, in_hybrid_model(name, None)[0]) for name in outside]
    return Naming(dims, any(theirs != own and theirs in tensors for own, theirs in in_pairs))


def find_parameters(family: Family, naming: Naming, tensors: Collection[str]) -> Iterator[FoundParameter]:
    """Every parameter of a model that a checkpoint has; one that it has twice comes twice.

    Args:
        tensors: Keys of the checkpoint.
    """
    for row in family.mappings:
        spellings = {} if row.role.is_passthrough else _spellings(row.megatron)
        for key in row.keys(naming.dims) if spellings else ():
            for spelling, module in spellings.items():
                for whole in naming.places(spelling, key):
                    segments = _segments(whole, tensors)
                    if segments:
                        yield FoundParameter(ParamKey(module, key.layer, key.expert), segments)


def _spellings(names: Sequence[str]) -> dict[str, str]:
    """Every name that a parameter may have in a checkpoint, numbers apart, with its spelling in the table."""
    spellings = {of_checkpoint(name): name for name in reversed(names)}
    for name in names:
        for one, other in (*NORM_SPELLINGS, *(pair[::-1] for pair in NORM_SPELLINGS)):
            if one in name:
                spellings.setdefault(name.replace(one, other), name)
    return spellings


def _segments(whole: Segment, tensors: Collection[str]) -> tuple[Segment, ...]:
    """The parts that a checkpoint has of a parameter, one of which may be all of it; none if it is not there."""
    for parts in _PARTS:
        if all(whole.key + part in tensors for part in parts):
            return tuple(replace(whole, key=whole.key + part) for part in parts)
    return ()


def of_checkpoint(spelling: str) -> str:
    """A parameter's name as a checkpoint has it, numbers apart.

    Grouped and sequential experts have one: `….experts.experts.*.linear_fc1.weight`.
    """
    match = _EXPERT.fullmatch(spelling)
    if match is None or "shared_experts" in spelling:
        return spelling
    return f"{match['above']}.experts.*.{match['linear']}"


def unknown_keys(keys: Collection[str], found: Container[str]) -> list[str]:
    """Keys of tensors that are no parameter of the model, no quantizer's, and no trainer's."""
    return [key for key in keys if key not in found and "_quantizer." not in key and kind_of(key) is None]
