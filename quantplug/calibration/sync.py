"""Makes every amax that of the whole tensor it belongs to, over all ranks, in a fixed number of collectives.

All ranks first agree that they are about to reduce the same amaxes. Then each axis of the layout costs one all-reduce
of one flat FP32 bucket, whatever the number of layers and experts. Nothing is written before all ranks agree on what
came out, so that one failing rank ends all of them with one error, their quantizers as calibration left them.

FP32 holds every BF16, FP16 and FP32 amax exactly.
"""

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from modelopt.torch.quantization.nn import StaticBlockScaleQuantizer, TensorQuantizer

from quantplug.calibration.shared_amax import Axis, QuantizerRole, ReductionPlan, SharedAmax
from quantplug.errors import CalibrationError, Offender
from quantplug.megatron.agreement import all_or_none

_NONE_YET = -1.0  # Below every amax, so that the maximum over ranks passes over a rank without one.


def synchronize(plan: ReductionPlan, *, require_activations: bool) -> None:
    """Reduces every amax of a plan over the ranks that share it. A collective: all ranks must call it.

    Args:
        plan: What this rank holds.
        require_activations: Whether an activation that has an amax on no rank is an error; else it stays without.

    Raises:
        CalibrationError: An amax is missing, negative, NaN or Inf, or ranks that share amaxes hold different ones. No
            quantizer has changed.
    """
    local = all_or_none(lambda: _local_values(plan))
    _agree_on_layout(plan, local)
    reduced = _reduced(plan, local)
    all_or_none(lambda: _require_all(plan.amaxes, local, reduced, require_activations))
    for amax, value in zip(plan.amaxes, reduced, strict=True):
        _write(amax, value)
    _reduce_wholes(plan)


def _local_values(plan: ReductionPlan) -> list[torch.Tensor]:
    """For every amax the flat FP32 maximum over the quantizers that this rank has of it."""
    values, offenders = [], []
    for amax in plan.amaxes:
        found = [leaf.amax.detach().float().flatten() for leaf in amax.leaves if leaf.amax is not None]
        # All quantizers of one amax have the same shape here, as they are of one kind of module in one layer.
        value = torch.stack(found).amax(0) if found else torch.full((1,), _NONE_YET)
        # ModelOpt calibrates a weight from the weight itself, without data: one without an amax was passed over.
        if len(found) < len(amax.leaves) and amax.role is QuantizerRole.WEIGHT:
            offenders.append(_offender(amax, "has a weight, and yet no amax"))
        elif found and not bool(((value >= 0) & value.isfinite()).all()):
            offenders.append(_offender(amax, "has an amax that is not a finite number of at least zero"))
        values.append(value)
    if offenders:
        raise CalibrationError("Calibration did not give every quantizer an amax.", offenders, _REMEDY)
    return values


def _reduce_wholes(plan: ReductionPlan) -> None:
    """Makes the amax above those of static blocks that of the whole weight: a slice's own would be another scale."""
    for axis in (Axis.TENSOR, Axis.EXPERT_TENSOR):
        leaves = [
            leaf for amax in plan.amaxes if axis in amax.slices for leaf in amax.leaves if _has_scale_above_blocks(leaf)
        ]
        if axis not in plan.groups or not leaves:
            continue
        bucket = torch.stack([leaf.global_amax.float().reshape(()) for leaf in leaves]).to(_device(plan.groups[axis]))
        dist.all_reduce(bucket, op=dist.ReduceOp.MAX, group=plan.groups[axis])
        for leaf, whole in zip(leaves, bucket, strict=True):
            leaf.global_amax = whole.to(leaf.global_amax)


def _has_scale_above_blocks(leaf: TensorQuantizer) -> bool:
    """Whether it is of static NVFP4: that of INT4 has amaxes of blocks alone, of which each is on one rank."""
    return isinstance(leaf, StaticBlockScaleQuantizer) and leaf.global_amax is not None


def _agree_on_layout(plan: ReductionPlan, local: Sequence[torch.Tensor]) -> None:
    """Refuses ranks that would reduce different amaxes with each other; costs one gather of 8 bytes an axis."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return
    device = _device(None)
    # An all-reduce of buckets of different lengths hangs, or mixes amaxes that do not belong together, without a word.
    mine = torch.tensor([_digest(plan, local, axis) for axis in Axis], dtype=torch.int64, device=device)
    everyone = torch.empty(dist.get_world_size() * len(Axis), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(everyone, mine)
    all_or_none(lambda: _check_layout(plan, everyone.cpu().view(-1, len(Axis)), mine.cpu()))


def _digest(plan: ReductionPlan, local: Sequence[torch.Tensor], axis: Axis) -> int:
    """A hash of what this rank would reduce over one axis: names and sizes in order, and the ranks; 0 for nothing."""
    if axis not in plan.groups:
        return 0
    lines = [str(dist.get_process_group_ranks(plan.groups[axis]))]
    pairs = zip(plan.amaxes, local, strict=True)
    lines += [f"{amax.name} {value.numel()}" for amax, value in pairs if axis in amax.axes]
    # Seven bytes, so that the number fits a signed 64-bit integer whatever its first bit is.
    return int.from_bytes(hashlib.blake2b("\n".join(lines).encode(), digest_size=7).digest(), "big")


def _check_layout(plan: ReductionPlan, everyone: torch.Tensor, mine: torch.Tensor) -> None:
    offenders = []
    for axis, group in plan.groups.items():
        others = [rank for rank in dist.get_process_group_ranks(group) if everyone[rank, axis] != mine[axis]]
        if others:
            name = axis.name.lower().replace("_", " ")
            offenders.append(Offender(f"{name} parallel ranks", f"differs from ranks {others}"))
    if offenders:
        raise CalibrationError(
            "Ranks that share amaxes hold different quantizers.", offenders, "Quantize with one config on all ranks."
        )


def _reduced(plan: ReductionPlan, local: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    values = list(local)
    # Every rank goes through the axes in the same order, so that no two wait for each other in different groups.
    for axis in Axis:
        members = [index for index, amax in enumerate(plan.amaxes) if axis in amax.axes]
        if axis not in plan.groups or not members:
            continue
        device = _device(plan.groups[axis])
        bucket = torch.cat([values[index].to(device) for index in members])
        dist.all_reduce(bucket, op=dist.ReduceOp.MAX, group=plan.groups[axis])
        parts = bucket.split([values[index].numel() for index in members])
        for index, part in zip(members, parts, strict=True):
            # The next axis reduces what this one gave, which makes the maximum over the product of both.
            values[index] = part
    return values


def _require_all(
    amaxes: Sequence[SharedAmax], local: Sequence[torch.Tensor], reduced: Sequence[torch.Tensor], activations: bool
) -> None:
    offenders = []
    for amax, before, after in zip(amaxes, local, reduced, strict=True):
        # Still the mark of none yet: no rank had one.
        if bool((after < 0).any()):
            if activations:
                offenders.append(_offender(amax, "saw no data on any rank"))
        # A dense layer runs on all ranks or on none: the forward loop has not run everywhere. Of experts it is no
        # surprise.
        elif bool((before < 0).any()) and amax.role is QuantizerRole.ACTIVATION:
            offenders.append(_offender(amax, "saw no data on this rank, but on others"))
    if offenders:
        raise CalibrationError("Calibration did not give every quantizer an amax.", offenders, _REMEDY)


def _write(amax: SharedAmax, value: torch.Tensor) -> None:
    if bool((value < 0).any()):
        return
    # A quantizer that had none takes the shape of its peers; without any on this rank the amax is of the whole tensor,
    # [].
    shape = next((leaf.amax.shape for leaf in amax.leaves if leaf.amax is not None), torch.Size())
    for leaf in amax.leaves:
        known = leaf.amax
        dtype = amax.dtype if known is None else known.dtype
        leaf.amax = value.view(shape).to(dtype=dtype, device=value.device if known is None else known.device)


def _offender(amax: SharedAmax, reason: str) -> Offender:
    return Offender(amax.name.partition(".")[2], reason)


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where the collectives of a group work."""
    return torch.device("cuda") if dist.get_backend(group) == dist.Backend.NCCL else torch.device("cpu")


_REMEDY = "Run the forward loop on every rank, over data that reaches every module."
