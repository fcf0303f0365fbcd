"""Quantized Megatron-Core modules: which are ours, and which are ModelOpt's knowingly.

Ours, below:
    TEColumnParallelGroupedLinear, TERowParallelGroupedLinear, TEGroupedMLP. In ModelOpt 0.47 the state of an expert's
    quantizer has the dense layers' replica ids, shard axes that are right for two experts only, and settings by local
    expert: `dist_checkpointing.save` refuses it, or what is loaded belongs to other experts.
ModelOpt's, because one weight with one quantizer is sharded like any dense layer:
    TEColumnParallelLinear, TERowParallelLinear and TELayerNormColumnParallelLinear, which refuse the shards that
    ModelOpt places wrong, TELinear, with other process groups than ModelOpt's, and TEDotProductAttention, whose sinks
    ModelOpt does not shard (`quantplug.plugins.dense`);
    SequentialMLP (one module an expert; it refuses TP with EP), whose outputs are weighed as servers weigh them
    (`quantplug.plugins.expert_outputs`).

What a sharded checkpoint holds of an expert's quantizer is keyed by *global* layer and expert, as Megatron keys its
weight: `decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc1.weight_quantizer._amax`. So a checkpoint saved
at one (TP, EP, ETP, PP) loads at any other.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from modelopt.torch.utils.distributed import ParallelState

from quantplug.errors import Offender, ShapeError, UnsupportedQuantizationError
from quantplug.plugins import extra_state
from quantplug.plugins.amax_state import (
    ShardDim,
    as_blocks,
    block_size,
    list_blocks,
    require_whole_blocks,
    shard_axis,
)
from quantplug.plugins.expert_outputs import WeighsOutputs
from quantplug.plugins.refusals import refuse_unsupported
from quantplug.plugins.transformer_engine import QuantGroupedLinear

Offsets = tuple[tuple[int, int, int], ...]


class QuantMegatronGroupedLinear(QuantGroupedLinear):
    """Quantized grouped linear whose experts are spread over expert parallel ranks, and sharded over ETP.

    Attributes:
        shard_dim: The dimension of every weight that expert tensor parallelism shards.
    """

    shard_dim: ClassVar[ShardDim]

    def _setup(self) -> None:
        # Experts have data and tensor parallel groups of their own; amaxes must not be reduced over the dense layers'.
        groups = self._pg_collection
        self.parallel_state = ParallelState(groups.expt_dp, groups.expt_tp, groups.ep)
        super()._setup()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """The experts' weights as Megatron shards them, and the state of every quantizer.

        Raises:
            ShapeError: Scale blocks straddle the shards of a weight.
            UnsupportedQuantizationError: A quantizer has state that we cannot place among the ranks.
        """
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state |= self._activation_state(prefix, sharded_offsets, metadata)
        # Megatron gives each expert the whole module's extra state, the first one's under the name without a number.
        settings = [state[f"{prefix}_extra_state{expert or ''}"] for expert in range(self.num_gemms)]
        own = extra_state.of_experts([of_expert.data for of_expert in settings])
        for expert, of_expert in enumerate(settings):
            of_expert.data = own[expert]
            state |= self._expert_state(expert, prefix, sharded_offsets, metadata)
        return state

    def require_placeable(self, prefix: str) -> None:
        """Refuses, before any state is made, every quantizer whose state has no place in a sharded checkpoint.

        Args:
            prefix: Full name of this module with a dot: inside its own state dict Megatron names it by its last part.
        """
        # None is for the quantizers of inputs and outputs, which belong to no expert.
        errors: list[tuple[int | None, ShapeError | UnsupportedQuantizationError]] = []
        for expert in (None, *range(self.num_gemms)):
            try:
                self._require_placeable(expert, prefix)
            except (ShapeError, UnsupportedQuantizationError) as error:
                errors.append((None if expert is None else self._global_expert(expert), error))
        if errors:
            _, first = errors[0]
            offenders = [
                replace(offender, expert=expert)
                for expert, error in errors
                if type(error) is type(first)
                for offender in error.offenders
            ]
            raise type(first)(first.problem, offenders, first.remedy)

    def _require_placeable(self, expert: int | None, prefix: str) -> None:
        if expert is None:
            _require_scalar_amax(prefix, self._activation_tensors())
        else:
            quantizer, weight = self.weight_quantizer[expert], self.get_parameter(f"weight{expert}")
            self._shard_axes(f"{prefix}weight_quantizer.{expert}", quantizer, weight)

    def _global_expert(self, expert: int) -> int:
        # Expert parallel ranks hold equal blocks of experts in order.
        return int(self._pg_collection.ep.rank()) * self.num_gemms + expert

    def _activation_tensors(self) -> dict[str, torch.Tensor]:
        """What the input and output quantizers hold, by its name in this module's state dict."""
        return {
            f"{name}.{key}": value
            for name in ("input_quantizer", "output_quantizer")
            for key, value in self.get_submodule(name).state_dict(keep_vars=True).items()
        }

    def _activation_state(self, prefix: str, offsets: Offsets, metadata: dict[str, Any]) -> ShardedStateDict:
        """The input and output quantizers': the same on every rank that has this layer."""
        # Replicated: the replica ids that Megatron derives from the two groups let one rank write each.
        tensors = self._activation_tensors()
        _require_scalar_amax(prefix, tensors)
        return make_sharded_tensors_for_checkpoint(
            tensors,
            prefix,
            sharded_offsets=offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )

    def _expert_state(self, expert: int, prefix: str, offsets: Offsets, metadata: dict[str, Any]) -> ShardedStateDict:
        """One local expert's weight quantizer, placed as its weight is: by global expert, and sharded over ETP."""
        groups = self._pg_collection
        weight, quantizer = self.get_parameter(f"weight{expert}"), self.weight_quantizer[expert]
        axes = self._shard_axes(f"{prefix}weight_quantizer.{expert}", quantizer, weight)
        local = {
            f"weight_quantizer.{key}": as_blocks(quantizer, value, weight) if key == "_amax" else value
            for key, value in quantizer.state_dict(keep_vars=True).items()
        }
        global_expert = self._global_expert(expert)
        # Megatron has two forms of experts in a checkpoint: a key for each, or one key with an axis of all experts in
        # front. A quantizer's state must take the form of its weight, or a load looks for it under the other one.
        if metadata.get("singleton_local_shards", False):
            key_prefix = f"{global_expert}.{prefix}"
        else:
            key_prefix = prefix
            offsets = (*offsets, (len(offsets), global_expert, groups.ep.size() * self.num_gemms))
        sharded = make_sharded_tensors_for_checkpoint(
            local,
            "",
            {f"weight_quantizer.{key}": axis for key, axis in axes.items() if axis is not None},
            offsets,
            tp_group=groups.expt_tp,
            dp_cp_group=groups.expt_dp,
        )
        # Keys in the checkpoint are global, those of the state dict this rank's own: only the first are renamed.
        replace_prefix_for_sharding(sharded, "", key_prefix)
        # Back under this rank's own number of the expert, by which `load_state_dict` finds the quantizer.
        own = f"{prefix}weight_quantizer.{expert}."
        return {own + key.removeprefix("weight_quantizer."): value for key, value in sharded.items()}

    def _shard_axes(self, name: str, quantizer: torch.nn.Module, weight: torch.Tensor) -> dict[str, int | None]:
        """Buffer name to the axis along which it is sharded over ETP; None: replicated."""
        axes: dict[str, int | None] = {}
        size = self._pg_collection.expt_tp.size()
        for path, leaf in quantizer.named_modules():
            if not isinstance(leaf, TensorQuantizer):
                continue
            for key, value in leaf.state_dict().items():
                full = f"{path}.{key}" if path else key
                # The amax of a whole weight, above those of its blocks, is the same for every shard.
                if key == "_global_amax":
                    axes[full] = None
                    continue
                # A pre-quant scale has shards of its own, which nothing here places.
                if key != "_amax":
                    raise _unplaceable(f"{name}.{full}")
                axes[full] = shard_axis(f"{name}.{full}", leaf, value, weight, self.shard_dim, size)
        return axes

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Puts the experts' settings together before TE's hook sees them: it takes them for its own FP8 state."""
        # A plain state dict has one extra state for the module, a sharded checkpoint one an expert.
        keys = [f"{prefix}_extra_state{expert or ''}" for expert in range(self.num_gemms)]
        if len(keys) > 1 and all(key in state_dict for key in keys):
            states = [state_dict.pop(key) for key in keys]
            state_dict[keys[0]] = extra_state.of_module(states, self._global_expert(0))
        for expert, quantizer in enumerate(self.weight_quantizer):
            list_blocks(state_dict, f"{prefix}weight_quantizer.{expert}._amax", quantizer)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class QuantColumnParallelGroupedLinear(QuantMegatronGroupedLinear):
    """Quantized TEColumnParallelGroupedLinear: ETP shards the rows (out_features) of every weight."""

    shard_dim = ShardDim.OUT
    _is_column_parallel = True  # ModelOpt's amax reductions ask for this name.


class QuantRowParallelGroupedLinear(QuantMegatronGroupedLinear):
    """Quantized TERowParallelGroupedLinear: ETP shards the columns (in_features) of every weight."""

    shard_dim = ShardDim.IN
    _is_row_parallel = True  # ModelOpt's amax reductions ask for this name.


class QuantTEGroupedMLP(WeighsOutputs, QuantModule):
    """Quantized TEGroupedMLP: every expert has a key of its own, and a block amax of gate and up is split."""

    def _setup(self) -> None:
        refuse_unsupported(self)
        groups = self.linear_fc1._pg_collection
        self.parallel_state = ParallelState(groups.expt_dp, groups.expt_tp, groups.ep)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Megatron's own, with every expert a key of its own (`singleton_local_shards`), as in ModelOpt's checkpoints.

        Raises:
            ShapeError: Scale blocks straddle the shards of a weight, or a shard's gate and up.
        """
        # Before any state is made: this names every expert at fault, where making the state would stop at the first.
        for name in ("linear_fc1", "linear_fc2"):
            self.get_submodule(name).require_placeable(f"{prefix}{name}.")
        metadata = {**(metadata or {}), "singleton_local_shards": True}
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if not self.config.gated_linear_unit:
            return state
        # As Megatron does with the weight: gate and up are saved as two halves, each sharded over ETP, because a shard
        # holds rows of both and shards of another ETP hold other rows of each.
        for expert, quantizer in enumerate(self.linear_fc1.weight_quantizer):
            for path, leaf in quantizer.named_modules():
                name = ".".join(filter(None, (f"{prefix}linear_fc1.weight_quantizer.{expert}", path, "_amax")))
                if isinstance(leaf, TensorQuantizer) and name in state and self._is_split(name, leaf, state[name]):
                    state[name] = apply_swiglu_sharded_factory(state[name], sharded_offsets, True)
        return state

    def _is_split(self, name: str, quantizer: TensorQuantizer, amax: ShardedTensor) -> bool:
        """Whether this amax is of gate rows above up rows: [N, 1], or [N/b, 1, K/b, 1] with whole blocks of each.

        Where one block has rows of both (a width that does not divide), no ETP but 1 can hold it, and it stays whole.
        """
        if amax.data.ndim != 4:
            # One for each row of this shard, gate's and up's; or one for the whole weight.
            return amax.data.ndim == 2 and amax.data.numel() > 1
        if self.config.moe_ffn_hidden_size % block_size(quantizer, ShardDim.OUT):
            return False
        shard_rows = self.config.moe_ffn_hidden_size // self.tp_group.size()
        require_whole_blocks(name, quantizer, shard_rows, ShardDim.OUT)
        return True


def _require_scalar_amax(prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        if not name.endswith("._amax") or value.numel() != 1:
            raise _unplaceable(f"{prefix}{name}")


def _unplaceable(name: str) -> UnsupportedQuantizationError:
    return UnsupportedQuantizationError(
        "A quantizer has state that we cannot place among the ranks of a sharded checkpoint.",
        [Offender(name, "is not an amax of a weight, or a per-tensor amax of an input or output")],
        "Use a config of FP8 or NVFP4 without a pre-quant scale or a bias.",
    )
