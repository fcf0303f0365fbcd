"""A live Megatron model as a stream of identified parameters.

Layer and expert ids are read from the modules (`layers_of`, `MoELayer.local_expert_indices`), so they are global under
pipeline, virtual pipeline and expert parallelism, and nothing is parsed out of a name. The layers of multi-token
prediction are counted from 0, whatever the decoder has.

Whether and where tensor parallelism cuts a parameter is read from the *type* of its layer, not from the
`tensor_model_parallel` / `partition_dim` attributes of the tensor: Megatron sets those only when it initializes
weights, and it hides the parallelism of experts from TE (`explicit_expert_comm`), so that TE marks every expert weight,
row parallel ones too, as cut along dimension 0 (megatron.core.extensions.transformer_engine; TE's `GroupedLinear`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TELinear,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model
from torch.distributed.tensor import DTensor

from quantplug.errors import Offender, UnsupportedModelError
from quantplug.mappings.keys import ParamKey
from quantplug.megatron.layers import Layer, layers_of, pattern_of_model
from quantplug.megatron.models.delta_net import ZeroCentredNorm
from quantplug.megatron.parallel import current_topology
from quantplug.megatron.releases.hybrid import HybridModel, HybridStack
from quantplug.topology import ParallelTopology, Shard, ShardAxis

LanguageModel: TypeAlias = GPTModel | HybridModel
"""What a model is, or each of its virtual pipeline stages."""

# ModelOpt gives a module a subclass of the class that it had, so these hold for quantized layers as well.
_GROUPED = (TEColumnParallelGroupedLinear, TERowParallelGroupedLinear)
_COLUMN_PARALLEL = (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TEColumnParallelGroupedLinear,
)
_ROW_PARALLEL = (RowParallelLinear, TERowParallelLinear, TERowParallelGroupedLinear)
# A recurrent mixer's convolution has a kernel for each channel, and the mixer itself some values for each head.
_CUT_BY_CHANNEL = (torch.nn.Conv1d, GatedDeltaNet, MambaMixer)
_ATTENTION_CORES = (DotProductAttention, TEDotProductAttention)  # Their one weight has an entry for each head.
# Modules whose children are no part of the model: what hangs below a linear or an attention core are its quantizers.
_LEAVES = (torch.nn.Conv1d, *_COLUMN_PARALLEL, *_ROW_PARALLEL, TELinear, *_ATTENTION_CORES)
_TE_NORMS = (te.RMSNorm, te.LayerNorm)
_TORCH_NORMS = (torch.nn.RMSNorm, torch.nn.LayerNorm)  # What Megatron's WrappedTorchNorm makes.
# Parameters of a linear layer that tensor parallelism leaves whole; a row parallel bias is added after the reduction.
_WHOLE_IN_COLUMN_PARALLEL = frozenset({"layer_norm_weight", "layer_norm_bias"})
_WHOLE_IN_ROW_PARALLEL = frozenset({"bias"})


@dataclass(frozen=True)
class MegatronParameter:
    """One weight that this rank holds.

    Attributes:
        key: Its identity across ranks.
        local_name: Its name in `named_parameters` (or `named_buffers`) of its model chunk.
        tensor: The live parameter (or buffer) itself, this rank's slice of it.
        shard: Which slice that is; None where the rank holds the whole tensor.
        zero_centred: Of a norm's weight, whether the norm multiplies with 1 + weight; None for all others.
    """

    key: ParamKey
    local_name: str
    tensor: torch.Tensor
    shard: Shard | None
    zero_centred: bool | None = None


@dataclass(frozen=True)
class _Location:
    """Where the walk stands: names so far, and the global ids that hold below this module."""

    pattern: str = ""
    local_name: str = ""
    layer: int | None = None
    expert: int | None = None
    # Global ids of the experts this rank holds, in order; empty outside the routed experts.
    experts: tuple[int, ...] = ()
    # Whether this module has a parameter that is cut along dimension 0, though its type does not say so.
    is_cut: bool = False
    # The model's layers and what keys call them, and what they call the norm behind those of the decoder.
    layers: Mapping[torch.nn.Module, Layer] = field(default_factory=dict)
    final_norm: str = ""

    def child(self, local_name: str, pattern: str | None = None) -> "_Location":
        return replace(
            self,
            pattern=_join(self.pattern, local_name if pattern is None else pattern),
            local_name=_join(self.local_name, local_name),
        )


def refuse_sharded(models: Iterable[torch.nn.Module]) -> None:
    """Refuses models whose parameters are cut into shards that are no tensor parallelism's.

    By FSDP, PyTorch's `fully_shard` or Megatron's own; or by generalized tensor parallelism, whose ranks put a weight
    together for each forward (`tensor_parallel_num_weight_shards`, Megatron-Core 0.19).

    Args:
        models: Modules with a `GPTModel` or `HybridModel` inside; others are not looked at.

    Raises:
        UnsupportedModelError: Names the first such parameter of each model, or the setting.
    """
    offenders = []
    inside = [module for model in models for module in model.modules() if isinstance(module, LanguageModel)]
    _refuse_weight_shards(inside)
    for index, model in enumerate(inside):
        sharded = next((name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)), None)
        if sharded is not None:
            reason = "is a shard of FSDP's (a DTensor), as others of its model are"
            offenders.append(Offender(f"model[{index}]: {sharded}", reason))
    if offenders:
        raise UnsupportedModelError(
            "Weights that FSDP has cut into shards are not gathered.",
            offenders,
            "Quantize a model before fully_shard. To save or export one, gather it where it is, with unshard() of "
            "every FSDPModule in it; or load its weights into a model without FSDP.",
        )


def _refuse_weight_shards(models: Sequence[LanguageModel]) -> None:
    offenders = [
        Offender(f"model[{index}]: {setting}", f"is {shards}: a rank holds a part of the rows that it computes with")
        for index, model in enumerate(models)
        for setting in ("gtp_weight_remat_size", "expert_gtp_weight_remat_size")
        if (shards := vars(model.config).get(setting, 1)) > 1
    ]
    if offenders:
        raise UnsupportedModelError(
            "Weights that generalized tensor parallelism has cut into shards are not gathered.",
            offenders,
            "Save a checkpoint, and load it into a model that is built without tensor_parallel_num_weight_shards and "
            "expert_tensor_parallel_num_weight_shards.",
        )


def model_chunks(model: torch.nn.Module | Sequence[torch.nn.Module]) -> list[LanguageModel]:
    """The bare `GPTModel`s or `HybridModel`s of a model: one, or one for each virtual pipeline stage.

    Args:
        model: One of them, one wrapped in Float16Module or DDP, or the list of them that virtual pipelining makes.

    Raises:
        UnsupportedModelError: There is something else inside; or FSDP has cut its parameters into shards.
    """
    chunks = unwrap_model([model] if isinstance(model, torch.nn.Module) else list(model))
    offenders = [
        Offender(f"model[{index}]", f"is a {type(chunk).__name__}, neither a GPTModel nor a HybridModel")
        for index, chunk in enumerate(chunks)
        if not isinstance(chunk, LanguageModel)
    ]
    if offenders or not chunks:
        raise UnsupportedModelError(
            "The model holds no GPTModel."
            if not chunks
            else "Not every part of the model is a GPTModel or HybridModel.",
            offenders,
            "Pass Megatron-Core's GPTModel or HybridModel (MambaModel), bare or wrapped (Float16Module, DDP), or its "
            "virtual stages.",
        )
    refuse_sharded(chunks)
    return chunks


def iter_parameters(model: torch.nn.Module | Sequence[torch.nn.Module]) -> Iterator[MegatronParameter]:
    """Every weight that this rank holds, in the order of the modules.

    Parameters, and the router's `expert_bias`, which is a buffer but a weight all the same. Quantizers and TE's
    `_extra_state` are left out. A quantized model gives the same stream as the model it was made from.

    Raises:
        UnsupportedModelError: There is something else than a `GPTModel` or `HybridModel` inside.
        TopologyError: Megatron's parallel groups are not initialized.
    """
    topology = current_topology()
    for chunk in model_chunks(model):
        pattern = pattern_of_model(chunk)
        start = _Location(
            layers={layer.module: layer for layer in layers_of(chunk)},
            final_norm="" if pattern is None else pattern.final_norm,
        )
        yield from _walk(chunk, start, topology)


def _walk(module: torch.nn.Module, location: _Location, topology: ParallelTopology) -> Iterator[MegatronParameter]:
    for name, tensor, here in _own_weights(module, location):
        key = ParamKey(here.pattern, here.layer, here.expert)
        shard = _shard(module, name, location, topology)
        yield MegatronParameter(key, here.local_name, tensor, shard, _zero_centred(module, name))
    for child, here in _children(module, location):
        yield from _walk(child, here, topology)


def _own_weights(module: torch.nn.Module, location: _Location) -> Iterator[tuple[str, torch.Tensor, _Location]]:
    """The weights that a module itself holds, not its children.

    Yields:
        Name in the module (`weight` for every `weight0`, `weight1`, ... of a grouped linear), tensor, location.
    """
    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, _GROUPED):
        yield from _grouped_weights(own, location)
        return
    # No gradient moves it, so Megatron keeps it as a buffer. But it decides which experts a token goes to (DeepSeek-V3,
    # arXiv 2412.19437, section 2.1.2), and a checkpoint without it routes wrongly.
    if isinstance(module, TopKRouter) and module.expert_bias is not None:
        own["expert_bias"] = module.expert_bias
    for name, tensor in own.items():
        yield name, tensor, location.child(name)


def _grouped_weights(
    own: Mapping[str, torch.Tensor], location: _Location
) -> Iterator[tuple[str, torch.Tensor, _Location]]:
    """A grouped linear names the tensors of its local experts weight0, weight1, ..., and bias0, ..."""
    for kind in ("weight", "bias"):
        for index, expert in enumerate(location.experts):
            if (name := f"{kind}{index}") in own:
                yield kind, own[name], replace(location.child(name, f"{kind}*"), expert=expert)


def _children(module: torch.nn.Module, location: _Location) -> Iterator[tuple[torch.nn.Module, _Location]]:
    if isinstance(module, _LEAVES):
        return
    if isinstance(module, SequentialMLP):
        # Below `local_experts` modules are numbered from 0 on every rank; the global ids are those that the layer above
        # told.
        experts = location.child("local_experts")
        for index, (expert, child) in enumerate(zip(location.experts, module.local_experts, strict=True)):
            yield child, replace(experts.child(str(index), "*"), expert=expert)
        return
    for name, child in module.named_children():
        if child in location.layers:
            layer = location.layers[child]
            yield child, replace(location.child(name), pattern=layer.pattern, layer=layer.number)
        elif isinstance(module, HybridStack) and name == "final_norm":
            yield child, location.child(name, location.final_norm)
        elif isinstance(module, MoELayer) and child is module.experts:
            yield child, replace(location.child(name), experts=tuple(module.local_expert_indices))
        # This norm is over the channels of this rank. Its type cannot be asked for: without mamba-ssm there is no such
        # class.
        elif isinstance(module, MambaMixer) and child is module.norm:
            yield child, replace(location.child(name), is_cut=True)
        else:
            yield child, location.child(name)


def _shard(module: torch.nn.Module, name: str, location: _Location, topology: ParallelTopology) -> Shard | None:
    if isinstance(module, _COLUMN_PARALLEL) and name not in _WHOLE_IN_COLUMN_PARALLEL:
        dim = 0
    elif isinstance(module, _ROW_PARALLEL) and name not in _WHOLE_IN_ROW_PARALLEL:
        dim = 1
    elif isinstance(module, (*_ATTENTION_CORES, *_CUT_BY_CHANNEL)) or location.is_cut:
        dim = 0
    else:
        return None
    # Routed experts have a tensor parallel size of their own. Shared experts stand beside them, not below, and are cut
    # like the dense layers.
    axis = ShardAxis.ETP if location.experts else ShardAxis.TP
    index, count = topology.place_on(axis)
    return Shard(axis, dim, index, count) if count > 1 else None


def _zero_centred(module: torch.nn.Module, name: str) -> bool | None:
    """Whether a norm multiplies with 1 + this weight of its; None for what is no weight of a norm.

    Megatron's own config has one setting for all of them (`layernorm_zero_centered_gamma`), but not every norm asks it:
    that of a Mamba mixer does not.
    """
    if isinstance(module, ZeroCentredNorm):
        return True
    if (isinstance(module, _TE_NORMS) and name == "weight") or (
        isinstance(module, te.LayerNormLinear) and name == "layer_norm_weight"
    ):
        return bool(module.zero_centered_gamma)
    return False if isinstance(module, _TORCH_NORMS) and name == "weight" else None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
