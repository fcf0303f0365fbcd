"""AWQ (Lin et al., arXiv 2306.00978) of a Megatron model, folded: factors of channels that leave no trace in files.

Columns that meet large inputs are multiplied by s before they are rounded, and their inputs divided by it: so they get
the finer steps of their blocks. Here s is a power of two that is put into what comes before (`folds`), exactly. The
model computes what it did; what is exported is a plain checkpoint, and no server needs to know of s.

As in the paper (section 3.2) s = size^alpha, with the size of a channel's inputs, and alpha is chosen from a grid by
the error that rounding leaves. Size is the root of the second moment, and the error of a weight w that is rounded to q
is, with the second moments m of its inputs and over all rows,

    sum of m_j * (q_j - w_j)^2

that of an expert times the tokens that it saw. Alpha 0 is in the grid, so nothing is made worse by this measure.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.utils.distributed import DistributedProcessGroup
from torch import nn

from quantplug.calibration.algorithms.folds import MOST_BINADES, Fold, folds_of
from quantplug.calibration.algorithms.targets import require_data
from quantplug.calibration.inputs.linears import Linear, linears_of
from quantplug.calibration.inputs.moments import FEW_TOKENS, InputPolicy, Moments
from quantplug.calibration.inputs.plain_forward import unquantized_moments
from quantplug.calibration.inputs.sums import add_over
from quantplug.calibration.quantizers import needs_amax
from quantplug.calibration.run import ForwardLoop, max_calibrate
from quantplug.errors import Offender, UnsupportedQuantizationError
from quantplug.formats import INT4, INT4_32, NVFP4, BlockFormat
from quantplug.megatron.agreement import all_or_none, collective_device, gather_objects

METHOD = "awq_lite"


@dataclass(frozen=True)
class FoldedChannels:
    """What was done to the channels that some linears read.

    Attributes:
        name: Of the norm before them, or of the linear.
        exponents: int32 [vectors, channels of this rank]: their columns were multiplied by 2 to these. Of attention's
            output projection, channels of values, each of which several columns read.
    """

    name: str
    exponents: torch.Tensor


@torch.no_grad()
def awq_lite(
    model: nn.Module,
    forward_loop: ForwardLoop | None = None,
    alpha_step: float = 0.1,
    policy: InputPolicy | None = None,
) -> tuple[FoldedChannels, ...]:
    """Stands for ModelOpt's calibration of the same name, on Megatron models: `fold_channels`, then `max`.

    The data runs once more where inputs are quantized. A collective: all ranks must call it.

    Raises:
        CalibrationError: As `fold_channels`, or as `calibrate`.
        UnsupportedQuantizationError: As `fold_channels`.
    """
    folded = fold_channels(model, forward_loop, alpha_step, policy)
    max_calibrate(model, forward_loop if _has_inputs(model) else None)
    return folded


@torch.no_grad()
def fold_channels(
    model: nn.Module,
    forward_loop: ForwardLoop | None = None,
    alpha_step: float = 0.1,
    policy: InputPolicy | None = None,
) -> tuple[FoldedChannels, ...]:
    """Chooses factors of channels and puts them into a model, whose quantizers are calibrated afterwards.

    Weights and norms of the model are changed; what it computes is not. A collective: all ranks must call it.

    Args:
        model: A quantized Megatron model that is not calibrated yet.
        forward_loop: Runs calibration data through it; called once.
        alpha_step: Step of the grid from 0 to 1.
        policy: What is taken for the inputs of experts that saw few tokens.

    Returns:
        What was done, for what this rank holds.

    Raises:
        CalibrationError: No data, or data that does not reach a linear or is not finite.
        UnsupportedQuantizationError: A weight of another format than NVFP4 or INT4, or behind what no factor can be
            put into exactly.
    """
    require_data(forward_loop, METHOD)
    assert forward_loop is not None
    linears = linears_of(model)
    folds = all_or_none(lambda: _folds(model, linears))
    read = list({id(linear): linear for fold in folds for linear in fold.quantized}.values())
    moments = unquantized_moments(model, forward_loop, read, policy or InputPolicy())
    seen = {id(linear): found for linear, found in zip(read, moments, strict=True)}
    chosen = [_exponents(fold, seen, alpha_step) for fold in folds]
    # Readers of the files know a folded model by its norms (`verify/source/folds.py`): without any, nothing is folded.
    has_norms = any(bool(found.any()) for fold, found in zip(folds, chosen, strict=True) if fold.is_shared)
    if any(gather_objects(has_norms)):
        for fold, found in zip(folds, chosen, strict=True):
            fold.apply(found)
    else:
        chosen = [torch.zeros_like(found) for found in chosen]
    return tuple(FoldedChannels(fold.name, found) for fold, found in zip(folds, chosen, strict=True))


def _folds(model: nn.Module, linears: list[Linear]) -> list[Fold]:
    folds = folds_of(model, linears)
    offenders = [
        weight.offender("is of another format")
        for linear in linears
        for weight in linear.weights
        if weight.quantizer.is_enabled and _format(weight.quantizer) is None
    ]
    if offenders or not folds:
        raise UnsupportedQuantizationError(
            f"The algorithm {METHOD} finds factors for NVFP4 and INT4 weights.",
            offenders or [Offender("model", "has no such weight")],
            "Quantize these weights as mtq.W4A16_NVFP4_CFG or mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG does.",
        )
    return folds


def _format(quantizer: TensorQuantizer) -> BlockFormat | None:
    sizes = {axis: size for axis, size in (quantizer.block_sizes or {}).items() if isinstance(axis, int)}
    if quantizer.num_bits == (2, 1) and sizes == {-1: 16}:
        return NVFP4
    return {128: INT4, 32: INT4_32}.get(sizes.get(-1, 0)) if quantizer.num_bits == 4 and len(sizes) == 1 else None


def _has_inputs(model: nn.Module) -> bool:
    """Whether calibration needs data: something beside weights is quantized by an amax."""
    weights = {id(weight.quantizer) for linear in linears_of(model) for weight in linear.weights}
    return any(
        needs_amax(module) and id(module) not in weights
        for module in model.modules()
        if isinstance(module, TensorQuantizer)
    )


def _exponents(fold: Fold, seen: Mapping[int, Moments], step: float) -> torch.Tensor:
    """int32 [vectors, channels]. A collective over the ranks that hold parts of the fold's linears."""
    sizes = _sizes(fold, seen)
    grid = [index * step for index in range(int(1 / step + 1e-9) + 1)]
    candidates = torch.stack([_powers(sizes * alpha) for alpha in grid])
    dead = torch.stack(
        [torch.stack([_is_zero(tensor, fold.channels) for tensor in group]).all(0) for group in fold.before]
    )
    # What multiplies nothing stays: by a norm's weight of zero no reader could tell the factor.
    candidates = torch.where(dead, 0, candidates)
    of_columns = fold.spread(candidates)
    errors = sum(_errors(linear, seen[id(linear)], of_columns, fold.is_shared) for linear in fold.quantized)
    assert isinstance(errors, torch.Tensor)
    best = errors.argmin(0)
    return torch.stack([candidates[index, vector] for vector, index in enumerate(best.tolist())])


def _powers(logarithms: torch.Tensor) -> torch.Tensor:
    return logarithms.round().clamp(-MOST_BINADES, MOST_BINADES).int()


def _is_zero(tensor: torch.Tensor, channels: int) -> torch.Tensor:
    return ~tensor.detach().reshape(channels, -1).any(1)


def _sizes(fold: Fold, seen: Mapping[int, Moments]) -> torch.Tensor:
    """Binary logarithms FP64 [vectors, channels] of the channels' sizes, around a mean of 0 over all channels."""
    if fold.is_shared:
        total = torch.zeros(fold.channels, dtype=torch.float64, device=fold.linears[0].weights[0].weight.device)
        for linear in fold.quantized:
            moments = seen[id(linear)]
            total += add_over(linear.expert_group, (moments.values * _tokens(linear, moments)[:, None]).sum(0))
        squares = total[None]
    else:
        squares = fold.summed(seen[id(fold.linears[0])].values)
    # A channel that no token used is as large as the smallest that one did.
    least = torch.where(squares > 0, squares, torch.inf).amin(-1, keepdim=True)
    known = torch.where(least.isfinite(), squares.maximum(least), 1.0)
    logarithms = known.log2() / 2
    group = fold.linears[0].tensor_group if fold.linears[0].is_row_parallel else None
    sums = add_over(group, logarithms.sum(-1, keepdim=True))
    return logarithms - sums / (fold.channels * (1 if group is None else group.world_size()))


def _tokens(linear: Linear, moments: Moments) -> torch.Tensor:
    """FP64 [weights]: how much an error of each weight counts beside those of the others."""
    seen = torch.tensor([inputs.tokens for inputs in moments.inputs], dtype=torch.float64)
    return (seen + FEW_TOKENS if linear.is_routed else seen).to(moments.values.device)


def _errors(linear: Linear, moments: Moments, candidates: torch.Tensor, is_shared: bool) -> torch.Tensor:
    """FP64 [candidates, vectors]: weighted errors of a linear's weights. A collective over its ranks.

    Args:
        candidates: Exponents int32 [candidates, vectors, columns].
    """
    factors = candidates.double().exp2().float()
    # [weights, channels]: of the whole scaled weight it is the largest of its columns', without scaling any.
    largest = torch.stack([weight.weight.detach().abs().amax(0).float() for weight in linear.weights])
    amaxes = _largest_over(linear.tensor_group, (largest * factors).amax(-1))
    errors = torch.zeros(len(factors), len(linear.weights), dtype=torch.float64, device=factors.device)
    for place, weight in enumerate(linear.weights):
        packing, values = _format(weight.quantizer), weight.weight.detach()
        # A rank may hold experts that are quantized beside such that are not.
        if packing is None or not weight.quantizer.is_enabled:
            continue
        for number, by in enumerate(factors[:, place if factors.shape[1] > 1 else 0]):
            scaled = values * by.to(values)
            left = (packing.unpack(packing.pack(scaled, amaxes[number, place])) - scaled.float()) / by
            errors[number, place] = left.square().sum(0, dtype=torch.float64) @ moments.values[place]
    errors *= _tokens(linear, moments)
    if not is_shared:
        return add_over(linear.tensor_group, errors)
    return add_over(linear.expert_group, add_over(linear.tensor_group, errors.sum(1, keepdim=True)))


def _largest_over(group: DistributedProcessGroup | None, tensor: torch.Tensor) -> torch.Tensor:
    if group is None:
        return tensor
    there = tensor.to(collective_device(), copy=True)
    dist.all_reduce(there, op=dist.ReduceOp.MAX, group=group.group)
    return there.to(tensor.device)
