"""The one look at all weights before any is streamed: NaN, Inf, overflow, and the amaxes of the weights themselves."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from quantplug.export.pipeline.gather import Groups
from quantplug.export.pipeline.prescan import NONFINITE, OVERFLOW, ZERO_AMAX, written_rows
from quantplug.export.plan.types import ExportTask, Held
from quantplug.findings import Findings
from quantplug.formats import first_nonfinite
from quantplug.formats.scales import weight_amax
from quantplug.mappings.table import ParamKey
from quantplug.megatron.agreement import all_or_none, collective_device, lost_ranks_named

Amaxes = dict[ParamKey, torch.Tensor]


@torch.no_grad()
def current_amaxes(tasks: Sequence[ExportTask], held: Held, groups: Groups, rank: int) -> dict[ParamKey, float]:
    """max|weight| of every quantized weight that this rank holds a slice of, over all slices. A collective.

    One MAX reduction over TP, one over ETP and one over all ranks for the scale groups serve all weights. A fused
    weight (q, k and v; gate and up) is one weight, so its parts share one amax.

    Raises:
        WeightError: NaN or Inf in a weight, or a plain weight that overflows the type it is sent in.
        CalibrationError: A calibrated amax of 0 for a weight that is not zero.
    """
    mine = [task for task in tasks if task.source.key in held]
    amaxes = all_or_none(lambda: _look(mine, held, rank))
    for axis, group in groups.items():
        cut = [task.source.key for task in mine if task.source.axis is axis and task.format is not None]
        if cut:
            largest = torch.stack([amaxes[key] for key in cut]).to(collective_device())
            with lost_ranks_named():
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            amaxes.update(zip(cut, largest.unbind(), strict=True))
    keys = [task.source.key for task in mine if task.format is not None]
    values = torch.stack([amaxes[key].to(collective_device()) for key in keys]).tolist() if keys else []
    own = dict(zip(keys, values, strict=True))
    return own | _of_groups(tasks, own)


def _of_groups(tasks: Sequence[ExportTask], own: Mapping[ParamKey, float]) -> dict[ParamKey, float]:
    """The largest amax of its scale group for every weight of this rank that is in one. A collective if any is."""
    names = sorted({task.scale_group for task in tasks if task.scale_group is not None})
    if not names:
        return {}
    places = {name: place for place, name in enumerate(names)}
    members = {task.source.key: places[task.scale_group] for task in tasks if task.scale_group is not None}
    largest = [0.0] * len(names)
    for key, amax in own.items():
        if key in members:
            largest[members[key]] = max(largest[members[key]], amax)
    reduced = torch.tensor(largest, dtype=torch.float32, device=collective_device())
    if dist.is_initialized():
        with lost_ranks_named():
            dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
    maxima = reduced.tolist()
    return {key: maxima[members[key]] for key in own if key in members}


def _look(tasks: Sequence[ExportTask], held: Held, rank: int) -> Amaxes:
    """This rank's own amaxes, on the device of the weights: one synchronization for all that are fine.

    Copies are looked at too where another one is sent: a damaged copy must not go unnoticed.
    """
    if not tasks:
        return {}
    # All of them before the first is known: small results would settle between the copies of weights that are made
    # for a moment, and the heap grow with the model.
    largest = torch.zeros(len(tasks), device=held[tasks[0].source.key].load().device)
    amaxes = dict(zip((task.source.key for task in tasks), largest.unbind(), strict=True))
    for task in tasks:
        written = written_rows(task, held[task.source.key])
        if written.numel():
            amaxes[task.source.key].copy_(weight_amax(written))
    findings = Findings(rank)
    sent = [amaxes[task.source.key].to(task.dtype if task.format is None else torch.float32) for task in tasks]
    suspect = [task.amax == 0 for task in tasks]
    fine = torch.stack([amax.isfinite() for amax in sent]).tolist()
    for task, is_fine, is_suspect in zip(tasks, fine, suspect, strict=True):
        if not is_fine:
            _add_unsendable(task, written_rows(task, held[task.source.key]), findings)
        elif is_suspect and amaxes[task.source.key] > 0:
            findings.add(ZERO_AMAX, task.source.key.name, "amax is 0", task.source.key.expert)
    findings.raise_if_any()
    return amaxes


def _add_unsendable(task: ExportTask, weight: torch.Tensor, findings: Findings) -> None:
    key = task.source.key
    reason = first_nonfinite(weight)
    if reason is None:
        findings.add(OVERFLOW, key.name, f"overflows {task.dtype}", key.expert)
    else:
        findings.add(NONFINITE, key.name, reason, key.expert)
