"""Dense Megatron layers: ModelOpt's wrappers, corrected where their groups or their sharding of scales are wrong.

ModelOpt 0.47 and 0.48 take any amax that a tensor parallel rank has as a shard of the whole weight's, in rank order.
That is so for a per-tensor amax (it is reduced over the ranks), and for one of blocks or channels where every shard
holds whole blocks. It is not where a block straddles two shards, nor in a gated MLP's first layer and the projection of
a gated delta net: there each rank has rows of every part, one above the other.

They also take the whole world for the data parallel group of a linear layer that tensor parallelism leaves whole
(TELinear): its amax would be reduced over pipeline stages, which hold other layers.

They restore amaxes in the dtype of the weight: FP32 ones of inputs would be rounded to BF16 when they are loaded.

They save the sinks of an attention (`softmax_offset`, one a head) as if every tensor parallel rank had the same: loaded
again, all ranks get the first one's.

And they give quantizers of keys and values to Transformer Engine's attention alone, so that a KV cache could not be
calibrated through Megatron-Core's own modules, which run without a GPU.

This is the one file that names ModelOpt's private classes, with `modelopt_names` beside it.
"""

from typing import Any, ClassVar

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TELinear,
    TERowParallelLinear,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from modelopt.torch.quantization.plugins.megatron import (
    _MegatronColumnParallelLinear,
    _MegatronRowParallelLinear,
    _QuantTELayerNormColumnParallelLinear,
    _QuantTEMCoreColumnParallelLinear,
    _QuantTEMCoreLinear,
    _QuantTEMCoreRowParallelLinear,
    quant_module_get_extra_state,
    quant_module_set_extra_state,
)
from modelopt.torch.utils.distributed import ParallelState
from torch import nn

from quantplug.errors import Offender, UnsupportedQuantizationError
from quantplug.plugins.amax_state import ShardDim, leaf_quantizers, shard_axis
from quantplug.plugins.modelopt_names import QuantCoreAttention

Offsets = tuple[tuple[int, int, int], ...]


class KeepsTypes(QuantModule):
    """Mixin over a ModelOpt wrapper: a restored amax keeps the dtype that it was saved in."""

    def modelopt_post_restore(self, prefix: str = "") -> None:
        """ModelOpt's own, which calibrates anew on zeros in the weight's dtype, to which a load would round FP32."""
        dtypes = {leaf: leaf.amax.dtype for leaf in leaf_quantizers(self) if leaf.amax is not None}
        super().modelopt_post_restore(prefix)
        for leaf, dtype in dtypes.items():
            # Not through the property, which copies into the buffer that is there.
            if leaf.amax is not None:
                leaf.register_buffer("_amax", leaf.amax.to(dtype))


class RefusesWrongShards(KeepsTypes):
    """Mixin over a ModelOpt wrapper: refuses to place an amax among shards where ModelOpt would place it wrong."""

    # Column parallel layers shard their rows, row parallel ones their columns.
    shard_dim: ClassVar[ShardDim]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """ModelOpt's own.

        Raises:
            ShapeError: Scale blocks straddle tensor parallel shards.
            UnsupportedQuantizationError: The amax is of rows of several parts, or of a shape whose shards we cannot
                place.
        """
        # One rank holds the whole weight, and no part of it can be placed wrong.
        size = self.parallel_state.tensor_parallel_group.world_size()
        if size > 1:
            for leaf in leaf_quantizers(self.weight_quantizer):
                # A quantizer that is off, or not calibrated yet, has no amax that could be placed wrong.
                if leaf.is_enabled and leaf.amax is not None:
                    name = f"{prefix}weight_quantizer._amax"
                    _refuse_static(name, leaf)
                    axis = shard_axis(name, leaf, leaf.amax, self.weight, self.shard_dim, size)
                    self._refuse_parts(name, axis)
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)

    def _refuse_parts(self, name: str, axis: int | None) -> None:
        # Only by name and config: the weight does not say what its rows are. An axis other than 0 cuts columns.
        parts = {".linear_fc1.": "gate rows above its up rows"} if self.config.gated_linear_unit else {}
        parts[".in_proj."] = "rows of all that a recurrent mixer projects to, one part above the other"
        found = [rows for linear, rows in parts.items() if linear in f".{name}"]
        if axis == 0 and found:
            raise UnsupportedQuantizationError(
                "The scales of a linear of several parts have no place in a checkpoint of any tensor parallel size.",
                [Offender(name, f"has this rank's {found[0]}")],
                "Use a per-tensor format, or no tensor parallelism.",
            )


def _refuse_static(name: str, leaf: TensorQuantizer) -> None:
    # ModelOpt places them by the axis that it has noted where it cut a weight into blocks itself, as it does before a
    # load. Without one it saves the amaxes of static blocks as if every rank had the same.
    if leaf.is_nvfp4_static and not isinstance(leaf.axis, tuple):
        raise UnsupportedQuantizationError(
            "Static NVFP4 blocks of dense linears are not saved with tensor parallelism.",
            [Offender(name, "has amaxes of the blocks of this rank's slice")],
            "Export the live model, which needs no checkpoint; or calibrate and save without tensor parallelism.",
        )


class QuantColumnParallelLinear(RefusesWrongShards, _MegatronColumnParallelLinear):
    """ModelOpt's quantized ColumnParallelLinear, of Megatron's local layers."""

    shard_dim = ShardDim.OUT


class QuantRowParallelLinear(RefusesWrongShards, _MegatronRowParallelLinear):
    """ModelOpt's quantized RowParallelLinear, of Megatron's local layers."""

    shard_dim = ShardDim.IN


class QuantTEColumnParallelLinear(RefusesWrongShards, _QuantTEMCoreColumnParallelLinear):
    """ModelOpt's quantized TEColumnParallelLinear."""

    shard_dim = ShardDim.OUT


class QuantTELayerNormColumnParallelLinear(RefusesWrongShards, _QuantTELayerNormColumnParallelLinear):
    """ModelOpt's quantized TELayerNormColumnParallelLinear."""

    shard_dim = ShardDim.OUT


class QuantTERowParallelLinear(RefusesWrongShards, _QuantTEMCoreRowParallelLinear):
    """ModelOpt's quantized TERowParallelLinear."""

    shard_dim = ShardDim.IN


class QuantTELinear(KeepsTypes, _QuantTEMCoreLinear):
    """ModelOpt's quantized TELinear, with the groups of its own layer."""

    def _setup(self) -> None:
        # ModelOpt takes the world for the group of every module whose set-up has left none.
        self.parallel_state = ParallelState(
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_tensor_model_parallel_group(),
        )
        super()._setup()


class ShardsSinks(QuantCoreAttention):
    """ModelOpt's quantizers of an attention's queries, keys and values, with sinks sharded as Megatron shards them."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """The sinks, one a head of this rank, and the amaxes of q, k and v, which all ranks have alike."""
        # Axis 0 of the sinks is sharded; every other tensor has no axis here, and is saved as replicated.
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.parallel_state.tensor_parallel_group.group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


class QuantTEDotProductAttention(ShardsSinks):
    """ModelOpt's quantized TEDotProductAttention."""


class QuantDotProductAttention(ShardsSinks):
    """Megatron-Core's own attention, with the quantizers that Transformer Engine's has, after rotation too."""

    def _setup(self) -> None:
        super()._setup()
        # Off until a rule or a checkpoint says otherwise: checkpoints of this class from elsewhere say nothing of them.
        for quantizer in (self.q_bmm_quantizer, self.k_bmm_quantizer, self.v_bmm_quantizer):
            quantizer.disable()

    # Torch puts extra states into a state dict of classes alone that have these two, as Transformer Engine's has.
    def get_extra_state(self) -> dict[str, Any]:
        """The settings of the quantizers, as ModelOpt keeps them."""
        return quant_module_get_extra_state(self)

    def set_extra_state(self, state: Any) -> None:
        """Takes settings up again."""
        quant_module_set_extra_state(self, state)


DENSE_WRAPPERS: dict[type[nn.Module], tuple[str, type[QuantModule]]] = {
    ColumnParallelLinear: ("megatron_ColumnParallelLinear", QuantColumnParallelLinear),
    RowParallelLinear: ("megatron_RowParallelLinear", QuantRowParallelLinear),
    TEColumnParallelLinear: ("te_mcore_ColumnParallelLinear", QuantTEColumnParallelLinear),
    TELayerNormColumnParallelLinear: (
        "te_mcore_LayerNormColumnParallelLinear",
        QuantTELayerNormColumnParallelLinear,
    ),
    TERowParallelLinear: ("te_mcore_RowParallelLinear", QuantTERowParallelLinear),
    TELinear: ("te_mcore_Linear", QuantTELinear),
    TEDotProductAttention: ("TEDotProductAttention", QuantTEDotProductAttention),
    DotProductAttention: ("megatron_DotProductAttention", QuantDotProductAttention),
}
