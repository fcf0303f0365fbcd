"""Whose amaxes scales are made of: those of calibration, or those of the weights as they are now."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from quantplug.choices import WeightAmax as WeightAmax
from quantplug.export.pipeline.gather import Groups
from quantplug.export.plan.types import ExportTask
from quantplug.findings import choice_named
from quantplug.mappings.keys import ParamKey
from quantplug.megatron.agreement import collective_device, lost_ranks_named

GROWTH = 2**-7
"""How far a weight may lie above its calibrated amax, relative to it, and still be the weight that was calibrated.

One unit in the last place of BF16, which has 8 significant bits: a weight, or the amax itself, that was rounded to BF16
after calibration moves by at most half of one. Clipping by that much is below the rounding of E4M3 and E2M1 (2^-4 and
2^-2 of a value).
"""


def weight_amax_policy(name: str) -> WeightAmax:
    """One of the policies by its name.

    Raises:
        ArgumentError: There is none of this name.
    """
    return choice_named(WeightAmax, name, "amax", "There is no such way to take the amaxes of weights.")


def has_grown(task: ExportTask, amax: float) -> bool:
    """Whether scales that are made of a weight's calibrated amax would clip it, beyond what rounding explains.

    Formats whose scales are all made of the blocks that they belong to clip nothing.
    """
    calibrated = task.amax
    return calibrated is not None and amax > calibrated * _reach(task) * (1 + GROWTH) and _has_scale_of_whole(task)


def _reach(task: ExportTask) -> float:
    """How many times its amax a weight may have: scales of blocks that are given may go up to the type's largest.

    An algorithm that changes weights as it quantizes them may put a value where the largest scale has its largest code.
    """
    if task.scheme is None or task.source.weight is None or not task.has_given_scales:
        return 1.0
    plain = task.scheme.weight.encoding
    return plain.largest / plain.searched(task.source.weight.search).largest


def _has_scale_of_whole(task: ExportTask) -> bool:
    """Whether any of a weight's tensors is a scale of all of it, which is one without axes.

    NVFP4 and FP8 have one, made of the calibrated amax. FP8 in blocks has none: every scale is made of its block as it
    is packed.
    """
    packed = (part for part in task.outputs if part.format is not None)
    return any(not spec.shape for part in packed if part.format for spec in part.format.outputs(part.shape))


def amaxes_of_wholes(
    tasks: Sequence[ExportTask], own: Mapping[ParamKey, float], groups: Groups
) -> dict[ParamKey, float]:
    """max|weight| of every quantized weight of which this rank holds a slice, over all slices. A collective.

    One MAX reduction over TP, one over ETP and one over all ranks for the scale groups serve all weights. A fused
    weight (q, k and v; gate and up) is one weight, so its parts share one amax.

    Args:
        tasks: All of the plan, on every rank in the same order.
        own: The amax of what this rank has of each of its weights.
    """
    mine = [task for task in tasks if task.source.key in own and task.format is not None]
    amaxes = {task.source.key: own[task.source.key] for task in mine}
    for axis, group in groups.items():
        # All ranks of a group hold slices of the same weights, and list them in the plan's order: their vectors are of
        # one length, each place being one weight, and either all of them call the collective or none does.
        cut = [task.source.key for task in mine if task.source.axis is axis]
        if cut:
            largest = torch.tensor([amaxes[key] for key in cut], dtype=torch.float32, device=collective_device())
            with lost_ranks_named():
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            amaxes.update(zip(cut, largest.tolist(), strict=True))
    return amaxes | _of_groups(tasks, amaxes)


def _of_groups(tasks: Sequence[ExportTask], own: Mapping[ParamKey, float]) -> dict[ParamKey, float]:
    """The largest amax of its scale group for every weight of this rank that is in one. A collective if any is."""
    # From the tasks of the whole plan, also of weights that this rank does not hold: every rank must come to the same
    # names in the same order, as the collective is one of all ranks.
    names = sorted({task.scale_group for task in tasks if task.scale_group is not None})
    if not names:
        return {}
    places = {name: place for place, name in enumerate(names)}
    members = {task.source.key: places[task.scale_group] for task in tasks if task.scale_group is not None}
    # Neutral for the maximum, as no amax is negative.
    largest = [0.0] * len(names)
    for key, amax in own.items():
        if key in members:
            largest[members[key]] = max(largest[members[key]], amax)
    if dist.is_initialized():
        reduced = torch.tensor(largest, dtype=torch.float32, device=collective_device())
        with lost_ranks_named():
            dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
        largest = reduced.tolist()
    return {key: largest[members[key]] for key in own if key in members}
