"""Which quantizers share one amax, on this rank and over which ranks: the plan of the reductions, without any data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, IntEnum

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.experts import SequentialMLP
from modelopt.torch.quantization.nn import GroupedQuantizer, QuantModule, SequentialQuantizer, TensorQuantizer
from modelopt.torch.quantization.utils import (
    is_quantized_column_parallel_linear,
    is_quantized_row_parallel_linear,
)
from modelopt.torch.utils.distributed import DistributedProcessGroup
from torch import nn

from quantplug.calibration.policy import ExpertWeights
from quantplug.calibration.quantizers import leaf_quantizers, needs_amax
from quantplug.errors import Offender, TopologyError


class Axis(IntEnum):
    """A dimension of the ranks; in the order in which all of them reduce, so that none waits for another.

    One after another the reductions of a quantizer's axes give the maximum over their product.
    """

    WORLD = 0  # A module that names no groups is on every rank, as ModelOpt takes it.
    DATA = 1
    EXPERT_DATA = 2
    TENSOR = 3
    EXPERT_TENSOR = 4
    EXPERT = 5


TENSOR_AXES = frozenset({Axis.TENSOR, Axis.EXPERT_TENSOR})
"""The dimensions whose ranks hold slices of a weight."""


class QuantizerRole(Enum):
    """What is quantized, which says who must have an amax before the reduction."""

    WEIGHT = "weight"  # Every rank: it has the weight.
    ACTIVATION = "activation"  # Every rank, or none.
    EXPERT_ACTIVATION = "input of routed experts"  # Any rank: the experts of another may have seen no token.


@dataclass(frozen=True)
class SharedAmax:
    """One amax, and all that share it.

    Attributes:
        name: Name that is the same on all ranks that share it; `*` stands for every local expert.
        role: What is quantized.
        leaves: This rank's quantizers.
        axes: The ranks to reduce over.
        dtype: Dtype of an amax that a quantizer does not have yet.
        slices: The dimensions whose ranks hold slices of the same tensor.
    """

    name: str
    role: QuantizerRole
    leaves: tuple[TensorQuantizer, ...]
    axes: frozenset[Axis]
    dtype: torch.dtype
    slices: frozenset[Axis] = frozenset()


@dataclass(frozen=True)
class ReductionPlan:
    """All amaxes of this rank, and the process group of every axis that has more than one rank."""

    amaxes: tuple[SharedAmax, ...]
    groups: Mapping[Axis, dist.ProcessGroup | None]


def plan_reductions(chunks: Sequence[nn.Module], expert_weights: ExpertWeights) -> ReductionPlan:
    """What `mtq.quantize` placed in a model, as amaxes to reduce.

    A weight's per-tensor amax is of the whole weight, over all its shards. That of blocks or channels is reduced only
    over ranks that hold the same blocks or channels. A routed expert's weight stays its own, unless all share one;
    the inputs of a layer's experts always share one amax, as those of a grouped linear layer do.

    Raises:
        TopologyError: Two modules name different ranks for one axis.
    """
    amaxes: dict[str, SharedAmax] = {}
    groups: dict[Axis, dist.ProcessGroup | None] = {}
    for index, chunk in enumerate(chunks):
        families = _expert_families(index, chunk)
        for name, module in chunk.named_modules():
            if not isinstance(module, QuantModule):
                continue
            here = axes_of(module)
            found = list(_amaxes_of(f"{index}.{name}", module, frozenset(here), families, expert_weights))
            if found:  # A module without any, such as ModelOpt's own wrapper of a dense MLP, joins no reduction.
                _add_groups(groups, here, name)
            # Members of one family have one name: their quantizers are put together under it.
            for amax in found:
                known = amaxes.setdefault(amax.name, amax)
                # `setdefault` gives back this very amax if the name is new.
                if known is not amax:
                    amaxes[amax.name] = replace(known, leaves=known.leaves + amax.leaves)
    return ReductionPlan(tuple(amaxes.values()), groups)


def _expert_families(index: int, chunk: nn.Module) -> dict[TensorQuantizer, str]:
    """Quantizers that have a counterpart in every other local expert, each with the name that all of them share.

    Args:
        index: Number of the chunk, which the name begins with.
        chunk: A virtual pipeline stage.
    """
    families: dict[TensorQuantizer, str] = {}
    for name, module in chunk.named_modules():
        if isinstance(module, SequentialMLP):
            members: Iterator[nn.Module] = iter(module.local_experts)
        elif isinstance(module, GroupedQuantizer):
            members = iter(module)
        else:
            continue
        for member in members:
            for path, leaf in member.named_modules():
                if isinstance(leaf, TensorQuantizer):
                    families[leaf] = f"{index}.{name}.*" + (f".{path}" if path else "")
    return families


def _amaxes_of(
    name: str,
    module: QuantModule,
    axes: frozenset[Axis],
    families: Mapping[TensorQuantizer, str],
    expert_weights: ExpertWeights,
) -> Iterator[SharedAmax]:
    dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)
    for child_name, child in module.named_children():
        if not isinstance(child, (TensorQuantizer, SequentialQuantizer, GroupedQuantizer)):
            continue
        is_weight = child_name.endswith("weight_quantizer")
        for number, leaf in enumerate(leaf_quantizers(child)):
            if not needs_amax(leaf):
                continue
            own, family = f"{name}.{child_name}.{number}", families.get(leaf)
            # Shards that hold different blocks or channels have different amaxes, and nothing to reduce.
            over = axes if _whole_over_tensor(module, child_name, leaf) else axes - TENSOR_AXES
            if is_weight and expert_weights is ExpertWeights.SHARED:
                yield SharedAmax(family or own, QuantizerRole.WEIGHT, (leaf,), over, dtype, axes & TENSOR_AXES)
            # Over EXPERT lie other experts, not copies of this one. Their maximum would coarsen every expert with small
            # weights.
            elif is_weight:
                slices = axes & TENSOR_AXES
                yield SharedAmax(own, QuantizerRole.WEIGHT, (leaf,), over - {Axis.EXPERT}, dtype, slices)
            else:
                role = QuantizerRole.EXPERT_ACTIVATION if family or Axis.EXPERT in axes else QuantizerRole.ACTIVATION
                yield SharedAmax(family or own, role, (leaf,), over, dtype)


def _whole_over_tensor(module: QuantModule, child_name: str, leaf: TensorQuantizer) -> bool:
    """Whether the amax of every tensor parallel rank is of the same whole: the tensor, or the same channels."""
    # One number for the tensor, or none yet, for data may still be missing on this rank alone.
    if leaf.amax is None or leaf.amax.numel() == 1:
        return True
    column, row = is_quantized_column_parallel_linear(module), is_quantized_row_parallel_linear(module)
    # Column parallel ranks hold different rows, so no row's amax is on two of them. Row parallel ranks hold pieces of
    # every row: the amax of a row is the largest of them, but a block lies within one rank.
    if child_name == "weight_quantizer":
        is_per_row = leaf.block_sizes is None and leaf.amax.ndim == 2 and leaf.amax.shape[1] == 1
        return is_per_row if row else not column
    # A column parallel layer takes the whole input and gives a share of the output; a row parallel one the reverse.
    return not row if child_name == "input_quantizer" else not column


def axes_of(module: QuantModule) -> dict[Axis, DistributedProcessGroup]:
    """The axes over which a module is spread, with their groups; those that it does not have are left out."""
    state = module.parallel_state
    # ModelOpt gives the experts' modules the groups of experts in the same places (QuantModule.parallel_state), so that
    # here only the axis tells them apart.
    is_expert = state.expert_model_parallel_group.is_initialized()
    data = Axis.EXPERT_DATA if is_expert else Axis.DATA
    named = {
        Axis.WORLD if state.data_parallel_group.group is None else data: state.data_parallel_group,
        Axis.EXPERT_TENSOR if is_expert else Axis.TENSOR: state.tensor_parallel_group,
        Axis.EXPERT: state.expert_model_parallel_group,
    }
    return {axis: group for axis, group in named.items() if group.is_initialized()}


def _add_groups(
    groups: dict[Axis, dist.ProcessGroup | None], here: Mapping[Axis, DistributedProcessGroup], name: str
) -> None:
    for axis, group in here.items():
        if group.world_size() == 1:
            continue
        # One bucket an axis goes over one group, so all modules must mean the same ranks by it.
        known = groups.setdefault(axis, group.group)
        ranks, other = dist.get_process_group_ranks(known), dist.get_process_group_ranks(group.group)
        if ranks != other:
            raise TopologyError(
                "Modules of one model are spread over different ranks.",
                [Offender(name, f"{axis.name.lower()} parallel over ranks {other}, others over {ranks}")],
                "Quantize one model, on one layout, at a time.",
            )
