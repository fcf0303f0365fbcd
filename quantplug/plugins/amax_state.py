"""The shape of a weight quantizer's amax: what a weight needs, and how tensor parallelism shards it.

The shapes are ModelOpt's: [] per tensor (FP8, and NVFP4 whose block scales are dynamic); [N, 1] per output channel;
[N/b, 1, K/b, 1] for blocks of b x b (FP8 with 128 x 128 blocks), the last block of an axis padded with zeros.
"""

import copy
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import torch
from modelopt.torch.quantization.nn import StaticBlockScaleQuantizer, TensorQuantizer
from torch import nn

from quantplug.errors import Offender, ShapeError, UnsupportedQuantizationError


class ShardDim(IntEnum):
    """The dimension of a weight [out_features, in_features] that tensor parallelism shards."""

    OUT = 0
    IN = 1


def leaf_quantizers(quantizer: nn.Module) -> Iterator[TensorQuantizer]:
    """The tensor quantizers in one quantizer: itself, or the members of a sequential one."""
    return (module for module in quantizer.modules() if isinstance(module, TensorQuantizer))


def required_amax_shape(quantizer: TensorQuantizer, weight: torch.Tensor) -> torch.Size:
    """The shape that calibrating `quantizer` on `weight` [N, K] gives its amax; no data is read."""
    # ModelOpt's own calibration, run on a tensor without data, is the only rule of shapes: ours would be a second one.
    probe = copy.deepcopy(quantizer)
    probe.reset_amax()
    probe.enable()
    probe.enable_calib()
    # Fake quantization would need kernels, which meta tensors have none of.
    probe.disable_quant()
    probe(torch.empty_like(weight, device="meta"))
    probe.load_calib_amax()
    # The buffer, not the property: of MX formats ModelOpt's calibration keeps one, which its property does not show.
    return probe.state_dict()["_amax"].shape


def fit_restored_amax(quantizer: nn.Module, weight: torch.Tensor) -> None:
    """Makes every restored amax fit `weight` [N, K], as far as shape and device go.

    A restore brings the shapes of the run that saved; the tensor parallel size may have changed since. An amax that
    fits keeps its values. One that does not gets a placeholder of the right shape for `load_state_dict` to fill: NaN,
    so that one that is never filled cannot pass for calibrated.
    """
    for leaf in leaf_quantizers(quantizer):
        leaf.to(weight.device)
        amax = leaf.state_dict().get("_amax")
        if amax is None:
            continue
        # Never cut or spread what is there: only the checkpoint knows which values belong to this rank's shard.
        shape = required_amax_shape(leaf, weight)
        if amax.shape != shape:
            leaf.register_buffer("_amax", torch.full(shape, torch.nan, dtype=amax.dtype, device=weight.device))


def as_blocks(quantizer: nn.Module, amax: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The amaxes of static NVFP4 blocks as [N, blocks of a row], which shards as its weight [N, K] does; others as is.

    ModelOpt lists them, [blocks, 1], row by row: cut by columns, a list has no shards.
    """
    if not isinstance(quantizer, StaticBlockScaleQuantizer) or not quantizer.is_nvfp4_static or amax.ndim != 2:
        return amax
    return amax.reshape(weight.shape[0], -1) if amax.shape[1] == 1 and amax.shape[0] % weight.shape[0] == 0 else amax


def list_blocks(state: dict[str, Any], name: str, quantizer: nn.Module) -> None:
    """Undoes `as_blocks` in what is loaded into a quantizer, under the name that its amax has there."""
    amax = state.get(name)
    if isinstance(amax, torch.Tensor) and isinstance(quantizer, StaticBlockScaleQuantizer) and amax.ndim == 2:
        state[name] = amax.reshape(-1, 1)


def shard_axis(
    name: str, quantizer: TensorQuantizer, amax: torch.Tensor, weight: torch.Tensor, shard_dim: ShardDim, size: int
) -> int | None:
    """The axis along which `amax` of a local weight [N, K] is sharded over `size` ranks; None: it is replicated.

    Raises:
        ShapeError: Blocks straddle the shards: every rank's amax is of other blocks than the whole weight's.
        UnsupportedQuantizationError: The amax has a shape whose shards we cannot place.
    """
    if amax.numel() == 1 and amax.ndim <= 1:
        return None
    if isinstance(quantizer, StaticBlockScaleQuantizer) and quantizer.is_nvfp4_static:
        # As `as_blocks` has them.
        if size > 1:
            require_whole_blocks(name, quantizer, weight.shape[shard_dim], shard_dim)
        return int(shard_dim)
    # [N/b, 1, K/b, 1]: axis 0 goes with the weight's rows, axis 2 with its columns.
    if amax.ndim == 4:
        if size > 1:
            require_whole_blocks(name, quantizer, weight.shape[shard_dim], shard_dim)
        return 2 * shard_dim
    # One a row. Where columns are sharded every rank has all rows, and the amaxes have been reduced over the ranks.
    if amax.shape == (weight.shape[0], 1):
        return 0 if shard_dim is ShardDim.OUT else None
    if size > 1:
        raise UnsupportedQuantizationError(
            "This amax cannot be placed among its tensor parallel shards.",
            [Offender(name, f"amax of shape {tuple(amax.shape)} for a local weight {tuple(weight.shape)}")],
            "Use per-tensor, per-channel or two-dimensional block scales, or no tensor parallelism for this weight.",
        )
    return None


def require_whole_blocks(name: str, quantizer: TensorQuantizer, features: int, shard_dim: ShardDim) -> None:
    """Refuses a shard of `features` rows or columns that does not hold a whole number of blocks.

    Raises:
        ShapeError: Names the amax, the size and its divisor.
    """
    block = block_size(quantizer, shard_dim)
    if features % block:
        raise ShapeError(
            "Scale blocks straddle tensor parallel shards; their amax has no place in a checkpoint of any topology.",
            [Offender(name, f"a shard of {features} features does not divide by the block size {block}")],
            "Use a (expert) tensor parallel size whose shards divide, or a per-tensor format.",
        )


def block_size(quantizer: TensorQuantizer, dim: ShardDim) -> int:
    """Block size along one dimension of a weight [N, K]; ModelOpt counts dimensions from either end."""
    sizes = quantizer.block_sizes
    # Blocks of a row, as NVFP4's, have no size along the other dimension: any rows are whole.
    return int(sizes.get(dim - 2) or sizes.get(int(dim)) or 1)
